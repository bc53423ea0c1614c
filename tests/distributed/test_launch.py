"""The launch files: two nodes as two process groups on the loopback, with and without Slurm."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from commands import arguments, options
from launch import wait_for, workers
from safetensors.torch import load_file

from fastpref.run.config import Config
from fastpref.run.train import train

pytestmark = pytest.mark.distributed

LAUNCH = Path(__file__).parents[2] / "bench" / "launch"
ADAPTER = "pytorch_lora_weights.safetensors"


def environment(**more: str) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": tools, "PORT": port} | more


def values(data: Path, folder: Path) -> dict:
    few = {"max_train_steps": 4, "train_batch_size": 1, "gradient_accumulation_steps": 2}
    return options(data, folder, **few, checkpointing_steps=1, checkpoints_total_limit=9)


def apart(one: Path, other: Path) -> float:
    a, b = load_file(one / ADAPTER), load_file(other / ADAPTER)
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def alone(encoded_pairs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    train(Config(**values(encoded_pairs, folder)))
    return folder


def test_two_nodes_and_one_loses_its_process(alone, encoded_pairs, tmp_path):
    """Both start again, also the node where nothing had failed."""
    parts = arguments(values(encoded_pairs, tmp_path / "run"))
    node = ["bash", str(LAUNCH / "nodes.sh"), "train", *parts]
    shared = environment(HEAD="127.0.0.1", NODES="2", GPUS="1", RESTARTS="2")
    how = {"env": shared, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    nodes = [subprocess.Popen(node, **how) for _ in range(2)]
    wait_for(tmp_path / "run" / "checkpoint-1", nodes[0])
    lost = {rank: pid for each in nodes for rank, pid in workers(each).items()}
    os.kill(lost[1], signal.SIGKILL)
    for each in nodes:
        _, err = each.communicate(timeout=200)
        assert each.returncode == 0, err[-3000:]
    assert apart(alone, tmp_path / "run") < 2e-5


SRUN = """#!/usr/bin/env bash
# Slurm's, of two nodes that are this machine.
while [[ $1 == --* ]]; do shift; done
"$@" & first=$!
"$@" & second=$!
trap 'kill $first $second' TERM
wait $first && wait $second
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
  show) echo 127.0.0.1; echo 127.0.0.1 ;;
  requeue) touch "$REQUEUED" ;;
esac
"""


def test_slurm(alone, encoded_pairs, tmp_path):
    """Its scripts alone: what Slurm does is done by two of a few lines. Before the time limit the
    run is saved and the job queued again; then it goes on.
    """
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    more = {"SLURM_JOB_NODELIST": "this,this", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    more |= {"SLURM_GPUS_ON_NODE": "1", "REQUEUED": str(tmp_path / "again"), "SAVING": "3"}
    found = environment(RESTARTS="0", **more)
    found["PATH"] = f"{tmp_path}{os.pathsep}{found['PATH']}"
    parts = arguments(values(encoded_pairs, tmp_path / "run") | {"max_train_steps": 400})
    job = ["bash", str(LAUNCH / "slurm.sh"), "train"]
    how = {"env": found, "cwd": LAUNCH.parents[1], "start_new_session": True}
    how |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = subprocess.Popen([*job, *parts], **how)
    wait_for(tmp_path / "run" / "checkpoint-1", first)
    os.kill(first.pid, signal.SIGUSR1)  # as --signal=B:USR1
    first.wait(timeout=120)
    assert (tmp_path / "again").exists()
    end = time.time() + 60
    while running(more["REQUEUED"]) and time.time() < end:
        time.sleep(0.1)
    saved = max(int(p.name.split("-")[1]) for p in (tmp_path / "run").glob("checkpoint-*"))
    assert 1 <= saved < 400
    parts[parts.index("--max_train_steps") + 1] = str(saved + 1)
    assert subprocess.run([*job, *parts], **how, timeout=200).returncode == 0
    assert (tmp_path / "run" / f"checkpoint-{saved + 1}").exists()
    assert (tmp_path / "run" / ADAPTER).exists()


def running(mark: str) -> bool:
    """Whether there are processes with `mark` in their environment."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.encode() in path.read_bytes():
                return True
    return False
