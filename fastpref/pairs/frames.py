"""Frames as they are shown, and what one file may cost: what pictures and clips have in common."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

# A small file can claim any size: what one row may take, MAX_PIXELS being 1.6 GB.
MAX_BYTES = 2 << 30  # of one file
MAX_FRAME = 1 << 26  # pixels of one decoded frame: 8192 x 8192
MAX_FRAMES = 1 << 16  # of one clip
MAX_PIXELS = 1 << 29  # pixels of one clip as kept in memory (3 bytes each)
MAX_DECODED = 1 << 34  # pixels of all frames of a clip: half an hour of 832 x 480, a minute of 4K
MAX_ANIMATED = 1 << 30  # likewise of an animation, which takes Pillow far longer


class MediaError(ValueError):
    """A medium that cannot be used; `kind` is one word: empty_file, not_media, truncated, ..."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Timeline:
    """When each frame is shown, in seconds from the first; how long all are, and how many."""

    times: list[Fraction]
    seconds: Fraction
    frames: int


@dataclass(frozen=True)
class Frame:
    """Upright pixels `uint8 [H, W, 3]`; `shape`: (height, width) with square pixels."""

    pixels: np.ndarray
    shape: tuple[int, int]
    composited: bool


def check_cost(frames: int, height: int, width: int, most: int) -> None:
    """MediaError: a frame, their number or all of them together exceed what is decoded."""
    if height * width > MAX_FRAME:
        reason = f"has a frame of {width}x{height}: at most {MAX_FRAME} pixels are read"
        raise MediaError("too_large", f"{reason}; scale it down")
    if frames > MAX_FRAMES:
        raise MediaError("too_large", f"has more than {MAX_FRAMES} frames; cut it")
    if frames * height * width > most:
        reason = f"has {frames} or more frames of {width}x{height}: more than {most} pixels in all"
        raise MediaError("too_large", f"{reason}; cut it or scale it down")


def on_white(rgba: np.ndarray) -> tuple[np.ndarray, bool]:
    """`uint8 [H, W, 4]` over white, and whether any of it shows through: a c + (1 - a) 255."""
    colours, alpha = rgba[..., :3], rgba[..., 3:]
    if alpha.min(initial=255) == 255:
        return colours, False
    weight = alpha.astype(np.uint16)
    return ((colours * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8), True
