"""Clips longer or larger than a Wan transformer has rotary places for: one line that says so."""

from __future__ import annotations

import pytest
import torch
from commands import BASE, fails
from tiny import transformer


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (("65", "12", "12"), "frames expected at most 64, for which the transformer has places, "
         "got 65: pass --num_frames 64"),
        (("4", "260", "12"), "at most 256x256, for which the transformer has places, got 260x12: "
         "pass --height 256 --width 12"),
        (("4", "12", "260"), "got 12x260: pass --height 12 --width 256"),
    ],
)  # fmt: skip
def test_a_sample_beyond_them(size, says, tmp_path, capsys):
    sizes = [w for flag, n in zip(("num_frames", "height", "width"), size, strict=True)
             for w in (f"--{flag}", n)]  # fmt: skip
    where = ["--family", "toy", "--model", str(BASE), "--output_dir", str(tmp_path)]
    said = fails(capsys, "sample", *where, *sizes, "--steps", "2", "--prompts", "a disc")
    assert said.endswith(f"{says}\n")


@pytest.mark.parametrize("name", ["toy", "wan"])
def test_the_last_place_is_taken(name):
    family, model, _, (channels, *_), width = transformer(name)
    limit = model.config.rope_max_seq_len
    cond, t = {"text": torch.zeros(1, 5, width)}, torch.zeros(1)
    with torch.no_grad():
        assert (
            family.predict(model, torch.zeros(1, channels, limit, 4, 4), t, cond).isfinite().all()
        )
        with pytest.raises(ValueError, match=f"rope_max_seq_len {limit}"):
            family.predict(model, torch.zeros(1, channels, limit + 1, 4, 4), t, cond)
