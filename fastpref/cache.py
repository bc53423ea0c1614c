"""The reference's errors, two float64 numbers per (pair, draw): computed once, kept on disk.

A cache is a folder: fingerprint.json says what the errors belong to; errors-NAME-N.safetensors hold
rows `pair_id [n]`, `index [n]`, `errors [n, 2]` (winner, loser), and in their metadata digests of
the fingerprint and of the rows. Each process writes files of its own name: several may share a
cache.

Draw k of a pair is computed in the batch that the pair is in in epoch k of a training run. So a run
that looks up what it needs, and `fill`, which is ahead of it, write the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import native
from .data import Batch, PairDataset, batches_per_epoch, collate, epoch_batches, map_ahead
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
        "core": "none" if native._C is None else "built",
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

    dataset: of its pairs. device: of what `get` returns. What other processes have written is read
    when it is opened, and again with each of its own writes. Draws are on the host.

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
        self.dataset = dataset
        self._compare(recorded(self.folder))
        self.ids, self.order = torch.tensor(dataset.pair_ids).sort()
        shape = (len(self.ids), fingerprint["draws_per_pair"], 2)
        try:  # rows as the set has them
            self.table = torch.full(shape, torch.nan, dtype=torch.float64)
        except RuntimeError:
            raise ValueError(
                f"draws_per_pair {shape[1]} of {shape[0]} pairs: their errors, "
                f"{16e-9 * shape[0] * shape[1]:.3g} GB, do not fit in memory: choose fewer"
            ) from None
        self.waiting: list[tuple[Draws, Tensor]] = []  # as they came, still on their device
        self.pending = torch.zeros(shape[:2], dtype=torch.bool)  # whose they are
        self.name, self.part = f"errors-{secrets.token_hex(4)}", 0
        self.own: list[tuple[Tensor, Tensor, Tensor]] = []  # of the file in hand
        self.computed, self.unwritten, self.failed = 0, False, False
        self.asked = self.found = 0  # batches that `look_up` was asked for, and knew
        self.seen: dict[Path, int] = {}  # files of others that were read, at this size
        self.written = time.monotonic()
        self._read_others()
        self._claim()

    def __str__(self) -> str:
        known = self.table.isfinite().all(2)
        return f"{self.folder}, {int(known.sum())} of {known.numel()} errors are there"

    def get(self, draws: Draws) -> Tensor | None:
        """The errors [2B] float64 of a batch's draws, winners first; None: not all are known."""
        at = self.rows(draws.pair_id), draws.index
        if self.waiting and self.pending[at].any():
            self._settle()
        found = self.table[at]  # [B, 2]
        known = bool(found.isfinite().all())
        return found.T.reshape(-1).to(self.device, non_blocking=True) if known else None

    def put(self, draws: Draws, errors: Tensor) -> None:
        """Keeps the errors [2B] of a batch's draws, winners first, without waiting for their
        device; every `SECONDS` it waits and writes. What is known, or not finite, is left out.
        """
        self.waiting.append((draws, errors.detach().clone()))  # a recorded pass overwrites its own
        self.pending[self.rows(draws.pair_id), draws.index] = True
        if time.monotonic() - self.written > SECONDS:
            self.flush()

    def flush(self) -> bool:
        """Writes what is not on the disk yet, and reads what others have written there. A failure
        is a warning, and tried again the next time; returns whether there was none.
        """
        self._settle()
        self.written = time.monotonic()
        try:
            self._write()
            self._read_others()
        except (OSError, ValueError) as error:
            if not self.failed:
                tqdm.write(f"warning: {error}", file=sys.stderr)
            self.failed = True
        else:
            self.failed = False
        return not self.failed

    def share(self) -> float:
        """Of the batches looked up since the last call, how many were known."""
        share = self.found / max(self.asked, 1)
        self.asked = self.found = 0
        return share

    def rows(self, pair_ids: Tensor) -> Tensor:
        """Where pairs stand in the set."""
        return self.order[torch.searchsorted(self.ids, pair_ids)]

    def lacking(self, draw: int) -> Tensor:
        """Of each row of the set, whether its errors at a draw are not known."""
        self._settle()
        return self.table[:, draw].isnan().any(1)

    def covers(self, batches: int) -> bool:
        """Whether the errors of a run's first `batches` batches are there."""
        size, seed = (self.fingerprint[name] for name in ("train_batch_size", "seed"))
        shapes = self.dataset.shapes
        lacking = [self.lacking(draw) for draw in range(self.table.shape[1])]
        per_epoch = batches_per_epoch(shapes, size)
        for epoch in range(-(-batches // per_epoch)):
            here = lacking[epoch % len(lacking)]
            if here.any():
                of_epoch = epoch_batches(shapes, size, seed, epoch)
                of_run = islice(of_epoch, batches - epoch * per_epoch)
                if any(here[list(rows)].any() for rows in of_run):
                    return False
        return True

    def _compare(self, there: dict[str, Any]) -> None:
        """ValueError names the fields in which a fingerprint (empty: none) is not this one."""
        listed = differences(there, self.fingerprint)
        if there and listed:
            raise ValueError(
                f"reference cache {self.folder}: filled with another {listed}; use the same "
                "values, or name another reference_cache"
            )

    def _claim(self) -> None:
        """Writes fingerprint.json where there is none; of two runs that begin at once the first
        one's stands, and is the other's too or a ValueError.
        """
        record = self.folder / "fingerprint.json"
        if not record.exists():
            text = json.dumps(self.fingerprint, indent=1) + "\n"
            write_atomic(record, text.encode(), new=True)
            self._compare(recorded(self.folder))

    def _settle(self) -> None:
        """What was put goes into the table and into the file in hand."""
        if not self.waiting:
            return
        found = torch.cat([said.double().view(2, -1).T for _, said in self.waiting]).cpu()
        ids = torch.cat([draws.pair_id for draws, _ in self.waiting])
        index = torch.cat([draws.index for draws, _ in self.waiting])
        row = self.rows(ids)
        new = found.isfinite().all(1) & self.table[row, index].isnan().any(1)
        self.table[row[new], index[new]] = found[new]
        self.own.append((ids[new], index[new], found[new]))
        self.computed += int(new.sum())
        self.unwritten |= bool(new.any())
        self.pending[:] = False
        self.waiting.clear()

    def _write(self) -> None:
        from safetensors.torch import save

        if not self.unwritten:
            return
        self._claim()  # again, where the folder has been deleted meanwhile
        ids, index, errors = (torch.cat(column) for column in zip(*self.own, strict=True))
        content = {"pair_id": ids, "index": index, "errors": errors}
        marks = {"fingerprint": _digest(self.fingerprint), "content": _sum(content)}
        file = self.folder / f"{self.name}-{self.part:06d}.safetensors"
        write_atomic(file, save(content, marks))
        self.unwritten = False
        if len(ids) >= ROWS:
            self.part, self.own = self.part + 1, []

    def _read_others(self) -> None:
        for file in sorted(self.folder.glob("errors-*.safetensors")):
            size = file.stat().st_size if file.is_file() else None
            if file.name.startswith(self.name) or self.seen.get(file, -1) == size:
                continue
            self.seen[file] = size
            ids, index, found = _read(file, self.fingerprint, self.ids)
            row = self.rows(ids)
            new = self.table[row, index].isnan().any(1)
            self.table[row[new], index[new]] = found[new]


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
        lacking = cache.lacking(k)
        every = islice(_batches(cache, k), rank, None, world)
        work += [(k, rows) for rows in every if lacking[list(rows)].any()]
    before, total = cache.computed, sum(len(rows) for _, rows in work)
    with tqdm(total=total, unit="draw", disable=True if rank else None, file=sys.stderr) as bar:
        load = partial(_load, cache)
        for (k, rows), batch in zip(work, map_ahead(load, work, num_workers), strict=True):
            _compute(cache, reference, process, prepare, k, rows, batch)
            bar.update(len(rows))
    if not cache.flush():
        cache._write()  # raises what the warning said
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
) -> Tensor:
    """The errors [2B] float64 of a training batch, winners first; what is not known is computed and
    kept, as `fill` would.

    So beyond draws_per_pair, where a draw comes again in another batch, what its own epoch left
    over (or what is lost) is computed in the batch that it would have had there.
    """
    cache.asked += 1
    found = cache.get(draws)
    if found is not None:
        cache.found += 1
        return found
    if epoch >= cache.fingerprint["draws_per_pair"]:
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


def _batches(cache: ErrorCache, draw: int) -> Iterator[tuple[int, ...]]:
    """The batches of rows in which a draw is computed: those of its epoch, then what is left."""
    size, seed = (cache.fingerprint[name] for name in ("train_batch_size", "seed"))
    return epoch_batches(cache.dataset.shapes, size, seed, draw, rest=True)


def _load(cache: ErrorCache, work: tuple[int, tuple[int, ...]]) -> Batch:
    """A batch of `_batches`, filled up with its own pairs."""
    _, rows = work
    size = cache.fingerprint["train_batch_size"]
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
    batches whose errors are there; 0 if none are.
    """
    worst, allowed = 0.0, max(2 * margin_noise, 1e-6 * beta)
    for batch, draws in batches:
        kept = cache.get(draws)
        if kept is not None:
            now = errors(online, process, batch, draws, cache.fingerprint["pair_mode"])
            w, l = (kept - now).chunk(2)
            change = (0.5 * beta * (w - l)).abs().max().item()
            worst = max(worst, change) if math.isfinite(change) else math.inf
    return worst, allowed


def warn_of_drift(worst: float, allowed: float) -> None:
    if not worst <= allowed:
        print(
            f"warning: cached and online margins differ by {worst:.3g}, expected at most "
            f"{allowed:.3g}: the reference is computed otherwise here than where the cache was "
            "filled; delete the cache's folder, or name another reference_cache, and run the same "
            "command again",
            file=sys.stderr,
        )


def recorded(folder: Path) -> dict[str, Any]:
    """A cache's fingerprint; empty: there is none. ValueError: it cannot be read."""
    record = folder / "fingerprint.json"
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"reference_cache {folder} is a link to nothing: make that folder")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"reference_cache {folder} is a file: choose another one")
    if not record.exists():
        return {}
    try:
        there = json.loads(record.read_bytes())
    except (OSError, ValueError, RecursionError):
        there = None
    if not isinstance(there, dict) or not there:
        raise ValueError(
            f"reference cache {record}: is not readable; delete its folder and run the same "
            "command again"
        )
    return there


