"""What a cache of the reference's errors lacks, computed: ahead of a run, or as the run needs it.

Draw k of a pair is computed in the batch that the pair is in in epoch k of a training run. So
`look_up`, in a run, and `fill`, which is ahead of it, write the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor
from tqdm import tqdm

from .. import ranks
from ..loss.functional import Draws
from ..pairs.dataset import Batch, collate, map_ahead
from ..pairs.order import epoch_batches
from .cache import ErrorCache
from .reference import Reference, errors

Prepare = Callable[[int, Batch], tuple[Batch, Draws]]  # (draw's number, batch) -> on the device


def fill(
    cache: ErrorCache,
    reference: Reference,
    process: Any,
    prepare: Prepare,
    *,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
) -> int:
    """Computes the errors that `cache` lacks; returns how many.

    Each in its batch of the epoch of its number; pairs that fill none there are batches of their
    own, filled up with themselves. Killed and called again it goes on. rank of world computes every
    world-th batch and waits for nobody. num_workers: threads that read ahead.

    Raises:
        ValueError: an error is not finite; the others are kept.
        OSError: the folder cannot be written.
    """
    work = []
    for k in range(cache.fingerprint["draws_per_pair"]):
        lacking = cache.lacking(k).numpy().tobytes()
        every = _batches(cache, k, rank, world)
        work += [(k, rows) for rows in every if any(lacking[row] for row in rows)]
    before, total = cache.computed, sum(len(rows) for _, rows in work)
    # None is tqdm's way to say: no bar where stderr is not a terminal.
    with tqdm(total=total, unit="draw", disable=True if rank else None, file=sys.stderr) as bar:
        load = partial(_load, cache)
        for (k, rows), batch in zip(work, map_ahead(load, work, num_workers), strict=True):
            _compute(cache, reference, process, prepare, k, rows, batch)
            bar.update(len(rows))
    if not cache.flush():
        cache.write()  # raises what the warning said
    lacking = [cache.lacking(k) for k in range(cache.fingerprint["draws_per_pair"])]
    bad = [row for k, rows in work for row in rows if lacking[k][row]]
    if bad:
        raise ValueError(
            f"the reference's error of pair {cache.dataset.pair_ids[bad[0]]:016x} is not finite "
            f"({len(bad)} of {total} are not): try mixed_precision no, or remove such pairs"
        )
    return cache.computed - before


def look_up(
    cache: ErrorCache,
    reference: Reference,
    process: Any,
    prepare: Prepare,
    epoch: int,
    batch: Batch,
    draws: Draws,
    *,
    together: bool = False,
) -> Tensor:
    """The errors [2B] float64 of a training batch, winners first; what is not known is computed and
    kept, as `fill` would.

    So beyond draws_per_pair, where a draw comes again in another batch, what its own epoch left
    over (or what is lost) is computed in the batch that it would have had there; and of several
    processes each then asks for what another has computed, which is read from the disk. together:
    several make a pass of the reference; where one has to, each does, of its batch as it is.
    """
    again = epoch >= cache.fingerprint["draws_per_pair"]
    cache.asked += 1
    found = cache.get(draws)
    if found is None and again:
        cache.flush()  # the others may ask for this one's
        found = cache.get(draws)
    cache.found += found is not None
    if together and any(ranks.gathered(found is None)):
        again, found = False, None
    if found is not None:
        return found
    if again:
        k, row = int(draws.index[0]), cache.rows(draws.pair_id)
        lacking = set(row[cache.lacking(k)[row]].tolist())
        for rows in _batches(cache, k):
            if not lacking.isdisjoint(rows):
                _compute(cache, reference, process, prepare, k, rows, _load(cache, (k, rows)))
                lacking.difference_update(rows)
            if not lacking:
                break
        found = cache.get(draws)
    if found is None:
        found = errors(reference, process, batch, draws, cache.fingerprint["pair_mode"])
        cache.put(draws, found)
    return found


def _batches(
    cache: ErrorCache, draw: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[int, ...]]:
    """The batches of rows in which a draw is computed: those of its epoch, then what is left."""
    size, seed = (cache.fingerprint[name] for name in ("train_batch_size", "seed"))
    share = {"skip": rank, "step": world}
    return epoch_batches(cache.dataset.shapes, size, seed, draw, rest=True, **share)


def _load(cache: ErrorCache, work: tuple[int, tuple[int, ...]]) -> Batch:
    """A batch of `_batches`, filled up with its own pairs."""
    _, rows = work
    size = cache.fingerprint["train_batch_size"]
    # Full, as in training: a matrix product rounds by how many rows it has.
    return collate([cache.dataset[rows[i % len(rows)]] for i in range(size)])


def _compute(
    cache: ErrorCache,
    reference: Reference,
    process: Any,
    prepare: Prepare,
    draw: int,
    rows: tuple[int, ...],
    batch: Batch,
) -> None:
    ready, draws = prepare(draw, batch)
    found = errors(reference, process, ready, draws, cache.fingerprint["pair_mode"])
    count = len(rows)
    own = Draws(draws.seed, draws.pair_id[:count], draws.index[:count])
    cache.put(own, found.view(2, -1)[:, :count].reshape(-1))
