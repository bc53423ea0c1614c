"""What FFmpeg takes from a clip's container without a word: where it ends, and what it claims."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from .frames import MediaError

MOST = 1 << 20  # elements that are looked at
RIFF, EBML = b"RIFF", b"\x1aE\xdf\xa3"  # else mp4 or mov
BOXES = b"ftyp styp moov moof mdat free skip wide udta uuid meta sidx mfra pdin emsg prft".split()
# Of Matroska: header, segment, what stands in a segment, what stands in a cluster, and filling.
ELEMENTS = {0x1A45DFA3, 0x18538067, 0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1F43B675, 0x1C53BB6B}
ELEMENTS |= {0x1941A469, 0x1043A770, 0x1254C367, 0xE7, 0xA3, 0xA0, 0xA7, 0xAB, 0x5854, 0xEC, 0xBF}
# Of an mp4: boxes that FFmpeg looks into, and tables that claim what they do not list.
NESTS = b"moov trak mdia minf stbl edts dinf udta ilst tref moof traf mvex sinf schi wave iprp ipco"
NESTS = frozenset(NESTS.split())
TABLES = re.compile(rb"stsz|stz2|ctts|sbgp|trun|elst|cmov")
ENCODER = range(58, 90)  # where in the description of a video an encoder's name stands
HANDLER = re.compile(rb"hdlr")  # what the boxes in a meta begin with, behind words of 4 bytes
MAX_SAMPLES = 1 << 25  # of sound that is not compressed: ten minutes
MAX_LISTED = 1 << 22  # samples of fragments or shown again by edits, lines of a table


def last_element(data: bytes) -> tuple[str, int]:
    """The last element of a container by name, and its end by its own length; ("", 0): none told.

    What stands behind it is not the container's own: a maker's trailer, bytes of a transfer.
    """
    name, end = "", 0
    for name, _, end in _elements(data):  # noqa: B007
        pass
    return name, end


def check_tables(data: bytes) -> None:
    """MediaError: an mp4 of a few bytes claims frames without end, all of which FFmpeg lists."""
    if data[:4] in (RIFF, EBML):
        return
    samples, edits, fragments, lines = 1, 0, 0, 0
    for table, at, end in _tables(data):
        first, second, third = (int.from_bytes(data[at + i : at + i + 4]) for i in (0, 4, 8))
        if table == b"cmov":
            raise MediaError("unreadable", "has a compressed header; write it again with ffmpeg")
        if table == b"elst":
            edits += second
        elif table == b"trun":  # with a line of 4 bytes or more for each, or none
            fragments += second if not first & 0xF00 or 4 * second > end - at else 0
        elif table in (b"ctts", b"sbgp"):  # lines of 8 bytes, each for a number of frames
            at += 8 if table == b"ctts" else 16 if first >> 24 else 12
            number = int.from_bytes(data[at - 4 : at])
            lines += number
            if 8 * number > end - at or lines > MAX_LISTED:
                raise MediaError("too_large", f"claims {number} changes of its times or groups")
            listed = struct.iter_unpack(">II", data[at : at + 8 * number])
            if sum(count for count, _ in listed) > MAX_SAMPLES:
                raise MediaError("too_large", f"claims more than {MAX_SAMPLES} frames")
        else:
            samples = max(samples, third)
            if table == b"stsz" and second and third > min(MAX_SAMPLES, len(data) // second):
                raise MediaError("too_large", f"claims {third} frames of {second} bytes")
    if fragments > MAX_LISTED or (edits > 16 and edits * samples > MAX_LISTED):
        raise MediaError("too_large", f"claims more than {MAX_LISTED} frames")


def _tables(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, begin and end of what is in each, wherever FFmpeg would find it.

    As FFmpeg does: any box may stand in any other, and what runs past the end of its own is cut.
    """
    nests, count = [(0, len(data))], 0
    while nests:
        at, end = nests.pop()
        while at + 8 <= end:
            length, name, begin = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8], at + 8
            if length == 1:
                length, begin = int.from_bytes(data[at + 8 : at + 16]), at + 16
            last = min(at + length, end) if length else end
            if last < begin:
                break
            at, count = last, count + 1
            if count > MOST:
                raise MediaError("too_large", f"has more than {MOST} boxes; write it again")
            if TABLES.fullmatch(name):
                yield name, begin, last
            elif name == b"stsd":  # boxes behind heads of many lengths
                for table in TABLES.finditer(data, begin, last):
                    length = int.from_bytes(data[table.start() - 4 : table.start()])
                    fits = length <= last - table.start() + 4
                    if fits or table.start() - begin not in ENCODER:
                        yield table[0], table.end() + 8 * (length == 1), last
            elif name in (b"free", b"hoov") and data[begin + 4 : begin + 8] in (b"mvhd", b"cmov"):
                nests.append((begin, last))  # a moov that was not ended
            elif name == b"meta":
                handlers = (found.start() for found in HANDLER.finditer(data, begin, last))
                first = next((start for start in handlers if (start - begin) % 4 == 0), last)
                nests.append((first - 4, last))
            elif name in NESTS:
                nests.append((begin, last))


def _elements(data: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, begin and end of each, from the first byte to what is not the container's own."""
    read = {RIFF: _riff, EBML: _matroska}.get(data[:4], _box)
    at = 0
    for _ in range(MOST):
        found = read(data, at) if at < len(data) else None
        if found is None:
            break
        yield found[0], at, found[1]
        at = found[1]


def _box(data: bytes, at: int) -> tuple[str, int] | None:
    """Of mp4 and mov."""
    name, length = data[at + 4 : at + 8], int.from_bytes(data[at : at + 4])
    if name not in BOXES:
        return None
    if length == 1:
        length = int.from_bytes(data[at + 8 : at + 16])
    return name.decode(), at + length if length >= 8 else len(data)  # 0: up to the end


def _riff(data: bytes, at: int) -> tuple[str, int] | None:
    """Of avi; a long one has several."""
    length = int.from_bytes(data[at + 4 : at + 8], "little")
    if data[at : at + 4] != RIFF or length == 0xFFFFFFFF:  # not known: written to a pipe
        return None
    end = at + 8 + length
    # Some writers count these eight bytes as well.
    return "RIFF", len(data) if 0 < end - len(data) <= 8 else end


def _matroska(data: bytes, at: int) -> tuple[str, int] | None:
    """Of mkv and webm; of an unknown length, as in what was recorded live, it is the beginning."""
    length = 9 - data[at].bit_length()
    name, at = int.from_bytes(data[at : at + length]), at + length
    if name not in ELEMENTS:
        return None
    length = 9 - data[at].bit_length() if at < len(data) else 8
    if at + length > len(data):
        return f"{name:x}", len(data) + 1
    most = (1 << 7 * length) - 1
    size = int.from_bytes(data[at : at + length]) & most
    return f"{name:x}", at + length + (0 if size == most else size)
