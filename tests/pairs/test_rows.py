"""Rows: every layout and file format, ties, ranked candidates, and one-line errors for bad ones."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastpref.pairs.rows import BadRow, Rows, read_rows

PLAIN = [
    {"prompt": "a red disc", "chosen": "a.mp4", "rejected": "b.mp4", "weight": 2.0},
    {"prompt": "ein grüner Kreis", "chosen": "b.mp4", "rejected": "clips/c.mp4", "weight": 0.5},
]
PICK = {"caption": "x", "jpg_0": "a.mp4", "jpg_1": "b.mp4"}


@pytest.fixture
def folder(tmp_path):
    """A data folder with three files that stand for clips (nothing here decodes them)."""
    root = tmp_path / "data"
    (root / "clips").mkdir(parents=True)
    for name in ("a.mp4", "b.mp4", "clips/c.mp4"):
        (root / name).write_bytes(name.encode())
    return root


def save(path: Path, rows: list[dict]) -> Path:
    """Writes rows as the suffix says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def only_bad(data: Path, **options) -> BadRow:
    """The one bad row of `data`."""
    (bad,) = [row for row in Rows(data, **options) if isinstance(row, BadRow)]
    assert "\n" not in str(bad)
    return bad


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("named", ["folder", "file"])
def test_plain_pairs(suffix, named, folder):
    path = save(folder / f"metadata.{suffix}", PLAIN)
    rows = read_rows(folder if named == "folder" else path)
    assert [row.prompt for row in rows] == ["a red disc", "ein grüner Kreis"]
    assert [row.weight for row in rows] == [2.0, 0.5]
    assert rows[1].rejected == folder.resolve() / "clips" / "c.mp4"
    assert rows[0].score_chosen is None and rows[0].negative_prompt is None
    place = {"jsonl": "line 2", "csv": "line 3", "parquet": "row 2"}[suffix]  # csv: a header
    assert rows[1].where == f"metadata.{suffix} {place}"


