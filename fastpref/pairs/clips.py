"""Clips, decoded by PyAV: mp4, mov, mkv, webm, avi."""

from __future__ import annotations

import bisect
import io
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from .containers import check_tables, last_element
from .frames import MAX_DECODED, MAX_FRAME, Frame, MediaError, Timeline, check_cost, on_white

OPTIONS = {
    # Only what holds its own data: playlists and the like would make FFmpeg open other files.
    "format_whitelist": "mov,matroska,avi",
    # FFmpeg checks it before it allocates a frame, also of those that it looks at to open a file.
    "max_pixels": str(MAX_FRAME),
}
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders drop it


def timeline(data: bytes, until: float) -> Timeline:
    """When each frame is shown, known to `until` seconds; of what comes later FFmpeg's own count.

    A packet need not show anything (what a cut left without a key frame, what an edit list skips),
    so the frames are decoded. MediaError: not a clip, truncated, damaged, too large.
    """
    stamps, rate = _packets(data, until)
    times: list[Any] = []
    for frame, _ in _shown(data):
        if frame.pts is None:
            until = math.inf  # they are laid anew, which takes all
        times.append(None if frame.pts is None else frame.pts * frame.time_base)
        # Two that are later: one may be a stamp that is out of order.
        if until < math.inf and min(times[-2:]) - times[0] > until:
            break
    else:
        until = math.inf  # all are known
    if not times:
        raise MediaError("unreadable", "holds no frames that are shown")
    times = _in_order([i / rate for i in range(len(times))] if None in times else times, rate)
    times = [time - times[0] for time in times]
    if until < math.inf:
        stamps = _in_order(stamps, rate)
        return Timeline(times, stamps[-1] - stamps[0] + 1 / rate, len(stamps))
    return Timeline(times, times[-1] + 1 / rate, len(times))


def _in_order(times: list[Fraction], rate: Fraction) -> list[Fraction]:
    """Each later than the one before: as many as can be are kept, the others stand evenly between.

    A stamp that is there twice or goes back says nothing of its own frame, but of no other either.
    """
    if all(a < b for a, b in pairwise(times)):
        return times
    lengths, latest = [], []  # of the longest run that begins with each
    for time in reversed(times):
        at = bisect.bisect_left(latest, -time)
        latest[at : at + 1] = [-time]
        lengths.append(at + 1)
    kept: list[int] = []
    for i, length in enumerate(reversed(lengths)):
        if length == len(latest) - len(kept) and (not kept or times[kept[-1]] < times[i]):
            kept.append(i)
    first, last = kept[0], kept[-1]
    laid = [times[first] - (first - i) / rate for i in range(first)]
    for a, b in pairwise(kept):
        step = (times[b] - times[a]) / (b - a)
        laid += [times[a] + i * step for i in range(b - a)]
    return laid + [times[last] + i / rate for i in range(len(times) - last)]


def _packets(data: bytes, until: float) -> tuple[list[Fraction], Fraction]:
    """Times of the packets in order, where all of them have one, and the clip's rate.

    MediaError before anything is decoded: an end that is missing, too much for `until` seconds.
    """
    name, end = last_element(data)
    _check_end(data, 0 if name == "mdat" else end)  # of those FFmpeg's own table tells more
    check_tables(data)
    stamps = []
    with _errors(data), _open(data) as container:
        stream = _video(container)
        for packet in container.demux(stream):  # ends with an empty one, which is to flush
            if packet.is_corrupt:
                raise MediaError("truncated", f"is truncated at frame {len(stamps)}")
            if packet.size and not packet.is_discard:
                stamps.append(packet.dts if packet.pts is None else packet.pts)
                check_cost(len(stamps), 1, 1, MAX_DECODED)
        if container.format.name.startswith("mov"):
            check_cost(len(stream.index_entries), 1, 1, MAX_DECODED)
            _check_end(data, max((e.pos + e.size for e in stream.index_entries), default=0))
        size = stream.codec_context.height, stream.codec_context.width
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        known = sorted(stamp * stream.time_base for stamp in stamps if stamp is not None)
    if len(known) < len(stamps):
        known = [i / rate for i in range(len(stamps))]
    check_cost(sum(time - known[0] <= until for time in known), *size, MAX_DECODED)
    return known, rate


