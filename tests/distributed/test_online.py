"""SPO, its preference model and the demo on two processes: what one process would have made."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from commands import BASE, arguments
from launch import run, start
from safetensors.torch import load_file

from fastpref.demo import clips
from fastpref.demo.online import CLIP
from fastpref.spo.config import SPOConfig
from fastpref.spo.loop import spo

HERE = Path(__file__).parent
SPO = HERE.parent / "spo"
SHARED = ("2/labels.jsonl", "2/labels-1.jsonl")
ADAPTER = "pytorch_lora_weights.safetensors"


def judge(frames, prompts, t):
    """Of tests/spo, by a process that the first attempt loses while it samples its second part."""
    from judges import calls, judge

    first = (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0")
    if first and calls["count"] == int(os.environ.get("DIES_AT", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    return judge(frames, prompts, t)


def values(folder: Path, prompts: Path, **changes) -> dict:
    sys.path.insert(0, str(SPO))
    from online import options

    few = {"gradient_accumulation_steps": 2, "train_batch_size": 3, "prompts_per_round": 3}
    few |= {"sample_batch_size": 1, "max_train_steps": 4, "win_rate_prompts": 3}
    few |= {"logging_steps": 2}  # a line's mean is over pairs, of one batch and of two
    return options(prompts, folder, **few | changes)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.txt"
    path.write_text("\n".join(clips.PAIR_PROMPTS[:9]) + "\n")
    return path


def apart(one: Path, other: Path) -> float:
    a, b = load_file(one / ADAPTER), load_file(other / ADAPTER)
    return max((a[name] - b[name]).abs().max().item() for name in a)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.distributed
def test_spo(prompts, tmp_path):
    """Three parts of a round, two or one batch of an update and three clips on two processes; the
    second time one is lost while it samples.
    """
    clip_list = json.dumps([clips.HELD_OUT[0], clips.HELD_OUT[1], clips.HELD_OUT[2]])
    looking = {"validation_steps": 2, "validation_sampling_steps": 2}
    few = values(tmp_path / "one", prompts, **looking)
    one = spo(SPOConfig(**few | {"validation_prompts": json.loads(clip_list)}))
    for name, dies in (("two", "-1"), ("again", "3")):
        several = few | {"output_dir": str(tmp_path / name), "scorer": "test_online:judge"}
        parts = [*arguments(several), "--validation_prompts", clip_list]
        path = os.pathsep.join(
            [str(HERE), str(SPO), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        )
        more = {"PYTHONPATH": path, "DIES_AT": dies}
        process = start(2, "spo", *parts, torchrun=["--max-restarts", "1"], **more)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, out + err[-4000:]
        assert ("starting at step 0" in err or "resumed" in out) == (name == "again")
        assert apart(tmp_path / "one", tmp_path / name) < 1e-4
        record = json.loads((tmp_path / name / "win_rate.json").read_text())
        wanted = json.loads((tmp_path / "one" / "win_rate.json").read_text())
        assert record["base"] == pytest.approx(wanted["base"], rel=1e-6)
        assert len(record["rounds"]) == len(wanted["rounds"]) > 1
        for got, want in zip(rows(tmp_path / name), rows(tmp_path / "one"), strict=True):
            assert got["global_step"] == want["global_step"] and got["epoch"] == want["epoch"]
            assert got.get("online/kept_by_step") == want.get("online/kept_by_step")
            assert got["loss"] == pytest.approx(want["loss"], abs=1e-5)
        sheets = [p.name for p in sorted((tmp_path / name / "validation").glob("*.png"))]
        assert sheets == ["step-000000.png", "step-000002.png", "step-000004.png"]
        # Each prompt's own clip, of its own seed.
        got, want = (
            load_file(tmp_path / n / "validation" / "base.safetensors") for n in (name, "one")
        )
        assert got.keys() == want.keys()
        assert all((got[k].int() - want[k].int()).abs().max() <= 1 for k in want)
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["online"]["judged"] == one["online"]["judged"]
    assert apart(tmp_path / "two", tmp_path / "again") == 0


@pytest.mark.distributed
def test_the_preference_model(encoded_pairs, tmp_path):
    """Batches of a step and of the held-out pairs on two processes."""
    few = {"family": "toy", "model": BASE, "data": encoded_pairs, "clip": CLIP, "frames": "tile"}
    few |= {"guidance_scale": 1.0, "held_out": 0.5, "train_batch_size": 1, "max_train_steps": 3}
    few |= {"gradient_accumulation_steps": 2, "logging_steps": 1, "learning_rate": 1e-3}
    few |= {"report_to": "none", "device": "cpu", "eval_steps": 3, "relabel": "clip"}
    for world in (1, 2):
        run(world, "spm", *arguments(few | {"output_dir": tmp_path / str(world)}))
    one, two = (load_file(tmp_path / n / "preference_model" / "model.safetensors") for n in "12")
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-4
    judged = [set((tmp_path / p).read_text().splitlines()[1:]) for p in ("1/labels.jsonl", *SHARED)]
    assert judged[0] == judged[1] | judged[2] and len(judged[1]) == len(judged[2]) == 3
    for want, got in zip(rows(tmp_path / "1"), rows(tmp_path / "2"), strict=True):
        name = "loss" if "loss" in want else "eval/loss"
        assert got[name] == pytest.approx(want[name], abs=1e-5)
        assert got.get("eval/accuracy") == want.get("eval/accuracy")


@pytest.mark.slow
def test_the_demo(tmp_path):
    """Pairs, encoding, four runs and what is said of them; the table is that of one."""
    few = ["--pairs", "16", "--steps", "4", "--clips", "8"]
    tables = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        out, _ = run(world, "demo", *few, "--output_dir", str(folder))
        lines = out[out.index("objective     win rate") :].splitlines()[1:5]
        # But for its last column, a time.
        tables.append([line.split()[:-1] for line in lines])
        assert len(tables[-1]) == 4
    assert tables[0] == tables[1]
    for name in ("dpo", "sft"):
        assert 0 < apart(tmp_path / "1" / name, tmp_path / "2" / name) < 1e-4