def test_optional_columns_and_byte_order_mark(folder):
    text = "prompt,chosen,rejected,score_chosen,score_rejected,negative_prompt\n"
    text += 'x,a.mp4,b.mp4,0.9,0.1,"blurry, dark"\ny,a.mp4,b.mp4,,,\n'
    (folder / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    first, second = read_rows(folder)
    assert (first.score_chosen, first.score_rejected) == (0.9, 0.1)
    assert first.negative_prompt == "blurry, dark" and first.weight == 1.0
    assert second.score_chosen is None and second.negative_prompt is None


def test_equal_scores_are_ties(folder):
    scores = [(1, 1), (2, 1), (0.5, 0.5)]
    save(
        folder / "metadata.jsonl",
        [{**PLAIN[0], "score_chosen": a, "score_rejected": b} for a, b in scores],
    )
    rows = Rows(folder)
    assert [row.score_chosen for row in rows] == [2.0]
    assert (rows.ties, rows.records, rows.total) == (2, 3, 3)
    assert len(list(rows)) == 1 and rows.ties == 2  # counted anew, not twice


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_pick_a_pic(suffix, tmp_path):
    """Bytes in parquet; label_0 1: the first image wins, 0: the second, 0.5: a tie."""
    labels = [1.0, 0.0, 0.5]
    if suffix == "parquet":
        media = [(f"A{i}".encode(), f"B{i}".encode()) for i in range(3)]
    else:
        media = [(f"A{i}", f"B{i}") for i in range(3)]
        for name in sum(media, ()):
            (tmp_path / name).write_bytes(name.encode())
    save(
        tmp_path / f"metadata.{suffix}",
        [
            {"caption": f"cat {i}", "jpg_0": a, "jpg_1": b, "label_0": label, "label_1": 1 - label}
            for i, ((a, b), label) in enumerate(zip(media, labels, strict=True))
        ],
    )
    rows = Rows(tmp_path)
    pairs = list(rows)
    content = [
        [m if isinstance(m, bytes) else m.read_bytes() for m in (p.chosen, p.rejected)]
        for p in pairs
    ]
    assert content == [[b"A0", b"B0"], [b"B1", b"A1"]]
    assert [p.prompt for p in pairs] == ["cat 0", "cat 1"] and rows.ties == 1


@pytest.mark.parametrize("has", [False, "False", 0, 0.0, "no"])
def test_unlabelled_pick_a_pic_rows_are_bad(has, tmp_path):
    row = {"caption": "cat", "jpg_0": b"A", "jpg_1": b"B", "label_0": 1.0, "has_label": has}
    save(tmp_path / "metadata.parquet", [row])
    assert (only_bad(tmp_path).kind, only_bad(tmp_path).field) == ("unknown_label", "has_label")


@pytest.mark.parametrize("has", [True, "True", 1, 1.0, None])
def test_labelled_pick_a_pic_rows_are_good(has, tmp_path):
    row = {"caption": "cat", "jpg_0": b"A", "jpg_1": b"B", "label_0": 1.0, "has_label": has}
    save(tmp_path / "metadata.parquet", [row])
    assert read_rows(tmp_path)[0].chosen == b"A"


def test_winner_column(folder):
    winners = ["a", "video_b", "B", "tie", "Tie "]
    save(
        folder / "metadata.csv",
        [{"prompt": w, "video_a": "a.mp4", "video_b": "b.mp4", "winner": w} for w in winners],
    )
    rows = Rows(folder)
    assert [row.chosen.name for row in rows] == ["a.mp4", "b.mp4", "b.mp4"] and rows.ties == 2


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_ranked_candidates(suffix, folder):
    names, scores = ["a.mp4", "b.mp4", "clips/c.mp4"], [0.1, 0.9, 0.5]
    if suffix == "csv":
        names, scores = json.dumps(names), json.dumps(scores)
    save(folder / f"metadata.{suffix}", [{"prompt": "x", "candidates": names, "scores": scores}])
    pairs = [(row.chosen.name, row.rejected.name) for row in Rows(folder)]
    assert pairs == [("b.mp4", "c.mp4"), ("b.mp4", "a.mp4"), ("c.mp4", "a.mp4")]
    (best,) = Rows(folder, ranked="best_worst")
    assert (best.chosen.name, best.rejected.name) == ("b.mp4", "a.mp4")
    assert (best.score_chosen, best.score_rejected) == (0.9, 0.1)


def test_candidates_without_scores_are_best_first_and_equal_scores_tie(folder):
    names = ["clips/c.mp4", "a.mp4", "b.mp4"]
    save(folder / "metadata.jsonl", [{"prompt": "x", "candidates": names}])
    assert [r.chosen.name for r in Rows(folder)] == ["c.mp4", "c.mp4", "a.mp4"]
    row = {"prompt": "x", "candidates": names, "scores": [1, 1, 0]}
    save(folder / "metadata.jsonl", [row])
    rows = Rows(folder)
    assert [r.rejected.name for r in rows] == ["b.mp4", "b.mp4"] and rows.ties == 1


def latin(*texts: str) -> pa.Array:
    """A string column whose texts are Latin-1, which most of Arrow does not check."""
    raw = [text.encode("latin-1") for text in texts]
    ends = pa.array(list(itertools.accumulate(map(len, raw), initial=0)), pa.int32())
    return pa.StringArray.from_buffers(len(raw), ends.buffers()[1], pa.py_buffer(b"".join(raw)))


def store(datasets: ModuleType, stored: Any, folder: Path, kind: str) -> Path:
    """A Hugging Face dataset as its own folder (saved) or as one of parquet shards."""
    if kind == "saved":
        datasets.DatasetDict({"train": stored}).save_to_disk(folder)
    else:
        (folder / "data").mkdir(parents=True)
        pq.write_table(stored.data.table, folder / "data" / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture
def datasets(monkeypatch) -> ModuleType:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("datasets")


@pytest.mark.parametrize("kind", ["shards", "saved"])
def test_hugging_face_datasets(kind, datasets, tmp_path):
    """Image features are kept as bytes; a prompt that is not UTF-8 costs its own row alone."""
    from PIL import Image

    pictures = [Image.new("RGB", (4, 4), (40 * i, 0, 0)) for i in range(3)]
    columns = {"chosen": pictures, "rejected": pictures[::-1]}
    features = datasets.Features({name: datasets.Image() for name in columns})
    images = datasets.Dataset.from_dict(columns, features=features).data.table
    table = images.append_column("prompt", latin("x", "caf\u00e9", "z"))
    features["prompt"] = datasets.Value("string")
    stored = datasets.Dataset(table.cast(features.arrow_schema))
    path = store(datasets, stored, tmp_path / "set", kind)
    first, bad, last = Rows(path)
    assert (first.prompt, last.prompt) == ("x", "z") and last.where.endswith("row 3")
    assert all(row.chosen[:4] == b"\x89PNG" for row in (first, last))
    assert (bad.kind, bad.field) == ("not_utf8", "prompt") and bad.where.endswith("row 2")
    with pytest.raises(ValueError, match=r"\(.*test.*train.*\)$"):
        Rows(path, split="test")


@pytest.mark.parametrize("kind", ["shards", "saved"])
def test_candidates_of_a_hugging_face_dataset(kind, datasets, tmp_path):
    """Images inside a list are bytes too."""
    from PIL import Image

    pictures = [[Image.new("RGB", (4, 4), (40 * i, 0, 0)) for i in range(3)]]
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "candidates": datasets.List(datasets.Image())}
    )
    columns = {"prompt": ["x"], "candidates": pictures}
    stored = datasets.Dataset.from_dict(columns, features=features)
    pairs = read_rows(store(datasets, stored, tmp_path / "set", kind))
    assert len(pairs) == 3 and all(row.rejected[:4] == b"\x89PNG" for row in pairs)


