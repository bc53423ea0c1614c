"""A data set in memory, and a script that fills a reference cache from it: FOLDER PAUSE."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastpref
from fastpref.pairs.dataset import Batch, Pair
from fastpref.step import cache, filling

K = 3
KIND = {"draws_per_pair": K, "train_batch_size": 2, "seed": 11, "pair_mode": "joint"}


class Pairs:
    """Seven pairs, of two shapes."""

    def __init__(self) -> None:
        self.pair_ids = [(n * 0x9E3779B97F4A7C15) % 2**63 for n in range(1, 8)]
        self.shapes = ["long" if n == 2 else "short" for n in range(7)]
        self.loaded = 0

    def __len__(self) -> int:
        return 7

    def __getitem__(self, i: int) -> Pair:
        self.loaded += 1
        generator = torch.Generator().manual_seed(i)
        frames = 5 if self.shapes[i] == "long" else 3
        w, l = torch.randn(2, 16, frames, 8, 8, generator=generator)
        text = torch.randn(5, 32, generator=generator)
        return Pair(w, l, {"text": text}, 1.0, self.pair_ids[i], "")


def kind(path: Path, c: Any, **changes: Any) -> dict[str, Any]:
    """A fingerprint; the files it looks at are made where they are missing."""
    path.mkdir(parents=True, exist_ok=True)
    for name in ("index.parquet", "fingerprint.json"):
        if not (path / name).exists():
            (path / name).write_text("something")
    values = {
        "model": path, "data": path, "process": c.process, "seed": 11, "draws_per_pair": K,
        "batch_size": 2, "pair_mode": "joint", "compile": None, "attention": "native",
        "device": "cpu", "dtype": "float32", "weights_dtype": "float32", "prompt_dropout": 0.0,
    }  # fmt: skip
    return cache.fingerprint(**{**values, **changes})


def prepare(k: int, batch: Batch) -> tuple[Batch, fastpref.Draws]:
    """Draw k, with a condition changed in place as prompt dropout does."""
    draws = fastpref.Draws(11, batch.pair_id, torch.full_like(batch.pair_id, k))
    batch.cond["text"] = batch.cond["text"] * (1 + k)
    return batch, draws


def fill(folder: Path, pause: float) -> int:
    """Fills `folder` by a reference that takes `pause` seconds a batch, each batch written."""

    def reference(noisy: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        time.sleep(pause)
        return noisy * cond["text"].mean((1, 2)).view(-1, 1, 1, 1, 1)

    cache.SECONDS = -1
    errors = cache.ErrorCache(folder, KIND, Pairs())
    return filling.fill(errors, reference, fastpref.FlowMatching(), prepare)


if __name__ == "__main__":
    fill(Path(sys.argv[1]), float(sys.argv[2]))
