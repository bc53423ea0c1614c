"""The pair dataset: encoded pairs read from disk, and batches in an order that resumes exactly."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .index import Index, Kinds, damaged, read_index
from .order import batches_per_epoch, epoch_batches
from .shards import (
    Changed,
    conditions,
    digest,
    encoding_of,
    pair_file,
    read_fingerprint,
    read_tensors,
)


class Pair(NamedTuple):
    """One encoded pair: latents `[C, F, h, w]` of both members, the prompt's embeddings."""

    latents_w: Tensor
    latents_l: Tensor
    cond: dict[str, Tensor]
    weight: float
    pair_id: int
    prompt: str


@dataclass(frozen=True)
class Batch:
    """B pairs: `latents [2B, C, F, h, w]` winners first, `cond` `[2B, ...]`, the rest per pair."""

    latents: Tensor
    cond: dict[str, Tensor]
    weight: Tensor  # [B] float64
    pair_id: Tensor  # [B] int64
    prompts: list[str]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """On `device`; floating latents and conditions in `dtype`; does not wait for pinned."""

        def move(value: Tensor, cast: bool) -> Tensor:
            target = dtype if cast and value.is_floating_point() else None
            return value.to(device, target, non_blocking=True)

        return Batch(
            move(self.latents, True),
            {name: move(value, True) for name, value in self.cond.items()},
            move(self.weight, False),
            move(self.pair_id, False),
            self.prompts,
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from where a GPU fetches it asynchronously."""
        return replace(
            self,
            latents=self.latents.pin_memory(),
            cond={name: value.pin_memory() for name, value in self.cond.items()},
            weight=self.weight.pin_memory(),
            pair_id=self.pair_id.pin_memory(),
        )


class PairDataset:
    """The pairs of an encoded set, in the order of its index.

    Attributes:
        fingerprint: what the set was encoded with (family, model, frames, size, rate, dtype, data).
        shapes: per pair, a text equal for pairs that fit in one batch.
        pair_ids, prompts, weights, ties: the index's columns.
        empty_cond: embeddings of the empty prompt (no batch dimension), for prompt dropout.

    Raises:
        ValueError: `folder` is no encoded set, one whose encoding has not finished, or one that
            changed on disk; so does a pair.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._path = self.folder / "index.parquet"
        if not self._path.is_file():
            lost = "no index.parquet" if self.folder.is_dir() else "no such folder"
            raise ValueError(
                f"{folder}: {lost}; expected a set made by fastpref encode "
                "(if its encoding was interrupted, run the same command again)"
            )
        index = read_index(self._path)
        self.pair_ids: Sequence[int] = index.pair_ids
        self.prompts: Sequence[str] = index.prompts
        self.weights, self.ties = index.weights, index.ties
        self.shapes: Sequence[str] = index.shapes
        self.fingerprint: dict[str, Any] = read_fingerprint(self.folder)
        self._encoding = encoding_of(self.fingerprint)
        self._digests = index.digests  # None: a set from before them
        if self._digests is not None or "digests" in self.fingerprint:
            self._check_digests(index)
        path = self.folder / "empty.safetensors"
        tensors = read_tensors(path)
        self._check_content(path, tensors, index.marks.get("empty"))
        self.empty_cond = conditions(tensors)

    def _check_digests(self, index: Index) -> None:
        """Whether the index and the fingerprint are what was written."""
        if index.rows is None or index.marks.get("rows") != index.rows:
            raise damaged(self._path, "was changed after it was written")
        if index.marks.get("encoding") != self._encoding:
            raise ValueError(
                f"{self.folder / 'fingerprint.json'}: was changed after the set was encoded; put "
                "it back, or encode into another output_dir"
            )

    def _check_content(self, path: Path, tensors: dict[str, Tensor], wanted: str | None) -> None:
        # At every read, in the threads that read ahead: blake2b does 1.5 GB/s without the GIL.
        if self._digests is not None and digest(path, tensors, self._encoding) != wanted:
            raise Changed(
                f"{path}: was changed after it was written; delete it and run the same fastpref "
                "encode again"
            )

    def __len__(self) -> int:
        return len(self.pair_ids)

    def every_shape(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Latents [1, C, F, h, w] and condition of each shape that there is, without values (meta),
        the largest first.
        """

        def made(text: str) -> dict[str, Tensor]:
            named = (part.rpartition(":") for part in text.split())
            sizes = {name: [int(n) for n in shape.split("x")] for name, _, shape in named}
            return {name: torch.empty(1, *of, device="meta") for name, of in sizes.items()}

        try:
            kinds = [
                (m["latents_w"], conditions(m)) for m in map(made, Kinds.of(self.shapes).kinds)
            ]
        except (ValueError, KeyError, RuntimeError):
            reason = "has shapes that are none, expected latents_w:CxFxhxw ..."
            raise damaged(self._path, reason) from None
        return sorted(kinds, key=lambda kind: -kind[0].numel())

    def largest(self) -> tuple[Tensor, dict[str, Tensor]]:
        return self.every_shape()[0]

    def __getitem__(self, i: int) -> Pair:
        path = pair_file(self.folder, self.pair_ids[i])
        tensors = read_tensors(path)
        for name in ("latents_w", "latents_l"):
            got = str(tensors[name].dtype) if name in tensors else "nothing"
            if name not in tensors or not tensors[name].is_floating_point():
                raise ValueError(
                    f"{path}: {name} of pair {self.pair_ids[i]} expected floating-point latents, "
                    f"got {got}; delete it and run the same fastpref encode again"
                )
        got = " ".join(f"{n}:{'x'.join(map(str, tensors[n].shape))}" for n in sorted(tensors))
        if got != self.shapes[i]:
            raise ValueError(
                f"{path}: expected {self.shapes[i]} as the index says, got {got}; delete it and "
                "run the same fastpref encode again"
            )
        wanted = None if self._digests is None else self._digests[i].tobytes().hex()
        self._check_content(path, tensors, wanted)
        return Pair(
            tensors["latents_w"],
            tensors["latents_l"],
            conditions(tensors),
            self.weights[i],
            self.pair_ids[i],
            self.prompts[i],
        )


def collate(pairs: Sequence[Pair]) -> Batch:
    """A batch of pairs of equal shapes; ValueError names the pair whose shape differs."""
    first = pairs[0]
    for pair in pairs:
        for name, a, b in (
            ("latents_l", pair.latents_l, first.latents_w),
            ("latents_w", pair.latents_w, first.latents_w),
            *((f"cond.{k}", pair.cond.get(k), first.cond[k]) for k in first.cond),
        ):
            if a is None or a.shape != b.shape:
                got = "nothing" if a is None else list(a.shape)
                raise ValueError(
                    f"collate: {name} of pair {pair.pair_id} expected {list(b.shape)} as in pair "
                    f"{first.pair_id}, got {got}; batch pairs of one shape"
                )
    cond = {k: torch.stack([pair.cond[k] for pair in pairs]) for k in first.cond}
    return Batch(
        torch.stack([p.latents_w for p in pairs] + [p.latents_l for p in pairs]),
        {name: torch.cat([value, value]) for name, value in cond.items()},
        torch.tensor([p.weight for p in pairs], dtype=torch.float64),
        torch.tensor([p.pair_id for p in pairs], dtype=torch.int64),
        [p.prompt for p in pairs],
    )


def batches(
    dataset: Any,
    batch_size: int,
    seed: int,
    start: int = 0,
    *,
    share: int = 0,
    shares: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Generator[tuple[int, Batch], None, None]:
    """Endless (epoch, batch), from batch number `start` on: counting batches is all a resume needs.
    share of shares: of these every shares-th, from its own on.

    Each epoch goes once through a new permutation of the pairs, in batches of equal shapes; pairs
    that fill no batch are left out of that epoch. `dataset` needs len(), [i] -> Pair and, where
    shapes differ, `shapes`. `num_workers` threads read ahead and change nothing in what comes out.

    Raises:
        ValueError: fewer pairs of one shape than `batch_size`.
    """
    shapes = Kinds.of(getattr(dataset, "shapes", None) or [""] * len(dataset))
    per_epoch = batches_per_epoch(shapes, batch_size)

    def load(planned: tuple[int, tuple[int, ...]]) -> tuple[int, Batch]:
        epoch, rows = planned
        batch = collate([dataset[i] for i in rows])
        return epoch, batch.pin_memory() if pin_memory else batch

    def plan() -> Iterator[tuple[int, tuple[int, ...]]]:
        number = start + share
        while True:
            epoch, skip = divmod(number, per_epoch)
            for rows in epoch_batches(shapes, batch_size, seed, epoch, skip=skip, step=shares):
                yield epoch, rows
                number += shares

    return map_ahead(load, plan(), num_workers)


def map_ahead(
    function: Callable[[Any], Any], items: Iterable[Any], num_workers: int
) -> Generator[Any, None, None]:
    """map(function, items) in order, worked ahead by `num_workers` threads (0: none)."""
    if num_workers == 0:
        yield from map(function, items)
        return
    # Threads: what is mapped is read in torch.stack, which releases the GIL; a DataLoader's
    # processes would hand every batch over.
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="fastpref-data")
    try:
        ahead: deque[Future[Any]] = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * num_workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        # Who leaves the loop does not wait for reads that nobody wants.
        pool.shutdown(wait=False, cancel_futures=True)
