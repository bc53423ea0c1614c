"""Notes: what is done to a prompt or a medium without a word, to be counted and told at the end."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .media import Clip
from .rows import Row

NOTES = {
    "cut_prompts": "prompts cut, longer than the text encoder reads",
    "slower": "clips of a lower rate than --fps",
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
    rate = clip.source_frames / clip.seconds
    # 29.97 is as good as 30 until a frame is taken again. A picture has no rate.
    if fps and clip.source_frames > 1 and (clip.repeated or rate < 0.99 * fps):
        again = f", {clip.repeated} of {len(clip.frames)} frames taken again" * (clip.repeated > 0)
        notes.append(Note("slower", field, f"{rate:.4g} fps, --fps {fps:g}{again}"))
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


def place(row: Row, note: Note) -> str:
    """`metadata.jsonl line 3, chosen: a.mp4 (8 fps, --fps 16)`"""
    medium, detail = getattr(row, note.field), note.detail
    name = medium.name if isinstance(medium, Path) else ""
    said = " ".join(filter(None, (name, f"({detail})" if name and detail else detail)))
    return f"{row.where}, {note.field}{f': {said}' if said else ''}"
