"""Rows: the preference pairs that a folder, a metadata file or a Hugging Face dataset lists.

Layouts, told apart by their columns (weight and negative_prompt are optional in all):
    prompt, chosen, rejected           optional score_chosen >= score_rejected: equal is a tie
    caption, jpg_0, jpg_1, label_0     Pick-a-Pic: image bytes; 1 (first wins), 0 or 0.5 (a tie);
                                       label_1, where there is one, is 1 - label_0
    prompt, video_a, video_b, winner   winner is a, b (or video_a, video_b) or tie
    prompt, candidates [, scores]      two or more media, ranked by score or listed best first
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..progress import printable
from .folder import Folder
from .media import MediaError
from .sources import open_source
from .text import MAX_ROWS, blank, is_text, not_utf8

Media = Path | bytes
LAYOUTS = {
    "chosen": ("prompt", "chosen", "rejected"),
    "jpg_0": ("caption", "jpg_0", "jpg_1", "label_0"),
    "video_a": ("prompt", "video_a", "video_b", "winner"),
    "candidates": ("prompt", "candidates"),
}
OPTIONAL = {"score_chosen", "score_rejected", "weight", "negative_prompt", "scores"}
FIELDS = (
    OPTIONAL | {"has_label", "label_1"} | {name for names in LAYOUTS.values() for name in names}
)
MAX_CANDIDATES = 256  # of one record: 32,640 pairs


class BadRow(ValueError):
    """A row that cannot be used: `kind` (one word, counted), `where` it stands, `field`, why."""

    def __init__(self, kind: str, where: str, field: str, reason: str) -> None:
        super().__init__(printable(f"{where}, {field}: {reason}"))
        self.kind, self.where, self.field, self.reason = kind, where, field, reason


@dataclass(frozen=True, kw_only=True)
class Row:
    """One preference pair: media are paths inside the data folder, or the bytes themselves."""

    prompt: str
    chosen: Media
    rejected: Media
    score_chosen: float | None = None
    score_rejected: float | None = None
    weight: float = 1.0
    negative_prompt: str | None = None
    where: str = ""
    tie: bool = False  # neither is preferred: chosen is the first


class Rows:
    """The pairs of `data`; iterating yields a `Row` per pair and a `BadRow` per unusable record.

    Args:
        data: folder with metadata.{jsonl,csv,parquet}, such a file, or a Hugging Face dataset
            (saved folder, folder of parquet shards, or the name of one on the hub).
        ranked: of records with more than two candidates: `all` ordered pairs, or `best_worst`.
        split: split of a Hugging Face dataset.
        ties: `drop` pairs without a winner, or `keep` them as such.

    `ties` counts those that were dropped so far (`first_tie`: where the first stands), `records`
    the records;
    `total` is the number of records where it is known. ValueError: nothing there, a column missing.
    """

    def __init__(
        self, data: str | Path, *, ranked: str = "all", split: str = "train", ties: str = "drop"
    ) -> None:
        if ranked not in ("all", "best_worst"):
            raise ValueError(f"ranked: expected all or best_worst, got {ranked!r}")
        if ties not in ("drop", "keep"):
            raise ValueError(f"ties: expected drop or keep, got {ties!r}")
        self.ranked, self.keep_ties = ranked, ties == "keep"
        self.ties = self.records = 0
        self.first_tie: str | None = None
        self._source = open_source(data, split, FIELDS)
        self.path: Path | None = self._source.path
        root = self._source.root
        self.root: Path | None = root and root.resolve()
        self.name: str = self._source.name
        self.total: int | None = self._source.total
        if (self.total or 0) > MAX_ROWS:
            raise ValueError(
                f"{data}: has {self.total} rows, at most {MAX_ROWS} are read; split it"
            )
        self.version: dict[str, str] = getattr(self._source, "version", {})  # of what is no file
        self.layout = layout(self._source.columns, self.name)

    def __iter__(self) -> Iterator[Row | BadRow]:
        self.ties = self.records = 0
        self.first_tie = None
        folder = self.root and Folder(self.root)
        for where, record in self._source:
            self.records += 1
            try:
                if isinstance(record, str):
                    raise BadRow("no_record", f"{self.name} {where}", "line", record)
                yield from self._pairs(Reader(record, f"{self.name} {where}", folder))
            except BadRow as bad:
                # Anew: the one that was raised keeps its frames, and with them the row's media.
                yield BadRow(bad.kind, bad.where, bad.field, bad.reason)

    def _tie(self, read: Reader) -> None:
        self.ties += 1
        self.first_tie = self.first_tie or read.where

    def _pairs(self, read: Reader) -> Iterator[Row]:
        prompt = read.text("caption" if self.layout == "jpg_0" else "prompt")
        shared = {
            "prompt": prompt,
            "where": read.where,
            "weight": read.weight(),
            "negative_prompt": read.text("negative_prompt", optional=True),
        }
        if self.layout == "candidates":
            candidates = read.candidates()
            if self.ranked == "best_worst":
                candidates = [candidates[0], candidates[-1]]
            pairs = itertools.combinations(candidates, 2)
        elif self.layout == "chosen":
            names = ("chosen", "rejected")
            scores = [read.number(f"score_{name}") for name in names]
            if None in scores:
                scores = [math.inf, -math.inf]
            if scores[0] < scores[1]:
                reason = f"expected at least score_rejected, {scores[1]:g}, got {scores[0]:g}"
                raise read.bad("unknown_label", "score_chosen", f"{reason}; swap the media")
            pairs = iter([tuple((scores[i], read.media(names[i])) for i in (0, 1))])
        else:
            names = ("jpg_0", "jpg_1") if self.layout == "jpg_0" else ("video_a", "video_b")
            first = read.label() if self.layout == "jpg_0" else read.winner()
            if first == 0.5 and not self.keep_ties:
                self._tie(read)
                return
            chosen, rejected = names[::-1] if first == 0 else names
            worse = math.inf if first == 0.5 else -math.inf
            pairs = iter([((math.inf, read.media(chosen)), (worse, read.media(rejected)))])
        for (score_chosen, chosen), (score_rejected, rejected) in pairs:
            tie = score_chosen == score_rejected
            if tie and not self.keep_ties:
                self._tie(read)
                continue
            known = math.isfinite(score_chosen)
            yield Row(
                chosen=chosen,
                rejected=rejected,
                score_chosen=score_chosen if known else None,
                score_rejected=score_rejected if known else None,
                tie=tie,
                **shared,
            )


def read_rows(data: str | Path, **options: Any) -> list[Row]:
    """All pairs of `data` (options of `Rows`); ValueError: a bad row, or no pair."""
    rows = Rows(data, **options)
    pairs = []
    for row in rows:
        if isinstance(row, BadRow):
            raise row
        pairs.append(row)
    if not pairs:
        raise ValueError(nothing(rows))
    return pairs


def nothing(rows: Rows) -> str:
    """Why `rows`, read to their end without a pair, have none."""
    if rows.ties:
        return f"{rows.name}: all {rows.ties} pairs are ties; expected pairs with a winner"
    return f"{rows.name}: no rows; expected one row per pair ({', '.join(LAYOUTS[rows.layout])})"


def layout(columns: list[str] | None, name: str) -> str:
    """Which of LAYOUTS the columns are (None: no record, so nothing is known)."""
    if columns is None:
        return "chosen"
    keys = [key for key in LAYOUTS if set(LAYOUTS[key][1:]) & set(columns)] or ["chosen"]
    key = min(keys, key=lambda key: len(set(LAYOUTS[key]) - set(columns)))
    missing = [column for column in LAYOUTS[key] if column not in columns]
    if missing:
        raise ValueError(
            f"{name}: missing column {', '.join(map(repr, missing))}; "
            f"expected {', '.join(LAYOUTS[key])}, found {', '.join(columns[:100]) or 'none'}"
        )
    return key


class Reader:
    """One record's fields, each checked: a field that is not as it must be raises BadRow."""

    def __init__(self, record: dict[str, Any], where: str, folder: Folder | None) -> None:
        self.record, self.where, self.folder = record, where, folder

    def bad(self, kind: str, field: str, reason: str) -> BadRow:
        return BadRow(kind, self.where, field, reason)

    def text(self, field: str, *, optional: bool = False) -> str | None:
        value = self.record.get(field)
        if value is None or (isinstance(value, str) and blank(value)):
            if optional:
                return None
            what = "is blank" if value else "is empty" if field in self.record else "is missing"
            raise self.bad("missing_value", field, f"{what}; expected a text")
        return self.checked(field, value)

    def checked(self, field: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.bad("missing_value", field, f"expected a text, got {type(value).__name__}")
        if not is_text(value):
            raise self.bad("not_utf8", field, not_utf8(value))
        return value

    def number(self, field: str, value: Any = None) -> float | None:
        value = self.record.get(field) if value is None else value
        if value is None or value == "":
            return None
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):  # an integer beyond float64's range
            number = math.nan
        if not math.isfinite(number):
            raise self.bad("not_a_number", field, f"expected a finite number, got {value!r:.40}")
        return number

    def weight(self) -> float:
        weight = self.number("weight")
        if weight is not None and weight < 0:
            raise self.bad("not_a_number", "weight", f"expected 0 or more, got {weight:g}")
        return 1.0 if weight is None else weight

    def label(self) -> float:
        """Pick-a-Pic: 1 where the first image wins, 0 the second, 0.5 a tie."""
        label = self.record.get("label_0")
        known = {"0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0, "0.5": 0.5}.get(str(label))
        if known is None:
            raise self.bad("unknown_label", "label_0", f"expected 0, 1 or 0.5, got {label!r:.40}")
        has = self.record.get("has_label")
        if str(has).lower() not in ("true", "1", "1.0", "none", ""):
            raise self.bad("unknown_label", "has_label", f"expected true or 1, got {has!r:.40}")
        other = self.number("label_1")
        if other is not None and other != 1 - known:
            reason = f"expected {1 - known:g} beside label_0 {known:g}, got {other:g}"
            raise self.bad("unknown_label", "label_1", reason)
        return known

    def winner(self) -> float:
        winner = str(self.record.get("winner")).strip().lower()
        wins = {"a": 1.0, "video_a": 1.0, "b": 0.0, "video_b": 0.0, "tie": 0.5}
        if winner not in wins:
            raise self.bad("unknown_label", "winner", f"expected a, b or tie, got {winner!r:.40}")
        return wins[winner]

    def media(self, field: str, value: Any = None) -> Media:
        """Bytes as they are; a path only if it names a file inside the data folder."""
        value = self.record.get(field) if value is None else value
        if isinstance(value, dict):  # a Video or Image feature of a Hugging Face dataset
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if isinstance(value, bytes):
            return value
        if value is None or value == "":
            state = "empty" if field in self.record else "missing"
            raise self.bad("missing_value", field, f"is {state}; expected a path or bytes")
        name = self.checked(field, value)
        if self.folder is None:
            raise self.bad("outside", field, "a hub dataset must carry its media as bytes")
        try:
            return self.folder.find(name)
        except MediaError as error:
            raise self.bad(error.kind, field, str(error)) from None

    def candidates(self) -> list[tuple[float, Media]]:
        """(score, medium) best first; without scores the list is taken as ranked, best first."""
        values, scores = (self._list(field) for field in ("candidates", "scores"))
        if not values or len(values) < 2:
            raise self.bad("missing_value", "candidates", "expected a list of at least two media")
        if len(values) > MAX_CANDIDATES:
            reason = f"expected at most {MAX_CANDIDATES} media, got {len(values)}"
            raise self.bad("too_many", "candidates", reason)
        if scores is None:
            numbers = [float(-i) for i in range(len(values))]
        elif len(scores) != len(values):
            raise self.bad(
                "unknown_label", "scores", f"expected {len(values)} numbers, got {len(scores)}"
            )
        else:
            numbers = [self.number("scores", "none" if s is None else s) for s in scores]
        pairs = [(s, self.media("candidates", v)) for s, v in zip(numbers, values, strict=True)]
        return sorted(pairs, key=lambda pair: -pair[0])

    def _list(self, field: str) -> list[Any] | None:
        value = self.record.get(field)
        if isinstance(value, str) and value:  # CSV: a JSON list in the cell
            try:
                value = json.loads(self.checked(field, value))
            except BadRow:
                raise
            except (ValueError, RecursionError):
                value = 0
        if value is None or value == "":
            return None
        if not isinstance(value, list):
            raise self.bad("missing_value", field, "expected a JSON list")
        return value or None
