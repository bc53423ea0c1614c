"""The reference's errors, two float64 numbers per (pair, draw): computed once, kept on disk.

A cache is a folder: fingerprint.json says what the errors belong to; errors-NAME-N.safetensors hold
rows `pair_id [n]`, `index [n]`, `errors [n, 2]` (winner, loser), and in their metadata the
fingerprint's digest. Each process writes files of its own name: several may share a cache.

Draw k of a pair is computed in the batch that the pair is in in epoch k of a training run. So a run
that keeps what its steps compute, and `fill`, which computes ahead, write the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import Batch, PairDataset, batches_per_epoch, collate, epoch_batches
from .files import differences, identity, model_identity, write_atomic
from .functional import Draws
from .reference import PairMode, Reference, errors

Prepare = Callable[[int, Batch], tuple[Batch, Draws]]  # (draw's number, batch) -> on the device

SECONDS = 10  # between two writes: what a killed process computes again
ROWS = 4096  # of a file, until the next one is begun


def fingerprint(
    *,
    model: str | Path,
    data: str | Path,
    process: Any,
    seed: int,
    draws_per_pair: int,
    batch_size: int,
    pair_mode: PairMode,
    compile: str | None,
    attention: str,
    device: str,
    dtype: str,
    weights_dtype: str,
    prompt_dropout: float,
) -> dict[str, Any]:
    """Everything that decides the errors of a reference, by name, as JSON values.

    model: diffusers folder or hub id; data: the encoded set; device: its type; dtype: of the
    activations, under autocast; weights_dtype: of the model as it is kept. The objective, beta, the
    adapters and the process's importance grid change no reference error: a sweep over them shares
    one cache.
    """
    values: dict[str, Any] = {
        "model": model_identity(model),
        "data": identity(Path(data) / "index.parquet"),
        "encoding": identity(Path(data) / "fingerprint.json"),
        "process": type(process).__name__,
        "seed": seed,
        "draws_per_pair": draws_per_pair,
        "train_batch_size": batch_size,
        "pair_mode": pair_mode,
        "compile": compile,
        "attention": attention,
        "device": device,
        "dtype": dtype,
        "weights_dtype": weights_dtype,
        "prompt_dropout": prompt_dropout,
        "torch": torch.__version__,
    }
    for each in fields(process):
        if each.init and each.name != "importance_steps":
            value = getattr(process, each.name)
            if isinstance(value, Tensor):
                value = hashlib.blake2b(value.numpy().tobytes(), digest_size=16).hexdigest()
            values[f"process.{each.name}"] = value
    return json.loads(json.dumps(values))


class ErrorCache:
    """Errors of the reference that `fingerprint` describes: in memory, and in the folder `path`.

    dataset: of its pairs. device: where errors are given. What other processes have written is
    read when it is opened, and again with each of its own writes. Draws are on the host.

    Raises:
        ValueError: the folder holds errors of another fingerprint (the fields are named), or a
            damaged file.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        fingerprint: dict[str, Any],
        dataset: PairDataset,
        device: torch.device | str = "cpu",
    ) -> None:
        self.folder, self.fingerprint, self.device = Path(path), fingerprint, device
        record = self.folder / "fingerprint.json"
        if record.exists():
            _same(record, fingerprint)
        else:
            write_atomic(record, (json.dumps(fingerprint, indent=1) + "\n").encode())
        self.dataset = dataset
        self.ids, self.order = torch.tensor(dataset.pair_ids).sort()
        shape = (len(self.ids), fingerprint["draws_per_pair"], 2)
        self.table = torch.full(shape, torch.nan, dtype=torch.float64)  # rows as the set has them
        self.waiting: list[tuple[Draws, Tensor]] = []  # as they came, still on their device
        self.name, self.part = f"errors-{secrets.token_hex(4)}", 0
        self.own: list[tuple[Tensor, Tensor, Tensor]] = []  # of the file in hand
        self.unwritten = False
        self.seen: dict[Path, int] = {}  # files of others that were read, at this size
        self.written = time.monotonic()
        self._read_others()

    def __str__(self) -> str:
        known = self.table.isfinite().all(2)
        return f"{self.folder}, {int(known.sum())} of {known.numel()} errors are there"

    def get(self, draws: Draws) -> Tensor | None:
        """The errors [2B] float64 of a batch's draws, winners first; None: not all are known."""
        at = self.rows(draws.pair_id), draws.index
        if self.waiting and not self.table[at].isfinite().all():
            self._settle()
        found = self.table[at]  # [B, 2]
        known = bool(found.isfinite().all())
        return found.T.reshape(-1).to(self.device, non_blocking=True) if known else None

    def put(self, draws: Draws, errors: Tensor) -> None:
        """Keeps the errors [2B] of a batch's draws, winners first, without waiting for their
        device; every `SECONDS` it waits and writes. What is known, or not finite, is left out.
        """
        self.waiting.append((draws, errors.detach().clone()))  # a recorded step overwrites its own
        if time.monotonic() - self.written > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what is not on the disk yet, and reads what others have written there."""
        from safetensors.torch import save

        self._settle()
        if self.unwritten:
            ids, index, errors = (torch.cat(column) for column in zip(*self.own, strict=True))
            content = {"pair_id": ids, "index": index, "errors": errors}
            file = self.folder / f"{self.name}-{self.part:06d}.safetensors"
            write_atomic(file, save(content, {"fingerprint": _digest(self.fingerprint)}))
            self.unwritten = False
            if len(ids) >= ROWS:
                self.part, self.own = self.part + 1, []
        try:
            self._read_others()
        except (OSError, ValueError) as error:  # a run goes on with what it has
            print(f"warning: {error}", file=sys.stderr)
        self.written = time.monotonic()

    def rows(self, pair_ids: Tensor) -> Tensor:
        """Where pairs stand in the set."""
        return self.order[torch.searchsorted(self.ids, pair_ids)]

    def covers(self, batches: int) -> bool:
        """Whether the errors of a run's first `batches` batches are there."""
        size, seed = (self.fingerprint[name] for name in ("train_batch_size", "seed"))
        shapes = self.dataset.shapes
        lacking = [self.lacking(draw) for draw in range(self.table.shape[1])]
        per_epoch = batches_per_epoch(shapes, size)
        for epoch in range(-(-batches // per_epoch) if any(lacking) else 0):
            of_epoch = epoch_batches(shapes, size, seed, epoch)
            of_run = islice(of_epoch, batches - epoch * per_epoch)
            here = lacking[epoch % len(lacking)]
            if here and any(not here.isdisjoint(rows) for rows in of_run):
                return False
        return True

    def lacking(self, draw: int) -> set[int]:
        """The rows of the set whose errors at a draw are not known."""
        self._settle()
        return set(self.table[:, draw].isnan().any(1).nonzero().flatten().tolist())

    def _settle(self) -> None:
        for draws, said in self.waiting:
            row, index = self.rows(draws.pair_id), draws.index
            found = said.double().cpu().view(2, -1).T
            new = found.isfinite().all(1) & self.table[row, index].isnan().any(1)
            self.table[row[new], index[new]] = found[new]
            self.own.append((draws.pair_id[new], index[new], found[new]))
            self.unwritten |= bool(new.any())
        self.waiting.clear()

    def _read_others(self) -> None:
        for file in sorted(self.folder.glob("errors-*.safetensors")):
            size = file.stat().st_size
            if file.name.startswith(self.name) or self.seen.get(file) == size:
                continue
            self.seen[file] = size
            ids, index, found = _read(file, self.fingerprint, self.ids)
            row = self.rows(ids)
            new = self.table[row, index].isnan().any(1)
            self.table[row[new], index[new]] = found[new]


def draw_batches(
    shapes: Sequence[str], batch_size: int, seed: int, draw: int
) -> Iterator[tuple[int, ...]]:
    """The batches of rows in which a draw is computed: those of the epoch of its number, then what
    it leaves over of each shape, which fills no batch.
    """
    left = dict.fromkeys(range(len(shapes)))
    for rows in epoch_batches(shapes, batch_size, seed, draw):
        for row in rows:
            del left[row]
        yield rows
    buckets: dict[str, list[int]] = {}
    for row in left:
        buckets.setdefault(shapes[row], []).append(row)
    yield from map(tuple, buckets.values())


def fill(
    cache: ErrorCache,
    reference: Reference,
    process: Any,
    prepare: Prepare,
    *,
    only: Draws | None = None,
    rank: int = 0,
    world: int = 1,
) -> int:
    """Computes the errors that `cache` lacks; returns how many.

    Each is computed in its batch of `draw_batches`; one that is not full is filled up with its own
    pairs. Killed and called again it goes on. rank of world computes every world-th batch and waits
    for nobody. only: no more than the batches that these draws, all of one number, are in.

    Raises:
        ValueError: an error is not finite (with `only` it stays unknown).
    """
    from tqdm import tqdm

    kind, dataset = cache.fingerprint, cache.dataset
    size, draws_per_pair = kind["train_batch_size"], kind["draws_per_pair"]
    work = []
    for k in range(draws_per_pair) if only is None else only.index[:1].tolist():
        lacking = cache.lacking(k)
        if only is not None:
            lacking &= set(cache.rows(only.pair_id).tolist())
        every = list(draw_batches(dataset.shapes, size, kind["seed"], k))
        work += [(k, rows) for rows in every[rank::world] if not lacking.isdisjoint(rows)]
    total, quiet = sum(len(rows) for _, rows in work), True if rank or only is not None else None
    with tqdm(total=total, unit="draw", disable=quiet, file=sys.stderr) as bar:
        for k, rows in work:
            batch = collate([dataset[rows[i % len(rows)]] for i in range(size)])
            ready, draws = prepare(k, batch)
            found = errors(reference, process, ready, draws, kind["pair_mode"]).cpu().view(2, -1)
            found, ids = found[:, : len(rows)], draws.pair_id[: len(rows)]
            if only is None and not found.isfinite().all():
                cache.flush()
                pair = ids[~found.isfinite().all(0)][0]
                raise ValueError(
                    f"cache-reference: the reference's error of pair {pair:016x} is not finite: "
                    "try mixed_precision no, or remove the pair"
                )
            cache.put(Draws(draws.seed, ids, draws.index[: len(rows)]), found.reshape(-1))
            bar.update(len(rows))
    cache.flush()
    return total


def look_up(
    cache: ErrorCache,
    reference: Reference,
    process: Any,
    prepare: Prepare,
    epoch: int,
    draws: Draws,
) -> Tensor | None:
    """The errors [2B] float64 of a training batch's draws, winners first. None: they are not known,
    and the step that computes them does so as `fill` would.

    In an epoch beyond draws_per_pair those that the earlier one left over, or that are lost, would
    be computed in another batch: here they are in theirs.
    """
    found = cache.get(draws)
    if found is None and epoch >= cache.fingerprint["draws_per_pair"]:
        fill(cache, reference, process, prepare, only=draws)
        found = cache.get(draws)
    return found


@torch.no_grad()
def drift(
    cache: ErrorCache,
    online: Reference,
    process: Any,
    batches: Iterable[tuple[Batch, Draws]],
    *,
    beta: float,
    margin_noise: float,
) -> tuple[float, float]:
    """(max |m_cached - m_online| over the batches, max(2 margin_noise, 1e-6 beta): what it may be).

    m_cached - m_online = (beta/2) (change of r_w - change of r_l), whatever the policy says. Of the
    batches whose errors are there; 0 if none are. Prints a warning when it is not within.
    """
    worst, allowed = 0.0, max(2 * margin_noise, 1e-6 * beta)
    for batch, draws in batches:
        kept = cache.get(draws)
        if kept is not None:
            now = errors(online, process, batch, draws, cache.fingerprint["pair_mode"])
            w, l = (kept - now).chunk(2)
            change = (0.5 * beta * (w - l)).abs().max().item()
            worst = max(worst, change) if math.isfinite(change) else math.inf
    if not worst <= allowed:
        print(
            f"warning: cached and online margins differ by {worst:.3g}, expected at most "
            f"{allowed:.3g}: the reference is computed otherwise here than where the cache was "
            "filled; delete the cache's folder, or name another reference_cache, and run the same "
            "command again",
            file=sys.stderr,
        )
    return worst, allowed


def _same(record: Path, now: dict[str, Any]) -> None:
    """ValueError names the fields in which a cache's fingerprint is not this run's."""
    try:
        there = json.loads(record.read_bytes())
    except ValueError:
        raise ValueError(
            f"reference cache {record}: is not readable; delete its folder and run the same "
            "command again"
        ) from None
    listed = differences(there, now)
    if listed:
        raise ValueError(
            f"reference cache {record.parent}: filled with another {listed}; use the same values, "
            "or name another reference_cache"
        )


def _digest(fingerprint: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(fingerprint).encode(), digest_size=16).hexdigest()


def _read(file: Path, fingerprint: dict[str, Any], known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(pair_id [n], index [n], errors [n, 2]) of a file that was written for this fingerprint;
    known: the set's ids, sorted.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            mark = (opened.metadata() or {}).get("fingerprint")
            names = ("pair_id", "index", "errors")
            ids, index, table = (opened.get_tensor(name) for name in names)
        if mark != _digest(fingerprint):
            raise ValueError("it was filled with other values than fingerprint.json says")
        kinds = [(v.dtype, list(v.shape)) for v in (ids, index, table)]
        rows = len(ids)
        expected = [(torch.int64, [rows]), (torch.int64, [rows]), (torch.float64, [rows, 2])]
        if kinds != expected:
            raise ValueError(f"errors expected float64 [{rows}, 2], got {list(table.shape)}")
        if not table.isfinite().all():
            raise ValueError("an error is not finite")
        at = torch.searchsorted(known, ids).clamp(max=len(known) - 1)
        if not torch.equal(known[at], ids):
            raise ValueError("it has a pair that the data has not")
        if ((index < 0) | (index >= fingerprint["draws_per_pair"])).any():
            raise ValueError("it has a draw beyond draws_per_pair")
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"reference cache {file}: cannot be used ({error}); delete it and run the same "
            "command again"
        ) from None
    return ids, index, table
