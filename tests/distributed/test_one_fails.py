"""What befalls one of several processes ends in a resumed run with nothing lost, or in one line
that says who and what.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from commands import arguments, encoded, options, write_pairs
from launch import run, said, start, wait_for, workers
from safetensors.torch import load_file

from fastpref.pairs.dataset import epoch_batches
from fastpref.pairs.shards import pair_file
from fastpref.run import checkpoint
from fastpref.run.config import Config
from fastpref.run.train import train

pytestmark = pytest.mark.distributed

FAULTY = str(Path(__file__).with_name("faulty.py"))
STEPS = 6


def values(data: Path, folder: Path, **changes) -> dict:
    few = {"max_train_steps": STEPS, "train_batch_size": 1, "gradient_accumulation_steps": 2}
    return options(data, folder, **few | changes)


def parameters(folder: Path) -> dict:
    newest, _ = checkpoint.newest(folder)
    assert newest.name == f"checkpoint-{STEPS}"
    return load_file(newest / "parameters.safetensors")


def equal(a: Path, b: Path) -> bool:
    """To the bit: the sum of two gradients does not depend on their order."""
    one, other = parameters(a), parameters(b)
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.fixture(scope="module")
def unbroken(encoded_pairs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run(2, "train", *arguments(values(encoded_pairs, folder)))
    return folder


def test_kill_9_and_torchruns_restarts(encoded_pairs, unbroken, tmp_path):
    """In the forward, in the reduction, during a save: --max-restarts goes on from the last
    checkpoint each time.
    """
    faults = {"FAULTS": "forward:1:2,reduction:1:3,save:0:4"}
    parts = arguments(values(encoded_pairs, tmp_path / "run"))
    process = start(2, FAULTY, "train", *parts, torchrun=["--max-restarts", "3"], **faults)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-4000:]
    # Before the first checkpoint, after it, and while the second is written.
    assert out.count("resumed from") == out.count("checkpoint-2\n") == 2
    assert equal(unbroken, tmp_path / "run")


@pytest.mark.parametrize("whom", ["all", "one"])
def test_signals(whom, encoded_pairs, unbroken, tmp_path):
    """SIGTERM to torchrun and so to all, SIGUSR1 to one: all leave at the same step, saved."""
    folder = tmp_path / "run"
    parts = arguments(values(encoded_pairs, folder, checkpointing_steps=1000))
    if whom == "all":
        process = start(2, FAULTY, "train", *parts, FAULTS="slow:1:4")  # time to be told
        wait_for(folder / "metrics.jsonl", process)
        while (folder / "metrics.jsonl").read_bytes().count(b"\n") < 3:
            pass
        for pid in workers(process).values():
            os.kill(pid, signal.SIGTERM)
        _, err = process.communicate(timeout=240)
        assert process.returncode
    else:
        restarts = ["--max-restarts", "2"]  # which do not go on against a person's wish
        process = start(2, FAULTY, "train", *parts, torchrun=restarts, FAULTS="signal:1:3")
        _, err = process.communicate(timeout=240)
    saved = [path.name for path in checkpoint.folders(folder)]
    assert saved == ["checkpoint-4"]  # the signal to one came when all had gone past asking in 3
    lines = said(err)
    assert len(lines) == 1 and "saved at step 4" in lines[0], err
    run(2, "train", *parts)
    assert equal(unbroken, folder)


def test_a_full_disk(encoded_pairs, unbroken, tmp_path):
    """One line, the checkpoint before it stands, and with room again the run goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        parts = arguments(values(encoded_pairs, disk / "run", checkpoints_total_limit=1))
        _, lines = run(2, "train", *parts, code=1)
        assert len(lines) == 1 and "No space left on device" in lines[0]
        kept, _ = checkpoint.newest(disk / "run")
        assert kept.name == "checkpoint-2"
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        out, _ = run(2, "train", *parts)
        assert "resumed from" in out and equal(unbroken, disk / "run")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_shard_that_cannot_be_read(tmp_path):
    """Of one process, in the middle: all end, what was done is saved, one line names the file."""
    dataset = encoded(write_pairs(tmp_path / "media", count=12), tmp_path / "data")
    folder, whole = tmp_path / "run", tmp_path / "one"
    # Of rank 1 in the last step: not among the pairs that all look at before the first.
    (row,) = list(epoch_batches(dataset.shapes, 1, 0, 0))[2 * STEPS - 1]
    broken = pair_file(dataset.folder, dataset.pair_ids[row])
    content = broken.read_bytes()
    broken.write_bytes(content[:-8])
    changes = {"checkpointing_steps": 1000, "num_workers": 0}
    parts = arguments(values(dataset.folder, folder, **changes))
    _, lines = run(2, "train", *parts, code=1)
    assert len(lines) == 1 and str(broken) in lines[0]
    assert [path.name for path in checkpoint.folders(folder)] == [f"checkpoint-{STEPS - 1}"]
    broken.write_bytes(content)
    out, _ = run(2, "train", *parts)
    assert "resumed from" in out
    train(Config(**values(dataset.folder, whole, **changes)))
    one, other = parameters(whole), parameters(folder)
    assert max((one[name] - other[name]).abs().max() for name in one) < 2e-5


