"""Short online runs on the demo's base: options, what stops them, whether two are the same."""

import json
import signal
from pathlib import Path

import pytest
import torch
from commands import BASE
from safetensors.torch import load_file

from fastpref.run.guard import Interrupted
from fastpref.spo import loop
from fastpref.spo.config import SPOConfig
from fastpref.spo.loop import spo


def options(prompts: Path, folder: Path, **changes) -> dict:
    return {
        **{"family": "toy", "model": str(BASE), "data": str(prompts), "output_dir": str(folder)},
        **{"num_frames": 8, "height": 12, "width": 12, "scorer": "judges:judge"},
        **{"guidance_scale": 1.0, "sampling_steps": 5, "first_step": 1, "candidates": 2},
        **{"prompts_per_round": 4, "sample_batch_size": 2, "train_batch_size": 4},
        **{"threshold": 0.1, "max_train_steps": 6, "learning_rate": 1e-3, "lora_rank": 4},
        **{"logging_steps": 1, "checkpointing_steps": 2, "win_rate_prompts": 2},
        **{"win_rate_rounds": 2, "report_to": "none", "device": "cpu"},
        **changes,
    }


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def rows(folder: Path) -> list[dict]:
    """The log without what a clock says."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("perf/seconds_per_pair", "perf/data_wait_fraction", "online/seconds")
    return [{k: v for k, v in row.items() if k not in timed} for row in found]


def same(a: Path, b: Path) -> None:
    one, other = adapter(a), adapter(b)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert any(value.any() for name, value in one.items() if "lora_B" in name)
    assert rows(a) == rows(b)
    one, other = (json.loads((f / "win_rate.json").read_text()) for f in (a, b))
    assert one == other


def once_assembled(monkeypatch, then) -> None:
    """Calls `then(run, online)` before a run begins."""
    real = loop.assemble

    def assemble(*args):
        made = real(*args)
        then(*made)
        return made

    monkeypatch.setattr(loop, "assemble", assemble)


def stop() -> None:
    signal.raise_signal(signal.SIGTERM)


def stopped(folder: Path, update: int, prompts: Path, monkeypatch, **changes) -> SPOConfig:
    """A run that was asked to stop in its update of that number."""
    seen, real = [], loop.step_loss

    def step_loss(*args, **kwargs):
        seen.append(None)
        if len(seen) == update:
            stop()
        return real(*args, **kwargs)

    config = SPOConfig(**options(prompts, folder, **changes))
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=f"step {update} in"):
        patch.setattr(loop, "step_loss", step_loss)
        spo(config)
    return config
