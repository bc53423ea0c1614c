"""The rows of a comparison on disk: read whole and checked, and one more appended."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.evidence.grid import NAMES, TIMED
from fastpref.files import write_atomic

Row = dict[str, Any]
SCORE, ERROR = 1e-4, 1e-5  # units of the integers in a row
WHERE = {"device": str, "torch": str, "commit": str, "cuda": str, "threads": int}
BASE = {"world": str, "pairs": int, "steps": int, "clips": int, "parameters": int}
KEPT = {"seconds_per_pair": float, "before": float, "curve": list, "logged": list}


def read(path: Path) -> list[Row]:
    """The rows of a file, the base model's first; none where there is no file.

    Raises:
        ValueError: a line that is no row, or none that goes with the first, by its number.
    """
    found: list[Row] = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            row = json.loads(line)
            wrong = _wrong(row, found)
        except (ValueError, RecursionError):
            wrong = "JSON"
        except (LookupError, TypeError, AttributeError):
            wrong = "a row of bench.evidence with all its fields"
        if wrong:
            raise ValueError(f"{path} line {number}: expected {wrong}; remove it")
        found.append(row)
    return found


def _wrong(row: Row, before: Sequence[Row]) -> str:
    """What was expected of a row where it is not so; LookupError, TypeError: a field is missing or
    of another kind.
    """
    if not before:
        if row["name"] != "base":
            return "the base model's row, which stands first"
        sizes = {which: len(row["prompts"][which]) for which in ("choice", "report")}
        asked = [prompt for which in sizes for prompt in row["prompts"][which]]
        typed = _typed(row, BASE) and all(isinstance(prompt, str) for prompt in asked)
        pairs = len(row["errors"][0])
    else:
        if row["name"] not in NAMES:
            return f"one of {', '.join(NAMES)} as its name"
        if key(row) in {key(other) for other in before}:
            return "each run once"
        numbers = [row[name] for name in ("beta", "alpha") if row[name] is not None]
        typed = all(map(_number, numbers)) and isinstance(row["seed"], int)
        if "diverged" in row:
            return "" if typed else "numbers as its beta, alpha and seed"
        sizes = {which: len(before[0]["prompts"][which]) for which in ("choice", "report")}
        pairs = len(before[0]["errors"][0])
        typed = typed and _typed(row, KEPT) and _curve(row, before[0])
    whole = (
        typed
        and _typed(row, WHERE)
        and all(_numbers(row["scores"][which], size) for which, size in sizes.items())
        and len(row["errors"]) == 2
        and all(_numbers(values, pairs) for values in row["errors"])
    )
    return "" if whole else "a row of bench.evidence as long as the base model's"


def _curve(row: Row, base: Row) -> bool:
    prompts = len(dict.fromkeys(base["prompts"]["report"]))
    points = [[p["step"], p["seconds"], p["accuracy"]] for p in row["curve"]]
    whole = bool(points) and all(
        _numbers(p, 3) for p in (*points, *([*q, 0] for q in row["logged"]))
    )
    judged = row["name"] not in TIMED or all(_numbers(p["report"], prompts) for p in row["curve"])
    return whole and judged


def _typed(row: Row, wanted: Mapping[str, type]) -> bool:
    return all(
        _number(row[name]) if kind is float else isinstance(row[name], kind)
        for name, kind in wanted.items()
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count > 0 and all(map(_number, values))


def append(path: Path, rows: Sequence[Row], new: Row) -> None:
    """The rows and a new one, whole or as before."""
    lines = [json.dumps(r, separators=(",", ":")) + "\n" for r in (*rows, new)]
    write_atomic(path, "".join(lines).encode())


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a run is known by."""
    return tuple(row.get(name) for name in ("name", "beta", "alpha", "seed"))


def line(row: Row, base: Row) -> str:
    """A run in a line: its gains, and the change of its winners' error."""
    if "diverged" in row:
        return f"diverged, {row['diverged']}"

    def mean(values: Sequence[int]) -> float:
        return sum(values) / len(values)

    gains = (
        f"{name} {SCORE * (mean(row['scores'][name]) - mean(base['scores'][name])):+.3f}"
        for name in ("choice", "report")
    )
    winner = mean(row["errors"][0]) / mean(base["errors"][0]) - 1
    return f"gain on {' and '.join(gains)}, winners' error {100 * winner:+.1f} %"
