"""Encoding broken data: every kind of bad row, refusals in one line, the dry run."""

from __future__ import annotations

import json
import shutil

import pytest
from commands import BASE, encoded, write_pairs

from fastpref.cli import main
from fastpref.pairs import media
from fastpref.pairs.encode import encode
from fastpref.pairs.prepare import survey
from fastpref.pairs.rows import BadRow


@pytest.fixture
def broken(tmp_path):
    """Three good pairs, two ties, a bad row of every kind; gives the folder and what is wrong."""
    data = write_pairs(tmp_path / "broken", 3)
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    good = rows[0]
    whole = (data / good["chosen"]).read_bytes()
    (data / "empty.mp4").touch()
    (data / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (data / "text.mp4").write_text("this is no clip\n" * 20)
    frames = media.decode(whole, media.Sampling()).frames
    media.write_clip(data / "wide.mp4", frames.repeat(1, 1, 2, 1))
    media.write_clip(data / "short.mp4", frames[:5])
    media.write_clip(data / "odd.mp4", frames[:, :10, :10])
    media.write_clip(data / "odd2.mp4", frames[:, 2:, 2:])
    (data / "folder.mp4").mkdir()
    (tmp_path / "outside.mp4").write_bytes(whole)
    wrong = [
        ({**good, "chosen": "none.mp4"}, "missing_file", "chosen"),
        ({**good, "chosen": "folder.mp4"}, "missing_file", "chosen"),
        ({**good, "rejected": "empty.mp4"}, "empty_file", "rejected"),
        ({**good, "rejected": "cut.mp4"}, "truncated", "rejected"),
        ({**good, "chosen": "text.mp4"}, "unreadable", "chosen"),
        ({**good, "rejected": "wide.mp4"}, "shape_mismatch", "rejected"),
        ({**good, "rejected": "short.mp4"}, "shape_mismatch", "rejected"),
        (
            {**good, "chosen": "odd.mp4", "rejected": "odd2.mp4"},
            "not_encodable",
            "chosen, rejected",
        ),
        ({**good, "chosen": "../outside.mp4"}, "outside", "chosen"),
        ({**good, "rejected": good["chosen"]}, "identical", "rejected"),
        (good, "duplicate", "row"),
        ({**good, "prompt": ""}, "missing_value", "prompt"),
        ({**good, "prompt": "\ud800"}, "not_utf8", "prompt"),
        ({**good, "weight": "heavy"}, "not_a_number", "weight"),
    ]
    ties = [{**good, "score_chosen": 1, "score_rejected": 1}] * 2
    lines = [json.dumps(row) for row in [*rows, *ties, *(row for row, _, _ in wrong)]]
    (data / "metadata.jsonl").write_text("\n".join([*lines, "{no json"]) + "\n")
    expected = [(f"metadata.jsonl line {6 + i}", f, k) for i, (_, k, f) in enumerate(wrong)]
    expected.append((f"metadata.jsonl line {6 + len(wrong)}", "line", "no_record"))
    return data, expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_rows_are_listed_and_counted_and_the_rest_is_encoded(broken, num_workers, tmp_path):
    data, expected = broken
    dataset = encoded(data, tmp_path / "set", num_workers=num_workers)
    assert len(dataset) == 3
    listed = [json.loads(x) for x in (tmp_path / "set" / "bad_rows.jsonl").read_text().splitlines()]
    assert sorted((x["where"], x["field"], x["kind"]) for x in listed) == sorted(expected)
    reasons = {x["kind"]: x["reason"] for x in listed}
    assert "\n" not in "".join(reasons.values())
    assert reasons["truncated"].startswith("cut.mp4 is truncated: ")
    assert reasons["not_encodable"].endswith("pass --height 8 --width 8 or other multiples")
    assert reasons["duplicate"] == "prompt and media are those of metadata.jsonl line 1"
    counts = json.loads((tmp_path / "set" / "counts.json").read_text())
    assert (counts["records"], counts["ties"], counts["pairs"]) == (20, 2, 3)
    assert sum(counts["bad"].values()) == len(expected)


def test_shapes_that_differ_say_what_to_pass(broken, tmp_path):
    data, _ = broken
    bad = {row.where.split()[-1]: row.reason for row in survey(data, progress=False)["bad_rows"]}
    assert bad["11"] == "frames x height x width expected 8x12x12 as in chosen, got 8x12x24; " + (
        "pass --height and --width"
    )
    assert bad["12"].endswith("got 5x12x12; pass --num_frames")
    sized = survey(data, sampling=media.Sampling(num_frames=5, height=12, width=12), progress=False)
    kinds = {row.where.split()[-1]: row.kind for row in sized["bad_rows"]}
    assert "11" not in kinds and "12" not in kinds and "13" not in kinds
    short = survey(data, sampling=media.Sampling(num_frames=8), progress=False)
    assert {r.where.split()[-1]: r.kind for r in short["bad_rows"]}["12"] == "too_short"


def test_the_dry_run_finds_what_encoding_finds(broken, tmp_path, capsys):
    data, expected = broken
    assert main(["encode", "--data", str(data), "--dry_run", "--num_workers", "1"]) == 0
    out = capsys.readouterr().out
    found = [x for x in expected if x[2] != "not_encodable"]  # what only the model can tell
    for where, field, _ in found:
        assert f"{where}, {field}: " in out
    assert "20 rows: 4 pairs, 2 ties dropped, 14 bad rows (1 duplicate" in out
    assert "frames: 8 to 8, median 8\nseconds: 1 to 1, median 1\n" in out
    assert "sizes: 6 of 12x12, 2 of 10x10" in out
    assert not (tmp_path / "set").exists()


def test_all_rows_bad(broken, tmp_path, capsys):
    data, _ = broken
    lines = (data / "metadata.jsonl").read_text().splitlines()
    (data / "metadata.jsonl").write_text("\n".join(lines[5:7]))
    arguments = ["encode", "--family", "toy", "--model", str(BASE), "--data", str(data)]
    arguments += ["--output_dir", str(tmp_path / "set")]
    assert main(arguments) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        "fastpref encode: metadata.jsonl: no usable pair, 2 bad rows; "
        "first: metadata.jsonl line 1, chosen: 'none.mp4' is not a file in"
    )
    assert said.endswith("the others are in " + str(tmp_path / "set" / "bad_rows.jsonl"))
    (tmp_path / "set" / "fingerprint.json.123.tmp").touch()  # of a process that was killed
    (data / "metadata.jsonl").write_text(lines[0])  # repaired: the folder may be used
    assert main(arguments) == 0


