"""Files of media for the tests: written here, as cameras, browsers and tools write them."""

from __future__ import annotations

import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from fastpref.pairs.media import MediaError, Sampling, decode

CASES = Path(__file__).parent / "cases"
ALL = Sampling()


class Pipe(io.RawIOBase):
    """What cannot be sought in: the writer fills in no length afterwards."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.data += bytes(data)
        return len(data)

    def getvalue(self) -> bytes:
        return bytes(self.data)


def noise(frames: int = 12, height: int = 32, width: int = 48, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, channels), np.uint8)


def steps(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frame i is grey of level 10 i: what tells which frames were taken."""
    levels = 10 * np.arange(frames, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3))


def which(clip) -> list[int]:
    return (clip.frames.float().mean((1, 2, 3)) / 10).round().int().tolist()


def write(
    frames, suffix="mp4", codec="libx264", *, pixels="yuv420p", pipe=False, gop=4, aspect=None,
    options=None, codec_options=None, times=None, fps=8,
) -> bytes:  # fmt: skip
    file = Pipe() if pipe else io.BytesIO()
    with av.open(file, "w", format=suffix, options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=codec_options or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        stream.codec_context.gop_size = gop
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for i, picture in enumerate(frames):
            form = "rgba" if frames.shape[3] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=form)
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, fps)
            container.mux(stream.encode(frame.reformat(format=pixels)))
        container.mux(stream.encode())
    return file.getvalue()


def lossless(frames, suffix="mp4", **how) -> bytes:
    return write(frames, suffix, "libx264rgb", pixels="rgb24", codec_options={"qp": "0"}, **how)


def animation(frames, form: str, duration=100, **how) -> bytes:
    first, *rest = (Image.fromarray(np.ascontiguousarray(frame)) for frame in frames)
    file = io.BytesIO()
    first.save(file, form, save_all=True, append_images=rest, duration=duration, **how)
    return file.getvalue()


def picture(pixels, form: str, **how) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **how)
    return file.getvalue()


def refused(data: bytes, sampling: Sampling = ALL) -> MediaError:
    with pytest.raises(MediaError) as error:
        decode(data, sampling)
    assert "\n" not in str(error.value)
    return error.value


def chunked(size: tuple[int, int], depth: int, colours: int, rows: bytes, key: bytes) -> bytes:
    """A PNG of one colour type and bit depth, with a transparent colour."""

    def chunk(name: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colours, 0, 0, 0))
    body = (chunk(b"tRNS", key) if key else b"") + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")
