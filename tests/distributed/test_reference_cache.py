"""The reference's errors on several processes: ahead of a run, and as it goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import arguments, options
from launch import run
from safetensors.torch import load_file

from fastpref.cli import main

pytestmark = pytest.mark.distributed
NAMES = ("pair_id", "index", "errors")


def errors_in(folder: Path) -> tuple[dict[tuple[int, int], list[float]], int]:
    """({(pair, draw): errors}, in how many rows) of a cache's files; where a draw stands in two of
    them they say the same.
    """
    found, rows = {}, 0
    for file in folder.glob("errors-*"):
        part = load_file(file)
        for pair, index, errors in zip(*(part[n].tolist() for n in NAMES), strict=True):
            assert found.setdefault((pair, index), errors) == pytest.approx(errors, rel=1e-5)
            rows += 1
    return found, rows


def test_processes_fill_the_cache_of_one(pairs, tmp_path, capsys):
    """Of media too, which they encode first; and a run reads it."""
    own = {"reference": "cached", "draws_per_pair": 2, "train_batch_size": 1}
    found = {}
    for world in (1, 2):
        out, where = tmp_path / f"run-{world}", tmp_path / f"cache-{world}"
        flags = arguments(options(pairs, out, reference_cache=str(where), **own))
        if world == 1:
            assert main(["cache-reference", *flags]) == 0
            said, err = capsys.readouterr().out, []
        else:
            said, err = run(2, "cache-reference", *flags)
        assert said.count("errors computed") == said.count(f"{where}: 20 errors computed") == 1
        found[world], rows = errors_in(where)
        assert err == [] and rows == 20 and len(list(where.glob("errors-*"))) == world
    assert found[1] == found[2]
    assert main(["train", *flags]) == 0
    assert ", 20 of 20 errors are there" in capsys.readouterr().out


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_what_another_process_has_computed_is_read_and_not_computed_again(
    tuning, encoded_pairs, tmp_path
):
    """Six pairs in batches of two: three batches an epoch, shared by two processes. In shards a
    pass is one of both: one that has to ask the reference does not wait for the other for good.
    """
    own = {"reference": "cached", "draws_per_pair": 2, "gradient_accumulation_steps": 2}
    own |= {"max_train_steps": 9, "checkpointing_steps": 9}  # 18 batches, 6 epochs
    if tuning == "full":
        own |= {"tuning": "full", "learning_rate": 1e-5}
    logs, errors = {}, {}
    for world in (1, 2):
        out, where = tmp_path / f"run-{world}", tmp_path / f"cache-{world}"
        values = options(encoded_pairs, out, reference_cache=str(where), **own)
        if tuning == "full":
            del values["lora_rank"]
        flags = arguments(values)
        assert main(["train", *flags]) == 0 if world == 1 else run(world, "train", *flags)
        lines = (out / "metrics.jsonl").read_text().splitlines()
        logs[world] = [json.loads(line) for line in lines]
        errors[world], rows = errors_in(where)
        # Where both ask at once, before either has written, both compute.
        assert rows == 12 if world == 1 else 12 <= rows <= 12 + 4
    assert errors[1].keys() == errors[2].keys() and len(errors[1]) == 12
    for draw, said in errors[1].items():
        assert errors[2][draw] == (said if tuning == "lora" else pytest.approx(said, rel=1e-5))
    losses = [[row["loss"] for row in logs[world]] for world in (1, 2)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert logs[2][-1]["perf/reference_cached"] == 1.0
