"""The reference's errors on disk, two float64 numbers per (pair, draw): filled once, read by runs.

A cache is a folder: fingerprint.json says what the errors belong to, errors-N.safetensors hold
`pair_id [n]` and `errors [n, K, 2]` (winner, loser) of every pair's draws 0 ... K-1, and in their
metadata the fingerprint's digest.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import Batch, PairDataset, collate
from .files import differences, identity, model_identity, write_atomic
from .functional import Draws
from .reference import PairMode, Reference, errors

Prepare = Callable[[int, Batch], tuple[Batch, Draws]]  # (draw's number, batch) -> on the device

CHUNK = 16  # batches per file, at most: what a killed `fill` computes again
FILES = 64  # at least, where there are as many batches: what ranks divide among them


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


def fill(
    path: str | Path,
    reference: Reference,
    process: Any,
    dataset: PairDataset,
    prepare: Prepare,
    fingerprint: dict[str, Any],
    *,
    batch_size: int,
    draws_per_pair: int,
    pair_mode: PairMode = "joint",
    rank: int = 0,
    world: int = 1,
) -> int:
    """Writes the reference's errors of every pair at draws 0 ... draws_per_pair - 1 into `path`.

    Batches have the training run's size, order of members and shapes (a last one is filled up with
    pairs already in it). Called again it goes on after the last whole file; rank of world fills
    every world-th file and waits for nobody. Returns how many pairs this call has computed.

    Raises:
        ValueError: the folder holds another fingerprint's errors or a damaged file, or an error is
            not finite.
    """
    from safetensors.torch import save
    from tqdm import tqdm

    folder = Path(path)
    record = folder / "fingerprint.json"
    if record.exists():
        _same(record, fingerprint)
    elif rank == 0:
        write_atomic(record, (json.dumps(fingerprint, indent=1) + "\n").encode())
    chunks = _chunks(dataset.shapes, batch_size)
    mine = {}
    for i, chunk in enumerate(chunks):
        file = folder / f"errors-{i:06d}.safetensors"
        if file.exists():
            _read(file, fingerprint)  # of these values, and whole
        elif i % world == rank:
            mine[file] = chunk
    total = sum(len(rows) for chunk in mine.values() for rows in chunk)
    with tqdm(total=total, unit="pair", disable=True if rank else None, file=sys.stderr) as bar:
        for file, chunk in mine.items():
            kept = []
            for rows in chunk:
                filled = [rows[i % len(rows)] for i in range(batch_size)]
                batch = collate([dataset[i] for i in filled])
                each = []
                for k in range(draws_per_pair):
                    ready, draws = prepare(k, replace(batch, cond=dict(batch.cond)))
                    each.append(errors(reference, process, ready, draws, pair_mode).view(2, -1).T)
                kept.append(torch.stack(each, dim=1)[: len(rows)].cpu())  # [pairs, K, 2]
                bar.update(len(rows))
            ids = torch.tensor([dataset.pair_ids[i] for rows in chunk for i in rows])
            table = torch.cat(kept)
            if not table.isfinite().all():
                pair = ids[(~table.isfinite()).flatten(1).any(1)][0]
                raise ValueError(
                    f"cache-reference: the reference's error of pair {pair:016x} is not finite: "
                    "try mixed_precision no, or remove the pair"
                )
            own = {"fingerprint": _digest(fingerprint)}
            write_atomic(file, save({"pair_id": ids, "errors": table}, metadata=own))
    return total


def cached(
    path: str | Path,
    fingerprint: dict[str, Any],
    pair_ids: Iterable[int],
    device: torch.device | str = "cpu",
) -> Reference:
    """The errors that `fill` wrote, looked up on `device` by the draws alone: no reference model.

    pair_ids: what the run will ask for. A draw beyond those filled gives NaN, which reaches the
    loss; no lookup waits for the device.

    Raises:
        ValueError: no cache there, of another fingerprint (the fields are named), incomplete or
            damaged.
    """
    folder = Path(path)
    record = folder / "fingerprint.json"
    if not record.exists():
        raise ValueError(
            f"reference cached: {folder} holds no reference errors; run fastpref cache-reference "
            "with the same config first"
        )
    _same(record, fingerprint)
    ids, tables = [], []
    for file in sorted(folder.glob("errors-*.safetensors")):
        pairs, table = _read(file, fingerprint)
        ids.append(pairs)
        tables.append(table)
    known = {i for part in ids for i in part.tolist()}
    missing = [i for i in pair_ids if i not in known]
    if missing or not known:
        first = f" (the first is {missing[0]:016x})" if missing else ""
        raise ValueError(
            f"reference cache {folder}: lacks {len(missing)} pairs of the data{first}; "
            "run the same fastpref cache-reference again"
        )
    known_ids, order = torch.cat(ids).sort()
    table = torch.cat(tables)[order].to(device)  # [N, K, 2]
    known_ids = known_ids.to(device)

    def reference(noisy: Any, t: Any, cond: Any, draws: Draws) -> Tensor:
        draws = draws.to(table.device)
        row = torch.searchsorted(known_ids, draws.pair_id).clamp(max=len(known_ids) - 1)
        there = (known_ids[row] == draws.pair_id) & (draws.index < table.shape[1])
        found = table[row, draws.index.clamp(max=table.shape[1] - 1)]  # [B, 2]
        return torch.where(there[:, None], found, torch.nan).T.reshape(-1)

    return reference


@torch.no_grad()
def drift(
    cache: Reference,
    online: Reference,
    process: Any,
    batches: Iterable[tuple[Batch, Draws]],
    *,
    pair_mode: PairMode,
    beta: float,
    margin_noise: float,
) -> tuple[float, float]:
    """(max |m_cached - m_online| over the batches, max(2 margin_noise, 1e-6 beta): what it may be).

    m_cached - m_online = (beta/2) (change of r_w - change of r_l), whatever the policy says. Prints
    a warning when it is not within.
    """
    changes = []
    for batch, draws in batches:
        kept, now = (errors(r, process, batch, draws, pair_mode) for r in (cache, online))
        w, l = (kept - now).chunk(2)
        changes.append(0.5 * beta * (w - l))
    worst = torch.cat(changes).abs().max().item()
    allowed = max(2 * margin_noise, 1e-6 * beta)
    if not worst <= allowed:
        print(
            f"warning: cached and online margins differ by {worst:.3g}, expected at most "
            f"{allowed:.3g}: the reference is computed otherwise here than where the cache was "
            "filled; delete the cache's folder (or name another reference_cache), then run "
            "fastpref cache-reference on this machine",
            file=sys.stderr,
        )
    return worst, allowed


def _same(record: Path, now: dict[str, Any]) -> None:
    """ValueError names the fields in which a cache's fingerprint is not this run's."""
    try:
        there = json.loads(record.read_bytes())
    except ValueError:
        raise ValueError(
            f"reference cache {record}: is not readable; delete its folder and run fastpref "
            "cache-reference again"
        ) from None
    listed = differences(there, now)
    if listed:
        raise ValueError(
            f"reference cache {record.parent}: filled with another {listed}; use the same values, "
            "or fill another folder with fastpref cache-reference"
        )


def _digest(fingerprint: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(fingerprint).encode(), digest_size=16).hexdigest()


def _read(file: Path, fingerprint: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(pair_id [n], errors [n, K, 2]) of a file that `fill` wrote for this fingerprint."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            mark = (opened.metadata() or {}).get("fingerprint")
            ids, table = (opened.get_tensor(name) for name in ("pair_id", "errors"))
        expected = (len(ids), fingerprint["draws_per_pair"], 2)
        if mark != _digest(fingerprint):
            raise ValueError("it was filled with other values than fingerprint.json says")
        if table.shape != expected or table.dtype != torch.float64 or ids.dtype != torch.int64:
            raise ValueError(f"errors expected float64 {list(expected)}, got {list(table.shape)}")
        if not table.isfinite().all():
            raise ValueError("an error is not finite")
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"reference cache {file}: cannot be used ({error}); delete it and run the same "
            "fastpref cache-reference again"
        ) from None
    return ids, table


def _chunks(shapes: list[str], batch_size: int) -> list[list[list[int]]]:
    """Rows of equal shapes in batches of at most batch_size, up to CHUNK of those to a file.

    A function of the set alone: a cache may be gone on with by another number of ranks.
    """
    buckets: dict[str, list[int]] = {}
    for row, shape in enumerate(shapes):
        buckets.setdefault(shape, []).append(row)
    batches = [
        rows[i : i + batch_size]
        for rows in buckets.values()
        for i in range(0, len(rows), batch_size)
    ]
    size = max(1, min(CHUNK, len(batches) // FILES))
    return [batches[i : i + size] for i in range(0, len(batches), size)]
