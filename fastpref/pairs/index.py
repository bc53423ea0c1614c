"""The index of an encoded set, of up to 1e7 rows: columns as compact as their values, whose rows
are Python's own where they are asked for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .arrow import Columns, plain, values
from .shards import index_digest

PART = 4096  # rows that are Python's at a time


class Column(Sequence):
    """A column that compares as a list does, and a slice of which is one."""

    @abstractmethod
    def part(self, start: int, stop: int) -> list[Any]:
        """The rows from start to stop, as Python's own."""

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), PART):
            yield from self.part(start, start + PART)

    def __getitem__(self, i: Any) -> Any:
        where = range(len(self))[i]  # IndexError
        if isinstance(i, slice):
            return [self[j] for j in where]
        return self.part(where, where + 1)[0]

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Sequence) and len(self) == len(other)
        return same and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None


class Numbers(Column):
    """numbers: a numpy array [n]."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.numbers, dtype, copy=copy)

    def part(self, start: int, stop: int) -> list[Any]:
        return self.numbers[start:stop].tolist()


class Kinds(Column):
    """Of few different values: `codes` [n], places in the list `kinds`."""

    def __init__(self, codes: np.ndarray, kinds: list[Any]) -> None:
        # A byte each, as a rule: their order is walked through at random.
        self.codes, self.kinds = codes.astype(np.min_scalar_type(len(kinds))), kinds

    @classmethod
    def of(cls, rows: Iterable[Any]) -> Kinds:
        """`rows` themselves, or any values that may be keys."""
        if isinstance(rows, cls):
            return rows
        known: dict[Any, int] = {}
        codes = [known.setdefault(row, len(known)) for row in rows]
        return cls(np.array(codes, np.int64), list(known))

    def counts(self) -> dict[Any, int]:
        """How often each kind is there."""
        counts = np.bincount(self.codes, minlength=len(self.kinds)).tolist()
        return dict(zip(self.kinds, counts, strict=True))

    def __len__(self) -> int:
        return len(self.codes)

    def part(self, start: int, stop: int) -> list[Any]:
        return [self.kinds[code] for code in self.codes[start:stop].tolist()]


class Texts(Column):
    """column: of Arrow, which holds a text once for all rows of a part of the file."""

    def __init__(self, column: Any) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def part(self, start: int, stop: int) -> list[str]:
        return values(plain(self.column.slice(start, stop - start)))


@dataclass(frozen=True)
class Index:
    """digests: [n, 16] uint8; None in a set from before them. rows: their digest, where there are
    digests. marks: of the file.
    """

    pair_ids: Numbers
    prompts: Texts
    weights: Numbers
    shapes: Kinds
    ties: Numbers
    marks: dict[str, str]
    digests: np.ndarray | None
    rows: str | None


def damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path}: {reason}; delete it and run the same fastpref encode again")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise damaged(path, f"is damaged ({' '.join(str(error).split())[:160]})") from None


def read_index(path: Path) -> Index:
    """An index.parquet. ValueError: it is damaged, or a row is none (which is named)."""
    import pyarrow as pa

    with _reading(path):
        file = Columns(path)
        ids, weights, prompts, shapes = map(file.whole, ("pair_id", "weight", "prompt", "shapes"))
        ties = file.whole("tie").cast(pa.bool_()) if "tie" in file.names else None
    if not len(ids):
        raise damaged(path, "has no rows, expected one per pair")
    found = _checked(path, ids, weights, prompts, shapes)
    tied = np.zeros(len(ids), bool) if ties is None else ties.fill_null(False).to_numpy()
    with _reading(path):
        verified = _digests(file)
    pa.default_memory_pool().release_unused()  # of columns that are not kept
    return Index(**found, ties=Numbers(tied), marks=file.marks, **verified)


def _checked(path: Path, ids: Any, weights: Any, prompts: Any, shapes: Any) -> dict[str, Column]:
    """The columns as they are kept. ValueError names the first row that is not as expected."""
    import pyarrow as pa

    def check(name: str, column: Any, expected: str, good: np.ndarray) -> None:
        if good.all():
            return
        row = int(good.argmin())
        pair_id, got = (values(plain(each.slice(row, 1)))[0] for each in (ids, column))
        where = f"row {row + 1}" + (f" (pair {pair_id})" if column is not ids else "")
        raise damaged(path, f"{where}: {name} expected {expected}, got {got!r:.40}")

    whole, number = pa.types.is_integer, pa.types.is_floating
    pair_ids = _numbers(ids, whole, pa.int64(), -1)
    check("pair_id", ids, "an integer in [0, 2^63)", pair_ids >= 0)
    weight = _numbers(weights, lambda kind: whole(kind) or number(kind), pa.float64(), -1.0)
    check("weight", weights, "0 or more", np.isfinite(weight) & (weight >= 0))
    for name, column in (("prompt", prompts), ("shapes", shapes)):
        text = pa.types.is_string(getattr(column.type, "value_type", column.type))
        there = column.is_valid().to_numpy()
        check(name, column, "a text", there if text else np.zeros(len(ids), bool))
    different, counts = np.unique(pair_ids, return_counts=True)
    if len(different) < len(ids):
        twice = different[counts.argmax()]
        raise damaged(path, f"pair {twice} stands in {counts.max()} rows, expected one")
    return {
        "pair_ids": Numbers(pair_ids),
        "weights": Numbers(weight),
        "prompts": Texts(prompts),
        "shapes": _kinds(shapes),
    }


def _numbers(column: Any, of: Callable[[Any], bool], kind: Any, missing: float) -> np.ndarray:
    """As `kind`; `missing` in place of what is no number."""
    if not of(column.type):
        return np.full(len(column), missing)
    return column.cast(kind).fill_null(missing).to_numpy()


def _kinds(column: Any) -> Kinds:
    """Of a dictionary's column; what no row names is left out."""
    column = column.unify_dictionaries()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in column.chunks])
    used = np.flatnonzero(np.bincount(codes))
    kinds = values(column.chunk(0).dictionary.take(used))
    return Kinds(np.searchsorted(used, codes), kinds)


def _digests(file: Columns) -> dict[str, Any]:
    """Of the pairs, and of all rows."""
    if "digest" not in file.names:
        return {"digests": None, "rows": None}
    found = bytearray()

    def parts(name: str) -> Iterator[list[Any]]:
        for part in file.parts(name):
            if name == "digest":
                found.extend(bytes.fromhex("".join(part)))
            yield part

    rows = index_digest((name, parts(name)) for name in file.names)
    return {"digests": np.frombuffer(found, np.uint8).reshape(-1, 16), "rows": rows}
