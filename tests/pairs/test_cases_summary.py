"""What an encoding says at its end, of data put together after reports from the field."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import BASE, write_pairs
from families import tiny
from PIL import Image
from torch import Tensor

from fastpref.cli import main
from fastpref.look.validation import Prompts
from fastpref.models import toy
from fastpref.pairs import prepare
from fastpref.pairs.dataset import PairDataset
from fastpref.pairs.encode import encode
from fastpref.pairs.media import write_clip

LONG = "the old stone wall and the lamps of a quiet street "


def noise(height: int, width: int, seed: int, count: int = 9) -> Tensor:
    """uint8 [count, height, width, 3]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, height, width, 3), generator=generator, dtype=torch.uint8)


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def clips(tmp_path) -> Path:
    """Pairs for 9 frames of 32x48 at 16 fps, each of another kind."""
    folder = tmp_path / "clips"
    folder.mkdir()
    seeds = iter(range(100))

    def clip(name: str, height: int = 32, width: int = 48, fps: float = 16, count: int = 9) -> str:
        write_clip(folder / name, noise(height, width, next(seeds), count), fps)
        return name

    long = LONG * 60
    rows = [
        {"prompt": f"{long} at dawn", "chosen": clip("a.mp4"), "rejected": clip("b.mp4")},
        {"prompt": f"{long} at dusk", "chosen": clip("c.mp4"), "rejected": clip("d.mp4")},
        {"prompt": "x", "chosen": clip("slow.mp4", fps=8), "rejected": clip("e.mp4", fps=15)},
        {"prompt": "y", "chosen": clip("f.mp4", fps=24, count=14), "rejected": "slow.mp4"},
        {"prompt": "x", "chosen": clip("wide.mp4", 32, 64), "rejected": clip("big.mp4", 64, 96)},
        {"prompt": "x", "chosen": "a.mp4", "rejected": "d.mp4", "score_chosen": 2},
        {"prompt": "x", "chosen": "a.mp4", "rejected": "same.mp4"},
        {"prompt": "x", "chosen": "a.mp4", "rejected": "same.mkv"},
        {"prompt": "x", "chosen": "a.mp4", "rejected": clip("short.mp4", count=5)},
        {"prompt": "x", "chosen": clip("\x1b[31mred.mp4", count=2), "rejected": "a.mp4"},
    ]
    rows[5]["score_rejected"] = 2
    rows.append(rows[5])
    (folder / "same.mp4").write_bytes((folder / "a.mp4").read_bytes())
    write_clip(folder / "same.mkv", noise(32, 48, 0), 16)
    return write_rows(folder, rows)


SUMMARY = """\
11 rows: 5 pairs, 2 ties dropped, 4 bad rows (1 identical, 1 identical_frames, 2 too_short)
  prompts cut, longer than the text encoder reads: 2; first: metadata.jsonl line 1, prompt: \
N tokens, of which 512 are read
  clips of a lower rate than --fps: 2; first: metadata.jsonl line 3, chosen: \
slow.mp4 (8 fps, --fps 16, 4 of 9 frames taken again)
  media resized: 1; first: metadata.jsonl line 5, rejected: big.mp4 (64x96 to 32x48)
  media cropped: 1; first: metadata.jsonl line 5, chosen: wide.mp4 (32x64 to 32x48)
  ties dropped: 2; first: metadata.jsonl line 6
  bad rows, identical: 1; first: metadata.jsonl line 7, rejected: has the same content as chosen
  bad rows, identical_frames: 1; first: metadata.jsonl line 8, rejected: has the same frames as \
chosen
  bad rows, too_short: 2; first: metadata.jsonl line 9, rejected: short.mp4 is too short: 5 frames \
at 16 fps, --num_frames asks for 9
"""
SIZE = {"num_frames": 9, "height": 32, "width": 48, "fps": 16}
FLAGS = [word for name, value in SIZE.items() for word in (f"--{name}", str(value))]


def summary(out: str) -> str:
    """The lines at an encoding's end, without its folder and the number of tokens."""
    found = out[re.search(r"^.*\d+ rows: ", out, re.M).start() :]
    return re.sub(r"^.*?: (\d+ rows)", r"\1", re.sub(r"\d+ tokens", "N tokens", found))


