"""Metadata files that could be read in two ways, or hold what Python has no value for."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastpref.pairs.rows import BadRow, Rows, read_rows

GOOD = {"prompt": ["cat"], "chosen": [b"A"], "rejected": [b"B"]}
FAR = pa.array([2**62], pa.timestamp("ms"))  # Python's years end at 9999
MARS = pa.array([10], pa.timestamp("ms", tz="Mars/Phobos"))


def write(folder, **columns):
    pq.write_table(pa.table(GOOD | columns), folder / "metadata.parquet")
    return folder


def test_a_parquet_column_named_twice(tmp_path):
    table = pa.table([["cat"], [b"A"], [b"B"], [b"B"]], ["prompt", "chosen", "rejected", "chosen"])
    pq.write_table(table, tmp_path / "metadata.parquet")
    with pytest.raises(ValueError, match=r"parquet: column 'chosen' expected once, got it twice"):
        Rows(tmp_path)


def test_a_json_key_said_twice(tmp_path):
    line = '{"prompt": "cat", "chosen": "a.mp4", "rejected": "b.mp4", "chosen": "b.mp4"}\n'
    (tmp_path / "metadata.jsonl").write_text(line)
    (bad,) = Rows(tmp_path)
    assert (bad.kind, bad.where) == ("no_record", "metadata.jsonl line 1")
    assert "key 'chosen' expected once, got it twice" in bad.reason


@pytest.mark.parametrize("values", [FAR, MARS, pa.array([2**30], pa.date32())])
def test_values_that_python_has_none_for(values, tmp_path):
    assert read_rows(write(tmp_path, created=values))[0].chosen == b"A"  # in a column not used
    for field, of in (("prompt", "a text"), ("weight", "a finite number"), ("chosen", "a text")):
        (bad,) = Rows(write(tmp_path, **{field: values}))
        assert isinstance(bad, BadRow)
        assert bad.field == field and f"expected {of}" in bad.reason
