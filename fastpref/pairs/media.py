"""Media: clips and images decoded by PyAV to uint8 frames of the asked rate, number and size."""

from __future__ import annotations

import bisect
import io
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import write_atomic

# Only formats that hold their own data: playlists and the like would make FFmpeg open other files.
FORMATS = "mov,matroska,avi,gif,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe"
# A small file can claim any size: what one row may take, MAX_PIXELS being 1.6 GB.
MAX_BYTES = 2 << 30  # of one file
MAX_FRAME = 1 << 26  # pixels of one decoded frame: 8192 x 8192
MAX_FRAMES = 1 << 16  # of one clip
MAX_PIXELS = 1 << 29  # pixels of one clip as kept in memory (3 bytes each)
EXIF_ORIENTATION = 0x0112
# Its values: quarter turns against the clock, then mirrored left to right.
UPRIGHT = {2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False)}
UPRIGHT |= {7: (1, True), 8: (1, False)}


class MediaError(ValueError):
    """A medium that cannot be used; `kind` is one word: empty_file, not_media, truncated, ..."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


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
    """Decoded frames `uint8 [F, H, W, 3]`, and the medium's own length and size."""

    frames: Tensor
    source_frames: int
    source_height: int
    source_width: int
    seconds: float


def load(media: Path | bytes) -> bytes:
    """The medium's bytes; MediaError: none, or more than MAX_BYTES."""
    size = len(media) if isinstance(media, bytes) else media.stat().st_size
    if size == 0:
        raise MediaError("empty_file", "has zero bytes")
    if size > MAX_BYTES:
        raise MediaError("too_large", f"has {size} bytes, at most {MAX_BYTES} are read; cut it")
    return media if isinstance(media, bytes) else media.read_bytes()


def decode(data: bytes, sampling: Sampling) -> Clip:
    """Frames of a clip (mp4, webm, mkv, avi, gif) or an image (png, jpg, webp, bmp).

    MediaError: not a medium, truncated, damaged, fewer frames than asked for, too large.
    """
    import av

    cut = truncation(data)
    if cut:
        raise MediaError("truncated", f"is truncated: {cut}")
    try:
        times, duration = timeline(data)
        picks = choose(times, duration, sampling)
        return _frames(data, picks, sampling, len(times), float(duration))
    except av.error.FFmpegError as error:
        known = "mp4, webm, mkv, avi, gif, png, jpg, webp or bmp"
        reason = f"cannot be decoded ({error.strerror}); expected {known}"
        raise MediaError("unreadable", reason) from None


def timeline(data: bytes) -> tuple[list[Fraction], Fraction]:
    """Display times of all frames from 0 on and the duration, in seconds; decodes nothing."""
    with _open(data) as container:
        stream = _video(container)
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        # demux ends with an empty packet, which is to flush a decoder.
        packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
        if not packets:
            raise MediaError("unreadable", "holds no frames")
        stamps = [p.pts if p.pts is not None else p.dts for p in packets]
        base = packets[0].time_base or Fraction(1)
        if None in stamps or len(set(stamps)) < len(stamps):
            times = [i / rate for i in range(len(packets))]
        else:
            times = [(stamp - min(stamps)) * base for stamp in sorted(stamps)]
        return times, times[-1] + 1 / rate


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


def _frames(data: bytes, picks: list[int], s: Sampling, total: int, seconds: float) -> Clip:
    wanted = set(picks)
    kept: dict[int, Tensor] = {}
    height = width = 0
    with _open(data) as container:
        stream = _video(container)
        # One thread each: the pool decodes many clips at once. FFmpeg checks the limit itself,
        # before it allocates a frame.
        stream.codec_context.thread_count = 1
        # A picture's decoder would fill in what is broken and say nothing.
        strict = {"err_detect": "explode"} if container.format.name.endswith("_pipe") else {}
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME)} | strict
        for i, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise MediaError("truncated", f"is damaged or truncated at frame {i} of {total}")
            if i in wanted:
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                turns, mirrored = _turns(data, container, frame)
                pixels = torch.rot90(pixels, turns, (0, 1))
                pixels = pixels.flip(1) if mirrored else pixels
                if (height, width) not in ((0, 0), tuple(pixels.shape[:2])):
                    raise MediaError("shape_mismatch", f"changes its size at frame {i}")
                height, width = pixels.shape[:2]
                kept[i] = resize(pixels, s.height, s.width)
                if kept[i].numel() // 3 * len(picks) > MAX_PIXELS:
                    reason = f"{len(picks)} frames of {width}x{height} exceed {MAX_PIXELS} pixels"
                    raise MediaError("too_large", f"{reason}: pass --num_frames, --height, --width")
            if len(kept) == len(wanted):
                break
        else:
            missing = f"frame {max(wanted)} of {total} is missing"
            raise MediaError("truncated", f"is truncated: {missing}")
    frames = torch.stack([kept[i] for i in picks])
    return Clip(frames, total, height, width, seconds)


