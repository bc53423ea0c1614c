"""`fastpref train` on 1, 2 and 4 processes: the same run, within the rounding of a sum."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import arguments, options
from launch import run
from safetensors.torch import load_file

from fastpref.run.config import Config
from fastpref.run.train import train

pytestmark = pytest.mark.distributed

ADAPTER = "pytorch_lora_weights.safetensors"
SUMS = 2e-5  # adapters of size 1 after four steps


def values(data: Path, folder: Path, **changes) -> dict:
    """Four batches a step, that 1, 2 or 4 processes share."""
    few = {"max_train_steps": 4, "train_batch_size": 1, "gradient_accumulation_steps": 4}
    return options(data, folder, **few | changes)


def apart(one: Path, other: Path) -> float:
    a, b = load_file(one / ADAPTER), load_file(other / ADAPTER)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(encoded_pairs, tmp_path_factory) -> Path:
    """One process's run."""
    folder = tmp_path_factory.mktemp("one") / "run"
    train(Config(**values(encoded_pairs, folder)))
    return folder


MODES = {
    "2": (2, {}),
    "4": (4, {}),
    "deferred on 2": (2, {"pair_mode": "deferred"}),
    "split on 2": (2, {"pair_mode": "split"}),
    "split on 4": (4, {"pair_mode": "split", "safeguard": 0.5}),
    "cached on 2": (2, {"reference": "cached", "draws_per_pair": 2}),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_same_run(mode, alone, encoded_pairs, tmp_path):
    world, changes = MODES[mode]
    if "reference" in changes:
        changes = changes | {"reference_cache": str(tmp_path / "cache")}
    if changes.keys() - {"pair_mode"}:
        alone = tmp_path / "one"
        train(Config(**values(encoded_pairs, alone, **changes | {"pair_mode": "joint"})))
    here = tmp_path / "several"
    out, said = run(world, "train", *arguments(values(encoded_pairs, here, **changes)))
    assert not [line for line in said if "epochs repeat" not in line]
    # Rank 0 alone speaks.
    assert out.count("objective  DPO") == 1 and f"{world} processes" in out
    assert apart(alone, here) < SUMS
    for one, several in zip(rows(alone), rows(here), strict=True):
        # The same pairs and draws: what neither policy nor rounding touches is equal to the bit.
        assert several["epoch"] == one["epoch"]
        same = ["errors/reference_w", "errors/reference_l"]
        rounded = ["loss", "errors/policy_w", "rewards/margins", "grad_norm"]
        tolerance = dict.fromkeys(same, 1e-7 if "pair_mode" in changes else 1e-12)
        for name in [*same, *rounded]:
            close = {"rel": tolerance.get(name, 1e-4), "abs": tolerance.get(name, 1e-4)}
            assert several[name] == pytest.approx(one[name], **close), name
        assert several["rewards/accuracies"] == one["rewards/accuracies"]
        assert several["perf/data_wait_fraction_max_rank"] in range(world)


def test_full_tuning_in_shards(encoded_pairs, tmp_path):
    """Two steps on two processes, each with half of every weight; one process goes on with the
    whole, and two with shards again: the model that one process would have made.
    """
    full = {"tuning": "full", "lora_rank": None, "learning_rate": 1e-4, "checkpointing_steps": 1}
    full = {k: v for k, v in values(encoded_pairs, tmp_path / "one", **full).items() if v}
    train(Config(**full))
    here = full | {"output_dir": str(tmp_path / "run")}
    for world, end in ((2, 2), (1, 3), (2, 4)):
        if world == 1:
            train(Config(**here | {"max_train_steps": end}))
        else:
            out, said = run(world, "train", *arguments(here | {"max_train_steps": end}))
            assert not said and "the model in shards" in out
    saved = tmp_path / "run" / "checkpoint-4"
    assert len(list(saved.glob("shard-*"))) == 2 and not (saved / "parameters.safetensors").exists()
    whole = "transformer/diffusion_pytorch_model.safetensors"
    one, other = (load_file(tmp_path / name / whole) for name in ("one", "run"))
    assert one.keys() == other.keys()
    assert max((one[name] - other[name]).abs().max() for name in one) < 2e-6
    began = load_file(Path(full["model"]) / whole)
    assert max((one[name] - began[name]).abs().max() for name in one) > 1e-4


def test_a_sum_in_bfloat16(alone, encoded_pairs, tmp_path):
    """As asked: it runs, and is another sum than float32's."""
    run(2, "train", *arguments(values(encoded_pairs, tmp_path / "b", reduce_dtype="bf16")))
    assert SUMS < apart(alone, tmp_path / "b") < 0.1


def test_resumed_on_another_number(encoded_pairs, alone, tmp_path):
    """Two steps on 4 processes, one on 2, the last on 1: the pairs, draws and schedule go on."""
    folder = tmp_path / "run"
    for world, end in ((4, 2), (2, 3), (1, 4)):
        changes = {"max_train_steps": end, "checkpointing_steps": 1}
        parts = arguments(values(encoded_pairs, folder, **changes))
        if world == 1:
            train(Config(**values(encoded_pairs, folder, **changes)))
        else:
            run(world, "train", *parts)
    assert [row["global_step"] for row in rows(folder)] == [1, 2, 3, 4]
    assert apart(alone, folder) < SUMS


def test_the_meter_goes_on(encoded_pairs, tmp_path):
    """What two processes have gathered since the last line of the log, one takes over."""
    every = {"logging_steps": 3, "checkpointing_steps": 1}
    train(Config(**values(encoded_pairs, tmp_path / "a", **every | {"max_train_steps": 3})))
    two = values(encoded_pairs, tmp_path / "b", **every | {"max_train_steps": 2})
    run(2, "train", *arguments(two))
    # As if it had been stopped before its last line.
    (tmp_path / "b" / "result.json").unlink()
    state = tmp_path / "b" / "checkpoint-1"
    assert json.loads((state / "state.json").read_text())["meter"]["counts"]
    for newer in (tmp_path / "b").glob("checkpoint-2"):
        newer.rename(tmp_path / "aside")
    train(Config(**two | {"max_train_steps": 3}))
    a, b = rows(tmp_path / "a")[-1], rows(tmp_path / "b")[-1]
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    assert torch.tensor([a["errors/policy_w"]]).allclose(torch.tensor([b["errors/policy_w"]]))


def test_what_cannot_be_shared(encoded_pairs, tmp_path):
    """One line, whoever else was started."""
    odd = values(encoded_pairs, tmp_path / "a", gradient_accumulation_steps=3)
    out, said = run(2, "train", *arguments(odd), code=1)
    assert said == [
        "fastpref train: gradient_accumulation_steps 3: expected a multiple of 2; it is the "
        "batches of a step of all 2 processes together, not of each"
    ]
    assert "loading the model" not in out
    _, said = run(3, "train", *arguments(odd | {"pair_mode": "split"}), code=1)
    assert len(said) == 1 and "3 processes, expected a multiple of 2" in said[0]