def frames(data: bytes, wanted: set[int]) -> Iterator[tuple[int, Frame]]:
    """(index, frame) of the wanted ones, in order."""
    from av.video.reformatter import VideoReformatter

    last = max(wanted)
    converter = VideoReformatter()  # of its own each frame would start threads
    with _errors(data):
        for i, (frame, aspect) in enumerate(_shown(data)):
            if i in wanted:
                yield i, _upright(frame, aspect, converter)
            if i == last:
                break


def _shown(data: bytes) -> Iterator[tuple[Any, Fraction]]:
    """The frames that are shown, in order, and their pixels' width / height."""
    import av

    with _errors(data), _open(data) as container:
        stream = _video(container)
        decoder = stream.codec_context
        if stream.metadata.get("alpha_mode") == "1" and decoder.name in WITH_ALPHA:
            decoder = av.CodecContext.create(WITH_ALPHA[decoder.name], "r")
        decoder.thread_count = 1  # the pool decodes many clips at once
        decoder.options = {"max_pixels": OPTIONS["max_pixels"]}
        count, drawn = 0, False
        for packet in container.demux(stream):
            drawn = drawn or packet.is_keyframe
            try:
                decoded = decoder.decode(packet)
            except av.error.InvalidDataError:
                if drawn:
                    raise
                continue  # there is nothing yet to draw it on
            for frame in decoded:
                if frame.is_corrupt:
                    raise MediaError("truncated", f"is damaged or truncated at frame {count}")
                count += 1
                check_cost(count, frame.height, frame.width, MAX_DECODED)
                yield frame, stream.sample_aspect_ratio or Fraction(1)


def _upright(frame: Any, aspect: Fraction, converter: Any) -> Frame:
    """A frame turned and mirrored as its display matrix says, on white."""
    alpha = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
    # By the matrix and the range that FFmpeg knows of the frame; BT.601, limited, if of none.
    rgb = converter.reformat(frame, format="rgba" if alpha else "rgb24", threads=1)
    pixels, composited = on_white(rgb.to_ndarray()) if alpha else (rgb.to_ndarray(), False)
    shape = (frame.height, max(1, round(frame.width * aspect)))
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix:
        # x' = a x + c y, y' = b x + d y
        a, b, _, c, d = struct.unpack("5i", bytes(matrix)[:20])
        if abs(b) + abs(c) > abs(a) + abs(d):
            pixels, shape, a, d = pixels.transpose(1, 0, 2), shape[::-1], c, b
        pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return Frame(np.ascontiguousarray(pixels), shape, composited)


def _video(container: Any) -> Any:
    """The stream that is shown: no cover, thumbnail or tile; of several the default one."""
    from av.stream import Disposition

    aside = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent
    videos = [stream for stream in container.streams.video if not stream.disposition & aside]
    shown = [stream for stream in videos if stream.disposition & Disposition.default] or videos
    if not shown:
        beside = len(container.streams.video)
        reason = f"holds no video{' but a cover, thumbnails or tiles' if beside else ''}"
        raise MediaError("unreadable", reason)
    if len(shown) > 1:
        numbers = ", ".join(str(stream.index) for stream in shown)
        reason = f"holds {len(shown)} videos (streams {numbers}), none of them the one to show"
        raise MediaError("unreadable", f"{reason}; keep one: ffmpeg -i IN -map 0:N -c copy OUT")
    if shown[0].codec_context is None:
        raise MediaError("unreadable", "holds a video that this FFmpeg has no decoder for")
    return shown[0]


def _check_end(data: bytes, end: int) -> None:
    if end > len(data):
        raise MediaError("truncated", f"is truncated: {len(data)} bytes of {end}")


def _open(data: bytes) -> Any:
    import av

    # Up to PyAV 18 a tag that is not UTF-8 raises unless told otherwise; later ones have no option.
    lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    return av.open(io.BytesIO(data), options=OPTIONS, **lenient)


@contextmanager
def _errors(data: bytes) -> Iterator[None]:
    """FFmpeg's errors as a MediaError: truncated where the file says so itself."""
    import av

    try:
        yield
    except av.error.FFmpegError as error:
        _check_end(data, last_element(data)[1])
        known = "mp4, mov, webm, mkv, avi, gif, png, jpg, webp, avif or bmp"
        reason = f"cannot be decoded ({error.strerror}); expected {known}"
        raise MediaError("unreadable", reason) from None
