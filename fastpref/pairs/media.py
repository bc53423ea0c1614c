"""Media: clips and pictures to uint8 frames of the asked rate, number and size."""

from __future__ import annotations

import bisect
import io
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import write_atomic
from . import clips, pictures
from .frames import MAX_BYTES, MAX_FRAME, MAX_FRAMES, MAX_PIXELS, MediaError
from .text import POINTER


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which frames of a clip are taken, and at what size.

    Args:
        num_frames: frames of every clip; None keeps all.
        height, width: each frame is scaled (bicubic, antialiased) to cover this size and cropped in
            the middle; None keeps the clip's own size.
        fps: frames are taken at this rate by time (the frame nearest to k / fps), `num_frames` of
            them from the start. Without it `num_frames` frames are taken evenly over the clip.
    """

    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width", "fps"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if (self.height is None) != (self.width is None):
            raise ValueError("height, width: expected both or neither; pass --height and --width")
        size = (self.num_frames or 1) * (self.height or 1) * (self.width or 1)
        if size > MAX_PIXELS:
            raise ValueError(
                f"num_frames x height x width: expected at most {MAX_PIXELS} pixels, got {size}"
            )


@dataclass(frozen=True)
class Clip:
    """Decoded frames `uint8 [F, H, W, 3]`, and of the medium itself what is shown.

    Its size is upright and has square pixels; `composited`: a frame was laid on white.
    """

    frames: Tensor
    source_frames: int
    source_height: int
    source_width: int
    seconds: float
    composited: bool
    repeated: int  # frames that are there again, since no other was shown by then


def load(media: Path | bytes) -> bytes:
    """The medium's bytes; MediaError: none, or more than MAX_BYTES."""
    size = len(media) if isinstance(media, bytes) else media.stat().st_size
    if size == 0:
        raise MediaError("empty_file", "has zero bytes")
    if size > MAX_BYTES:
        raise MediaError("too_large", f"has {size} bytes, at most {MAX_BYTES} are read; cut it")
    return media if isinstance(media, bytes) else media.read_bytes()


def decode(data: bytes, sampling: Sampling) -> Clip:
    """Frames of a clip (`clips`) or of a picture, animated or not (`pictures`), as they are shown.

    MediaError: not a medium, truncated, damaged, fewer frames than asked for, too large.
    """
    if data.startswith(POINTER):
        raise MediaError("not_media", "is a git-lfs pointer, not the file itself; run git lfs pull")
    s, kind = sampling, pictures if pictures.is_picture(data) else clips
    # Of a clip much longer than what is asked the rest is not decoded.
    until = 4 * s.num_frames / s.fps if s.num_frames and s.fps else math.inf
    shown = kind.timeline(data, until)
    picks = choose(shown.times, shown.seconds, s)
    kept: dict[int, Tensor] = {}
    shape, composited = (0, 0), False
    for i, frame in kind.frames(data, set(picks)):
        if shape not in ((0, 0), frame.shape):
            raise MediaError("shape_mismatch", f"changes its size at frame {i}")
        shape, composited = frame.shape, composited or frame.composited
        kept[i] = resize(torch.from_numpy(frame.pixels), s.height, s.width, shape)
        if kept[i].numel() // 3 * len(picks) > MAX_PIXELS:
            reason = f"{len(picks)} frames of {shape[1]}x{shape[0]} exceed {MAX_PIXELS} pixels"
            raise MediaError("too_large", f"{reason}: pass --num_frames, --height, --width")
    frames = torch.stack([kept[i] for i in picks])
    return Clip(
        frames, shown.frames, *shape, float(shown.seconds), composited, len(picks) - len(kept)
    )


def choose(times: list[Fraction], duration: Fraction, sampling: Sampling) -> list[int]:
    """Which of the frames shown at `times` are taken, in order (a frame may be taken twice)."""
    n, asked = len(times), sampling.num_frames
    if sampling.fps is not None and n > 1:
        # A twentieth of a frame of tolerance, since containers round times (webm: to milliseconds).
        available = max(1, math.ceil(float(duration) * sampling.fps - 0.05))
        count = min(asked or available, available)
        if count > MAX_FRAMES:
            reason = (
                f"lasts {float(duration):.6g} s: {count} frames, at most {MAX_FRAMES} are taken"
            )
            raise MediaError("too_large", f"{reason}; pass --num_frames")
        picks = [_nearest(times, k / sampling.fps) for k in range(count)]
    elif asked and asked < n:
        picks = [round(i * (n - 1) / (asked - 1)) for i in range(asked)] if asked > 1 else [0]
    else:
        picks = list(range(n))
    if asked and len(picks) < asked:
        rate = f" at {sampling.fps:g} fps" if sampling.fps else ""
        reason = f"is too short: {len(picks)} frames{rate}, --num_frames asks for {asked}"
        raise MediaError("too_short", reason)
    return picks


def _nearest(times: list[Fraction], target: float) -> int:
    i = bisect.bisect_left(times, target)
    if i == len(times) or (i > 0 and target - times[i - 1] <= times[i] - target):
        i -= 1
    return i


def resize(
    frame: Tensor, height: int | None, width: int | None, shape: tuple[int, int] | None = None
) -> Tensor:
    """`uint8 [H, W, 3]` scaled (bicubic, antialiased) to cover height x width, centre cropped.

    `shape`: its (height, width) as shown, where its pixels are not square. MediaError: so thin that
    it would have more than MAX_FRAME pixels before it is cropped.
    """
    h, w = shape or frame.shape[:2]
    if height is None or width is None:
        height, width = h, w
    scale = max(height / h, width / w)
    size = (max(height, round(h * scale)), max(width, round(w * scale)))
    if size[0] * size[1] > MAX_FRAME:
        reason = f"{w}x{h}, scaled to cover {width}x{height}, is {size[1]}x{size[0]}"
        raise MediaError("too_large", f"{reason}, at most {MAX_FRAME} pixels; crop it")
    if size != frame.shape[:2]:
        planes = frame.permute(2, 0, 1)[None].float()
        planes = F.interpolate(planes, size=size, mode="bicubic", antialias=True)
        # Bicubic overshoots at edges.
        frame = planes[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frame[top : top + height, left : left + width].contiguous()


def write_clip(path: Path, frames: Tensor, fps: float = 8.0) -> None:
    """Writes `uint8 [F, H, W, 3]` as lossless RGB mp4 (4:2:0 shifts colours of small clips)."""
    import av

    buffer = io.BytesIO()
    buffer.name = path.name  # its ending decides the format
    with av.open(buffer, "w") as container:
        # 29.97 is exactly n / 35184372088832, beyond FFmpeg's 32 bits; NTSC's rates are n / 1001.
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264rgb", rate=rate, options={"qp": "0"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        for frame in frames.contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    write_atomic(path, buffer.getvalue())
