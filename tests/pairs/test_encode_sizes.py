"""Sizes that a model does not take, refused before an hour of encoding is lost."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from commands import BASE, fails
from families import frames_of, tiny, write_media

from fastpref import models
from fastpref.cli import main
from fastpref.models import encoders as model_encoders
from fastpref.models import toy
from fastpref.pairs import prepare
from fastpref.pairs.encode import FIRST, encode
from fastpref.pairs.media import write_clip


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("wan", ["--num_frames", "16"], "frames expected 4k+1, got 16: pass --num_frames 13 or 17"),
        ("wan", ["--height", "40", "--width", "48"], "divisible by 16, got 40x48: pass --height 32"
         " --width 48 or other multiples"),
        ("cogvideox-2b", ["--num_frames", "4"], "4k+1, got 4: pass --num_frames 1 or 5"),
        ("sd15", ["--num_frames", "2"], "the model takes images, got 2 frames: pass --num_frames 1"
         ),
        ("sdxl", ["--height", "30", "--width", "48"], "divisible by 4, got 30x48"),
    ],
)  # fmt: skip
def test_sizes_asked_for_are_refused_before_anything_loads(
    name, flags, says, tmp_path, monkeypatch, capsys
):
    case = tiny(name)
    media = write_media(case.family, tmp_path / "media")
    monkeypatch.setattr(model_encoders.Encoders, "_load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("fastpref.pairs.prepare.decode", lambda *_: pytest.fail("decoded"))
    where = ["--data", str(media), "--output_dir", str(tmp_path / "set")]
    given = ["--family", case.family.name, "--model", str(case.path), *where, *flags]
    capsys.readouterr()
    assert says in fails(capsys, "encode", *given)
    assert says in fails(capsys, "encode", "--dry_run", *given)
    assert not (tmp_path / "set").exists()
    size = {"--num_frames": "1", "--height": "32", "--width": "48"}
    size |= dict(zip(flags[::2], flags[1::2], strict=True))
    clip = [*given[:4], "--prompts", "x", "--output_dir", str(tmp_path / "clips")]
    assert says in fails(capsys, "sample", *clip, *(word for pair in size.items() for word in pair))


def test_cases_of_a_model_of_another_family_at_encode_time(tmp_path, capsys):
    """ComfyUI#7114: said before an hour of encoding, not by the training after it."""
    case = tiny("wan")
    media = write_media(case.family, tmp_path / "media")
    where = ["--data", str(media), "--output_dir", str(tmp_path / "set")]
    line = fails(capsys, "encode", "--family", "toy", "--model", str(case.path), *where)
    assert "another family's model?" in line and not (tmp_path / "set").exists()


def write_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def odd(folder: Path, count: int, size: tuple[int, int] = (24, 40)) -> Path:
    """`count` pairs of a size that no video family takes."""
    folder.mkdir()
    for name, level in (("a.mp4", 0), ("b.mp4", 99)):
        write_clip(folder / name, torch.full((5, *size, 3), level, dtype=torch.uint8))
    rows = [{"prompt": f"{i}", "chosen": "a.mp4", "rejected": "b.mp4"} for i in range(count)]
    write_rows(folder, rows)
    return folder


@pytest.mark.parametrize("name", ["wan", "cogvideox-2b"])
def test_data_whose_every_size_is_wrong_are_refused_at_once(name, tmp_path, monkeypatch, capsys):
    """After the first pairs, before a model is loaded; the folder is free for the right size."""
    case = tiny(name)
    data, where = odd(tmp_path / "data", 200), ["--output_dir", str(tmp_path / "set")]
    given = ["--family", case.family.name, "--model", str(case.path), "--data", str(data), *where]
    decoded = []
    real = prepare.decode
    monkeypatch.setattr(prepare, "decode", lambda *a: decoded.append(1) or real(*a))
    with monkeypatch.context() as patch:
        patch.setattr(model_encoders.Encoders, "_load", lambda *_: pytest.fail("loaded"))
        capsys.readouterr()
        said = fails(capsys, "encode", *given)
    assert f"the model takes none of the first {FIRST} pairs; first: metadata.jsonl line 1" in said
    assert said.endswith("got 24x40: pass --height 16 --width 32 or other multiples\n")
    assert len(decoded) < 3 * FIRST
    lines = (data / "metadata.jsonl").read_text().splitlines()[:2]
    (data / "metadata.jsonl").write_text("\n".join(lines))
    assert main(["encode", *given, "--height", "16", "--width", "32"]) == 0


def test_a_family_that_tells_no_sizes_is_asked_for_the_first_pairs(tmp_path):
    """They come a batch at a time, whose size need not divide FIRST."""
    mine = ModuleType("mine")
    vars(mine).update({name: getattr(toy, name) for name in models.NAMES})
    mine.pipeline = lambda path, dtype: SimpleNamespace(dtype=dtype)
    data = odd(tmp_path / "data", 100, size=(10, 10))
    with pytest.raises(ValueError, match="the model takes none of the first 32 pairs; first: meta"):
        encode(mine, BASE, data, tmp_path / "set", batch_size=5, progress=False)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_rows_of_a_wrong_size_among_others_are_bad_rows(batch_size, tmp_path, monkeypatch):
    """Known before the encoder sees one; many at the start stop nothing where others fit."""
    case = tiny("wan")
    data = odd(tmp_path / "data", FIRST + 8)
    wrong = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    good = json.loads(
        (write_media(case.family, tmp_path / "m") / "metadata.jsonl").read_text().splitlines()[0]
    )
    for key in ("chosen", "rejected"):
        (data / good[key]).write_bytes((tmp_path / "m" / good[key]).read_bytes())
    write_clip(data / "even.mp4", frames_of(case.family, 5, 8))
    write_clip(data / "even2.mp4", frames_of(case.family, 6, 8))
    even = {"prompt": "x", "chosen": "even.mp4", "rejected": "even2.mp4"}
    write_rows(data, [wrong[0], good, *wrong[1:], even])
    seen, real = [], case.module.encode_media
    monkeypatch.setattr(
        case.module, "encode_media", lambda pipe, f: seen.append(1) or real(pipe, f)
    )
    encode("wan", case.path, data, tmp_path / "set", batch_size=batch_size, progress=False)
    assert len(seen) == 2
    counts = json.loads((tmp_path / "set" / "counts.json").read_text())
    assert counts["bad"] == {"not_encodable": FIRST + 9} and counts["pairs"] == 1
    rows = [json.loads(x) for x in (tmp_path / "set" / "bad_rows.jsonl").read_text().splitlines()]
    assert rows[-1]["reason"] == "frames expected 4k+1, got 8: pass --num_frames 5 or 9"
