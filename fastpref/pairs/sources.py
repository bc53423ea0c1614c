"""Sources: the records of a metadata file (jsonl, csv, parquet) or of a Hugging Face dataset.

Each has `name`, `path` (the file, or None), `root` (the folder media paths are relative to),
`columns` (None where there is no record), `total` (records, where known), and iterates over
(where, record): a dict, or the reason why there is none. Only the file itself is checked here.

Text files are read twice, first for their columns and number, and not kept. They are read here and
not by `datasets` (5.2): one broken line costs it the whole file, the prompts 007 and NA are 7.0 and
none to it, and a comma too many in one row shifts every row's cells into the next column.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from .arrow import Parquet, records
from .text import MAX_LINE, check_pointer, delimiter, lines

SUFFIXES = (".jsonl", ".csv", ".parquet")
BARE = {"audio", "image", "label", "pdf", "text", "video"}  # columns of files without metadata
MAX_COLUMNS = 10_000
Records = Iterator[tuple[str, dict[str, Any] | str]]


def open_source(
    data: str | Path, split: str, fields: Container[str]
) -> Jsonl | Csv | Parquet | HuggingFace:
    """The source `data` names; ValueError: there is none, or it cannot be read.

    fields: of a record, where columns can be read alone; what else it holds may be left out.
    """
    path = find(data)
    if path is None:
        return HuggingFace(str(data), split, fields)
    if split != "train":
        raise ValueError(
            f"split {split}: has no effect, {path} has no splits (only Hugging Face datasets do); "
            "remove it"
        )
    check_pointer(path)
    kind = path.suffix.lower()
    if kind != ".parquet":
        return Jsonl(path) if kind == ".jsonl" else Csv(path)
    source = Parquet(path, fields)
    check_columns(source.columns, str(path))
    return source


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
    if (path / "model_index.json").exists():
        raise ValueError(f"{path}: is a model's folder; expected a folder of media")
    if (path / "encoded" / "fingerprint.json").is_file():
        raise ValueError(f"{path}: is a run's folder; its pairs are in {path / 'encoded'}")
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
    for name in twice(filter(None, columns)):  # a spreadsheet's empty columns
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
        self.total = 0
        names: dict[str, None] = {}
        for _, record in self:
            self.total += 1
            if isinstance(record, dict):
                names.update(dict.fromkeys(record))
            if len(names) > MAX_COLUMNS:
                raise ValueError(f"{path}: its records have more than {MAX_COLUMNS} different keys")
        self.columns: list[str] | None = list(names) or None

    @staticmethod
    def _parse(text: str) -> dict[str, Any] | str:
        try:
            record = json.loads(text, object_pairs_hook=json_object)
        except (ValueError, RecursionError) as error:
            return f"expected a JSON object in one line ({error})"
        return record if isinstance(record, dict) else "expected a JSON object in one line"

    def __iter__(self) -> Records:
        for line, text in enumerate(lines(self.path), 1):
            text = text.strip("\ufeff \t\r\n")  # a mark within: files put together
            if text:
                yield f"line {line}", self._parse(text)


class Csv:
    """Records of a .csv file with a header line; a row of nothing but empty cells is none."""

    def __init__(self, path: Path) -> None:
        self.name, self.path, self.root = path.name, path, path.parent
        self.columns: list[str] | None = None
        csv.field_size_limit(MAX_LINE)  # of a cell: 131072 otherwise
        self.total = sum(1 for _ in self)
        check_columns(self.columns or [], f"{path} line 1")

    def __iter__(self) -> Records:
        text = lines(self.path)
        header = next(text, "")
        said = re.fullmatch(r"sep=([,;|\t])\s*", header)  # Excel's own first line
        before = 0 if said is None else 1
        header = next(text, "") if said else header
        mark = said[1] if said else delimiter(header)
        how = {"delimiter": mark, "skipinitialspace": f"{mark} " in header}
        reader = csv.reader(itertools.chain([header], text), strict=True, **how)
        columns: list[str] | None = None
        line = before + 1
        try:
            for cells in reader:
                if columns is None:
                    columns = self.columns = cells or None
                elif any(cells):
                    yield f"line {line}", self._record(cells)
                line = before + reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"{self.path} line {line}: not CSV ({error}); close each quote, and double those "
                "inside a quoted text"
            ) from None

    def _record(self, cells: list[str]) -> dict[str, Any] | str:
        if len(cells) > len(self.columns):
            expected = f"expected {len(self.columns)} columns, got {len(cells)}"
            return f"{expected}; put quotes around a text that holds commas"
        return dict(zip(self.columns, cells, strict=False))


class HuggingFace:
    """Records of one split; images and videos come as their bytes, undecoded.

    Raises:
        ValueError: nothing there can be loaded, or the split does not exist.
    """

    def __init__(self, data: str, split: str, fields: Container[str]) -> None:
        path = Path(data)
        for shard in sorted(path.rglob("*.parquet")):
            check_pointer(shard)
            Parquet(shard, fields)  # within its bounds: datasets reads whole row groups
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
