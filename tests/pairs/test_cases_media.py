"""Media as people have them, after public reports: what is shown, where it ends, how it looks."""

from __future__ import annotations

import io
import struct
import tempfile
import time
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image

from fastpref.pairs.frames import on_white
from fastpref.pairs.media import MediaError, Sampling, choose, decode

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


# What is a frame: what is shown.


@pytest.mark.parametrize("name, packets", [("open_gop_h264.mkv", 55), ("open_gop_hevc.mkv", 56)])
def test_packets_that_show_nothing_are_no_frames(name, packets):
    """spdl#1236, lossless-cut#2626: a lossless cut leaves packets whose key frame is gone."""
    data = (CASES / name).read_bytes()
    with av.open(io.BytesIO(data)) as container:
        shown = [(float(f.time), f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    with av.open(io.BytesIO(data)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == packets
    clip = decode(data, ALL)
    assert clip.source_frames == len(clip.frames) == len(shown) == 52
    assert clip.seconds == pytest.approx(shown[-1][0] - shown[0][0] + 1 / 16)
    for sampling in (Sampling(num_frames=5), Sampling(fps=8), Sampling(fps=8, num_frames=9)):
        times = [Fraction(at) - Fraction(shown[0][0]) for at, _ in shown]
        picks = choose(times, Fraction(clip.seconds), sampling)
        taken = decode(data, sampling)
        assert taken.source_frames == 52
        assert np.array_equal(taken.frames, np.stack([shown[i][1] for i in picks]))


@pytest.mark.parametrize("codec, suffix", [("libx264", "matroska"), ("libvpx-vp9", "webm")])
def test_a_cut_between_key_frames_shows_what_can_be_drawn(codec, suffix):
    """spdl#1236's kind: up to its first key frame nothing is shown; players wait as well."""
    file, whole = io.BytesIO(), write(steps(12), suffix, codec, gop=6)
    with av.open(io.BytesIO(whole)) as source, av.open(file, "w", format=suffix) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for i, packet in enumerate(source.demux(video=0)):
            if packet.size and i >= 2:
                packet.stream = stream
                target.mux(packet)
    clip = decode(file.getvalue(), ALL)
    assert clip.source_frames == len(clip.frames) < 12 - 2
    assert which(clip) == list(range(12 - len(clip.frames), 12))
    assert which(decode(file.getvalue(), Sampling(fps=4)))[0] == 12 - len(clip.frames)


def test_what_an_edit_list_skips_is_no_frame():
    """A cut that keeps the packets from the last key frame on, and shows what comes later."""
    one_key_frame = {"bf": "0", "sc_threshold": "0"}
    data = bytearray(write(steps(12), gop=12, codec_options=one_key_frame))
    at = data.index(b"elst") + 12
    duration, start = struct.unpack(">Ii", data[at : at + 8])
    assert start == 0
    unit = 16384 // 8  # of the media
    data[at : at + 8] = struct.pack(">Ii", duration * 9 // 12, 3 * unit)
    with av.open(io.BytesIO(data)) as container:
        assert sum(packet.is_discard for packet in container.demux(video=0)) == 3
    clip = decode(bytes(data), ALL)
    assert which(clip) == list(range(3, 12)) and clip.source_frames == 9
    assert clip.seconds == pytest.approx(9 / 8)
    assert which(decode(bytes(data), Sampling(fps=4))) == [3, 5, 7, 9, 11]
    assert decode(bytes(data), Sampling(fps=8, num_frames=1)).source_frames == 9


@pytest.mark.parametrize("suffix", ["mp4", "matroska", "avi"])
def test_frames_that_are_reordered_and_start_late(suffix):
    """B-frames have negative or late times; the clip starts with its first shown frame."""
    late = {} if suffix == "avi" else {"times": [40 + i for i in range(12)]}
    data = write(steps(12), suffix, codec_options={"bf": "3"}, gop=12, **late)
    clip = decode(data, Sampling(fps=8))
    assert which(clip) == list(range(12)) and clip.seconds == pytest.approx(1.5)
    assert which(decode(data, Sampling(fps=4, num_frames=3))) == [0, 2, 4]


def test_of_a_long_clip_only_the_beginning_is_decoded(monkeypatch):
    """Its number of frames and its length are then those that the container tells."""
    data = write(steps(24), gop=24)
    monkeypatch.setattr("fastpref.pairs.clips.MAX_DECODED", 12 * 32 * 48)
    clip = decode(data, Sampling(fps=8, num_frames=2))
    assert which(clip) == [0, 1] and clip.source_frames == 24
    assert clip.seconds == pytest.approx(3.0)
    assert refused(data).kind == refused(data, Sampling(num_frames=4)).kind == "too_large"


@pytest.mark.parametrize("name", ["animated.webp", "animated.png"])
def test_animations_of_pictures_have_frames(name):
    """Pillow#7738, VideoHelperSuite#302, #411: ComfyUI writes them."""
    clip = decode((CASES / name).read_bytes(), ALL)
    assert clip.source_frames == len(clip.frames) == 17
    assert clip.seconds == pytest.approx(17 * 0.062)
    image = Image.open(CASES / name)
    for i in range(17):
        image.seek(i)
        assert np.array_equal(clip.frames[i], np.asarray(image.convert("RGB")))
    assert len(decode((CASES / name).read_bytes(), Sampling(fps=8)).frames) == 9


@pytest.mark.parametrize("form", ["WEBP", "PNG", "GIF", "AVIF"])
def test_frames_of_an_animation_last_as_long_as_each_says(form):
    """VideoHelperSuite#411's kind; one that asks for no time is shown for a tenth of a second."""
    how = {"lossless": True} if form == "WEBP" else {}
    data = animation(steps(5), form, [200, 100, 300, 0, 100], **how)
    clip = decode(data, ALL)
    assert clip.source_frames == 5 and which(clip) == [0, 1, 2, 3, 4]
    assert clip.seconds == pytest.approx(0.2 + 0.1 + 0.3 + 0.1 + 0.1)
    # Shown from 0, .2, .3, .6 and .7 s on: the nearest to each tenth, the earlier of two.
    assert which(decode(data, Sampling(fps=10))) == [0, 0, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("form", ["WEBP", "PNG", "GIF"])
def test_parts_of_an_animation_are_laid_over_each_other(form):
    """Small changes are stored as small pictures, with what was there before around them."""
    frames = np.full((4, 32, 48, 3), 200, np.uint8)
    for i in range(1, 4):
        frames[i, 8 * i : 8 * i + 4, 10:20] = 40 * i
    how = {"lossless": True} if form == "WEBP" else {}
    clip = decode(animation(frames, form, **how), ALL)
    assert np.array_equal(clip.frames, frames) and not clip.composited


def test_the_picture_that_stands_in_for_an_apng_is_none_of_its_frames():
    first = Image.fromarray(np.full((8, 8, 3), 250, np.uint8))
    rest, file = [Image.fromarray(frame) for frame in steps(3, 8, 8).copy()], io.BytesIO()
    first.save(file, "PNG", save_all=True, append_images=rest, default_image=True, duration=100)
    clip = decode(file.getvalue(), ALL)
    assert which(clip) == [0, 1, 2] and clip.seconds == pytest.approx(0.3)


# What of a file is the picture or the clip.


def test_a_picture_in_tiles_is_whole():
    """block/buzz#7666, filebrowser#2909: 2 x 2 tiles of 128; FFmpeg's first stream is one."""
    (frame,) = decode((CASES / "tiled.avif").read_bytes(), ALL).frames
    whole = np.asarray(Image.open(CASES / "tiled_whole.png").convert("RGB")).astype(int)
    assert frame.shape == whole.shape == (256, 256, 3)
    assert np.abs(frame.numpy() - whole).max() <= 8


@pytest.mark.parametrize("brands", [b"heicmif1", b"mif1heic", b"heixmiaf", b"msf1hevc"])
def test_heic_is_refused_by_name(brands):
    """filebrowser#2909: as phones store them, in tiles which FFmpeg would give one by one."""
    data = bytearray((CASES / "tiled.avif").read_bytes())
    data[8:12], data[16:20] = brands[:4], brands[4:]
    data = data.replace(b"avif", brands[:4]) if brands[:4] != b"mif1" else data
    assert "HEIC picture; save it as" in str(refused(bytes(data)))


def two_videos(suffix: str, *dispositions) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=suffix) as container:
        streams = []
        for i, disposition in enumerate(dispositions):
            stream = container.add_stream("libx264", rate=8)
            stream.height, stream.width, stream.pix_fmt = 32, 32 * (i + 1), "yuv420p"
            stream.disposition = disposition.value
            streams.append(stream)
        for i, stream in enumerate(streams):
            for frame in steps(3 + i, 32, 32 * (i + 1)):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["mp4", "matroska"])
def test_of_several_videos_the_default_one_is_shown(suffix):
    """block/buzz#7666's kind: the first stream is only that."""
    none, default = Disposition(0), Disposition.default
    assert decode(two_videos(suffix, none, default), ALL).frames.shape == (4, 32, 64, 3)
    assert decode(two_videos(suffix, default, none), ALL).frames.shape == (3, 32, 32, 3)
    error = refused(two_videos(suffix, default, default))
    assert "holds 2 videos (streams 0, 1), none of them the one to show; keep one" in str(error)


def covered(suffix: str, clip: bool) -> bytes:
    """A cover first, then a clip or a sound."""
    cover, file = picture(noise(1)[0], "JPEG"), io.BytesIO()
    with av.open(file, "w", format=suffix) as container:
        if suffix == "mp4":
            front = container.add_stream("mjpeg", rate=1)
            front.height, front.width, front.pix_fmt = 32, 48, "yuvj420p"
            front.disposition = Disposition.attached_pic.value
        else:
            container.add_attachment("cover.jpg", "image/jpeg", cover)
        if clip:
            stream = container.add_stream("libx264", rate=8)
            stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        sound = container.add_stream("aac", rate=8000)
        for i in range(8):
            if clip:
                frame = np.full((32, 64, 3), 10 * i, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            silence = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            silence.rate = 8000
            container.mux(sound.encode(silence))
        if clip:
            container.mux(stream.encode())
        container.mux(sound.encode())
        if suffix == "mp4":
            packet = av.Packet(cover)
            packet.stream, packet.pts, packet.dts = front, 0, 0
            packet.time_base, packet.is_keyframe = Fraction(1, 1), True
            container.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["mp4", "matroska"])
def test_a_cover_is_not_the_clip(suffix):
    """block/buzz#7666's kind: music and clips carry a picture for their shelf."""
    data = covered(suffix, clip=True)
    with av.open(io.BytesIO(data)) as container:
        assert sum(bool(s.disposition & Disposition.attached_pic) for s in container.streams) == 1
    assert which(decode(data, ALL)) == list(range(8))
    assert "holds no video but a cover" in str(refused(covered(suffix, clip=False)))


@pytest.mark.parametrize("kind", ["video", "picture"])
def test_what_stands_behind_a_jpeg_is_not_the_picture(kind):
    """sview#138: motion photos; MPO, depth and gain maps are further JPEGs."""
    frame = noise(1)[0]
    first, more = picture(frame, "JPEG"), picture(noise(1, 64, 64)[0], "JPEG")
    clip = decode(first + (b"MotionPhoto_Data" + write(steps(3)) if kind == "video" else more), ALL)
    assert clip.source_frames == 1
    assert torch.equal(clip.frames, decode(first, ALL).frames)
    if kind == "picture":
        file = io.BytesIO()
        pages = [Image.open(io.BytesIO(page)) for page in (first, more)]
        pages[0].save(file, "MPO", save_all=True, append_images=pages[1:])
        assert decode(file.getvalue(), ALL).frames.shape == (1, 32, 48, 3)


def test_a_pointer_of_git_lfs_is_named():
    """DALI#1872: what stands in a checkout that did not fetch its large files."""
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    error = refused(text.encode())
    assert error.kind == "not_media" and "git-lfs pointer" in str(error)
    assert "git lfs pull" in str(error)


# What is the end of a file: what the decoder says.


TAIL = b"a maker's own bytes, of a length that is no box: \xff\xff\xff\xff" + bytes(range(256)) * 3


def whole() -> dict[str, bytes]:
    moving, mjpeg = noise(8), {"codec": "mjpeg", "pixels": "yuvj420p"}
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    gif, avi, mp4 = animation(moving, "GIF"), write(moving, "avi", **mjpeg), write(moving)
    front, at = table_in_front(moving), mp4.index(b"mdat")
    long = struct.pack(">I4sQ", 1, b"mdat", struct.unpack(">I", mp4[at - 4 : at])[0] + 8)
    return {
        "mp4 and a trailer": mp4 + TAIL,
        "mp4 of 64 bits": mp4[: at - 12] + long + mp4[at + 4 :],  # the space is left for that
        "mp4 with a claim in its frames": mp4.replace(b"x264 - core 165", b"stsz - core 165", 1),
        "mp4 to its end": front.replace(*mdat(front, 0), 1),
        "mp4 of unknown length": front.replace(*mdat(front, 0xFFFFFFF0), 1),
        "fragments and a trailer": write(moving, options=fragments) + TAIL,
        "fragments to a pipe": write(moving, pipe=True, options={"movflags": "frag_keyframe"}),
        "mov and a trailer": write(moving, "mov") + TAIL,
        "mkv and a trailer": write(moving, "matroska") + TAIL,
        "mkv to a pipe": write(moving, "matroska", pipe=True),
        "mkv to a pipe and a trailer": write(moving, "matroska", pipe=True) + TAIL,
        "webm live": write(moving, "webm", "libvpx-vp9", pipe=True, options={"live": "1"}),
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
    """sview#138, whats-in-a-gif#3, image-gif#237, NAudio#688, MediaInfoLib#657."""
    clip = decode(data, ALL)
    assert clip.source_frames == len(clip.frames) == 8


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


# What pixels look like.


def matrixed(data: bytes, *matrix: int) -> bytes:
    """With another display matrix a b c d: x' = a x + c y, y' = b x + d y."""
    at = data.index(b"tkhd") + 4 + 40  # version and flags, times, id, duration, layer, volume
    a, b, c, d = (value << 16 for value in matrix)
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


@pytest.mark.parametrize(
    "matrix, turned",
    [
        ((1, 0, 0, 1), lambda x: x),
        ((0, 1, -1, 0), lambda x: np.rot90(x, -1, (1, 2))),
        ((-1, 0, 0, -1), lambda x: np.rot90(x, 2, (1, 2))),
        ((0, -1, 1, 0), lambda x: np.rot90(x, 1, (1, 2))),
        ((-1, 0, 0, 1), lambda x: x[:, :, ::-1]),
        ((1, 0, 0, -1), lambda x: x[:, ::-1]),
        ((0, 1, 1, 0), lambda x: x.transpose(0, 2, 1, 3)),
        ((0, -1, -1, 0), lambda x: np.rot90(x, 2, (1, 2)).transpose(0, 2, 1, 3)),
    ],
    ids=["upright", "right", "over", "left", "mirrored", "flipped", "transposed", "transversed"],
)
def test_clips_are_turned_and_mirrored_as_their_matrix_says(matrix, turned):
    """Selfies are mirrored; the angle alone does not tell."""
    frames = noise(3)
    assert np.array_equal(decode(matrixed(lossless(frames), *matrix), ALL).frames, turned(frames))


@pytest.mark.parametrize("aspect, width", [(2, 96), (Fraction(1, 2), 24), (Fraction(16, 15), 51)])
@pytest.mark.parametrize("suffix, codec", [("mp4", "libx264"), ("mov", "mpeg4"),
                                           ("matroska", "libx264"), ("avi", "mpeg4")])  # fmt: skip
def test_pixels_that_are_not_square_are_shown_so(suffix, codec, aspect, width):
    """musubi-tuner#656: the height stays, the width is what the pixels' width / height says."""
    halves = np.zeros((3, 32, 48, 3), np.uint8)
    halves[:, :, 24:] = 240
    data = write(halves, suffix, codec, aspect=Fraction(aspect))
    clip = decode(data, ALL)
    assert clip.frames.shape == (3, 32, width, 3)
    assert (clip.source_height, clip.source_width) == (32, width)
    left, right = clip.frames[:, :, : width // 3], clip.frames[:, :, -(width // 3) :]
    assert left.float().mean() < 10 and right.float().mean() > 230
    sized = decode(data, Sampling(height=16, width=16))
    assert sized.frames.shape == (3, 16, 16, 3) and sized.source_width == width


def test_pixels_that_are_not_square_in_a_turned_clip():
    """musubi-tuner#656's kind: the aspect is that of what is stored, before it is turned."""
    clip = decode(matrixed(write(noise(3), aspect=Fraction(2)), 0, 1, -1, 0), ALL)
    assert clip.frames.shape == (3, 96, 32, 3)
    assert (clip.source_height, clip.source_width) == (96, 32)


def test_pixels_of_an_absurd_aspect_are_refused():
    data = bytearray(write(noise(1), aspect=Fraction(2)))
    at = data.index(b"pasp") + 4
    data[at : at + 8] = struct.pack(">II", 1 << 20, 1)
    assert refused(bytes(data)).kind == "too_large"


def seen(green: int) -> np.ndarray:
    """A box on nothing; under the nothing any colour, which nobody sees."""
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[..., :3] = green, 255 - green, 40
    rgba[4:8, 4:8] = 0, 200, 0, 255
    rgba[8:12, 8:12] = 200, 0, 0, 102
    return rgba


SEEN = np.full((16, 16, 3), 255)
SEEN[4:8, 4:8] = 0, 200, 0
SEEN[8:12, 8:12] = 0.4 * 200 + 0.6 * 255, 0.6 * 255, 0.6 * 255


def chunked(size: tuple[int, int], depth: int, colours: int, rows: bytes, key: bytes) -> bytes:
    """A PNG of one colour type and bit depth, with a transparent colour."""

    def chunk(name: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colours, 0, 0, 0))
    body = (chunk(b"tRNS", key) if key else b"") + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "WEBP", "AVIF"])
def test_what_is_under_nothing_is_not_seen(form):
    """sd-scripts#1269: two pictures that look alike are alike; on white."""
    how = {"PNG": {}, "WEBP": {"lossless": True, "exact": True}, "AVIF": {"quality": 100}}[form]
    first, second = (decode(picture(seen(green), form, **how), ALL) for green in (0, 255))
    for clip in (first, second):
        assert clip.composited and clip.frames[0, 12:, :4].min() == 255
        if form != "AVIF":  # whose colours are blurred at edges
            assert np.array_equal(clip.frames[0], SEEN)
    opaque = picture(np.dstack([noise(1)[0], np.full((32, 48), 255, np.uint8)]), form, **how)
    clip = decode(opaque, ALL)
    assert not clip.composited and clip.frames.shape == (1, 32, 48, 3)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_what_is_under_nothing_is_not_seen_in_an_animation(form):
    """sd-scripts#1269's kind: a box that moves over nothing; PNG and WebP begin with a full one."""
    boxes = np.zeros((4, 16, 16, 4), np.uint8)
    boxes[..., :3] = 0, 255, 0
    boxes[0, ..., 3] = 0 if form == "GIF" else 255
    for i in range(4):
        boxes[i, 4 * i : 4 * i + 4, :8] = 255, 0, 0, 255
    how = {"GIF": {"disposal": 2}, "PNG": {"disposal": 1}, "WEBP": {"lossless": True}}[form]
    data = animation(boxes, form, **how)
    clip = decode(data, ALL)
    white = np.where(boxes[..., 3:] == 0, 255, boxes[..., :3])
    assert clip.composited and np.array_equal(clip.frames, white)
    assert decode(data, Sampling(num_frames=1)).composited == (form == "GIF")
    assert decode(animation(boxes[::-1], form, **how), ALL).composited


def test_colours_on_white_are_rounded():
    level, alpha = np.meshgrid(np.arange(256), np.arange(256))
    rgba = np.stack([level, level, level, alpha], axis=-1).astype(np.uint8)
    pixels, composited = on_white(rgba)
    exact = (level * alpha + 255.0 * (255 - alpha)) / 255
    assert composited and np.abs(pixels - exact[..., None]).max() <= 0.5


def test_transparent_entries_of_palettes_and_transparent_colours():
    """sd-scripts#1269's kind: transparency is also a colour, of 8 bits or of 16."""
    indices = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
    palette = indices.copy()
    palette.putpalette([level for i in range(16) for level in (10 * i, 5, 200)])
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=bytes([255] * 8 + [0] * 4 + [51] * 4))
    (frame,) = decode(file.getvalue(), ALL).frames.numpy()
    assert frame[1, 3].tolist() == [70, 5, 200] and frame[2].min() == 255
    assert frame[3, 0].tolist() == [
        0.2 * 120 + 0.8 * 255,
        0.2 * 5 + 0.8 * 255,
        0.2 * 200 + 0.8 * 255,
    ]

    grey16 = (b"\0" + struct.pack(">2H", 40000, 300)) * 2
    clip = decode(chunked((2, 2), 16, 0, grey16, struct.pack(">H", 300)), ALL)
    assert clip.composited and clip.frames[0, 0].tolist() == [[156] * 3, [255] * 3]
    rgb16 = b"".join(
        b"\0" + struct.pack(">6H", *(40000, 300, 700), *(9000, 1, 2)) for _ in range(2)
    )
    clip = decode(chunked((2, 2), 16, 2, rgb16, struct.pack(">3H", 9000, 1, 2)), ALL)
    assert clip.composited and clip.frames[0, 0].tolist() == [[156, 1, 2], [255] * 3]
    grey8 = bytes([0, 7, 90]) * 2
    clip = decode(chunked((2, 2), 8, 0, grey8, struct.pack(">H", 7)), ALL)
    assert clip.composited and clip.frames[0, 0].tolist() == [[255] * 3, [90] * 3]


@pytest.mark.parametrize(
    "suffix, codec, pixels",
    [
        ("webm", "libvpx-vp9", "yuva420p"),
        ("webm", "libvpx", "yuva420p"),
        ("mov", "png", "rgba"),
        ("mov", "qtrle", "argb"),
        ("mov", "prores_ks", "yuva444p10le"),
        ("matroska", "ffv1", "bgra"),
        ("avi", "ffv1", "yuva444p16le"),
    ],
)
def test_what_is_under_nothing_is_not_seen_in_a_clip(suffix, codec, pixels):
    """sd-scripts#1269's kind; of VP8 and VP9 FFmpeg's own decoders drop the alpha."""
    boxes = np.full((3, 32, 32, 4), 255, np.uint8)
    boxes[:, :, :16] = 250, 0, 0, 0
    boxes[:, :, 16:] = 0, 0, 0, 128
    options = {"prores_ks": {"profile": "4444"}, "libvpx": {"auto-alt-ref": "0"}}.get(codec)
    data = write(boxes, suffix, codec, pixels=pixels, codec_options=options)
    clip = decode(data, ALL)
    assert clip.composited and clip.source_frames == 3
    assert clip.frames[:, 4:-4, 2:14].float().mean() == pytest.approx(255, abs=3)
    assert clip.frames[:, 4:-4, 18:-2].float().mean() == pytest.approx(127, abs=3)
    boxes[..., 3] = 255
    plain = decode(write(boxes, suffix, codec, pixels=pixels, codec_options=options), ALL)
    assert not plain.composited


MATRICES = {  # ITU-R: red's and blue's share of luma
    1: (0.2126, 0.0722),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
    2: (0.299, 0.114),  # unspecified: as FFmpeg and what is built on it
}


def rgb_of(yuv, space: int, full: bool) -> np.ndarray:
    """R, G, B by the matrix's own definition, in levels of 8 bits."""
    red, blue = MATRICES[space]
    y, u, v = np.asarray(yuv, float)
    y, u, v = ((y / 255, (u - 128) / 255, (v - 128) / 255) if full else
               ((y - 16) / 219, (u - 128) / 224, (v - 128) / 224))  # fmt: skip
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    return 255 * np.clip([r, (y - red * r - blue * b) / (1 - red - blue), b], 0, 1)


@pytest.mark.parametrize("name", ["bt709", "bt709full"])
def test_the_installed_decoder_knows_the_matrix_and_the_range(name):
    """PyAV#2230, #2149: 29 levels off up to PyAV 16."""
    data = (CASES / f"{name}.mp4").read_bytes()
    with av.open(io.BytesIO(data)) as container:
        stored = next(container.decode(video=0)).to_ndarray(channel_last=True)[::8, ::8]
    frame = decode(data, ALL).frames[0, ::8, ::8].numpy()
    expected = [rgb_of(yuv, 1, name.endswith("full")) for yuv in stored.reshape(-1, 3)]
    assert np.abs(frame.reshape(-1, 3) - expected).max() <= 1


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("space", MATRICES)
@pytest.mark.parametrize("pixels", ["yuv444p", "yuv420p", "yuv420p10le"])
def test_colours_are_those_of_the_matrix_and_the_range(pixels, space, full):
    """PyAV#2230's kind."""
    file, yuv = io.BytesIO(), (120, 90, 170)
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, pixels
        frame = av.VideoFrame(32, 32, pixels)
        for plane, level in zip(frame.planes, yuv, strict=True):
            wide = struct.pack("<H", 4 * level) if "10" in pixels else bytes([level])
            plane.update(wide * (plane.buffer_size // len(wide)))
        for of in (stream.codec_context, frame):
            of.colorspace, of.color_range = space, 2 if full else 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (shown,) = decode(file.getvalue(), ALL).frames
    off = 1 if pixels == "yuv444p" else 2.5  # swscale rounds where it scales
    assert np.abs(shown.numpy() - rgb_of(yuv, space, full)).max() <= off


def test_a_matrix_that_is_not_known_is_refused():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv444p"
        stream.codec_context.colorspace = 8  # YCgCo
        frame = av.VideoFrame.from_ndarray(noise(1, 32, 32)[0], format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv444p")))
        container.mux(stream.encode())
    assert "cannot be decoded" in str(refused(file.getvalue()))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "CMYK", "I;16", "RGBA"])
def test_pictures_of_every_kind(mode):
    grey = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (16, 1))
    form = "JPEG" if mode == "CMYK" else "PNG"
    image = Image.fromarray(grey)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode in ("P", "PA"):
        image = image.convert("P")
    elif mode != "L":
        image = image.convert("RGB").convert(mode)
    file = io.BytesIO()
    image.save(file, form, quality=100)
    (frame,) = decode(file.getvalue(), ALL).frames.numpy()
    expected = np.asarray(image.convert("RGB")) if mode == "1" else grey[..., None].repeat(3, -1)
    assert np.abs(frame.astype(int) - expected).max() <= 3


# What a file may cost.


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