def test_candidates_that_are_not_utf8(folder):
    lists = pa.ListArray.from_arrays([0, 2, 4], latin("a.mp4", "b.mp4", "caf\u00e9.mp4", "b.mp4"))
    table = pa.table({"prompt": ["x", "y"], "candidates": lists})
    pq.write_table(table, folder / "metadata.parquet")
    row, bad = Rows(folder)
    assert row.prompt == "x" and (bad.kind, bad.field) == ("not_utf8", "candidates")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_missing_column(suffix, folder):
    save(folder / f"metadata.{suffix}", [{"prompt": "x", "chosen": "a.mp4"}])
    message = (
        f"metadata.{suffix}: missing column 'rejected'; "
        "expected prompt, chosen, rejected, found prompt, chosen"
    )
    with pytest.raises(ValueError) as error:
        Rows(folder)
    assert str(error.value) == message


def test_columns_of_no_layout(folder):
    save(folder / "metadata.csv", [{"text": "x", "good": "a.mp4"}])
    with pytest.raises(
        ValueError, match=r"missing column 'prompt', 'chosen', 'rejected'; .*found text, good"
    ):
        Rows(folder)


@pytest.mark.parametrize(
    "column, value, kind, said",
    [
        ("chosen", "none.mp4", "missing_file", "'none.mp4' is not a file in"),
        ("chosen", "clips", "missing_file", "'clips' is not a file in"),
        ("rejected", "", "missing_value", "is empty"),
        ("rejected", 7, "missing_value", "expected a text, got int"),
        ("prompt", None, "missing_value", "is empty; expected a text"),
        ("chosen", "../outside.mp4", "outside", "relative to the data folder"),
        ("chosen", "clips/../../outside.mp4", "outside", "relative to the data folder"),
        ("chosen", "clips/../a.mp4", "outside", "relative to the data folder"),
        ("chosen", "/etc/hostname", "outside", "relative to the data folder"),
        ("chosen", "link.mp4", "outside", "a link that leaves the data folder"),
        ("chosen", "linked/outside.mp4", "outside", "a link that leaves the data folder"),
        ("chosen", "loop", "missing_file", "is not a file"),
        ("chosen", "a\0.mp4", "missing_file", "is not a file"),
        ("chosen", "a" * 5000, "missing_file", "is not a file"),
        ("weight", "heavy", "not_a_number", "expected a finite number, got 'heavy'"),
        ("weight", -1, "not_a_number", "expected 0 or more, got -1"),
        ("score_chosen", "nan", "not_a_number", "expected a finite number"),
    ],
)
def test_bad_fields(column, value, kind, said, folder):
    (folder.parent / "outside.mp4").write_bytes(b"x")
    (folder / "link.mp4").symlink_to("../outside.mp4")
    (folder / "linked").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    save(folder / "metadata.jsonl", [PLAIN[0], {**PLAIN[1], column: value}])
    bad = only_bad(folder)
    assert (bad.kind, bad.field, bad.where) == (kind, column, "metadata.jsonl line 2")
    assert said in str(bad) and str(bad).startswith(f"metadata.jsonl line 2, {column}: ")
    with pytest.raises(ValueError, match=r"metadata.jsonl line 2"):
        read_rows(folder)


