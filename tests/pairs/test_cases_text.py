"""Metadata and names as people have them, and what they may cost.

After public reports: webui#3657, owncloud#31544, renpy#2327, DALI#1872 (encodings, names in another
composition, git-lfs pointers), transformers#46237 (links of the hub's cache), WanVideoWrapper#1781
and SimpleTuner#283 (prompts of white space).
"""

from __future__ import annotations

import json
import os
import tracemalloc
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastpref.pairs import arrow, rows, sources, text
from fastpref.pairs.rows import BadRow, Rows, read_rows

PROMPTS = ["ein grüner Kreis, groß", "a red disc"]
LINES = [{"prompt": prompt, "chosen": "a.mp4", "rejected": "b.mp4"} for prompt in PROMPTS]
POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
MIB = 1 << 20


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (root / name).write_bytes(name.encode())
    return root


def table(mark: str = ",") -> str:
    cells = [["prompt", "chosen", "rejected"], *(list(line.values()) for line in LINES)]
    quoted = [[f'"{c}"' if mark in c else c for c in row] for row in cells]
    return "".join(mark.join(row) + "\n" for row in quoted)


def metadata(suffix: str) -> str:
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES)
    return lines if suffix == "jsonl" else table()


def one_bad(data: Path) -> BadRow:
    (bad,) = [row for row in Rows(data) if isinstance(row, BadRow)]
    assert len(str(bad).splitlines()) == 1
    return bad


# What is a text: its encoding, its line ends, its delimiter.

MARKED = ["utf-8-sig", "utf-16", "utf-32"]
ENCODINGS = ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", *MARKED]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings(encoding, suffix, folder):
    (folder / f"metadata.{suffix}").write_bytes(metadata(suffix).encode(encoding))
    assert [row.prompt for row in read_rows(folder)] == PROMPTS


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(end, encoding, suffix, folder):
    words = metadata(suffix).replace("\n", end)
    (folder / f"metadata.{suffix}").write_bytes(words.encode(encoding))
    found = read_rows(folder)
    first = 1 + (suffix == "csv")
    assert [row.prompt for row in found] == PROMPTS
    assert [row.where.split()[-1] for row in found] == [str(first), str(first + 1)]


def test_separators_that_end_no_line(folder):
    """U+2028, U+0085 and others are letters of a prompt, in JSON and in CSV."""
    prompt = "one\u2028two\u0085three\x0bfour"
    words = json.dumps({**LINES[0], "prompt": prompt}, ensure_ascii=False)
    (folder / "metadata.jsonl").write_text(words.replace("\x0b", "\\u000b"), newline="")
    assert read_rows(folder)[0].prompt == prompt
    (folder / "other.csv").write_text(f"prompt,chosen,rejected\n{prompt},a.mp4,b.mp4\n")
    assert read_rows(folder / "other.csv")[0].prompt == prompt


