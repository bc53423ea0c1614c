"""Decoding: exact frames of every format, sampling by time, resizing, and media to refuse."""

from __future__ import annotations

import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from fastpref.pairs.media import MAX_FRAME, MediaError, Sampling, decode, load, resize, write_clip

ALL = Sampling()
FORMATS = {
    "rgb.mp4": ("libx264rgb", "rgb24", {"qp": "0"}),
    "yuv.mp4": ("libx264", "yuv420p", {}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {}),
    "x264.mkv": ("libx264", "yuv420p", {}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {}),
    "anim.gif": ("gif", "rgb8", {}),
    "image.png": ("png", "rgb24", {}),
    "image.jpg": ("mjpeg", "yuvj420p", {"qmin": "1", "qmax": "2"}),
}


def gradient(frames: int = 12, height: int = 32, width: int = 48) -> torch.Tensor:
    """A smooth moving picture uint8 [F, H, W, 3]: what lossy codecs keep within a few levels."""
    t, y, x = torch.meshgrid(*map(torch.arange, (frames, height, width)), indexing="ij")
    planes = [128 + 100 * torch.sin((x + 2 * t) / 9), 4 * y + 8 * t, 255 - 20 * t]
    return torch.stack([p.float().clamp(0, 255) for p in planes], dim=-1).to(torch.uint8)


def write(path: Path, frames: torch.Tensor, fps: int = 8) -> bytes:
    codec, pixels, options = FORMATS[path.name]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_frames(name, tmp_path):
    frames = gradient(1 if name.startswith("image") else 12)
    clip = decode(write(tmp_path / name, frames), ALL)
    assert clip.frames.shape == frames.shape and clip.frames.dtype == torch.uint8
    error = (clip.frames.int() - frames.int()).abs().float()
    if name in ("rgb.mp4", "image.png"):
        assert error.max() == 0
    else:
        assert error.mean() < (20 if name == "anim.gif" else 8)  # rgb8 has 8 levels of red
    assert clip.source_frames == len(frames)
    if len(frames) > 1:
        assert clip.seconds == pytest.approx(1.5, abs=0.02)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kept", [0.3, 0.9, 0.995])
def test_truncated_files_are_refused(name, kept, tmp_path):
    generator = torch.Generator().manual_seed(0)
    shape = (1 if name.startswith("image") else 12, 48, 64, 3)
    noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    data = write(tmp_path / name, noise)
    assert len(decode(data, ALL).frames) == shape[0]
    with pytest.raises(MediaError, match="truncated") as error:
        decode(data[: int(len(data) * kept)], ALL)
    assert error.value.kind == "truncated"