def test_clips_of_every_kind_are_told_in_a_line_each(clips, tmp_path, capsys):
    """WanVideoWrapper#1781 (prompts that differ after token 512), diffusion-pipe#200 and
    musubi-tuner#34 (8 fps clips at --fps 16).
    """
    case, folder = tiny("wan"), tmp_path / "set"
    where = ["--model", str(case.path), "--data", str(clips), "--output_dir", str(folder)]
    capsys.readouterr()
    assert main(["encode", "--family", "wan", *where, *FLAGS]) == 0
    assert summary(capsys.readouterr().out) == SUMMARY
    counts = json.loads((folder / "counts.json").read_text())
    first = counts.pop("first")
    assert counts == {
        "records": 11,
        "ties": 2,
        "pairs": 5,
        "already_encoded": 0,
        "bad": {"identical": 1, "identical_frames": 1, "too_short": 2},
        "notes": {"cut_prompts": 2, "slower": 2, "resized": 1, "cropped": 1, "composited": 0},
    }
    assert set(first) == {name for name, n in (counts["notes"] | counts["bad"]).items() if n} | {
        "ties"
    }
    # The same embedding, which is why they are counted.
    dataset = PairDataset(folder)
    one, other = (dataset[i].cond["text"] for i, p in enumerate(dataset.prompts) if LONG in p)
    assert torch.equal(one, other)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_resumed_encoding_tells_of_the_whole_set(num_workers, clips, tmp_path, capsys):
    case, folder = tiny("wan"), tmp_path / "set"
    given = {**SIZE, "batch_size": 2, "num_workers": num_workers}
    encode("wan", case.path, clips, folder, **given, progress=False)
    before = json.loads((folder / "counts.json").read_text())
    bad = (folder / "bad_rows.jsonl").read_text()
    assert [json.loads(line)["where"][-1] for line in bad.splitlines()] == ["7", "8", "9", "0"]
    (folder / "index.parquet").unlink()
    for path in sorted(folder.rglob("pairs/*/*.safetensors"))[:3]:
        path.unlink()  # never encoded: another first one of some kind
    (folder / "counts.json").unlink()
    capsys.readouterr()
    encode("wan", case.path, clips, folder, **given)
    assert json.loads((folder / "counts.json").read_text()) == {**before, "already_encoded": 2}
    assert (folder / "bad_rows.jsonl").read_text() == bad
    said = summary(capsys.readouterr().out)
    assert said == SUMMARY.replace("5 pairs,", "5 pairs (2 already encoded),")


def test_the_dry_run_says_the_same(clips, capsys):
    """But for what takes a tokenizer to know; and nothing that a terminal would obey."""
    assert main(["encode", "--data", str(clips), "--dry_run", *FLAGS]) == 0
    said = summary(capsys.readouterr().out)
    without = [line for line in SUMMARY.splitlines() if "prompts cut" not in line]
    assert said.splitlines()[: len(without)] == without


