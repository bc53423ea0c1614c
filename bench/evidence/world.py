"""What a comparison is made in: a base model, encoded pairs, two sets of prompts and a judge."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.files import write_atomic
from fastpref.run.folder import read_record

Asked = tuple[list[str], list[int]]  # prompts, and a seed of its own for each


@dataclass(frozen=True)
class World:
    """What a world's `prepare(folder, pairs, clips)` has made.

    choice: what betas are chosen on; report: what is reported, of other prompts, never trained on.
    settings: of Config, for every training. hyper: of Config, by objective or by the grid's name.
    load: a model in eval mode, the base or with an adapter's file in it, not merged.
    clips: of `choice` or of `report`. judge: `score` and its parts by name, [N] float64 each.
    errors: [pairs, 2] float64, of held-out pairs. spo(folder, seed, beta, steps): trains SPO there;
    it returns what the loop does, and `pairs_per_step` and `before`, seconds of what stood before
    it; None: no SPO here. before: seconds in which the pairs were sampled and labelled.
    """

    family: str
    model: Path
    data: Path
    shuffled: Path
    settings: dict[str, Any]
    hyper: dict[str, dict[str, Any]]
    choice: Asked
    report: Asked
    load: Callable[[Path | None], nn.Module]
    clips: Callable[[nn.Module, Asked], list[Tensor]]
    judge: Callable[[list[str], list[Tensor]], dict[str, Tensor]]
    errors: Callable[[nn.Module], Tensor]
    before: float
    spo: Callable[[Path, int, float, int], dict[str, Any]] | None = None


def asked(prompts: list[str], seed: int, count: int) -> Asked:
    """Each prompt in turn, with seeds from `seed` on."""
    return [prompts[i % len(prompts)] for i in range(count)], [seed + i for i in range(count)]


def clock() -> float:
    """Seconds: of this process where one thread of a CPU does all, so that what else runs there
    counts less; else of the wall.
    """
    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def once(record: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns, and its `seconds`; where it was made before, from the record.
    ValueError: that is not readable.
    """
    if not record.exists():
        start = clock()
        made = make()
        write_atomic(record, json.dumps(made | {"seconds": clock() - start}).encode())
    return read_record(record, {"seconds": float})
