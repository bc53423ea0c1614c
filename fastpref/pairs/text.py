"""Text: the lines of a text file, whatever encoding, line ends and delimiter it has, within bounds
of size; and what is said of a text that cannot be read.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from ..models.weights import POINTER

MAX_BYTES = 1 << 30  # of a text file
MAX_LINE = 1 << 24  # characters of one line: JSON of 16 MiB may take 20 times that in memory
MAX_ROWS = 1 << 23  # of any source, and lines of a text file: each may be a bad row in memory
SIGNLESS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and one sign that are shown as nothing


def check_pointer(path: Path) -> None:
    """ValueError: git-lfs has left its pointer in the file's place."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(f"{path}: is a git-lfs pointer, not the file: run git lfs pull there")


def encoding(head: bytes) -> dict[str, str]:
    """Encoding and error handler of a text that begins so: UTF-8, UTF-16 or UTF-32 by their mark,
    or by the zeros of its first letters. What is not Unicode comes out as surrogates.
    """
    name = json.detect_encoding(head)
    return {
        "encoding": name,
        "errors": "surrogateescape" if name.startswith("utf-8") else "surrogatepass",
    }


def lines(path: Path) -> Iterator[str]:
    """The lines of a text file, ends kept; ValueError: not whole, or beyond the bounds.

    A line ends with LF, CR LF or CR.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path}: has {size} bytes, at most {MAX_BYTES} are read; split it")
    with path.open("rb") as file:
        how = encoding(file.read(4))
    with path.open(newline="", **how) as file:
        for number in itertools.count(1):
            try:
                line = file.readline(MAX_LINE + 1)
            except UnicodeDecodeError as error:
                reason = f"not whole {how['encoding']} text ({error.reason})"
                raise ValueError(f"{path} line {number}: {reason}; save it as UTF-8") from None
            if not line:
                return
            if number > MAX_ROWS:
                raise ValueError(f"{path}: has more than {MAX_ROWS} lines; split it")
            if len(line) > MAX_LINE:
                raise ValueError(f"{path} line {number}: has more than {MAX_LINE} characters")
            yield line


def delimiter(header: str) -> str:
    """What stands between the cells below a CSV file's header: pairs take three columns or more, so
    where no comma stands it is what Excel writes in its place.
    """
    names = re.sub(r'"[^"]*"', "", header)
    return next((mark for mark in ",;\t|" if mark in names), ",")


def blank(text: str) -> bool:
    """Whether nothing of a text is seen: spaces of every width, marks without a letter."""
    kinds = ((unicodedata.category(c), c) for c in text)
    return all(k in ("Cc", "Cf") or k[0] in "MZ" or c in SIGNLESS for k, c in kinds)


def is_text(text: str) -> bool:
    """Whether no surrogate stands in it, for bytes or of itself."""
    return not re.search("[\ud800-\udfff]", text)


def not_utf8(text: str) -> str:
    """What is wrong with a text in which surrogates stand for bytes."""
    try:
        guess = text.encode(errors="surrogateescape").decode("cp1252")
    except UnicodeError:  # no Windows-1252 either, or surrogates of its own
        return "is not UTF-8; save the file as UTF-8"
    return f"is not UTF-8 (as Windows-1252 it reads {guess!r:.60}); save the file as UTF-8"
