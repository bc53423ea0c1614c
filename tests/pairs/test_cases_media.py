"""Cases of the field: what is a frame, and what of a file is the picture or the clip."""

from __future__ import annotations

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from media_files import (
    ALL,
    CASES,
    animation,
    noise,
    picture,
    refused,
    steps,
    which,
    write,
)
from PIL import Image

from fastpref.pairs.media import Sampling, choose, decode


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


def stamped(wrong: dict[int, int]) -> bytes:
    """A frame each half second, then eight a second; some are stamped so many ms too late."""
    times = [4 * i for i in range(10)] + [40 + i for i in range(15)]  # eighths of a second
    data = bytearray(write(steps(25), "matroska", "ffv1", pixels="bgr0", times=times))
    with av.open(io.BytesIO(data)) as container:
        at = [packet.pos for packet in container.demux(video=0) if packet.size]
    for i, late in wrong.items():  # behind the track's number
        stamp = slice(at[i] + 1, at[i] + 3)
        data[stamp] = struct.pack(">h", struct.unpack(">h", data[stamp])[0] + late)
    return bytes(data)


@pytest.mark.parametrize(
    "wrong",
    [{3: -500}, {3: -500, 4: -1000}, {3: -1100}, {6: -3000}, {3: 3499}, {1: -500}, {24: -125}],
    ids=["twice", "thrice", "back", "as the first", "ahead", "two first", "two last"],
)
def test_a_stamp_that_is_wrong_is_only_that_of_its_own_frame(wrong):
    """Milliseconds cannot tell two frames apart, or a recorder's clock was set."""
    sure, some = stamped({}), stamped(wrong)
    assert sure != some
    for rate in (1, 2, 4, 8):
        whole, clip = decode(sure, Sampling(fps=rate)), decode(some, Sampling(fps=rate))
        assert which(clip) == which(whole), rate
        assert (clip.seconds, clip.source_frames) == (whole.seconds, whole.source_frames)
        for count in (2, 4, 6):
            few = decode(some, Sampling(fps=rate, num_frames=count))
            assert which(few) == which(whole)[:count]
            assert (few.seconds, few.source_frames) == (whole.seconds, 25)


def test_a_stamp_far_ahead_is_not_yet_the_end_of_what_is_asked_for():
    few = Sampling(fps=8, num_frames=4)
    assert (
        which(decode(stamped({1: 20000}), few)) == which(decode(stamped({}), few)) == [0, 0, 0, 1]
    )


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
