"""Cases of the field: where a file ends is what its decoder says."""

from __future__ import annotations

import io
import struct
import tempfile
import zlib
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from media_files import (
    ALL,
    animation,
    noise,
    picture,
    refused,
    write,
)

from fastpref.pairs.media import MediaError, Sampling, decode

TAIL = b"a maker's own bytes, of a length that is no box: \xff\xff\xff\xff" + bytes(range(256)) * 3


@cache
def whole() -> dict[str, bytes]:
    moving, mjpeg = noise(8), {"codec": "mjpeg", "pixels": "yuvj420p"}
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    gif, avi, mp4 = animation(moving, "GIF"), write(moving, "avi", **mjpeg), write(moving)
    front, at = table_in_front(moving), mp4.index(b"mdat")
    long = struct.pack(">I4sQ", 1, b"mdat", struct.unpack(">I", mp4[at - 4 : at])[0] + 8)
    text = b"Elephant trunks, travelstories, pixelstsz, stz2, a cmov;" * 2000
    return {
        "mp4 of a title": titled("mp4", text.decode()),
        "mov of a title": titled("mov", text.decode()),
        "mov of an encoder": titled("mov", "", encoder="xtravelstories"),
        "fragments of a title": titled("mp4", text.decode(), fragments),
        "mp4 and text in boxes": b"".join([mp4, *(boxed(name, text) for name in TEXTS)]),
        "mp4 and a trailer": mp4 + TAIL,
        "mp4 of 64 bits": mp4[: at - 12] + long + mp4[at + 4 :],  # the space is left for that
        "mp4 with a claim in its frames": mp4.replace(b"x264 - core", b"stsz - core", 1),
        "mp4 to its end": front.replace(*mdat(front, 0), 1),
        "mp4 of unknown length": front.replace(*mdat(front, 0xFFFFFFF0), 1),
        "fragments and a trailer": write(moving, options=fragments) + TAIL,
        "fragments to a pipe": write(moving, pipe=True, options={"movflags": "frag_keyframe"}),
        "mov and a trailer": write(moving, "mov") + TAIL,
        "mkv and a trailer": write(moving, "matroska") + TAIL,
        "mkv to a pipe": write(moving, "matroska", pipe=True),
        "mkv to a pipe and a trailer": write(moving, "matroska", pipe=True) + TAIL,
        "webm live": write(moving, "webm", "libvpx-vp9", pipe=True, options={"live": "1"}),
        "mkv with a claim in its frames": write(moving, "matroska").replace(
            b"x264 - core", b"cmov - core", 1
        ),
        "mkv of a browser": unknown_clusters(write(moving, "matroska", pipe=True)),
        "avi and a trailer": avi + TAIL,
        "avi to a pipe": write(moving, "avi", **mjpeg, pipe=True),
        "avi of length 0": avi[:4] + bytes(4) + avi[8:],
        "avi whose length counts all": avi[:4] + struct.pack("<I", len(avi)) + avi[8:],
        "gif without a trailer": gif[:-1],
        "gif and more": gif + TAIL,
        "webp and more": animation(moving, "WEBP") + TAIL,
        "apng and more": animation(moving, "PNG") + TAIL,
        "avif and more": animation(moving, "AVIF") + TAIL,
    }


TEXTS = b"free", b"uuid", b"skip", b"wide", b"meta", b"Xtra"


def boxed(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), name) + body


