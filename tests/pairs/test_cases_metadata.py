"""What any metadata file may cost is known before it is read."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from metadata_files import LINES, MIB, metadata, one_bad

from fastpref.pairs import arrow, rows, sources, text
from fastpref.pairs.rows import Rows, read_rows


@pytest.fixture
def peak():
    """Most that Python has held since the test called this the first time, in MiB."""

    def measured() -> float:
        if not tracemalloc.is_tracing():
            tracemalloc.start()
        return tracemalloc.get_traced_memory()[1] / MIB

    yield measured
    tracemalloc.stop()


def write(path: Path, columns: dict, **options) -> Path:
    # store_schema: else what was made as a dictionary would be read as one
    pq.write_table(pa.table(columns), path, compression="zstd", store_schema=False, **options)
    return path


def test_parquet_of_zeros_is_refused_unread(folder):
    columns = {"prompt": ["x"] * 12, "rejected": [b"b"] * 12}
    columns["chosen"] = [bytes(8 * MIB) + bytes([i]) for i in range(12)]
    options = {"use_dictionary": False, "row_group_size": 2}
    path = write(folder / "metadata.parquet", columns, **options)
    assert path.stat().st_size < 20_000
    with pytest.raises(
        ValueError, match=r"parquet: unpacks to 1006\d+ bytes from \d+, expected at"
    ):
        Rows(folder)
    shard = folder / "hub" / "data" / "train-00000-of-00001.parquet"
    shard.parent.mkdir(parents=True)
    path.rename(shard)
    with pytest.raises(ValueError, match=r"train-.*: unpacks to 1006"):
        Rows(folder / "hub")


def test_columns_that_are_not_read_may_be_anything(folder, peak):
    columns = {"prompt": ["x"], "chosen": [b"a"], "rejected": [b"b"], "mask": [bytes(80 * MIB)]}
    write(folder / "metadata.parquet", columns, use_dictionary=False)
    peak()
    assert read_rows(folder)[0].chosen == b"a" and peak() < 8


def repeated(value: bytes, times: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), pa.array([value]))


def test_one_value_in_many_rows_is_read_a_few_at_a_time(folder, peak, monkeypatch):
    columns = {
        "prompt": ["x"] * 64,
        "chosen": repeated(bytes(4 * MIB), 64),
        "rejected": [b"b"] * 64,
    }
    write(folder / "metadata.parquet", columns)
    monkeypatch.setattr(arrow, "BATCH", 8 * MIB)
    peak()
    assert sum(1 for _ in Rows(folder)) == 64
    assert peak() < 24  # two rows at a time, not 16


def test_one_value_in_many_places_of_a_list_is_there_once(folder, peak):
    """Not 400 times: the second bound of a list beside that of its length."""
    lists = pa.ListArray.from_arrays([0, 200, 400], repeated(bytes(MIB), 400))
    write(folder / "metadata.parquet", {"prompt": ["x", "y"], "candidates": lists})
    peak()
    found = Rows(folder, ranked="best_worst")
    assert [row.prompt for row in found] == ["x", "y"]
    assert peak() < 8  # MiB of 400


def test_rows_and_members_without_number(folder, monkeypatch):
    nothing = pa.nulls(1 << 21, pa.string())
    write(folder / "metadata.parquet", {"prompt": nothing, "chosen": nothing, "rejected": nothing})
    with pytest.raises(ValueError, match=r"parquet: says it has 2097152 rows in \d+ bytes"):
        Rows(folder)
    monkeypatch.setattr(arrow, "LISTED", 1 << 16)
    lists = pa.ListArray.from_arrays([0, (1 << 16) + 1], pa.nulls((1 << 16) + 1, pa.binary()))
    write(folder / "metadata.parquet", {"prompt": ["x"], "candidates": lists})
    with pytest.raises(
        ValueError, match=r"column candidates.* lists 65537 values in one row group"
    ):
        Rows(folder)


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_honest_parquet_is_read(use_dictionary, folder, monkeypatch):
    """Media that do not pack, and columns that pack well beside them."""
    monkeypatch.setattr(arrow, "UNPACKED", 0)
    monkeypatch.setattr(arrow, "BATCH", MIB)
    media = [os.urandom(MIB // 4) for _ in range(12)]
    same = {"prompt": ["a fox " * 50] * 6, "negative_prompt": ["blurred " * 50] * 6}
    pairs = {"chosen": media[:6], "rejected": media[6:]}
    write(folder / "metadata.parquet", same | pairs, use_dictionary=use_dictionary)
    assert [(row.chosen, row.rejected) for row in read_rows(folder)] == [
        *zip(media[:6], media[6:], strict=True)
    ]
    listed = {"prompt": ["x", "y"], "candidates": [media[:3], [*media[3:5], media[3]]]}
    write(folder / "metadata.parquet", listed, use_dictionary=use_dictionary)
    first, second = (list(pair) for pair in (media[:3], [*media[3:5], media[3]]))
    found = [row.rejected for row in read_rows(folder)]
    assert found == [first[1], first[2], first[2], second[1], second[2], second[2]]


def test_lists_and_structures_keep_their_gaps():
    column = pa.array(
        [[{"bytes": b"a", "path": None}, None], None, [], [{"bytes": None, "path": "b"}]]
    )
    assert arrow.values(column) == column.to_pylist()
    assert arrow.values(column.slice(1)) == column.to_pylist()[1:]
    assert arrow.values(pa.chunked_array([column, column])) == column.to_pylist() * 2
    packed = pa.array(["x", None, "x"]).dictionary_encode()
    assert arrow.values(packed) == ["x", None, "x"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_text_files_of_absurd_size(suffix, folder, monkeypatch):
    path = folder / f"metadata.{suffix}"
    path.touch()
    os.truncate(path, 1 << 40)  # holes: it takes no place on the disk
    with pytest.raises(
        ValueError, match=r"has 1099511627776 bytes, at most 1073741824 are read; sp"
    ):
        Rows(folder)
    path.write_text(metadata(suffix) + "\n" * 100)
    monkeypatch.setattr(text, "MAX_ROWS", 50)
    with pytest.raises(ValueError, match=r"has more than 50 lines; split it"):
        Rows(folder)
    path.write_text(metadata(suffix))
    monkeypatch.setattr(text, "MAX_LINE", 30)
    with pytest.raises(ValueError, match=r"line \d: has more than 30 characters"):
        Rows(folder)


def test_rows_columns_and_candidates_have_a_most(folder, monkeypatch):
    path = folder / "metadata.jsonl"
    words = json.dumps({**LINES[0], **{f"x{i}": 0 for i in range(sources.MAX_COLUMNS)}})
    path.write_text(words)
    with pytest.raises(ValueError, match=r"jsonl: its records have more than 10000 different keys"):
        Rows(folder)
    path.write_text(json.dumps({"prompt": "x", "candidates": ["a.mp4"] * 257}))
    assert one_bad(folder).reason == "expected at most 256 media, got 257"
    path.write_text(metadata("jsonl") * 2)
    monkeypatch.setattr(rows, "MAX_ROWS", 3)
    with pytest.raises(ValueError, match=r"has 4 rows, at most 3 are read; split it"):
        Rows(folder)


def test_a_text_file_is_not_held_in_memory(folder, peak):
    (folder / "metadata.jsonl").write_text(metadata("jsonl") * 2000)
    peak()
    assert sum(1 for _ in sources.Jsonl(folder / "metadata.jsonl")) == 4000
    assert peak() < 0.2  # of 0.5


def test_bad_rows_keep_no_media(folder):
    media = [os.urandom(MIB) for _ in range(8)]
    columns = {"prompt": [None] * 4, "chosen": media[:4], "rejected": media[4:]}
    path = write(folder / "metadata.parquet", {**columns, "prompt": pa.nulls(4, pa.string())})
    tracemalloc.start()
    bad = list(Rows(path))
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(bad) == 4 and kept < MIB