@pytest.mark.parametrize("said", ["", "sep={}\n", "sep={}\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("mark", [";", "\t", "|", ","])
def test_delimiters_as_excel_writes_them(mark, encoding, said, folder):
    words = said.format(mark) + table(mark)
    (folder / "metadata.csv").write_bytes(words.encode(encoding))
    found = read_rows(folder)
    assert [row.prompt for row in found] == PROMPTS
    assert found[0].where == f"metadata.csv line {2 + bool(said)}"


def test_a_delimiter_inside_a_quoted_name_is_none(folder):
    words = table(";").replace("prompt;", 'prompt;"x, y";').replace("a.mp4", "7;a.mp4")
    (folder / "metadata.csv").write_text(words)
    assert [row.prompt for row in read_rows(folder)] == PROMPTS


def test_rows_of_empty_cells_are_none(folder):
    (folder / "metadata.csv").write_text(table() + ",,\n,,\n")
    assert len(read_rows(folder)) == 2


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_windows_1252_is_named(suffix, folder):
    (folder / f"metadata.{suffix}").write_bytes(metadata(suffix).encode("cp1252"))
    bad = one_bad(folder)
    assert (bad.kind, bad.field) == ("not_utf8", "prompt")
    assert "as Windows-1252 it reads 'ein grüner Kreis, groß'" in bad.reason


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_utf16_that_ends_within_a_letter(suffix, folder):
    (folder / f"metadata.{suffix}").write_bytes(metadata(suffix).encode("utf-16")[:-1])
    with pytest.raises(ValueError, match=r"line \d: not whole utf-16 text \(truncated data\); sa"):
        read_rows(folder)


def test_half_a_letter_in_utf16_costs_its_row(folder):
    raw = metadata("jsonl").replace("red", "\ud83d").encode("utf-16", "surrogatepass")
    (folder / "metadata.jsonl").write_bytes(raw)
    assert one_bad(folder).kind == "not_utf8" and len(list(Rows(folder))) == 2


def test_files_put_together_keep_their_marks(folder):
    (folder / "metadata.jsonl").write_bytes(metadata("jsonl").encode("utf-8-sig") * 2)
    assert [row.prompt for row in read_rows(folder)] == PROMPTS * 2


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_git_lfs_pointers(name, folder):
    (folder / name).write_text(POINTER)
    with pytest.raises(ValueError, match=f"{name}: is a git-lfs pointer, not the file: run git lf"):
        Rows(folder)


def test_git_lfs_pointers_of_a_dataset(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_text(POINTER)
    with pytest.raises(ValueError, match=r"train-0.*: is a git-lfs pointer"):
        Rows(tmp_path)


NOTHING_SEEN = [
    " ",
    "\t\n",
    "\u00a0\u3000",
    "\u200b\ufeff",
    "\u2060\u00ad",
    "\x00",
    "\u3164",
    "\u0301",
]


@pytest.mark.parametrize("prompt", NOTHING_SEEN)
def test_blank_prompts(prompt, folder):
    blank = {**LINES[0], "prompt": prompt}
    words = [LINES[0], blank, {**LINES[1], "negative_prompt": prompt}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, words)))
    bad = one_bad(folder)
    assert (bad.kind, bad.field, bad.reason) == (
        "missing_value",
        "prompt",
        "is blank; expected a text",
    )
    assert list(Rows(folder))[2].negative_prompt is None


@pytest.mark.parametrize("prompt", ["?", " a ", "猫", "👩‍🚀", "é"])
def test_prompts_that_are_seen(prompt, folder):
    (folder / "metadata.jsonl").write_text(json.dumps({**LINES[0], "prompt": prompt}))
    assert read_rows(folder)[0].prompt == prompt


def test_what_a_terminal_obeys_is_shown(folder):
    evil = "\x1b[2J\u202ea\x9b.mp4"
    (folder / "metadata.jsonl").write_text(json.dumps({**LINES[0], "chosen": evil, "w\x1b": 1}))
    bad = one_bad(folder)
    assert str(bad).isprintable() and "x1b[2J" in str(bad)


# What is a name.

NAME = "Fête/Ångström 한.mp4"


def put(root: Path, name: str, holds: str = "x") -> Path:
    path = root / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(holds)
    return path


def named(folder: Path, name: str) -> Path | BadRow:
    """What a row with this name of its chosen clip finds."""
    (folder / "metadata.jsonl").write_text(json.dumps({**LINES[0], "chosen": name}))
    (row,) = Rows(folder)
    return row if isinstance(row, BadRow) else row.chosen


@pytest.mark.parametrize("on_disk, said", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_compositions_of_a_name(on_disk, said, folder):
    path = put(folder, unicodedata.normalize(on_disk, NAME))
    assert named(folder, unicodedata.normalize(said, NAME)) == path.resolve()


def test_of_two_compositions_the_exact_one_wins(folder):
    paths = {form: put(folder, unicodedata.normalize(form, "é.mp4")) for form in ("NFC", "NFD")}
    assert len(list(folder.glob("*.mp4"))) == 4
    for form, path in paths.items():
        assert named(folder, unicodedata.normalize(form, "é.mp4")) == path.resolve()


def test_of_two_other_compositions_none_is_picked(folder):
    for name in ("é" + "e\u0301.mp4", "e\u0301" + "é.mp4"):
        put(folder, name)
    bad = named(folder, "éé.mp4")
    assert bad.kind == "missing_file" and "; expected one of 'e\\u0301\\xe9.mp4' and " in str(bad)


@pytest.mark.parametrize("said", ["clips/A.MP4", "clips\\a.mp4", "Clips/a.mp4 ", "clips/ａ.mp4"])
def test_names_that_are_almost_right(said, folder):
    """Another file than the one that is named is never read, but said."""
    put(folder, "clips/a.mp4")
    bad = named(folder, said)
    assert bad.kind == "missing_file" and "; expected 'clips/a.mp4', almost the same name" in str(
        bad
    )


def test_nothing_outside_the_folder_is_listed(folder, tmp_path):
    put(tmp_path, "outside/secret.mp4")
    (folder / "link").symlink_to("../outside")
    assert named(folder, "link/SECRET.mp4").kind == "outside"
    assert "expected" not in str(named(folder, "LINK/secret.mp4"))


def test_a_metadata_files_own_name_is_shown(folder):
    path = folder / "\x1b[2J.jsonl"
    path.write_text(json.dumps({**LINES[0], "prompt": ""}))
    assert str(one_bad(path)).startswith(r"\x1b[2J.jsonl line 1, prompt: is empty")


def test_a_folder_is_listed_once(folder, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "listdir", lambda path, of=os.listdir: calls.append(path) or of(path))
    words = [json.dumps({**LINES[0], "chosen": f"{i}.mp4"}) for i in range(50)]
    (folder / "metadata.jsonl").write_text("\n".join(words))
    assert len([row for row in Rows(folder) if row.kind == "missing_file"]) == 50
    assert len(calls) == 1


# The hub's cache: names that are links to what they hold.


@pytest.fixture
def snapshot(tmp_path):
    """A snapshot as huggingface_hub keeps it: a.mp4, clips/b.mp4 and metadata.jsonl are links."""
    repo = tmp_path / "anywhere" / "datasets--owner--pairs"
    root = repo / "snapshots" / "0123abcd"
    (repo / "blobs").mkdir(parents=True)
    (root / "clips").mkdir(parents=True)
    line = {**LINES[0], "rejected": "clips/b.mp4"}
    for name, holds in (("a.mp4", "a"), ("clips/b.mp4", "b"), ("metadata.jsonl", json.dumps(line))):
        blob = repo / "blobs" / f"digest-of-{name.replace('/', '-')}"
        blob.write_text(holds)
        (root / name).symlink_to(os.path.relpath(blob, (root / name).parent))
    return root


def test_a_snapshot_of_the_hub(snapshot, tmp_path):
    for data in (snapshot, snapshot / "metadata.jsonl"):
        (row,) = read_rows(data)
        assert [row.chosen.read_text(), row.rejected.read_text()] == ["a", "b"]
        assert row.chosen.name == "a.mp4"  # what errors name
    (tmp_path / "cache").symlink_to(snapshot.parents[2])
    assert read_rows(tmp_path / "cache" / snapshot.relative_to(snapshot.parents[2]))


def relinked(snapshot: Path, target: Path | str) -> BadRow:
    (snapshot / "a.mp4").unlink()
    (snapshot / "a.mp4").symlink_to(target)
    bad = one_bad(snapshot)
    assert (bad.kind, bad.field) == ("outside", "chosen") and "a link that leaves" in bad.reason
    return bad


def test_links_elsewhere_are_refused(snapshot, tmp_path):
    repo, blobs = snapshot.parents[1], snapshot.parents[1] / "blobs"
    other = repo.with_name("datasets--owner--other") / "blobs" / "digest"
    other.parent.mkdir(parents=True)
    (blobs / "deep").mkdir()
    for file in (other, repo / "refs", tmp_path / "file", blobs / "deep" / "digest"):
        file.write_text("x")
        relinked(snapshot, os.path.relpath(file, snapshot))
    relinked(snapshot, "/etc/hostname")
    (blobs / "chain").symlink_to("digest-of-a.mp4")
    relinked(snapshot, blobs / "chain")
    (blobs / "out").symlink_to(other)
    relinked(snapshot, "../../blobs/out")
    (snapshot.parent / "second").symlink_to("../blobs/digest-of-a.mp4")
    relinked(snapshot, "../second")
    relinked(snapshot, "../../blobs")
    relinked(snapshot, "../../blobs/none")


def test_a_folder_outside_may_not_lead_back(snapshot, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.mp4").symlink_to(snapshot.parents[1] / "blobs" / "digest-of-a.mp4")
    (snapshot / "out").symlink_to(tmp_path / "outside")
    (snapshot / "metadata.jsonl").unlink()
    assert named(snapshot, "out/x.mp4").kind == "outside"


def test_other_folders_are_no_cache(snapshot):
    repo = snapshot.parents[1].rename(snapshot.parents[2] / "my--pairs")
    kinds = [row.kind for row in Rows(repo / "snapshots" / snapshot.name)]
    assert kinds == ["outside"]


# What any file may cost is known before it is read.


@pytest.fixture
def peak():
    """Most that Python has held since the test called this the first time, in MiB."""

    def measured() -> float:
        if not tracemalloc.is_tracing():
            tracemalloc.start()
        return tracemalloc.get_traced_memory()[1] / MIB

    yield measured
    tracemalloc.stop()


def write(path: Path, columns: dict, **options) -> Path:
    # store_schema: else what was made as a dictionary would be read as one
    pq.write_table(pa.table(columns), path, compression="zstd", store_schema=False, **options)
    return path


def test_parquet_of_zeros_is_refused_unread(folder):
    columns = {"prompt": ["x"] * 12, "rejected": [b"b"] * 12}
    columns["chosen"] = [bytes(8 * MIB) + bytes([i]) for i in range(12)]
    options = {"use_dictionary": False, "row_group_size": 2}
    path = write(folder / "metadata.parquet", columns, **options)
    assert path.stat().st_size < 20_000
    with pytest.raises(
        ValueError, match=r"parquet: unpacks to 1006\d+ bytes from \d+, expected at"
    ):
        Rows(folder)
    shard = folder / "hub" / "data" / "train-00000-of-00001.parquet"
    shard.parent.mkdir(parents=True)
    path.rename(shard)
    with pytest.raises(ValueError, match=r"train-.*: unpacks to 1006"):
        Rows(folder / "hub")


def test_columns_that_are_not_read_may_be_anything(folder, peak):
    columns = {"prompt": ["x"], "chosen": [b"a"], "rejected": [b"b"], "mask": [bytes(80 * MIB)]}
    write(folder / "metadata.parquet", columns, use_dictionary=False)
    peak()
    assert read_rows(folder)[0].chosen == b"a" and peak() < 8


def repeated(value: bytes, times: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), pa.array([value]))


def test_one_value_in_many_rows_is_read_a_few_at_a_time(folder, peak, monkeypatch):
    columns = {
        "prompt": ["x"] * 64,
        "chosen": repeated(bytes(4 * MIB), 64),
        "rejected": [b"b"] * 64,
    }
    write(folder / "metadata.parquet", columns)
    monkeypatch.setattr(arrow, "BATCH", 8 * MIB)
    peak()
    assert sum(1 for _ in Rows(folder)) == 64
    assert peak() < 24  # two rows at a time, not 16


def test_one_value_in_many_places_of_a_list_is_there_once(folder, peak):
    """Not 400 times: the second bound of a list beside that of its length."""
    lists = pa.ListArray.from_arrays([0, 200, 400], repeated(bytes(MIB), 400))
    write(folder / "metadata.parquet", {"prompt": ["x", "y"], "candidates": lists})
    peak()
    found = Rows(folder, ranked="best_worst")
    assert [row.prompt for row in found] == ["x", "y"]
    assert peak() < 8  # MiB of 400


def test_rows_and_members_without_number(folder, monkeypatch):
    nothing = pa.nulls(1 << 21, pa.string())
    write(folder / "metadata.parquet", {"prompt": nothing, "chosen": nothing, "rejected": nothing})
    with pytest.raises(ValueError, match=r"parquet: says it has 2097152 rows in \d+ bytes"):
        Rows(folder)
    monkeypatch.setattr(arrow, "LISTED", 1 << 16)
    lists = pa.ListArray.from_arrays([0, (1 << 16) + 1], pa.nulls((1 << 16) + 1, pa.binary()))
    write(folder / "metadata.parquet", {"prompt": ["x"], "candidates": lists})
    with pytest.raises(
        ValueError, match=r"column candidates.* lists 65537 values in one row group"
    ):
        Rows(folder)


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_honest_parquet_is_read(use_dictionary, folder, monkeypatch):
    """Media that do not pack, and columns that pack well beside them."""
    monkeypatch.setattr(arrow, "UNPACKED", 0)
    monkeypatch.setattr(arrow, "BATCH", MIB)
    media = [os.urandom(MIB // 4) for _ in range(12)]
    same = {"prompt": ["a fox " * 50] * 6, "negative_prompt": ["blurred " * 50] * 6}
    pairs = {"chosen": media[:6], "rejected": media[6:]}
    write(folder / "metadata.parquet", same | pairs, use_dictionary=use_dictionary)
    assert [(row.chosen, row.rejected) for row in read_rows(folder)] == [
        *zip(media[:6], media[6:], strict=True)
    ]
    listed = {"prompt": ["x", "y"], "candidates": [media[:3], [*media[3:5], media[3]]]}
    write(folder / "metadata.parquet", listed, use_dictionary=use_dictionary)
    first, second = (list(pair) for pair in (media[:3], [*media[3:5], media[3]]))
    found = [row.rejected for row in read_rows(folder)]
    assert found == [first[1], first[2], first[2], second[1], second[2], second[2]]


def test_lists_and_structures_keep_their_gaps():
    column = pa.array(
        [[{"bytes": b"a", "path": None}, None], None, [], [{"bytes": None, "path": "b"}]]
    )
    assert arrow.values(column) == column.to_pylist()
    assert arrow.values(column.slice(1)) == column.to_pylist()[1:]
    assert arrow.values(pa.chunked_array([column, column])) == column.to_pylist() * 2
    packed = pa.array(["x", None, "x"]).dictionary_encode()
    assert arrow.values(packed) == ["x", None, "x"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_text_files_of_absurd_size(suffix, folder, monkeypatch):
    path = folder / f"metadata.{suffix}"
    path.touch()
    os.truncate(path, 1 << 40)  # holes: it takes no place on the disk
    with pytest.raises(
        ValueError, match=r"has 1099511627776 bytes, at most 1073741824 are read; sp"
    ):
        Rows(folder)
    path.write_text(metadata(suffix) + "\n" * 100)
    monkeypatch.setattr(text, "MAX_ROWS", 50)
    with pytest.raises(ValueError, match=r"has more than 50 lines; split it"):
        Rows(folder)
    path.write_text(metadata(suffix))
    monkeypatch.setattr(text, "MAX_LINE", 30)
    with pytest.raises(ValueError, match=r"line \d: has more than 30 characters"):
        Rows(folder)


def test_rows_columns_and_candidates_have_a_most(folder, monkeypatch):
    path = folder / "metadata.jsonl"
    words = json.dumps({**LINES[0], **{f"x{i}": 0 for i in range(sources.MAX_COLUMNS)}})
    path.write_text(words)
    with pytest.raises(ValueError, match=r"jsonl: its records have more than 10000 different keys"):
        Rows(folder)
    path.write_text(json.dumps({"prompt": "x", "candidates": ["a.mp4"] * 257}))
    assert one_bad(folder).reason == "expected at most 256 media, got 257"
    path.write_text(metadata("jsonl") * 2)
    monkeypatch.setattr(rows, "MAX_ROWS", 3)
    with pytest.raises(ValueError, match=r"has 4 rows, at most 3 are read; split it"):
        Rows(folder)


def test_a_text_file_is_not_held_in_memory(folder, peak):
    (folder / "metadata.jsonl").write_text(metadata("jsonl") * 2000)
    peak()
    assert sum(1 for _ in sources.Jsonl(folder / "metadata.jsonl")) == 4000
    assert peak() < 0.2  # of 0.5


def test_bad_rows_keep_no_media(folder):
    media = [os.urandom(MIB) for _ in range(8)]
    columns = {"prompt": [None] * 4, "chosen": media[:4], "rejected": media[4:]}
    path = write(folder / "metadata.parquet", {**columns, "prompt": pa.nulls(4, pa.string())})
    tracemalloc.start()
    bad = list(Rows(path))
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(bad) == 4 and kept < MIB


def test_a_header_with_spaces_and_a_spreadsheets_empty_columns(folder):
    text = 'prompt, chosen, rejected,,\n"a fox, red", a.mp4, b.mp4,,\n'
    (folder / "metadata.csv").write_text(text)
    (row,) = read_rows(folder)
    assert (row.prompt, row.chosen.name, row.rejected.name) == ("a fox, red", "a.mp4", "b.mp4")
