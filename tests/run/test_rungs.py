"""Runs with attention, compile and cuda_graphs: the same run, recorded, refused in one line."""

from __future__ import annotations

import json

import pytest
import torch
from commands import options, write_pairs
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from fastpref.run.config import Config
from fastpref.run.train import train

ARTIFACT = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("rungs") / "data", count=6)


def run(data, folder, **changes) -> tuple[dict, list[dict]]:
    """(the adapter, the metrics)."""
    train(Config(**options(data, folder, **changes)))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return load_file(folder / ARTIFACT), [json.loads(line) for line in lines]


def timeless(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("pair_mode", ["joint", "deferred"])
def test_a_run_in_static_buffers_is_the_run(pair_mode, data, tmp_path, capsys):
    """On a CPU without graphs, but through their buffers, with accumulation: bit for bit."""
    same = {"pair_mode": pair_mode, "gradient_accumulation_steps": 2, "objective": "sdpo"}
    plain = run(data, tmp_path / "plain", **same)
    recorded = run(data, tmp_path / "recorded", cuda_graphs=True, **same)
    said = capsys.readouterr()
    assert "graphs: the step runs without CUDA graphs (cpu has no CUDA graphs)" in said.err
    assert ", CUDA graphs" in said.out
    assert all(torch.equal(plain[0][name], recorded[0][name]) for name in plain[0])
    assert timeless(plain[1]) == timeless(recorded[1])


def test_the_attention_that_was_picked_is_printed_recorded_and_kept(data, tmp_path, capsys):
    run(data, tmp_path / "run", max_train_steps=1)
    assert "attention  native\n" in capsys.readouterr().out
    record = tmp_path / "run" / "attention.json"
    assert json.loads(record.read_text())["attention"] == "native"
    record.write_text(json.dumps({"attention": "cudnn"}))  # an earlier part, on another machine
    with pytest.raises(ValueError, match="attention cudnn: needs an NVIDIA GPU"):
        run(data, tmp_path / "run", max_train_steps=2)


def test_a_backend_that_is_not_there_is_one_line(data, tmp_path):
    with pytest.raises(ValueError) as raised:
        run(data, tmp_path, attention="flash3")
    assert str(raised.value).startswith("attention flash3: ") and "\n" not in str(raised.value)


def test_skip_zeros_and_graphs_exclude_each_other(data, tmp_path):
    with pytest.raises(ValueError, match="skip_zeros waits for the device"):
        Config(**options(data, tmp_path, objective="hinge", skip_zeros=True, cuda_graphs=True))


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["adapters_off", "frozen_copy"])
def test_a_compiled_run_is_the_run_within_rounding(reference, data, tmp_path):
    """Probes, self-checks and validation compile nothing; all is compiled in the first step."""
    torch._dynamo.reset()
    counters.clear()
    same = {"reference": reference, "checkpointing": "attention", "max_train_steps": 3}
    plain = run(data, tmp_path / "plain", **same)
    compiled = run(
        data, tmp_path / "compiled", compile=True,
        validation_prompts=["a red square moves right"], validation_steps=2, **same,
    )  # fmt: skip
    # A frozen copy without adapters is other code than the blocks with adapters.
    assert counters["stats"]["unique_graphs"] == 3
    for name in plain[0]:
        torch.testing.assert_close(compiled[0][name], plain[0][name], rtol=1e-2, atol=1e-4)