def user_error(capsys, *arguments: str) -> str:
    """The one line a mistake prints, with exit code 1."""
    assert main(["encode", *arguments]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("fastpref encode: ")
    return said[0].removeprefix("fastpref encode: ")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--height", "8"], "height, width: expected both or neither; pass --height and --width"),
        (["--num_frames", "0"], "num_frames: expected a positive number, got 0"),
        (["--num_frames", "many"], "argument --num_frames: invalid int value: 'many'"),
        (["--family", "nothing"], "family: expected one of "),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--data", "/no/where"], "data /no/where: no such file or folder; expected a folder with"),
        (["--num_worker_count", "1"], "unrecognized arguments: --num_worker_count 1"),
        (["--num_w", "1"], "unrecognized arguments: --num_w 1"),
        (["--batch_size", "0"], "batch_size: expected 1 or more, got 0"),
        (["--num_workers", "-1"], "num_workers: expected 0 to 256, got -1"),
        (["--seed", "0"], "seed has no effect with posterior mode; remove it, or pass posterior"),
        (["--posterior", "mean"], "argument --posterior: invalid choice: 'mean'"),
        (["--posterior", "sample"], "posterior sample: family fastpref.models.toy has none to sam"),
        (["--num_workers", "257", "--dry_run"], "num_workers: expected 0 to 256, got 257"),
    ],
)
def test_mistakes_are_one_line(flags, said, pairs, tmp_path, capsys):
    given = ["--family", "toy", "--model", str(BASE), "--data", str(pairs)]
    line = user_error(capsys, *given, "--output_dir", str(tmp_path / "set"), *flags)
    assert line.startswith(said)
    assert not (tmp_path / "set").exists()


def test_a_seed_out_of_range(pairs, tmp_path):
    with pytest.raises(ValueError, match=r"^seed: expected 0 <= seed < 2\^63, got -1$"):
        encode("wan", BASE, pairs, tmp_path / "set", posterior="sample", seed=-1)


def test_mistakes_in_data_are_one_line(pairs, tmp_path, capsys):
    given = [
        "--family",
        "toy",
        "--model",
        str(BASE),
        "--output_dir",
        str(tmp_path / "set"),
        "--data",
    ]
    path = tmp_path / "metadata.csv"
    path.write_text("prompt,chosen\nx,a.mp4\n")
    assert user_error(capsys, *given, str(path)).startswith(
        "metadata.csv: missing column 'rejected'"
    )
    path.write_text("prompt,chosen,rejected\n")
    assert user_error(capsys, *given, str(path)).startswith("metadata.csv: no rows; expected")
    rows = [json.loads(line) for line in (pairs / "metadata.jsonl").read_text().splitlines()]
    ties = [json.dumps({**row, "score_chosen": 1, "score_rejected": 1}) for row in rows]
    data = shutil.copytree(pairs, tmp_path / "ties")
    (data / "metadata.jsonl").write_text("\n".join(ties))
    assert user_error(capsys, *given, str(data)).startswith("metadata.jsonl: all 10 pairs are ties")
    assert "--family, --model, --output_dir required" in user_error(capsys, "--data", str(pairs))
    encoded(pairs, tmp_path / "encoded")
    said = user_error(capsys, *given, str(tmp_path / "encoded"))
    assert said.endswith("is an encoded set (finished); expected a folder of media")
    (tmp_path / "encoded" / "index.parquet").unlink()
    said = user_error(capsys, *given, str(tmp_path / "encoded"))
    assert "(unfinished: run its fastpref encode again)" in said


def test_bad_row_is_an_error_of_one_line():
    bad = BadRow("kind", "m.csv line 2", "chosen", "is wrong")
    assert str(bad) == "m.csv line 2, chosen: is wrong" and isinstance(bad, ValueError)
