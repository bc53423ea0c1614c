"""Metadata for tests: two pairs, and the one row that is bad."""

from __future__ import annotations

import json
from pathlib import Path

from fastpref.pairs.rows import BadRow, Rows

PROMPTS = ["ein grüner Kreis, groß", "a red disc"]
LINES = [{"prompt": prompt, "chosen": "a.mp4", "rejected": "b.mp4"} for prompt in PROMPTS]
MIB = 1 << 20


def table(mark: str = ",") -> str:
    cells = [["prompt", "chosen", "rejected"], *(list(line.values()) for line in LINES)]
    quoted = [[f'"{c}"' if mark in c else c for c in row] for row in cells]
    return "".join(mark.join(row) + "\n" for row in quoted)


def metadata(suffix: str) -> str:
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES)
    return lines if suffix == "jsonl" else table()


def one_bad(data: Path) -> BadRow:
    (bad,) = [row for row in Rows(data) if isinstance(row, BadRow)]
    assert len(str(bad).splitlines()) == 1
    return bad
