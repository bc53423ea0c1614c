"""`fastpref` with a fault in it, told by the environment: what befalls processes of a long run.

FAULTS: some of `KIND:RANK:STEP` with commas, each in the attempt (torchrun's restarts) of its
place; FAULTS of an attempt that has none are none.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from fastpref import cli, ranks
from fastpref.run import bookkeeping, checkpoint, train
from fastpref.step import pair

attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
listed = os.environ.get("FAULTS", "").split(",")
kind, rank, step = [*(listed[attempt] if attempt < len(listed) else "").split(":"), "-1", "-1"][:3]
mine = ranks.rank() == int(rank)
at = 0  # the step that is being computed, from 1


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def here() -> bool:
    return mine and at == int(step)


def before(function, what):
    def call(*args, **kwargs):
        what()
        return function(*args, **kwargs)

    return call


def begins() -> None:
    """Of a step's forward."""
    if kind == "forward" and here():
        die()
    if kind == "memory" and here():
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if kind == "slow" and here():
        time.sleep(4)
    if kind == "late" and here():  # until torchrun ends it
        signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
        time.sleep(60)


def reduces() -> None:
    if kind == "reduction" and here():
        # The others wait in the sum of the gradients: this one has said that it comes.
        torch.distributed.all_reduce = lambda *_, **__: die()


def stops() -> None:
    if kind == "signal" and here():
        os.kill(os.getpid(), signal.SIGUSR1)


def spoiled(pred, target, ref, *rest, **how):
    if kind == "nan" and here():
        pred = pred * torch.nan
    return loss(pred, target, ref, *rest, **how)


def written(tensors: dict, path: Path) -> None:
    """A file of a checkpoint, which is of the step before the one at hand."""
    if kind == "save" and mine and at - 1 == int(step) and path.name == "optimizer.safetensors":
        die()
    save_file(tensors, path)


loss, update, save_file = pair.preference_loss, bookkeeping.update, checkpoint.save_file
pair.preference_loss = before(spoiled, begins)
bookkeeping.sum_gradients = before(before(bookkeeping.sum_gradients, reduces), stops)
checkpoint.save_file = written


def next_step(run):
    global at
    found = update(run)
    at = run.step + 1
    return found


def starts(run):
    global at
    at = run.step + 1
    return announce(run)


announce = train.announce
train.announce, bookkeeping.update = starts, next_step

arguments = sys.argv[1:]
if kind == "config" and mine:
    arguments[arguments.index("--beta") + 1] = "999"
if kind == "torch" and mine:
    torch.__version__ = "2.99.0"
if kind == "data" and mine:
    os.chdir("other")
sys.exit(cli.main(arguments))
