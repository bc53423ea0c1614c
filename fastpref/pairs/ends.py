"""Where a clip's container says that it ends. FFmpeg plays what is left of it without a word."""

from __future__ import annotations

MOST = 1 << 20  # elements that are looked at
BOXES = b"ftyp styp moov moof mdat free skip wide udta uuid meta sidx mfra pdin emsg prft".split()
# Of Matroska: header, segment, what stands in a segment, what stands in a cluster, and filling.
ELEMENTS = {0x1A45DFA3, 0x18538067, 0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1F43B675, 0x1C53BB6B}
ELEMENTS |= {0x1941A469, 0x1043A770, 0x1254C367, 0xE7, 0xA3, 0xA0, 0xA7, 0xAB, 0x5854, 0xEC, 0xBF}


def last_element(data: bytes) -> tuple[str, int]:
    """The last element of a container by name, and its end by its own length; ("", 0): none told.

    What stands behind it is not the container's own: a maker's trailer, bytes of a transfer.
    """
    read = {b"RIFF": _riff, b"\x1aE\xdf\xa3": _matroska}.get(data[:4], _box)
    name, at = "", 0
    for _ in range(MOST):
        found = read(data, at) if at < len(data) else None
        if found is None:
            break
        name, at = found
    return name, at


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
    if data[at : at + 4] != b"RIFF" or length in (0, 0xFFFFFFFF):  # not known: written to a pipe
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
