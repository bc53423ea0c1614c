"""Sources: the records of a metadata file (jsonl, csv, parquet) or of a Hugging Face dataset.

Each has `name`, `path` (the file, or None), `root` (the folder media paths are relative to),
`columns` (None where there is no record), `total` (records, where known), and iterates over
(where, record): a dict, or the reason why there is none. Only the file itself is checked here.

Text files are read here and not by `datasets` (5.2): one broken line costs it the whole file, the
prompts 007 and NA are 7.0 and none to it, and a comma too many in one row shifts every row's cells
into the next column.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".csv", ".parquet")
BARE = {"audio", "image", "label", "pdf", "text", "video"}  # columns of files without metadata
BOM = b"\xef\xbb\xbf"
Records = Iterator[tuple[str, dict[str, Any] | str]]


def open_source(data: str | Path, split: str) -> Jsonl | Csv | Parquet | HuggingFace:
    """The source `data` names; ValueError: there is none, or it cannot be read."""
    path = find(data)
    if path is None:
        return HuggingFace(str(data), split)
    if split != "train":
        raise ValueError(
            f"split {split}: has no effect, {path} has no splits (only Hugging Face datasets do); "
            "remove it"
        )
    return {".jsonl": Jsonl, ".csv": Csv, ".parquet": Parquet}[path.suffix.lower()](path)


def find(data: str | Path) -> Path | None:
    """The metadata file of `data`, or None where `data` must be a Hugging Face dataset."""
    path = Path(data)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"{path}: expected a folder or a {', '.join(SUFFIXES)} file, got {path.suffix!r}"
            )
        return path
    if not path.is_dir():
        if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(data)):
            raise ValueError(
                f"data {data}: no such file or folder; expected a folder with metadata.jsonl, "
                "metadata.csv or metadata.parquet, such a file, or a dataset OWNER/NAME"
            )
        return None
    if (path / "fingerprint.json").exists():
        unfinished = not (path / "index.parquet").exists()
        state = "unfinished: run its fastpref encode again" if unfinished else "finished"
        raise ValueError(f"{path}: is an encoded set ({state}); expected a folder of media")
    found = [path / f"metadata{suffix}" for suffix in SUFFIXES]
    found = [file for file in found if file.is_file()]
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise ValueError(f"{path}: holds {names}; pass the file that is meant")
    return found[0] if found else None


def twice(names: Iterable[str]) -> list[str]:
    """The names that stand there more than once: the last would win."""
    return [name for name, count in Counter(names).items() if count > 1]


def check_columns(columns: list[str], where: str) -> None:
    """ValueError: a column stands there twice."""
    for name in twice(columns):
        raise ValueError(
            f"{where}: column {name!r} expected once, got it twice; rename or remove one"
        )


def json_object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """What json.loads makes of an object; ValueError: a key stands there twice."""
    for name in twice(name for name, _ in members):
        raise ValueError(f"key {name!r} expected once, got it twice")
    return dict(members)


class Jsonl:
    """Records of a .jsonl file; bytes that are not UTF-8 become surrogates, later refused."""

    def __init__(self, path: Path) -> None:
        self.name, self.path, self.root = path.name, path, path.parent
        self.columns: list[str] | None = None
        self._records: list[tuple[str, dict[str, Any] | str]] = []
        for line, raw in enumerate(path.read_bytes().removeprefix(BOM).split(b"\n"), 1):
            if raw.strip():
                self._records.append((f"line {line}", self._parse(raw)))
        self.total = len(self._records)
        parsed = [record for _, record in self._records if isinstance(record, dict)]
        if parsed:
            self.columns = list(dict.fromkeys(key for record in parsed for key in record))

    @staticmethod
    def _parse(raw: bytes) -> dict[str, Any] | str:
        try:
            text = raw.decode(errors="surrogateescape")
            record = json.loads(text, object_pairs_hook=json_object)
        except (ValueError, RecursionError) as error:
            return f"expected a JSON object ({error})"
        return record if isinstance(record, dict) else "expected a JSON object"

    def __iter__(self) -> Records:
        return iter(self._records)


class Csv:
    """Records of a .csv file with a header line."""

    def __init__(self, path: Path) -> None:
        self.name, self.path, self.root = path.name, path, path.parent
        text = path.read_bytes().removeprefix(BOM).decode(errors="surrogateescape")
        csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # of a cell: 131072 otherwise
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        self.columns: list[str] | None = None
        self._records: list[tuple[str, dict[str, Any] | str]] = []
        line = 1
        try:
            for cells in reader:
                if self.columns is None:
                    self.columns = cells or None
                elif cells:
                    self._records.append((f"line {line}", self._record(cells)))
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"{path} line {line}: not CSV ({error}); close each quote, and double those inside "
                "a quoted text"
            ) from None
        check_columns(self.columns or [], f"{path} line 1")
        self.total = len(self._records)

    def _record(self, cells: list[str]) -> dict[str, Any] | str:
        if len(cells) > len(self.columns):
            expected = f"expected {len(self.columns)} columns, got {len(cells)}"
            return f"{expected}; put quotes around a text that holds commas"
        return dict(zip(self.columns, cells, strict=False))

    def __iter__(self) -> Records:
        return iter(self._records)


class Parquet:
    """Records of a .parquet file, read a few at a time: media bytes may stand in its columns."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.name, self.path, self.root = path.name, path, path.parent
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a parquet file ({str(error)[:120]})") from None
        self.columns = self._file.schema_arrow.names
        check_columns(self.columns, str(path))
        self.total = self._file.metadata.num_rows

    def __iter__(self) -> Records:
        row = 0
        for batch in self._batches():
            for record in records(batch):
                row += 1
                yield f"row {row}", record

    def _batches(self) -> Iterator[Any]:
        import pyarrow as pa

        batches = self._file.iter_batches(batch_size=16)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                reason = " ".join(str(error).split())[:120]
                raise ValueError(
                    f"{self.path}: its data cannot be read ({reason}); write the file anew"
                ) from None
            if batch is None:
                return
            yield batch