def _turns(data: bytes, container: Any, frame: Any) -> tuple[int, bool]:
    """(quarter turns against the clock, then mirrored) that show a frame as it is meant.

    A picture's are read from its EXIF data: FFmpeg tells the turn alone.
    """
    turns, orientation = round(frame.rotation / 90), 1
    if container.format.name.endswith("_pipe"):
        from PIL import Image

        try:
            orientation = Image.open(io.BytesIO(data)).getexif().get(EXIF_ORIENTATION, 1)
        except Exception:  # EXIF data that Pillow cannot read: whatever it stumbles over
            return turns, False
    return UPRIGHT.get(orientation, (turns, False))


def resize(frame: Tensor, height: int | None, width: int | None) -> Tensor:
    """`uint8 [H, W, 3]` scaled (bicubic, antialiased) to cover height x width, centre cropped.

    MediaError: so thin that it would have more than MAX_FRAME pixels before it is cropped.
    """
    h, w = frame.shape[:2]
    if height is None or width is None or (h, w) == (height, width):
        return frame.contiguous()
    scale = max(height / h, width / w)
    size = (max(height, round(h * scale)), max(width, round(w * scale)))
    if size[0] * size[1] > MAX_FRAME:
        reason = f"{w}x{h}, scaled to cover {width}x{height}, is {size[1]}x{size[0]}"
        raise MediaError("too_large", f"{reason}, at most {MAX_FRAME} pixels; crop it")
    if size != (h, w):
        planes = frame.permute(2, 0, 1)[None].float()
        planes = F.interpolate(planes, size=size, mode="bicubic", antialias=True)
        # Bicubic overshoots at edges.
        frame = planes[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return frame[top : top + height, left : left + width].contiguous()


def _open(data: bytes) -> Any:
    import av

    options = {"format_whitelist": FORMATS}
    # Up to PyAV 18 a tag that is not UTF-8 raises unless told otherwise; later ones have no option.
    lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    return av.open(io.BytesIO(data), options=options, **lenient)


def _video(container: Any) -> Any:
    for stream in container.streams.video:
        if stream.codec_context is not None:  # None: FFmpeg has no decoder for it
            return stream
    raise MediaError("unreadable", "holds no video that can be decoded")


def truncation(data: bytes) -> str | None:
    """What shows that a file ends early, by its container's own lengths and end marks; else None.

    FFmpeg plays what is left of a cut clip without a word; here half a clip is not a clip.
    """
    size, expected = len(data), 0
    # Behind an end mark writers pad (GIF) or append data of their own (JPEG, PNG).
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return None if data.rstrip(b"\0")[-1:] == b"\x3b" else "the GIF trailer is missing"
    if data[:3] == b"\xff\xd8\xff":
        return None if b"\xff\xd9" in data[-65536:] else "the JPEG end mark is missing"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return None if b"IEND" in data[-65536:] else "the PNG end chunk is missing"
    if data[:4] == b"RIFF":
        expected = 8 + int.from_bytes(data[4:8], "little")
    elif data[4:8] == b"ftyp":
        while expected + 8 <= size:
            length = int.from_bytes(data[expected : expected + 4])
            if length == 1:
                length = int.from_bytes(data[expected + 8 : expected + 16])
            if length < 8:  # 0: up to the end of the file
                return None
            expected += length
    elif data[:4] == b"\x1aE\xdf\xa3":
        expected = _segment_end(data)
    return f"{size} bytes of {expected}" if expected > size else None


def _segment_end(data: bytes) -> int:
    """Where a Matroska segment ends by its own header; 0 where it does not say."""
    # The header before a segment is short; further on the same four bytes may be a picture's.
    at = data[:4096].find(b"\x18\x53\x80\x67") + 4
    if at < 4 or at >= len(data) or data[at] == 0:
        return 0
    length = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + length]) & ((1 << 7 * length) - 1)
    # All ones: not known, as in a stream that was recorded live.
    return 0 if value == (1 << 7 * length) - 1 else at + length + value


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