def test_a_link_inside_the_folder_is_fine(folder):
    (folder / "link.mp4").symlink_to("clips/c.mp4")
    save(folder / "metadata.jsonl", [{**PLAIN[0], "chosen": "link.mp4"}])
    assert read_rows(folder)[0].chosen == folder.resolve() / "clips" / "c.mp4"


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_prompts_that_are_not_utf8(suffix, folder):
    path = folder / f"metadata.{suffix}"
    text = "caf\u00e9".encode("latin-1")
    if suffix == "jsonl":
        path.write_bytes(b'{"prompt": "' + text + b'", "chosen": "a.mp4", "rejected": "b.mp4"}\n')
    elif suffix == "csv":
        path.write_bytes(b"prompt,chosen,rejected\n" + text + b",a.mp4,b.mp4\n")
    else:
        table = pa.table({"prompt": latin("caf\u00e9"), "chosen": ["a.mp4"], "rejected": ["b.mp4"]})
        pq.write_table(table, path)
    bad = only_bad(folder)
    assert (bad.kind, bad.field) == ("not_utf8", "prompt") and "UTF-8" in str(bad)


@pytest.mark.parametrize("line", ["{not json", "[1, 2]", '"text"', "[" * 100000])
def test_lines_that_are_no_record(line, folder):
    path = save(folder / "metadata.jsonl", PLAIN)
    path.write_text(path.read_text() + line + "\n")
    bad = only_bad(folder)
    assert (bad.kind, bad.where) == ("no_record", "metadata.jsonl line 3")


def test_a_comma_without_quotes_is_one_bad_row(folder):
    text = "prompt,chosen,rejected\na fox, jumping,a.mp4,b.mp4\n\ny,a.mp4,b.mp4\n"
    (folder / "metadata.csv").write_text(text)
    bad, row = Rows(folder)
    assert str(bad).startswith("metadata.csv line 2, line: expected 3 columns, got 4; put quotes")
    assert bad.kind == "no_record" and row.where == "metadata.csv line 4"


@pytest.mark.parametrize("rest", ["z,a.mp4,b.mp4\n", '"z",a.mp4,b.mp4\n'])
def test_an_open_quote_is_named_where_its_record_begins(rest, folder):
    text = 'prompt,chosen,rejected\nx,a.mp4,b.mp4\n"y,a.mp4,b.mp4\n' + rest
    (folder / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=r"metadata.csv line 3: not CSV \(.*; close each quote"):
        Rows(folder)


def test_a_long_text_is_a_text(folder):
    prompt = "fox\n" * 50_000
    save(folder / "metadata.csv", [{**PLAIN[0], "prompt": prompt}, PLAIN[1]])
    first, second = read_rows(folder)
    assert first.prompt == prompt and first.where == "metadata.csv line 2"
    assert second.where == "metadata.csv line 50003"


@pytest.mark.parametrize(
    "row, field",
    [
        ({**PICK, "label_0": 0.7}, "label_0"),
        ({**PICK, "label_0": None}, "label_0"),
        *(({**PICK, "label_0": a, "label_1": b}, "label_1") for a, b in ((0, 0), (1, 1), (0, 0.5))),
        ({**PLAIN[0], "score_chosen": 0.1, "score_rejected": 0.9}, "score_chosen"),
        ({"prompt": "x", "video_a": "a.mp4", "video_b": "b.mp4", "winner": "left"}, "winner"),
        ({"prompt": "x", "candidates": ["a.mp4", "b.mp4"], "scores": [1]}, "scores"),
    ],
)
def test_unknown_labels(row, field, folder):
    save(folder / "metadata.jsonl", [row])
    bad = only_bad(folder)
    assert (bad.kind, bad.field) == ("unknown_label", field) and "expected" in str(bad)


