"""Counts: what an encoding did with its rows, prompts and media, and the first of each kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..progress import printable
from .media import Clip
from .rows import BadRow, Row

# What is done to a prompt or a medium without a word, and how it is told.
NOTES = {
    "cut_prompts": "prompts cut, longer than the text encoder reads",
    "slower": "clips of a lower rate than --fps, frames taken again",
    "resized": "media resized",
    "cropped": "media cropped",
    "composited": "media with alpha, composited on white",
}


class Note(NamedTuple):
    """That `kind` of NOTES was done to a row's `field` (prompt, chosen, rejected), in numbers."""

    kind: str
    field: str
    detail: str = ""


def clip_notes(field: str, clip: Clip, fps: float | None) -> list[Note]:
    """What decoding did to a medium, by its own size and length."""
    notes = []
    # A twentieth of a frame, as `media.choose`: containers round times. An image has no rate.
    if fps and clip.source_frames > 1 and clip.source_frames + 0.05 < clip.seconds * fps:
        rate = f"{clip.source_frames / clip.seconds:.4g} fps"
        notes.append(Note("slower", field, f"{rate}, --fps {fps:g}"))
    own, (height, width) = (clip.source_height, clip.source_width), clip.frames.shape[1:3]
    scale = max(height / own[0], width / own[1])
    sizes = f"{own[0]}x{own[1]} to {height}x{width}"
    if scale != 1:
        notes.append(Note("resized", field, sizes))
    if (round(own[0] * scale), round(own[1] * scale)) != (height, width):
        notes.append(Note("cropped", field, sizes))
    if clip.composited:
        notes.append(Note("composited", field))
    return notes


@dataclass
class Counts:
    """What became of the records, of the whole set and not of one call alone.

    pairs: usable, of which already_encoded were in the folder before this call. ties: pairs without
    a winner, dropped. bad: bad rows by kind. notes: by kind of NOTES the prompts and media of the
    pairs that it was done to, each once however many pairs it stands in. first: of each of these
    kinds where it is first met, in the order of the rows.
    """

    records: int = 0
    ties: int = 0
    pairs: int = 0
    already_encoded: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NOTES, 0))
    first: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._noted: set[bytes] = set()

    def add_bad(self, row: BadRow) -> None:
        self.bad[row.kind] = self.bad.get(row.kind, 0) + 1
        self.first.setdefault(row.kind, str(row))

    def add(
        self, row: Row, digests: tuple[bytes, bytes], notes: Sequence[Note], encoded: bool = False
    ) -> None:
        """Counts a pair and its notes; digests: of its media; encoded: by an earlier call."""
        self.pairs += 1
        self.already_encoded += encoded
        keys = {"prompt": row.prompt.encode(), "chosen": digests[0], "rejected": digests[1]}
        fresh = {name for name, key in keys.items() if key not in self._noted}
        for kind, name, detail in notes:
            if name in fresh:
                self.notes[kind] += 1
                self.first.setdefault(kind, _place(row, name, detail))
                self._noted.add(keys[name])

    def record(self) -> bytes:
        """counts.json."""
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return (json.dumps(public, indent=1) + "\n").encode()

    def __str__(self) -> str:
        """A line of what became of the rows, and one of each kind that there is."""
        bad = ", ".join(f"{n} {kind}" for kind, n in sorted(self.bad.items()))
        before = f" ({self.already_encoded} already encoded)" if self.already_encoded else ""
        lines = [
            f"{self.records} rows: {self.pairs} pairs{before}, {self.ties} ties dropped, "
            f"{sum(self.bad.values())} bad rows{f' ({bad})' if bad else ''}"
        ]
        told = {NOTES[kind]: (kind, n) for kind, n in self.notes.items()}
        told["ties dropped"] = ("ties", self.ties)
        told |= {f"bad rows, {kind}": (kind, n) for kind, n in sorted(self.bad.items())}
        lines += [
            f"{what}: {n}; first: {self.first[kind]}" for what, (kind, n) in told.items() if n
        ]
        return "\n  ".join(map(printable, lines))


def _place(row: Row, field: str, detail: str) -> str:
    """`metadata.jsonl line 3, chosen: a.mp4 (8 fps, --fps 16)`"""
    medium: Any = getattr(row, field)
    name = medium.name if isinstance(medium, Path) else ""
    said = " ".join(filter(None, (name, f"({detail})" if name and detail else detail)))
    return f"{row.where}, {field}{f': {said}' if said else ''}"