def titled(suffix: str, title: str, options=None, encoder="x") -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=suffix, options=options or {}) as container:
        container.metadata.update(title=title, comment=title)
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.metadata.update(encoder=encoder, handler_name=title[:99])
        for frame in noise(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def table_in_front(frames) -> bytes:
    """An mp4 for the web; it takes a file to rearrange."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "front.mp4"
        with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=8)
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        return path.read_bytes()


def unknown_clusters(data: bytes) -> bytes:
    """As a browser records: of no cluster the length is told."""
    data = bytearray(data)
    at = data.find(b"\x1fC\xb6u")
    while at >= 0:
        length = 9 - data[at + 4].bit_length()
        data[at + 4 : at + 4 + length] = ((2 << 7 * length) - 1).to_bytes(length)
        at = data.find(b"\x1fC\xb6u", at + 4)
    return bytes(data)


def mdat(data: bytes, length: int) -> tuple[bytes, bytes]:
    """The head of the box of frames, and one that tells another length."""
    at = data.index(b"mdat")
    return data[at - 4 : at + 4], struct.pack(">I", length) + b"mdat"


@pytest.mark.parametrize("name, data", whole().items(), ids=whole())
def test_bytes_behind_the_end_and_ends_that_nobody_wrote(name, data):
    """sview#138, whats-in-a-gif#3, image-gif#237, NAudio#688, MediaInfoLib#657.

    And what is only text is no table of frames.
    """
    clip = decode(data, ALL)
    assert clip.source_frames == len(clip.frames) == 8


@cache
def cut_ones() -> dict[str, bytes]:
    moving = noise(12)
    fast = {"movflags": "frag_keyframe+empty_moov"}
    return {
        "mp4": write(moving),
        "fragments": write(moving, options=fast),
        "mov": write(moving, "mov"),
        "mkv": write(moving, "matroska"),
        "webm": write(moving, "webm", "libvpx-vp9"),
        "mkv to a pipe": write(moving, "matroska", pipe=True),
        "mkv live": write(moving, "matroska", pipe=True, options={"live": "1"}),
        "avi": write(moving, "avi", "mpeg4"),
        "gif": animation(moving, "GIF"),
        "webp": animation(moving, "WEBP"),
        "apng": animation(moving, "PNG"),
        "avif sequence": animation(moving, "AVIF"),
        "avif": picture(moving[0], "AVIF"),
        "png": picture(moving[0], "PNG"),
        "jpg": picture(moving[0], "JPEG"),
        "progressive jpg": picture(moving[0], "JPEG", progressive=True),
        "still webp": picture(moving[0], "WEBP"),
        "bmp": picture(moving[0], "BMP"),
    }


@pytest.mark.parametrize("name, data", cut_ones().items(), ids=cut_ones())
def test_what_lacks_its_end_is_refused(name, data):
    """Cut anywhere, with or without something behind: frames or rows that are missing."""
    everything = decode(data, ALL).frames
    for kept in np.random.default_rng(0).integers(len(data) // 50, len(data) - 40, 40):
        try:
            taken = decode(data[:kept], ALL).frames
        except MediaError as error:
            assert error.kind in ("truncated", "unreadable")
        else:
            assert torch.equal(taken, everything), f"{name} cut at {kept} of {len(data)}"


def test_an_mp4_whose_last_frames_are_missing_is_refused():
    """Cut between two frames, with the length of their box repaired: its table tells."""
    data = table_in_front(noise(8))
    with av.open(io.BytesIO(data)) as container:
        ends = sorted(entry.pos + entry.size for entry in container.streams.video[0].index_entries)
    assert ends[-1] == len(data)
    for end in ends[1:-1:3]:
        cut = data[:end].replace(*mdat(data, end - data.index(b"mdat") + 4), 1)
        assert refused(cut).kind == "truncated"
        assert refused(cut, Sampling(num_frames=1, fps=8)).kind == "truncated"


def test_an_animation_that_has_fewer_frames_than_it_says_is_refused():
    claimed = bytearray(animation(noise(3), "PNG"))
    at = claimed.index(b"acTL") + 4
    claimed[at : at + 4] = struct.pack(">I", 5)
    claimed[at + 8 : at + 12] = struct.pack(">I", zlib.crc32(claimed[at - 4 : at + 8]))
    assert refused(bytes(claimed)).kind == "truncated"


def test_a_recording_cut_in_its_last_frame_is_refused():
    """Without lengths at the front: the last block, or the decoder, is what tells."""
    live = unknown_clusters(write(noise(3), "matroska", pipe=True))
    with av.open(io.BytesIO(live)) as container:
        last = max(packet.pos for packet in container.demux(video=0) if packet.size) - 3
    assert live[last] == 0xA3  # a block: this byte, two of its length, what it holds
    for end in (last + 1, last + 2, last + 3, last + 9, len(live) - 1):
        assert refused(live[:end]).kind == "truncated"
    mp4 = whole()["mp4 of 64 bits"]
    assert refused(mp4[:-900]).kind == "truncated"
    piped = write(noise(3), "avi", "mjpeg", pixels="yuvj420p", pipe=True)
    for end in (100, 300, 600):
        assert refused(piped[:-end]).kind == "truncated"


@pytest.mark.parametrize("suffix", ["mp4", "matroska", "avi"])
def test_a_frame_that_its_decoder_calls_damaged_is_refused(suffix):
    data = bytearray(write(noise(6), suffix, "mpeg4", gop=6))
    with av.open(io.BytesIO(data)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    at = packets[3].pos + packets[3].size // 2
    data[at : at + 40] = bytes(range(40))
    assert "damaged or truncated at frame 3" in str(refused(bytes(data)))