def records(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow table or record batch."""
    columns = [values(column) for column in batch.columns]
    for row in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, row, strict=True))


def values(column: Any) -> list[Any]:
    """An Arrow column as Python values; texts that are not UTF-8 keep their bytes as surrogates."""
    import pyarrow as pa

    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        raw = column.cast(pa.large_binary()).to_pylist()
        return [None if v is None else v.decode(errors="surrogateescape") for v in raw]
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
        return "\udcff"
    except (ValueError, OverflowError, KeyError):
        return cell.type


class HuggingFace:
    """Records of one split; images and videos come as their bytes, undecoded.

    Raises:
        ValueError: nothing there can be loaded, or the split does not exist.
    """

    def __init__(self, data: str, split: str) -> None:
        path = Path(data)
        self.name, self.path = data, None
        self.root = path if path.is_dir() else None  # on the hub: no file of this machine's
        try:
            import datasets
        except ModuleNotFoundError:
            raise ValueError(
                f"data {data}: no metadata.jsonl, metadata.csv or metadata.parquet there; "
                "for a Hugging Face dataset install the package datasets"
            ) from None
        try:
            if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
                stored = datasets.load_from_disk(data)
                if isinstance(stored, datasets.DatasetDict):
                    if split not in stored:
                        raise ValueError(f"split {split}: expected one of {', '.join(stored)}")
                    stored = stored[split]
                elif split != "train":
                    raise ValueError(f"it has no splits, remove split {split}")
            else:
                stored = datasets.load_dataset(data, split=split, streaming=True)
        except Exception as error:  # datasets raises errors of many libraries
            reason = " ".join(str(error).split())[:160]
            raise ValueError(
                f"data {data}: expected a folder with metadata.jsonl, metadata.csv or "
                f"metadata.parquet, such a file, or a Hugging Face dataset ({reason})"
            ) from None
        of = {"split": stored.split, "data_version": getattr(stored, "_fingerprint", None)}
        self.version = {name: str(value) for name, value in of.items() if value}
        self._records = stored.with_format("arrow")  # as stored: nothing is decoded
        self.columns: list[str] | None = stored.column_names
        if self.root and self.columns and set(self.columns) <= BARE:
            raise ValueError(
                f"data {data}: no metadata.jsonl, metadata.csv or metadata.parquet in the folder; "
                "expected one that names the pairs of its files"
            )
        self.total = len(stored) if hasattr(stored, "__len__") else None

    def __iter__(self) -> Records:
        row = 0
        for table in self._records.iter(batch_size=16):
            for record in records(table):
                row += 1
                yield f"row {row}", record