def _digest(fingerprint: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(fingerprint).encode(), digest_size=16).hexdigest()


def _sum(content: dict[str, Tensor]) -> str:
    """A digest of the numbers: a flipped bit is another reference."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ("pair_id", "index", "errors"):
        digest.update(content[name].numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path, fingerprint: dict[str, Any], known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(pair_id [n], index [n], errors [n, 2]) of a file that was written for this fingerprint;
    known: the set's ids, sorted.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            marks = opened.metadata() or {}
            content = {name: opened.get_tensor(name) for name in ("pair_id", "index", "errors")}
        if marks.get("fingerprint") != _digest(fingerprint):
            raise ValueError("it was filled with other values than fingerprint.json says")
        ids, index, table = content.values()
        kinds = [(v.dtype, list(v.shape)) for v in (ids, index, table)]
        rows = len(ids)
        expected = [(torch.int64, [rows]), (torch.int64, [rows]), (torch.float64, [rows, 2])]
        if kinds != expected:
            raise ValueError(f"errors expected float64 [{rows}, 2], got {list(table.shape)}")
        if marks.get("content") != _sum(content):
            raise ValueError("its numbers are not those that were written")
        at = torch.searchsorted(known, ids).clamp(max=len(known) - 1)
        if not torch.equal(known[at], ids):
            raise ValueError("it has a pair that the data has not")
        if ((index < 0) | (index >= fingerprint["draws_per_pair"])).any():
            raise ValueError("it has a draw beyond draws_per_pair")
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"reference cache {file}: cannot be used ({error}); delete it (or the whole "
            "folder) and run the same command again"
        ) from None
    return ids, index, table
