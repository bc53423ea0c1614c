"""Pictures and animations, decoded by Pillow: png, apng, jpg, webp, gif, bmp, avif."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from .frames import MAX_ANIMATED, Frame, MediaError, Timeline, check_cost, on_white

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF")
STILL = ("JPEG", "MPO", "BMP")  # MPO: a JPEG with more behind it, which is not the picture
BEGINNINGS = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP|GIF8[79]a|BM|....ftyp(?:avi[fs]|mif1|msf1)",
    re.DOTALL,
)
HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}
ORIENTATION = 0x0112  # of EXIF


def is_picture(data: bytes) -> bool:
    """By its first bytes; MediaError: a picture that no decoder here can read."""
    if data[4:8] == b"ftyp":
        end = min(int.from_bytes(data[:4]), 256)  # of the brands, first the major one
        heic = HEIC.intersection(data[i : i + 4] for i in range(8, end, 4))
        if data[8:12] in HEIC or (data[8:12] in (b"mif1", b"msf1") and heic):
            raise MediaError("unreadable", "is a HEIC picture; save it as AVIF, PNG or JPEG")
    return BEGINNINGS.match(data) is not None


def timeline(data: bytes, until: float) -> Timeline:
    """When each frame is shown by its own duration; MediaError: truncated, damaged, too large."""
    times, now = [], Fraction(0)
    for image in _shown(data, timing=True):
        times.append(now)
        milliseconds = Fraction(image.info.get("duration", 0)).limit_denominator(1000)
        # As browsers do: animations that ask for no time at all were never shown that fast.
        now += (milliseconds if milliseconds > 10 else 100) / 1000
    if data[:2] == b"\xff\xd8":
        _check_jpeg(data)
    return Timeline(times, now if len(times) > 1 else Fraction(1, 25), len(times))


def frames(data: bytes, wanted: set[int]) -> Iterator[tuple[int, Frame]]:
    """(index, frame) of the wanted ones, in order."""
    for i, image in enumerate(_shown(data)):
        if i in wanted:
            pixels, composited = _pixels(image)
            yield i, Frame(pixels, pixels.shape[:2], composited)


def _shown(data: bytes, timing: bool = False) -> Iterator[Any]:
    """The frames in order, each a Pillow image that changes with the next one; timing: a still is
    not decoded.
    """
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.format != "GIF":  # which tells the number of its frames only in the end
            check_cost(getattr(image, "n_frames", 1), image.height, image.width, MAX_ANIMATED)
        hidden = int(getattr(image, "default_image", False))  # what stands in for an animation
        for i in itertools.count():
            try:
                image.seek(i)
            except EOFError:
                break
            check_cost(i + 1, image.height, image.width, MAX_ANIMATED)
            if not (timing and image.format in STILL):
                image.load()
            if i >= hidden:
                yield image
            if image.format in STILL:
                break
    except (MediaError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError("too_large", f"is too large ({error})") from None
    except Image.UnidentifiedImageError:
        raise MediaError("truncated", "is truncated or damaged (in its header)") from None
    except Exception as error:  # whatever a damaged file makes a decoder stumble over
        raise MediaError("truncated", f"is truncated or damaged ({error})") from None


def _check_jpeg(data: bytes) -> None:
    """MediaError: FFmpeg finds less than all of it. Pillow fills that in and says nothing."""
    import av

    decoder = av.CodecContext.create("mjpeg", "r")
    decoder.options = {"err_detect": "explode"}
    decoder.thread_count = 1
    try:
        decoder.decode(av.Packet(data))
    except av.error.InvalidDataError:
        raise MediaError("truncated", "is truncated or damaged (in its rows)") from None
    except av.error.FFmpegError:  # a kind of JPEG that FFmpeg cannot read
        pass


def _pixels(image: Any) -> tuple[np.ndarray, bool]:
    """Upright `uint8 [H, W, 3]` on white, and whether white shows through."""
    from PIL import Image

    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    try:
        turn = turned.get(image.getexif().get(ORIENTATION))
    except Exception:  # EXIF data that Pillow cannot read: whatever it stumbles over
        turn = None
    key = image.info.get("transparency")
    if image.mode.startswith("I"):  # 16 bit grey, which Pillow's own conversion would clip
        levels = np.asarray(image)
        grey = Image.fromarray((levels >> 8).astype(np.uint8))
        opaque = Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8))
        image = Image.merge("RGBA", (grey, grey, grey, opaque))
    elif image.has_transparency_data:
        if isinstance(key, tuple) and max(key) > 255:  # of 16 bits, like its picture's
            image.info["transparency"] = tuple(level >> 8 for level in key)
        image = image.convert("RGBA")
    else:
        image = image.convert("RGB")
    image = image if turn is None else image.transpose(turn)
    pixels = np.array(image)
    return on_white(pixels) if image.mode == "RGBA" else (pixels, False)