@pytest.mark.parametrize(
    "row, field",
    [
        ({"prompt": "x", "candidates": ["a.mp4"]}, "candidates"),
        ({"prompt": "x", "candidates": "a.mp4, b.mp4"}, "candidates"),
        ({"prompt": "x", "candidates": ["a.mp4", None]}, "candidates"),
        ({"prompt": "x", "candidates": 5}, "candidates"),
        ({"prompt": "x", "candidates": {"a": "a.mp4", "b": "b.mp4"}}, "candidates"),
        ({"prompt": "x", "candidates": "[" * 100000}, "candidates"),
        ({"prompt": "x", "candidates": ["a.mp4", "b.mp4"], "scores": 5}, "scores"),
        ({"prompt": "x", "candidates": ["a.mp4", "b.mp4"], "scores": 0}, "scores"),
        ({"prompt": "x", "candidates": ["a.mp4", "b.mp4"], "scores": [1, 10**400]}, "scores"),
        ({"prompt": "x", "candidates": ["a.mp4", "b.mp4"], "scores": [1, None]}, "scores"),
    ],
)
def test_bad_candidates(row, field, folder):
    save(folder / "metadata.jsonl", [row])
    assert only_bad(folder).field == field


@pytest.mark.parametrize("field", ["weight", "score_chosen", "score_rejected"])
def test_numbers_beyond_float64_are_bad(field, folder):
    scores = {"score_chosen": 1, "score_rejected": 0}
    save(folder / "metadata.jsonl", [{**PLAIN[0], **scores, field: 10**400}, PLAIN[1]])
    bad = only_bad(folder)
    assert (bad.kind, bad.field) == ("not_a_number", field) and len(list(Rows(folder))) == 2


def test_parquet_whose_pages_are_garbled(folder):
    path = save(folder / "metadata.parquet", PLAIN * 50)
    whole = bytearray(path.read_bytes())
    whole[4:400] = b"\xff" * 396  # behind the magic number; the footer stays whole
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"metadata.parquet: its data cannot be read \(") as error:
        read_rows(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_files_have_no_splits(suffix, folder):
    save(folder / f"metadata.{suffix}", PLAIN)
    with pytest.raises(ValueError, match=f"split nope: has no effect, .*metadata.{suffix} has no"):
        Rows(folder, split="nope")
    assert len(read_rows(folder, split="train")) == 2


def test_a_column_named_twice(folder):
    (folder / "metadata.csv").write_text("prompt,chosen,rejected,chosen\nx,a.mp4,b.mp4,b.mp4\n")
    with pytest.raises(ValueError, match=r"metadata.csv line 1: column 'chosen' expected once"):
        Rows(folder)


def test_media_without_metadata(folder, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"no metadata.jsonl, metadata.csv or .* in the folder"):
        Rows(folder)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_no_rows(suffix, folder):
    path = folder / f"metadata.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(PLAIN).slice(0, 0), path)
    else:
        path.write_text("prompt,chosen,rejected\n" if suffix == "csv" else "\n")
    with pytest.raises(ValueError, match=f"metadata.{suffix}: no rows; expected one row per pair"):
        read_rows(folder)


def test_all_ties(folder):
    save(folder / "metadata.jsonl", [{**PLAIN[0], "score_chosen": 1, "score_rejected": 1}] * 3)
    with pytest.raises(ValueError, match="all 3 pairs are ties; expected pairs with a winner"):
        read_rows(folder)


def test_wrong_places(folder, tmp_path):
    with pytest.raises(ValueError, match="no such file or folder; expected a folder with metadata"):
        Rows(tmp_path / "nothing")
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(ValueError, match=r"expected a folder or a .jsonl, .csv, .parquet file"):
        Rows(tmp_path / "rows.txt")
    (tmp_path / "metadata.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="not a parquet file"):
        Rows(tmp_path)
    save(folder / "metadata.csv", PLAIN)
    save(folder / "metadata.jsonl", PLAIN)
    with pytest.raises(ValueError, match=r"holds metadata.jsonl and metadata.csv; pass the file"):
        Rows(folder)
    with pytest.raises(ValueError, match="ranked: expected all or best_worst, got 'top'"):
        Rows(folder / "metadata.csv", ranked="top")
