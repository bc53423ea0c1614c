"""Cases of the field: what a file may cost is bounded, whatever it claims."""

from __future__ import annotations

import io
import struct
import time
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from media_files import (
    ALL,
    animation,
    chunked,
    noise,
    refused,
    write,
)

from fastpref.pairs.containers import check_tables
from fastpref.pairs.media import MediaError, Sampling, decode


def blank(frames: int, suffix: str = "mp4") -> bytes:
    """A clip of grey frames, a few bytes each."""
    file = io.BytesIO()
    with av.open(file, "w", format=suffix) as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.height = stream.width = 16
        stream.pix_fmt, stream.codec_context.gop_size = "yuv420p", 600
        frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 99, np.uint8), format="rgb24")
        frame = frame.reformat(format="yuv420p")
        for i in range(frames):
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def gif(frames: int, side: int = 16) -> bytes:
    """A GIF of one pixel a frame on a large canvas: 23 bytes each."""
    head = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(3) + b"\xff" * 3
    control = b"!\xf9\x04\0" + struct.pack("<H", 10) + bytes(2)
    dot = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02D\x01\0"
    return head + (control + dot) * frames + b";"


@pytest.mark.parametrize(
    "sampling", [ALL, Sampling(num_frames=3), Sampling(fps=8), Sampling(fps=8, num_frames=3)]
)
@pytest.mark.parametrize("kind", ["clip", "gif"])
def test_more_frames_than_are_read_are_refused_in_every_way(kind, sampling, monkeypatch):
    for module in ("frames", "media"):
        monkeypatch.setattr(f"fastpref.pairs.{module}.MAX_FRAMES", 20)
    make = blank if kind == "clip" else gif
    error = refused(make(21), sampling)
    assert error.kind == "too_large" and "more than 20 frames; cut it" in str(error)
    decode(make(20), Sampling(num_frames=3))


def test_the_cost_of_frames_is_linear():
    """The times of 158 s of CPU for 1.3 MB: a minimum taken anew for each frame."""
    few, many = blank(4000), blank(16000)
    seconds = []
    for data in (few, many):
        least = []
        for _ in range(2):
            begin = time.process_time()
            decode(data, Sampling(num_frames=2))
            least.append(time.process_time() - begin)
        seconds.append(min(least))
    assert seconds[1] < 4 * 2 * seconds[0]


def claiming(**tables: tuple[int, int]) -> bytes:
    """A clip in whose tables numbers stand that it does not hold, each at an offset."""
    options = {"movflags": "frag_keyframe+empty_moov"} if "trun" in tables else {}
    data = bytearray(write(noise(2, 16, 16), options=options))
    for name, numbers in tables.items():
        at = data.index(name.encode()) + 4
        data[at : at + 4 * len(numbers)] = struct.pack(f">{len(numbers)}I", *numbers)
    return bytes(data)


@pytest.mark.parametrize(
    "tables",
    [{"stsz": (0, 1, 1 << 26)}, {"trun": (1, 1 << 26)}, {"stsz": (0, 0, 60000), "elst": (0, 1000)}],
    ids=["samples", "fragment", "edits"],
)
def test_what_a_table_claims_is_bounded_before_it_is_listed(tables):
    """2 KB took 4 GB and half a minute."""
    begin = time.process_time()
    error = refused(claiming(**tables))
    assert error.kind == "too_large" and "claims" in str(error)
    assert time.process_time() - begin < 0.5


@pytest.mark.parametrize(
    "tables",
    [
        {"ctts": (0, 1, 1 << 27, 0)},
        {"ctts": (0, 2, 1, 0)},
        {"sbgp": (0, 0, 1, 1 << 27, 1)},
        {"sbgp": (1 << 24, 0, 0, 1, 1 << 27, 1)},
        {"stz2": (0, 8, 60000), "elst": (0, 1000)},
        {"trun": (0x200, 1 << 26, 99)},
    ],
    ids=["times", "unlisted times", "groups", "groups of today", "small samples", "lines"],
)
def test_what_rare_tables_claim_is_bounded(tables):
    """A claim of 2^27 times cost FFmpeg half a gigabyte."""
    data = write(noise(2, 16, 16))
    for name, numbers in tables.items():
        length = 8 + 4 * len(numbers)
        data += struct.pack(f">I4s{len(numbers)}I", length, name.encode(), *numbers)
    assert "claims" in str(refused(data))


