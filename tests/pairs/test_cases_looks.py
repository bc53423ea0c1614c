"""Cases of the field: turned, of pixels that are not square, on white, of a matrix and a range."""

from __future__ import annotations

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from media_files import (
    ALL,
    CASES,
    animation,
    chunked,
    lossless,
    noise,
    picture,
    refused,
    write,
)
from PIL import Image

from fastpref.pairs.frames import on_white
from fastpref.pairs.media import Sampling, decode


def matrixed(data: bytes, *matrix: int) -> bytes:
    """With another display matrix a b c d: x' = a x + c y, y' = b x + d y."""
    at = data.index(b"tkhd") + 4 + 40  # version and flags, times, id, duration, layer, volume
    a, b, c, d, *moved = (value << 16 for value in (*matrix, 32, 0))  # as phones move it
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, *moved, 1 << 30) + data[at + 36 :]


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
