"""Arrow: the records of Parquet files and of Arrow tables, within bounds of what they unpack to.

A few kilobytes of Parquet can stand for terabytes: a page of zeros, a dictionary of one long value
and a million rows (or members of one list) that name it, runs of a billion nulls.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

UNPACKED, TIMES = 64 << 20, 100  # bytes of a file's columns: at most this, or so many times its own
ROWS, ROWS_PER_BYTE = 1 << 20, 16  # its rows: at most this, or so many for each of its bytes
LISTED = 1 << 24  # values of one row group's lists
PART = 1 << 17  # rows of a column that are Python's at a time; each time costs a dictionary
BATCH = 256 << 20  # bytes of the rows that are read at a time, where that is more than one


class Parquet:
    """Records of a .parquet file, read a few at a time: media bytes may stand in its columns.

    fields: the columns that are read. ValueError: not a Parquet file, or beyond the bounds.
    """

    def __init__(self, path: Path, fields: Container[str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.name, self.path, self.root = path.name, path, path.parent
        try:
            file = pq.ParquetFile(path)
            self.columns = file.schema_arrow.names
            self.total = file.metadata.num_rows
            self._fields = [name for name in self.columns if name in fields]
            self._sizes, shared = weighed(file, path, fields)
            # Read as a dictionary, values that stand there once are once in memory.
            self._file = pq.ParquetFile(path, read_dictionary=shared) if shared else file
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a parquet file ({str(error)[:120]})") from None

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        row = 0
        for group, size in enumerate(self._sizes):
            count = min(16, max(1, BATCH // max(1, size)))  # each value may be as long as its group
            how = {"batch_size": count, "row_groups": [group], "columns": self._fields}
            batches = self._file.iter_batches(**how)
            while (batch := self._next(batches)) is not None:
                for record in records(batch):
                    row += 1
                    yield f"row {row}", record

    def _next(self, batches: Iterator[Any]) -> Any:
        import pyarrow as pa

        try:
            return next(batches, None)
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(
                f"{self.path}: its data cannot be read ({reason}); write the file anew"
            ) from None


def weighed(file: Any, path: Path, fields: Container[str]) -> tuple[list[int], list[str]]:
    """Of each row group the bytes its fields unpack to, without the leaves named beside them: those
    of lists, whose values may be far fewer than their places. ValueError: beyond the bounds.
    """
    size, meta = path.stat().st_size, file.metadata
    if meta.num_rows > max(ROWS, ROWS_PER_BYTE * size):
        raise ValueError(f"{path}: says it has {meta.num_rows} rows in {size} bytes; write it anew")
    sizes, unpacked, shared = [0] * meta.num_row_groups, 0, []
    for j in range(meta.num_columns):
        leaf = file.schema.column(j)
        if leaf.path.split(".")[0] not in fields:
            continue
        chunks = [meta.row_group(i).column(j) for i in range(meta.num_row_groups)]
        weights = [max(0, chunk.total_uncompressed_size) for chunk in chunks]
        unpacked += sum(weights)
        places = [chunk.num_values for chunk in chunks] if leaf.max_repetition_level else []
        if max(places, default=0) > LISTED:
            raise ValueError(
                f"{path}: column {leaf.path} lists {max(places)} values in one row group, at most "
                f"{LISTED} are read; write it in smaller ones"
            )
        far = any(n * weight > BATCH for n, weight in zip(places, weights, strict=False))
        if far and leaf.physical_type == "BYTE_ARRAY":
            shared.append(leaf.path)
        else:
            sizes = [total + weight for total, weight in zip(sizes, weights, strict=True)]
    if unpacked > max(UNPACKED, TIMES * size):
        raise ValueError(
            f"{path}: unpacks to {unpacked} bytes from {size}, expected at most {TIMES} times as "
            "many; write it without what is repeated"
        )
    return sizes, shared


class Columns:
    """The columns of a Parquet file, one by one.

    ValueError: beyond the bounds, also of what a column's texts, that stand there once and are
    repeated, would be in full.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        self.names = schema.names
        self.marks = {k.decode(): v.decode() for k, v in (schema.metadata or {}).items()}
        weighed(file, path, self.names)
        texts = [field.name for field in schema if pa.types.is_string(field.type)]
        self._most = max(UNPACKED, TIMES * path.stat().st_size)
        self._file = pq.ParquetFile(path, read_dictionary=texts)

    def whole(self, name: str) -> Any:
        """A column as Arrow holds it: of texts a dictionary for each row group. KeyError: none."""
        column = self._file.read(columns=[name])[name]
        self._check(column.chunks, 0)
        return column

    def parts(self, name: str) -> Iterator[list[Any]]:
        """A column as Python values, some rows at a time."""
        length = 0
        for batch in self._file.iter_batches(PART, columns=[name]):
            length = self._check(batch.columns, length)
            yield values(plain(batch.column(0)))

    def _check(self, chunks: list[Any], length: int) -> int:
        """`length` and the bytes of the texts of `chunks`."""
        import pyarrow as pa
        import pyarrow.compute as pc

        for chunk in chunks:
            if pa.types.is_dictionary(chunk.type):
                each = pc.binary_length(chunk.dictionary).take(chunk.indices)
                length += pc.sum(each).as_py() or 0
        if length > self._most:
            raise ValueError(f"holds {length} bytes of texts that are repeated")
        return length


def plain(column: Any) -> Any:
    """Of a dictionary's column the column that it stands for, any other as it is."""
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        return pa.chunked_array(map(plain, column.chunks)) if column.num_chunks else column
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def records(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow table or record batch."""
    columns = [values(column) for column in batch.columns]
    for row in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, row, strict=True))


def values(column: Any) -> list[Any]:
    """An Arrow column as Python values; texts that are not UTF-8 keep their bytes as surrogates,
    and a value that a dictionary holds once is one object.
    """
    import pyarrow as pa

    kind = column.type
    if isinstance(column, pa.ChunkedArray):
        return [value for chunk in column.chunks for value in values(chunk)]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        try:
            return column.to_pylist()
        except UnicodeDecodeError:
            raw = column.cast(pa.large_binary()).to_pylist()
            return [None if v is None else v.decode(errors="surrogateescape") for v in raw]
    if pa.types.is_dictionary(kind):
        places = column.indices.to_pylist()
        known = {i: values(column.dictionary.slice(i, 1))[0] for i in set(places) - {None}}
        return [known.get(i) for i in places]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        within = iter(values(column.flatten()))
        lengths = column.value_lengths().to_pylist()
        return [None if n is None else list(islice(within, n)) for n in lengths]
    if pa.types.is_struct(kind) and kind.num_fields:
        names = [field.name for field in kind]
        there = column.is_valid().to_pylist()
        rows = zip(there, *map(values, column.flatten()), strict=True)
        return [dict(zip(names, row, strict=True)) if valid else None for valid, *row in rows]
    try:
        return column.to_pylist()
    except (ValueError, OverflowError, KeyError):  # a record is refused, not the column
        return [_value(cell) for cell in column]


def _value(cell: Any) -> Any:
    """A cell as a Python value.

    One with texts that are not UTF-8 is a surrogate in their place, and one that Python has no
    value for (a date beyond its years, an unknown time zone) its type.
    """
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return "\ud800"
    except (ValueError, OverflowError, KeyError):
        return cell.type