def test_not_a_number_on_one(encoded_pairs, tmp_path):
    """Every process skips that step: parameters stay what they were, and the same everywhere."""
    once = {"max_train_steps": 3, "checkpointing_steps": 1}
    parts = arguments(values(encoded_pairs, tmp_path / "run", **once))
    _, lines = run(2, FAULTY, "train", *parts, FAULTS="nan:1:2")
    assert lines == [
        "warning: step 2: 1 steps skipped, their loss or gradient was not finite",
    ]
    states = [
        load_file(tmp_path / "run" / f"checkpoint-{step}" / "parameters.safetensors")
        for step in (1, 2, 3)
    ]
    for name in states[0]:
        assert states[1][name].equal(states[0][name])
    assert any(not states[2][name].equal(states[1][name]) for name in states[0])


def test_out_of_memory_on_one(encoded_pairs, tmp_path):
    """All end with its one line; of adapters what was done is saved, in shards the others wait in a
    pass for it.
    """
    parts = arguments(values(encoded_pairs, tmp_path / "run", checkpointing_steps=1000))
    _, lines = run(2, FAULTY, "train", *parts, code=1, FAULTS="memory:1:4")
    assert len(lines) == 1 and "out of memory with checkpointing none" in lines[0], lines
    assert "checkpoint-3 is kept" in lines[0] and "rank" not in lines[0]
    few = {"tuning": "full", "learning_rate": 1e-4, "timeout": 12.0}
    full = values(encoded_pairs, tmp_path / "full", **few)
    del full["lora_rank"]
    _, lines = run(2, FAULTY, "train", *arguments(full), code=1, FAULTS="memory:1:4")
    assert len(lines) == 1 and "out of memory (CUDA out of memory. Tried" in lines[0], lines
    _, lines = run(2, FAULTY, "train", *arguments(full), code=1, FAULTS="forward:1:4")
    gone = "fastpref train: another process of the run is gone; run the same command to go on"
    assert lines == [gone]


def test_processes_that_differ(encoded_pairs, tmp_path, monkeypatch):
    """The field is named."""
    parts = arguments(values(encoded_pairs, tmp_path / "run"))
    # Once: no restart mends a mistake.
    again = ["--max-restarts", "2"]
    _, lines = run(2, FAULTY, "train", *parts, code=1, torchrun=again, FAULTS="config:1:0")
    assert lines == [
        "fastpref train: the config differs between the processes: beta (1000.0 on rank 0, 999.0 "
        "on rank 1): start all with the same"
    ]
    _, lines = run(2, FAULTY, "train", *parts, code=1, FAULTS="torch:1:0")
    assert len(lines) == 1 and "what is there differs between the processes: torch (" in lines[0]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(encoded_pairs, "data")
    encoded(write_pairs(tmp_path / "media", count=6, seed=1), tmp_path / "other" / "data")
    parts = arguments(values(Path("data"), tmp_path / "run"))
    _, lines = run(2, FAULTY, "train", *parts, code=1, FAULTS="data:1:0")
    assert len(lines) == 1
    assert "what the run is made of differs between the processes: data (" in lines[0]


def test_a_straggler_is_named(encoded_pairs, unbroken, tmp_path):
    parts = arguments(values(encoded_pairs, tmp_path / "run", timeout=12.0))
    process = start(2, FAULTY, "train", *parts, FAULTS="late:1:4")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    lines = said(err)
    assert len(lines) == 1, err
    assert "rank 1 of 2 did not come within 12 s: look at its machine" in lines[0]
    run(2, "train", *parts)
    assert equal(unbroken, tmp_path / "run")
    steps = [json.loads(line)["global_step"] for line in (tmp_path / "run/metrics.jsonl").open()]
    assert steps == [*range(1, STEPS + 1)]
