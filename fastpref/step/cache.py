"""The reference's errors, two float64 numbers per (pair, draw): computed once, kept on disk.

A cache is a folder: fingerprint.json says what the errors belong to; errors-NAME-N.safetensors hold
rows `pair_id [n]`, `index [n]`, `errors [n, 2]` (winner, loser), and in their metadata digests of
the fingerprint and of the rows. Each process writes files of its own name: several may share a
cache.

`filling` computes what a cache lacks.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import differences, identity, model_identity, tidy, write_atomic
from ..loss import native
from ..loss.functional import Draws
from ..pairs.dataset import PairDataset
from ..pairs.order import batches_per_epoch, epoch_batches
from ..progress import warn
from .reference import PairMode

SECONDS = 10  # between two writes: what a killed process computes again
# safetensors cannot be appended to: each write makes the file in hand anew.
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
        "core": "none" if native._C is None else "built",  # the oracle sums in another order
        "torch": torch.__version__,
    }
    for each in fields(process):
        if each.init and each.name != "importance_steps":
            value = getattr(process, each.name)
            if isinstance(value, Tensor):
                value = hashlib.blake2b(value.numpy().tobytes(), digest_size=16).hexdigest()
            values[f"process.{each.name}"] = value
    # As it will be read back: JSON makes lists of tuples, which would differ from them.
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
        tidy(self.folder)
        self.ids, self.order = torch.from_numpy(np.array(dataset.pair_ids)).sort()
        shape = (len(self.ids), fingerprint["draws_per_pair"], 2)
        try:  # rows as the set has them
            # NaN: not known. No error is: what is not finite is never kept.
            self.table = torch.full(shape, torch.nan, dtype=torch.float64)
        except RuntimeError:
            raise ValueError(
                f"draws_per_pair {shape[1]} of {shape[0]} pairs: their errors, "
                f"{16e-9 * shape[0] * shape[1]:.3g} GB, do not fit in memory: choose fewer"
            ) from None
        self.waiting: list[tuple[Draws, Tensor]] = []  # as they came, still on their device
        self.pending = torch.zeros(shape[:2], dtype=torch.bool)  # whose they are
        # Not from a seeded generator: processes of one seed share the folder.
        self.name, self.part = f"errors-{secrets.token_hex(4)}", 0
        self.own: list[tuple[Tensor, Tensor, Tensor]] = []  # of the file in hand
        self.computed, self.unwritten, self.failed = 0, False, False
        self.asked = self.found = 0  # batches that `filling.look_up` was asked for, and knew
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
        # To settle waits for the device: only where something of this batch is waiting.
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
            self.write()
            self._read_others()
        except (OSError, ValueError) as error:
            if not self.failed:
                warn(str(error))
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
            here = lacking[epoch % len(lacking)].numpy().tobytes()
            if any(here):
                of_epoch = epoch_batches(shapes, size, seed, epoch)
                of_run = islice(of_epoch, batches - epoch * per_epoch)
                if any(here[row] for rows in of_run for row in rows):
                    return False
        return True

    def _compare(self, there: dict[str, Any]) -> None:
        """ValueError names the fields in which a fingerprint (empty: none) is not this one."""
        always = {name for name in self.fingerprint if not name.startswith("process.")}
        if there and not always <= there.keys():
            raise _unreadable(self.folder)
        listed = differences(there, self.fingerprint)
        if there and listed:
            raise ValueError(
                f"reference cache {self.folder}: filled with another {listed}; use the same "
                "values, name another reference_cache, or delete that folder to fill it again"
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

    def write(self) -> None:
        """What is not on the disk yet; OSError or ValueError: it cannot be written."""
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
            # -1 and not None, which is the size of a file that has vanished meanwhile.
            if file.name.startswith(self.name) or self.seen.get(file, -1) == size:
                continue
            self.seen[file] = size
            ids, index, found = _read(file, self.fingerprint, self.ids)
            row = self.rows(ids)
            new = self.table[row, index].isnan().any(1)
            self.table[row[new], index[new]] = found[new]


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
    except (OSError, ValueError, RecursionError):  # the last: JSON nested too deeply
        there = None
    if not isinstance(there, dict) or not there:
        raise _unreadable(folder)
    return there


def _unreadable(folder: Path) -> ValueError:
    return ValueError(
        f"reference cache {folder / 'fingerprint.json'}: is not readable; delete its folder and "
        "run the same command again, which fills it"
    )


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