def test_a_name_that_colours_the_terminal_is_shown_as_escapes(clips, capsys):
    rows = [json.loads(line) for line in (clips / "metadata.jsonl").read_text().splitlines()]
    write_rows(clips, [rows[-2], rows[0]])
    assert main(["encode", "--data", str(clips), "--dry_run", *FLAGS]) == 0
    assert "first: metadata.jsonl line 1, chosen: \\x1b[31mred.mp4 is too short" in summary(
        capsys.readouterr().out
    )


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Pairs of 32x48 pictures, each of another kind."""
    folder = tmp_path / "pictures"
    folder.mkdir()

    def picture(name: str, seed: int, **options: Any) -> str:
        Image.fromarray(noise(32, 48, seed, 1)[0].numpy()).save(folder / name, **options)
        return name

    pixels = noise(32, 48, 0, 1)[0]
    alpha = torch.zeros(32, 48, 1, dtype=torch.uint8)
    Image.fromarray(torch.cat([pixels, alpha], 2).numpy()).save(folder / "alpha.png")
    opaque = torch.cat([noise(32, 48, 7, 1)[0], alpha + 255], 2)
    Image.fromarray(opaque.numpy()).save(folder / "opaque.png")
    rows = [
        {"prompt": f"{LONG * 12} one", "chosen": picture("a.png", 0), "rejected": "alpha.png"},
        {"prompt": f"{LONG * 12} two", "chosen": picture("b.png", 1), "rejected": "opaque.png"},
        {"prompt": "x", "chosen": "a.png", "rejected": picture("packed.png", 0, compress_level=0)},
        {"prompt": "y", "chosen": "b.png", "rejected": "alpha.png"},
    ]
    return write_rows(folder, rows)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_pictures_of_every_kind(name, pictures, tmp_path):
    """diffusers#5890, SimpleTuner#283: SD printed what it cut of every prompt, 240 KB of it.
    sd-scripts#1269: alpha; one that hides nothing is no news.
    """
    case, records = tiny(name), []
    watch = logging.Handler()
    watch.emit = records.append
    libraries = [logging.getLogger(library) for library in ("diffusers", "transformers")]
    for library in libraries:
        library.addHandler(watch)
    try:
        encode(
            "stable_diffusion", case.path, pictures, tmp_path / "set", dtype="bfloat16",
            progress=False,
        )  # fmt: skip
    finally:
        for library in libraries:
            library.removeHandler(watch)
    assert [record.getMessage() for record in records] == []
    counts = json.loads((tmp_path / "set" / "counts.json").read_text())
    assert counts["pairs"] == 3
    assert counts["bad"] == {"identical_frames": 1}
    assert counts["notes"]["cut_prompts"] == 2 and counts["notes"]["composited"] == 1
    first = counts["first"]
    where = "metadata.jsonl line"
    assert re.fullmatch(
        rf"{where} 1, prompt: \d+ tokens, of which 77 are read", first["cut_prompts"]
    )
    assert first["composited"] == f"{where} 1, rejected: alpha.png"


def test_what_hid_under_alpha_is_told_where_no_pair_is_left_by_it(tmp_path, capsys):
    """sd-scripts#1269: two pictures that look alike are a bad row, and why is in the summary."""
    for name, seed in (("a.png", 0), ("b.png", 1)):
        pixels = noise(32, 48, seed, 1)[0]
        alpha = torch.zeros(32, 48, 1, dtype=torch.uint8)
        Image.fromarray(torch.cat([pixels, alpha], 2).numpy()).save(tmp_path / name)
    write_rows(tmp_path, [{"prompt": "x", "chosen": "a.png", "rejected": "b.png"}])
    where, line = ["--data", str(tmp_path)], "metadata.jsonl line 1"
    model = ["--family", "toy", "--model", str(BASE), "--output_dir", str(tmp_path / "set")]
    for more in (["--dry_run"], model):
        assert main(["encode", *where, *more]) == 1
        said = capsys.readouterr()
        assert (
            f"  media with alpha, composited on white: 2; first: {line}, chosen: a.png" in said.out
        )
        same = f"{line}, rejected: has the same frames as chosen"
        assert f"  bad rows, identical_frames: 1; first: {same}\n" in said.out
        assert said.err.endswith(f"metadata.jsonl: no usable pair, 1 bad rows; first: {same}\n")


