"""The encoded set as it is written: its folder bound to one encoding, its index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..files import differences, identity, model_identity, tidy, write_atomic
from ..models.folder import encoders_of
from .arrow import values
from .media import Sampling
from .notes import Note
from .prepare import Counts, Prepared
from .rows import BadRow, Row, Rows
from .shards import (
    digest,
    encoding_of,
    index_digest,
    pair_file,
    read_fingerprint,
    stored_shapes,
    written_digest,
)

# Beginnings of what a folder may hold that is not encoded yet: a lock, a write that was cut off,
# what was found of data whose rows were all bad.
LEFT_OVER = (".fastpref", "fingerprint.json", "bad_rows.jsonl", "counts.json")


def fingerprint(
    module: ModuleType,
    model: str | Path,
    rows: Rows,
    sampling: Sampling,
    dtype: str,
    seed: int | None,
) -> dict[str, Any]:
    """What decides an encoded set's content, as compared by `check`; digests: its files have them.

    Of a Hugging Face dataset also its split and its own fingerprint, where it has them; encoders:
    what training compares with the base it gets (`models.folder.encoders_of`).
    """
    encoders = encoders_of(model)
    return {
        "family": module.__name__,
        "model": model_identity(model),
        **({"encoders": encoders} if encoders else {}),
        **asdict(sampling),
        "dtype": dtype,
        **({"posterior": "mode"} if seed is None else {"posterior": "sample", "seed": seed}),
        "digests": "blake2b",
        "ranked": rows.ranked if rows.layout == "candidates" else None,
        **({"ties": "keep"} if rows.keep_ties else {}),
        "data": identity(rows.path) if rows.path else rows.name,
        **rows.version,
    }


def check(folder: Path, now: dict[str, Any], data: Path | None) -> bool:
    """Whether pairs of this encoding are in `folder` already; ValueError names what differs if it
    is another's.

    A folder without pairs must be new or empty (but for LEFT_OVER, and a fingerprint binds nothing
    there: its model may since be mended), and none may be the folder of the `data` itself.
    """
    if folder.resolve() == data:
        raise ValueError(f"output_dir {folder}: is the data folder; choose another output_dir")
    if not (folder / "fingerprint.json").exists() or not (folder / "pairs").exists():
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output_dir {folder}: is a file; choose another output_dir")
        there = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
        foreign = [name for name in there if not name.startswith(LEFT_OVER)]
        if foreign:
            raise ValueError(
                f"output_dir {folder}: holds something else ({foreign[0]}): "
                "choose another output_dir"
            )
        return False
    # Sets from before these were written; without digests they are read, and never added to.
    before = {"posterior": "mode", "digests": now["digests"]} | read_fingerprint(folder)
    hidden = {"data"} if data else set()  # of files: two digests say nothing
    listed = differences(before, now, hidden)
    if not listed and before.get("data") != now["data"]:
        raise ValueError(
            f"output_dir {folder}: the data changed since it was encoded; delete that folder to "
            "encode again, or choose another output_dir"
        )
    if listed:
        raise ValueError(
            f"output_dir {folder}: encoded with another {listed}; "
            "choose another output_dir, or the same values"
        )
    return True


def claim(folder: Path, now: dict[str, Any], data: Path | None) -> None:
    """Makes `folder` this encoding's own, by its fingerprint, and removes what a killed one left
    among its pairs; ValueError as `check`.
    """
    for part in folder.glob("pairs/??"):
        tidy(part)
    if not check(folder, now, data):
        write_atomic(folder / "fingerprint.json", (json.dumps(now, indent=1) + "\n").encode())


def entry(item: Prepared, ties: bool) -> dict[str, Any]:
    """A pair's line of the index: everything but the media; ties: whether it says what is one."""
    left = ("chosen", "rejected") if ties else ("chosen", "rejected", "tie")
    names = [f.name for f in fields(Row) if f.name not in left]
    return {"pair_id": item.pair_id} | {name: getattr(item.row, name) for name in names}


def indexed(
    items: Iterable[tuple[bool, Prepared | BadRow]], counts: Counts, keep_ties: bool
) -> tuple[list[dict[str, Any]], list[BadRow]]:
    """(lines of the index, bad rows) of items, each with whether it is new; all are counted."""
    index: list[dict[str, Any]] = []
    bad: list[BadRow] = []
    for _, item in items:
        if (fault := counts.add(item)) is not None:
            bad.append(fault)
        else:
            index.append(entry(item, keep_ties))
    return index, bad


def embeddings(cond: dict[str, Tensor]) -> dict[str, Tensor]:
    """A prompt's embeddings under the names they are stored by."""
    return {f"cond.{name}": value for name, value in cond.items()}


def stored(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What is written of `tensors`: floating ones in `dtype`, the others as they are."""
    return {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
        for name, value in tensors.items()
    }


def write_tensors(
    folder: Path, path: Path, tensors: dict[str, Tensor], notes: Sequence[Note] = ()
) -> None:
    """Writes them as one safetensors file of the set in `folder`, with their digest and what was
    noted of a pair.
    """
    from safetensors.torch import save

    encoding = encoding_of(read_fingerprint(folder))
    # One entry, since safetensors writes several in any order.
    said = {"digest": digest(path, tensors, encoding), "notes": notes}
    write_atomic(path, save(tensors, {"fastpref": json.dumps(said)}))


def write_index(folder: Path, index: list[dict[str, Any]]) -> None:
    """index.parquet, one row per pair, by id; an encoded set is complete with it.

    Neither the order of the rows nor what an interruption left to encode changes it. In its schema
    stand digests of its rows, of the fingerprint and of the empty prompt's file.
    """
    import pyarrow as pa

    index = sorted(index, key=lambda line: line["pair_id"])
    columns = {name: [line[name] for line in index] for name in index[0]}
    files = [pair_file(folder, i) for i in columns["pair_id"]]
    columns["shapes"] = [stored_shapes(file) for file in files]
    if "digests" in read_fingerprint(folder):
        columns["digest"] = [written_digest(file) for file in files]
    numbers = {"pair_id": pa.int64(), "weight": pa.float64()}
    numbers |= {"score_chosen": pa.float64(), "score_rejected": pa.float64(), "tie": pa.bool_()}
    schema = pa.schema([(name, numbers.get(name, pa.string())) for name in columns])
    write_table(folder, pa.table(columns, schema=schema))


def write_table(folder: Path, table: Any) -> None:
    """index.parquet of an Arrow table, with its digests where it has the pairs'."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if "digest" in table.column_names:
        encoding = encoding_of(read_fingerprint(folder))
        empty = written_digest(folder / "empty.safetensors")
        parts = ((name, map(values, table[name].chunks)) for name in table.column_names)
        rows = index_digest(parts)  # as they will be read back
        table = table.replace_schema_metadata({"rows": rows, "encoding": encoding, "empty": empty})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomic(folder / "index.parquet", sink.getvalue().to_pybytes())
