"""A round's pairs: which prompts, sampled batch by batch onto the disk, read back in order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import tidy, write_atomic
from ..pairs.order import epoch_batches, epoch_order
from ..pairs.shards import digest
from ..run import checkpoint
from ..run.assemble import Run
from .resampler import Rolled, Transition
from .step import kind

COUNTS = ("judged", "kept", "network", "decodes", "scores", "seconds")


def prompts_of(number: int, size: int, rows: Sequence[int], seed: int) -> list[tuple[int, int]]:
    """(epoch, row) of a round's prompts: rounds go through the rows in turn, in an order that each
    epoch has of its own.
    """
    found = []
    for i in range(number * size, (number + 1) * size):
        epoch, place = divmod(i, len(rows))
        if not found or found[-1][0] != epoch:
            order = list(epoch_order(len(rows), seed, epoch))
        found.append((epoch, rows[order[place]]))
    return found


def updates_of(
    transitions: Sequence[Transition], batch_size: int, accumulate: int, seed: int, number: int
) -> list[list[list[Transition]]]:
    """A round's optimiser steps, each of up to `accumulate` batches: all its transitions, once, in
    an order of the round's own. Batches are of one kind; the last ones may be smaller.
    """
    kinds = [kind(each) for each in transitions]
    rows = epoch_batches(kinds, batch_size, seed, number, rest=True)
    batches = [[transitions[i] for i in some] for some in rows]
    return [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]


def part_file(folder: Path, number: int, part: int) -> Path:
    return folder / f"round-{number:06d}-{part:03d}.safetensors"


def mark(run: Run) -> str:
    """What decides a round's pairs beside its number: the policy's step, options, identities."""
    config, described = run.config, run.config.described()
    fixed = {n: value for n, value in config.to_dict().items() if not described[n]["free"]}
    return json.dumps([run.own["since"], fixed, run.made_of], sort_keys=True)


def write_part(path: Path, mark: str, rows: Sequence[int], rolled: Rolled) -> None:
    """What one batch of prompts gave; rows: of its prompts; mark: of what it was sampled with."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for i, each in enumerate(rolled.transitions):
        tensors |= {f"{i:06d}.x": each.x.contiguous(), f"{i:06d}.y": each.y.contiguous()}
    said: dict[str, Any] = {
        "transitions": [[t.step, rows[t.row], t.gap] for t in rolled.transitions],
        "counts": {name: getattr(rolled, name) for name in COUNTS},
    }
    said["digest"] = digest(path, tensors, mark + json.dumps(said))
    write_atomic(path, save(tensors, {"fastpref": json.dumps(said)}))


def read_part(path: Path, mark: str) -> Rolled | None:
    """What `write_part` wrote, the rows of prompts in the transitions; None: there is nothing of
    that mark, or it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            said: dict[str, Any] = json.loads((file.metadata() or {})["fastpref"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if said.pop("digest") != digest(path, tensors, mark + json.dumps(said)):
            return None
        counts = said["counts"]
        counts["kept"] = {int(step): count for step, count in counts["kept"].items()}
        transitions = [
            Transition(step, row, tensors[f"{i:06d}.x"], tensors[f"{i:06d}.y"], gap)
            for i, (step, row, gap) in enumerate(said["transitions"])
        ]
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return Rolled(transitions, **counts)


def add(total: dict[str, Any], rolled: Rolled) -> None:
    """Adds a batch's counts to `total`, which a checkpoint keeps as JSON."""
    each = rolled.judged // max(1, len(rolled.kept))
    counts = {name: getattr(rolled, name) for name in ("network", "decodes", "scores", "seconds")}
    counts |= {"judged": rolled.judged, "pairs": sum(rolled.kept.values())}
    counts["transitions"] = len(rolled.transitions)
    counts |= {f"kept/{step}": n for step, n in rolled.kept.items()}
    counts |= {f"judged/{step}": each for step in rolled.kept}
    merge(total, counts)


def merge(total: dict[str, Any], counts: dict[str, Any]) -> None:
    for name, value in counts.items():
        total[name] = total.get(name, 0) + value


def prune(folder: Path, run_folder: Path, number: int) -> None:
    """Removes all rounds but `number` and those that a checkpoint goes on from."""
    tidy(folder)
    needed = {number}
    for saved in checkpoint.folders(run_folder):
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            needed.add(json.loads((saved / "state.json").read_bytes())["own"]["round"])
    for path in folder.glob("round-*-*.safetensors"):
        found = path.name.split("-")[1]
        if found.isdecimal() and int(found) not in needed:
            path.unlink()


def batches_of(chosen: Sequence[tuple[int, int]], size: int) -> Iterator[tuple[Tensor, list[int]]]:
    """(epochs [P] int64, rows) of a round's prompts, `size` at once."""
    for i in range(0, len(chosen), size):
        some = chosen[i : i + size]
        yield torch.tensor([epoch for epoch, _ in some]), [row for _, row in some]