HANDLER = struct.pack(">I4s", 32, b"hdlr") + bytes(8) + b"mdir" + bytes(12)


@pytest.mark.parametrize("length", [0, 1, 2**31, None], ids=["open", "64 bits", "past", "plain"])
@pytest.mark.parametrize(
    "around",
    [
        [b"stsz"],
        [b"moov", b"stsz"],
        [b"udta", b"stsz"],
        [b"udta", b"meta" + bytes(4) + HANDLER, b"ilst", b"stsz"],
        [b"meta" + HANDLER, b"stsz"],
        [b"hoov" + struct.pack(">I4s", 8, b"mvhd"), b"trak", b"mdia", b"minf", b"stbl", b"stsz"],
        [b"stsd" + struct.pack(">III4s", 0, 1, 200, b"avc1") + bytes(78), b"stsz"],
        [b"moof", b"traf", b"trun"],
    ],
    ids=lambda around: " ".join(name[:4].decode() for name in around),
)
def test_a_table_is_found_where_ffmpeg_finds_it(around, length):
    """In any box that is looked into, of any length that is read."""
    body = struct.pack(">III", *((0, 1, 1 << 26) if around[-1] == b"stsz" else (1, 1 << 26, 0)))
    for name in reversed(around):
        if length == 1:
            body = struct.pack(">I4sQ", 1, name[:4], 16 + len(name[4:] + body)) + name[4:] + body
        else:
            told = 4 + len(name + body) if length is None else length
            body = struct.pack(">I", told) + name + body
    with pytest.raises(MediaError, match="claims") as error:
        check_tables(write(noise(2, 16, 16)) + body)
    assert error.value.kind == "too_large"


def test_boxes_are_bounded(monkeypatch):
    monkeypatch.setattr("fastpref.pairs.containers.MOST", 100)
    nested = b"".join(struct.pack(">I4s", 8 * (99 - i), b"udta") for i in range(99))
    for boxes in (struct.pack(">I4s", 8, b"free") * 99, nested):
        assert "more than 100 boxes" in str(refused(write(noise(2, 16, 16)) + boxes))


def test_a_large_canvas_of_many_frames_is_refused():
    """23 KB whose frames of 8192 x 8192 take a second each."""
    begin = time.process_time()
    error = refused(gif(100_000, 300), Sampling(num_frames=2, height=32, width=32))
    assert error.kind == "too_large" and "pixels in all" in str(error)
    claimed = bytearray(animation(noise(2), "PNG"))
    at = claimed.index(b"acTL") + 4
    claimed[at : at + 4] = struct.pack(">I", 1 << 30)
    claimed[at + 8 : at + 12] = struct.pack(">I", zlib.crc32(claimed[at - 4 : at + 8]))
    assert "more than 65536 frames" in str(refused(bytes(claimed)))
    assert time.process_time() - begin < 20


def test_a_large_frame_is_refused_before_a_clip_is_opened():
    """FFmpeg decodes a frame to learn of a stream; without a limit it allocates what is claimed."""
    side = 9000
    rows = zlib.compressobj(9)
    body = b"".join(rows.compress(bytes(side + 1)) for _ in range(side)) + rows.flush()
    large = chunked((side, side), 8, 0, b"", b"").replace(zlib.compress(b""), body)
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as container:
        stream = container.add_stream("png", rate=8)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "rgb24"
        packet = av.Packet(large)
        packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, 0, 0, True
        packet.time_base = Fraction(1, 8)
        container.mux(packet)
    refused(file.getvalue())
