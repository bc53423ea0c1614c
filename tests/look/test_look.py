"""`fastpref sample`, `eval` and `doctor`: what they refuse, keep and print."""

from __future__ import annotations

import json

import pytest
import torch
from commands import BASE, encoded, fails, undigested
from safetensors.torch import load_file, save_file
from tiny import adapt

import fastpref
from fastpref.cli import EVAL_SEED, main
from fastpref.look import evaluate
from fastpref.models import toy
from fastpref.pairs.media import write_clip
from fastpref.pairs.shards import pair_file
from fastpref.run import artifact

SIZE = ["--num_frames", "8", "--height", "12", "--width", "12", "--steps", "2"]
MODEL = ["--family", "toy", "--model", str(BASE)]


def sample(folder) -> list[str]:
    return ["sample", *MODEL, "--output_dir", str(folder), *SIZE, "--prompts", "a red disc"]


def test_a_sample_never_overwrites_what_is_not_its_own(tmp_path, capsys):
    mine = tmp_path / "mine" / "0000.mp4"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    assert "holds something else: choose another one" in fails(capsys, *sample(mine.parent))
    assert mine.read_bytes() == b"mine"
    for _ in range(2):  # the second over the first's
        assert main(sample(tmp_path / "new")) == 0
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [".fastpref", "0000.mp4"]


class Interrupted(torch.Tensor):
    """A clip whose hundredth frame does not come."""

    def contiguous(self):
        return self

    def numpy(self):
        yield from self.as_subclass(torch.Tensor).expand(99, -1, -1, -1).numpy()
        raise KeyboardInterrupt


def test_a_clip_is_written_whole_or_not_at_all(tmp_path):
    frame = torch.zeros(1, 12, 12, 3, dtype=torch.uint8)
    write_clip(tmp_path / "a.mp4", frame)
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_clip(tmp_path / "a.mp4", frame.as_subclass(Interrupted))
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


@pytest.fixture
def mixed(tmp_path):
    """Five pairs of two sizes in turn."""
    rows, generator = [], torch.Generator().manual_seed(0)
    for i, size in enumerate((12, 16, 12, 16, 12)):
        for name in "wl":
            frames = torch.randint(0, 256, (4, size, size, 3), generator=generator)
            write_clip(tmp_path / "media" / f"{i}_{name}.mp4", frames.to(torch.uint8))
        rows.append({"prompt": f"p{i}", "chosen": f"{i}_w.mp4", "rejected": f"{i}_l.mp4"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "media" / "metadata.jsonl").write_text(lines)
    return encoded(tmp_path / "media", tmp_path / "set")


def test_errors_of_clips_of_two_sizes(mixed):
    model, process = toy.load(BASE), fastpref.FlowMatching()
    how = {"seed": 3, "draws_per_pair": 2}
    together = evaluate.errors(model, toy, process, mixed, **how)
    alone = evaluate.errors(model, toy, process, mixed, batch_size=1, **how)
    assert together.shape == (5, 2)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


def test_eval_prints_changes_on_draws_of_its_own(mixed, tmp_path, capsys):
    model = toy.load(BASE)
    adapt(model, toy.LORA_TARGETS)
    artifact.export(tmp_path, model)
    where = [
        "eval",
        *MODEL,
        "--data",
        str(mixed.folder),
        "--lora",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    said = []
    for more in ([], ["--seed", str(EVAL_SEED)], ["--seed", "0"]):
        assert main([*where, "--draws_per_pair", "2", *more]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1] != said[2]  # 0 is what training draws from by default
    assert said[0].keys() == {
        "pairs", "implicit_acc", "chosen_error_change", "rejected_error_change"
    }  # fmt: skip


def test_eval_names_a_pair_that_is_not_finite(mixed, tmp_path, capsys):
    model = toy.load(BASE)
    adapt(model, toy.LORA_TARGETS)
    artifact.export(tmp_path, model)
    broken = pair_file(undigested(mixed.folder), mixed.pair_ids[3])  # or the change is the fault
    tensors = load_file(broken)
    tensors["latents_w"][0, 0, 0, 0] = torch.nan
    save_file(tensors, broken)
    where = ["--data", str(mixed.folder), "--lora", str(tmp_path), "--device", "cpu"]
    said = fails(capsys, "eval", *MODEL, *where, "--draws_per_pair", "2")
    assert said.startswith(f"fastpref eval: {broken}: errors expected finite, got nan (chosen), ")
    assert "and 1 of 5 pairs" in said


@pytest.mark.parametrize("why", ["", "no nvcc"])
def test_doctor_leaves_out_what_is_not_so(why, monkeypatch, capsys):
    monkeypatch.setattr(fastpref, "build_info", lambda: {"cpu": "avx2", "why_not_cuda": why})
    assert main(["doctor"]) == 0
    assert ("why_not_cuda" in capsys.readouterr().out) == bool(why)
