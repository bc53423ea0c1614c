"""The order of an epoch's pairs, and its batches of equal shapes: the same in every process, found
a part at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from .index import Kinds

PART = 1 << 14  # rows that are planned at a time


def _parts(n: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """`epoch_order`, a part at a time."""
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
    # manual_seed takes all 64 bits; without the shift every run's order would be another one.
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    # As int32 the same permutation in a third of the time.
    order = torch.randperm(n, generator=generator, dtype=torch.int32).numpy()
    return (order[i : i + PART] for i in range(0, n, PART))


def epoch_order(n: int, seed: int, epoch: int) -> Iterator[int]:
    """A permutation of range(n): a function of the seed and the epoch alone."""
    for part in _parts(n, seed, epoch):
        yield from part.tolist()


def epoch_batches(
    shapes: Sequence[str],
    batch_size: int,
    seed: int,
    epoch: int,
    *,
    skip: int = 0,
    step: int = 1,
    rest: bool = False,
) -> Iterator[tuple[int, ...]]:
    """One epoch's batches of row numbers, each of equal shapes, found as they are asked for; what
    fills no batch is left out, or (rest) comes last, as batches that are not full. Of these every
    `step`-th from number `skip` on: the others cost 0.1 us a pair.
    """
    for part in every(planned(shapes, batch_size, seed, epoch, rest=rest), skip, step):
        yield from map(tuple, part.tolist())


def planned(
    shapes: Sequence[str], batch_size: int, seed: int, epoch: int, *, rest: bool = False
) -> Iterator[np.ndarray]:
    """The same, [batches, batch_size] of a part of the epoch's order at a time."""
    shapes = Kinds.of(shapes)
    left, seen = np.empty(0, np.int32), {}
    for part in _parts(len(shapes), seed, epoch):
        rows = np.concatenate([left, part])
        codes = shapes.codes[rows]
        by_code = codes.argsort(kind="stable")  # places in rows
        counts = np.bincount(codes)
        place = np.arange(len(rows)) - (counts.cumsum() - counts)[codes[by_code]]
        fills = place < (counts - counts % batch_size)[codes[by_code]]
        places = by_code[fills].reshape(-1, batch_size)
        yield rows[places[places[:, -1].argsort()]]  # as the last pair of each comes
        left = rows[by_code[~fills]]  # of each shape in their order
        if rest:
            new, at = np.unique(codes, return_index=True)
            seen |= dict.fromkeys(new[at.argsort()].tolist())
    for code in seen:  # in the order in which they came
        end = left[shapes.codes[left] == code]
        if len(end):
            yield end[None]


def every(parts: Iterable[np.ndarray], skip: int, step: int) -> Iterator[np.ndarray]:
    """Of batches that come in parts every `step`-th, from number `skip` on."""
    for part in parts:
        yield part[skip::step]
        skip += step * len(range(skip, len(part), step)) - len(part)


def batches_per_epoch(shapes: Sequence[str], batch_size: int) -> int:
    """How many whole batches of equal shapes there are: the same number in every epoch.

    Raises:
        ValueError: fewer pairs of one shape than `batch_size`.
    """
    counts = Kinds.of(shapes).counts()
    total = sum(count // batch_size for count in counts.values())
    if not total:
        kinds = f" of one shape ({len(counts)} shapes)" if len(counts) > 1 else ""
        raise ValueError(
            f"data: expected at least train_batch_size = {batch_size} pairs{kinds}, "
            f"got {max(counts.values(), default=0)}; lower train_batch_size to that or add pairs"
        )
    return total


def left_out(shapes: Sequence[str], batch_size: int) -> str | None:
    """Which pairs no epoch trains on, in words; None: each is in some."""
    counts = Kinds.of(shapes).counts()
    never = {shape: n for shape, n in counts.items() if n < batch_size}
    said = (
        f"{sum(never.values())} of {len(shapes)} pairs never train: fewer than train_batch_size = "
        f"{batch_size} pairs have their shape ({'; '.join(never)}); encode them all at one size"
    )
    return said if never else None