def test_other_frames_of_the_same_latents_are_a_bad_row(tmp_path, monkeypatch):
    data = write_pairs(tmp_path / "data", 2)
    frames = noise(12, 12, 0) // 2 * 2
    write_clip(data / "0_w.mp4", frames)
    write_clip(data / "0_l.mp4", frames + 1)
    real = toy.encode_media
    monkeypatch.setattr(toy, "encode_media", lambda pipe, frames: real(pipe, frames // 2))
    encode("toy", BASE, data, tmp_path / "set", dtype="bfloat16", progress=False)
    counts = json.loads((tmp_path / "set" / "counts.json").read_text())
    assert counts["pairs"] == 1 and counts["bad"] == {"identical_latents": 1}
    said = "has the same latents as chosen in bfloat16, of other frames"
    assert counts["first"] == {"identical_latents": f"metadata.jsonl line 1, rejected: {said}"}


@pytest.mark.parametrize("name", ["wan", "cogvideox-2b", "sd15", "sdxl"])
def test_a_prompt_is_cut_where_its_tokenizer_cuts_it(name):
    """Word by word: as soon as it is said to be cut, and no sooner, another end changes nothing."""
    case = tiny(name)
    words = (LONG * 60).split()

    def same(count: int) -> bool:
        prompts = [" ".join([*words[:count], end]) for end in ("wall", "the wall")]
        one, other = case.module.encode_text(case.encoders, prompts)
        return torch.equal(one["text"], other["text"])

    def cut(count: int) -> bool:
        return bool(case.encoders.cut([" ".join([*words[:count], "wall"])])[0])

    assert not cut(2) and not same(2)
    assert cut(550) and same(550)
    # Of letters one more at a time, the one that the tokenizer itself leaves out.
    text, most = case.encoders.text, {"cogvideox-2b": 24, "wan": 512}.get(name, 77)
    for count in range(most - 4, most + 3):
        prompt, left_out = " ".join("a" * count), False
        for part in filter(None, (text.tokenizer, getattr(text, "tokenizer_2", None))):
            ids = (part(prompt, max_length=most, truncation=t).input_ids for t in (False, True))
            left_out |= next(ids) != next(ids)
        assert (
            bool(case.encoders.cut([prompt])[0])
            == left_out
            == (count > most - len(part("").input_ids))
        )
    spaces = "a" + "&nbsp;" * 600 + "b"
    assert bool(case.encoders.cut([spaces])[0]) == (name != "wan")  # which cleans prompts


def test_a_medium_of_many_pairs_is_counted_once(tmp_path):
    data = write_pairs(tmp_path / "data", 3)
    ranked = {"prompt": "x", "candidates": ["0_w.mp4", "1_w.mp4", "2_w.mp4"]}
    more = {"prompt": "y", "candidates": ["2_w.mp4", "0_w.mp4"]}
    write_rows(data, [ranked, more])
    given = {"height": 8, "width": 8, "fps": 16, "progress": False}
    encode("toy", BASE, data, tmp_path / "set", **given)
    counts = json.loads((tmp_path / "set" / "counts.json").read_text())
    assert counts["pairs"] == 4
    assert counts["notes"]["resized"] == counts["notes"]["slower"] == 3


@pytest.mark.parametrize(
    ("fps", "asked", "count", "slower"),
    [
        (8, 16, 9, True),
        (16, 16, 9, False),
        (16, 16, 2, False),
        (24, 16, 9, False),
        (23.976, 24, 48, False),  # each frame once
        (23.976, 24, 600, True),
        (30000 / 1001, 29.97, 60, False),
        (12, 12.5, 12, True),
        (16, None, 9, False),
        (1, 16, 1, False),
    ],
)
def test_which_rates_are_below_the_asked_one(fps, asked, count, slower, tmp_path, capsys):
    for i, name in enumerate(("a.mp4", "b.webm")):
        if name == "a.mp4" or count > 1:
            write_clip(tmp_path / "a.mp4", noise(8, 8, i, count), fps)
    write_clip(tmp_path / "b.mkv", noise(8, 8, 7, count), fps)  # times in milliseconds
    write_rows(tmp_path, [{"prompt": "x", "chosen": "a.mp4", "rejected": "b.mkv"}])
    sampling = prepare.Sampling(fps=asked)
    found = prepare.survey(tmp_path, sampling=sampling, progress=False)["counts"]
    assert found.notes["slower"] == (2 if slower else 0)


def test_a_prompt_to_sample_from_that_is_cut_is_said(capsys):
    """Where no encoding counts it."""
    case = tiny("sd15")
    capsys.readouterr()
    Prompts(case.module, str(case.path), ["short", LONG * 30], torch.device("cpu"))
    said = capsys.readouterr().err
    assert re.search(r"^warning: prompt 2 is cut: \d+ tokens, of which 77 are read$", said, re.M)
    assert "prompt 1" not in said and "truncated" not in said