def picture(**options) -> bytes:
    noise = Image.effect_noise((120, 90), 80).convert("RGB")
    buffer = io.BytesIO()
    noise.save(buffer, "jpeg", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_cut_jpeg_is_not_whole_for_its_thumbnail(options):
    """A thumbnail has an end mark of its own; Pillow fills what is missing with grey."""
    whole, thumbnail = picture(**options), picture()
    data = whole[:2] + b"\xff\xe2" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + whole[2:]
    assert decode(data, ALL).frames.shape == (1, 90, 120, 3)
    for cut in (data[: len(data) * 2 // 3], data[: len(data) * 2 // 3] + b"\xff\xd9"):
        with pytest.raises(MediaError, match="truncated"):
            decode(cut, ALL)


def test_truncated_stream_in_a_whole_looking_mp4(tmp_path):
    """The sample table stands in front, the data's own length is repaired: FFmpeg must notice."""
    path = tmp_path / "fast.mp4"
    noise = torch.randint(0, 256, (12, 48, 64, 3), dtype=torch.uint8)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264rgb", rate=8, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "rgb24"
        for frame in noise.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    at = data.index(b"mdat") - 4
    data = bytearray(data[: at + (len(data) - at) // 2])
    data[at : at + 4] = struct.pack(">I", len(data) - at)
    with pytest.raises(MediaError):
        decode(bytes(data), ALL)


@pytest.mark.parametrize(
    "data, kind",
    [
        (b"this is a text\n" * 50, "unreadable"),
        (
            b"#EXTM3U\n#EXTINF:9,\n/a.mp4\n#EXT-X-ENDLIST\n",
            "unreadable",
        ),
        (b"ffconcat version 1.0\nfile secret.mp4\n", "unreadable"),
        (bytes(4096), "unreadable"),
        (b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2", "unreadable"),
    ],
    ids=["text", "playlist", "concat", "zeros", "header"],
)
def test_what_is_no_medium(data, kind):
    with pytest.raises(MediaError) as error:
        decode(data, ALL)
    assert error.value.kind == kind
    assert "\n" not in str(error.value)


def test_a_playlist_reads_no_other_file(tmp_path, monkeypatch):
    """Without the list of formats FFmpeg would play the clip that the playlist names."""
    write_clip(tmp_path / "secret.mp4", gradient())
    monkeypatch.chdir(tmp_path)
    playlist = b"ffconcat version 1.0\nfile secret.mp4\n"
    with av.open(io.BytesIO(playlist)) as container:
        assert len(list(container.decode(video=0))) == 12  # what must not happen here
    with pytest.raises(MediaError):
        decode(playlist, ALL)


def test_empty_and_huge_files(tmp_path, monkeypatch):
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(MediaError, match="zero bytes"):
        load(tmp_path / "empty.mp4")
    monkeypatch.setattr("fastpref.pairs.media.MAX_BYTES", 10)
    (tmp_path / "long.mp4").write_bytes(bytes(11))
    with pytest.raises(MediaError, match="11 bytes, at most 10"):
        load(tmp_path / "long.mp4")


def test_a_picture_too_large_is_refused_before_it_is_allocated():
    side = 9000
    assert side * side > MAX_FRAME

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(3 * side + 1)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert len(png) < 1 << 20
    with pytest.raises(MediaError, match="has a frame of 9000x9000"):
        decode(png, ALL)


def test_clip_pixels_are_limited(tmp_path, monkeypatch):
    write_clip(tmp_path / "c.mp4", gradient(12, 32, 48))
    data = (tmp_path / "c.mp4").read_bytes()
    monkeypatch.setattr("fastpref.pairs.media.MAX_PIXELS", 11 * 32 * 48)
    with pytest.raises(MediaError, match="12 frames of 48x32 exceed") as error:
        decode(data, ALL)
    assert error.value.kind == "too_large"
    assert len(decode(data, Sampling(num_frames=11)).frames) == 11
    with pytest.raises(MediaError, match="24 frames of 48x32 exceed"):  # shown twice, kept twice
        decode(data, Sampling(fps=16))
    monkeypatch.setattr("fastpref.pairs.media.MAX_FRAMES", 23)
    with pytest.raises(MediaError, match=r"lasts 1.5 s: 24 frames, at most 23"):
        decode(data, Sampling(fps=16))
    with pytest.raises(ValueError, match="num_frames x height x width"):
        Sampling(num_frames=12, height=32, width=48)


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(), range(12)),
        (Sampling(num_frames=12), range(12)),
        (Sampling(num_frames=1), [0]),
        (Sampling(num_frames=2), [0, 11]),
        (Sampling(num_frames=5), [0, 3, 6, 8, 11]),  # evenly, i * 11 / 4 rounded
        (Sampling(fps=8), range(12)),
        (Sampling(fps=4), [0, 2, 4, 6, 8, 10]),
        (Sampling(fps=4, num_frames=3), [0, 2, 4]),
        (Sampling(fps=16, num_frames=5), [0, 0, 1, 1, 2]),  # half-way: the earlier frame
        (Sampling(fps=6), [0, 1, 3, 4, 5, 7, 8, 9, 11]),  # k * 8 / 6 to the nearest
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_frames_are_taken_by_time(sampling, expected, suffix, tmp_path):
    """Frame i has brightness 20 i; webm rounds its times to milliseconds."""
    frames = torch.full((12, 16, 16, 3), 0, dtype=torch.uint8)
    frames += (20 * torch.arange(12, dtype=torch.uint8)).view(-1, 1, 1, 1)
    name = {"mp4": "yuv.mp4", "webm": "vp9.webm"}[suffix]
    clip = decode(write(tmp_path / name, frames), sampling)
    taken = (clip.frames.float().mean((1, 2, 3)) / 20).round().int().tolist()
    assert taken == list(expected)


def test_variable_frame_rate_is_sampled_by_time(tmp_path):
    """Frames shown at 0, 1, 2, 10, 11 tenths of a second: at 5 fps the third one stands still."""
    with av.open(str(tmp_path / "vfr.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height = stream.width = 16
        stream.pix_fmt = "yuv420p"
        for i, time in enumerate([0, 1, 2, 10, 11]):
            frame = av.VideoFrame.from_ndarray(
                np.full((16, 16, 3), 40 * i, np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = time, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clip = decode((tmp_path / "vfr.mp4").read_bytes(), Sampling(fps=5))
    taken = (clip.frames.float().mean((1, 2, 3)) / 40).round().int().tolist()
    assert taken == [
        0,
        2,
        2,
        2,
        3,
        3,
    ]  # at 0, .2, .4, .6 (nearest .2 or 1.0: the tie is earlier), ...


def test_too_short(tmp_path):
    write_clip(tmp_path / "c.mp4", gradient(6), fps=8)
    data = (tmp_path / "c.mp4").read_bytes()
    with pytest.raises(MediaError, match="6 frames, --num_frames asks for 7") as error:
        decode(data, Sampling(num_frames=7))
    assert error.value.kind == "too_short"
    with pytest.raises(MediaError, match="3 frames at 4 fps, --num_frames asks for 4"):
        decode(data, Sampling(num_frames=4, fps=4))


def test_an_image_is_one_frame_at_any_rate(tmp_path):
    data = write(tmp_path / "image.png", gradient(1))
    assert len(decode(data, Sampling(num_frames=1, fps=60)).frames) == 1


def test_resize_keeps_what_it_need_not_touch():
    frame = gradient(1)[0]
    assert torch.equal(resize(frame, None, None), frame)
    assert torch.equal(resize(frame, 32, 48), frame)
    assert torch.equal(resize(frame, 32, 32), frame[:, 8:40])  # only a centre crop
    assert torch.equal(resize(frame, 20, 48), frame[6:26])


def test_resize_is_an_antialiased_bicubic_and_covers():
    """Against Pillow's own, which filters like it; an aliasing one differs by tens of levels."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    frame = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8, generator=generator)
    ours = resize(frame, 20, 20)
    picture = Image.fromarray(frame.numpy()).resize((27, 20), Image.Resampling.BICUBIC)
    expected = np.asarray(picture)[:, 3:23].astype(int)
    assert ours.shape == (20, 20, 3)
    assert np.abs(ours.numpy().astype(int) - expected).max() <= 2


@pytest.mark.parametrize("size", [(20, 20), (64, 8), (8, 64), (33, 47), (31, 49), (1, 1)], ids=str)
def test_resize_gives_the_asked_size(size):
    assert resize(gradient(1, 32, 48)[0], *size).shape == (*size, 3)


def test_pictures_too_thin_to_scale_are_refused(tmp_path):
    """8192x1 scaled to cover 832x480 would take 22 GB to keep one pixel's line of it."""
    data = write(tmp_path / "image.png", gradient(1, 1, 1024))
    with pytest.raises(MediaError, match=r"1024x1, scaled to cover 832x480, is 491520x480") as e:
        decode(data, Sampling(height=480, width=832))
    assert e.value.kind == "too_large"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_turned_and_mirrored_as_exif_says(kind, orientation):
    corners = torch.zeros(16, 32, 3, dtype=torch.uint8)
    corners[:8, :16], corners[:8, 16:] = 255, 128
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(corners.numpy()).save(file, kind, exif=exif.tobytes(), quality=100)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
    (frame,) = decode(file.getvalue(), ALL).frames
    assert frame.shape == upright.shape
    assert (frame.int() - torch.from_numpy(upright.copy()).int()).abs().max() <= 8


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_exif_data_that_cannot_be_read_turn_nothing():
    image, text = Image.fromarray(gradient(1)[0].numpy()), PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n10\nno numbers")
    for kind, how in (
        ("JPEG", {"exif": b"Exif\0\0II*\0\xff\xff\xff\x7f", "quality": 100}),
        ("PNG", {"pnginfo": text}),
    ):
        file = io.BytesIO()
        image.save(file, kind, **how)
        off = decode(file.getvalue(), ALL).frames.int() - gradient(1).int()
        assert off.abs().max() <= 8


@pytest.mark.parametrize("field, value", [("num_frames", 0), ("fps", -1.0), ("fps", float("inf"))])
def test_sampling_ranges(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected a positive number, got"):
        Sampling(**{field: value})


def test_height_without_width():
    with pytest.raises(ValueError, match="pass --height and --width"):
        Sampling(height=32)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_raise_media_errors_only(name, tmp_path):
    """Random bytes changed at random places: frames or a MediaError, never anything else."""
    data = write(tmp_path / name, gradient(1 if name.startswith("image") else 4, 16, 16))
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(data)
        for at in generator.integers(0, len(data), generator.integers(1, 20)):
            damaged[at] = generator.integers(256)
        try:
            decode(bytes(damaged), ALL)
            outcomes.add("frames")
        except MediaError:
            outcomes.add("error")
    assert "error" in outcomes
