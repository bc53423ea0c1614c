"""Files: a write that happens whole or not at all, a folder that one process writes into, and an
identity of what files hold.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

# Of a large file its size, head and tail and evenly spaced windows between them are hashed.
# Whole, a 14B model's 28 GB would take a minute at every start (blake2b does 0.5 GB/s); weights
# that were trained on differ everywhere.
EDGE, WINDOW, WINDOWS = 4 << 20, 64 << 10, 256
MODEL_FILES = (".safetensors", ".json", ".bin", ".model", ".txt")
TEMPORARY = ".fastpref-"  # how the names of unfinished files begin, and nothing of a user's


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], free: Container[str] = ()
) -> str:
    """Where two records differ but for `free`: `beta (1 there, 2 here), ...`; empty: nowhere."""
    names = [n for n in {**before, **now} if n not in free and before.get(n) != now.get(n)]
    return ", ".join(f"{n} ({before.get(n)} there, {now.get(n)} here)" for n in names)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An error in writing `path` names it: neither a full disk's nor safetensors' own does."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"{path} cannot be written ({reason}): mend that, and run the same command again"
        ) from error


def flush(path: Path) -> None:
    """Waits until a file, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_atomic(path: Path, data: bytes, *, new: bool = False) -> None:
    """Writes `data` beside `path`, flushes it to the disk and renames it over `path`; new: where
    there is a file already, that one stays.

    Of two processes that write at once each has its own temporary file; the last rename stands
    (new: the first). What a killed one leaves is for `tidy`.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, file = _temporary(path)
        try:
            # Flushed, then renamed: else after a power cut the name may stand for an empty file.
            with file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                if new:
                    _link(temporary, path)
                else:
                    os.replace(temporary, path)
        except BaseException:  # a signal's KeyboardInterrupt too
            temporary.unlink(missing_ok=True)
            raise


def _temporary(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside `path`, locked while it is open."""
    while True:
        temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}.{path.name}.tmp")
        file = open(temporary, "xb")  # noqa: SIM115
        with suppress(OSError):  # a file system without locks: nothing is removed there
            fcntl.flock(file, fcntl.LOCK_EX)
        if temporary.exists():  # else removed before it was locked
            return temporary, file
        file.close()


def tidy(folder: Path) -> None:
    """Removes the temporaries that killed processes left in `folder`; what is being written stays,
    whoever writes it.
    """
    for path in folder.glob(f"{TEMPORARY}*.tmp"):
        with suppress(OSError), path.open("r+b") as file:  # locked, or gone meanwhile
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def share(path: Path) -> None:
    """Gives a file that a library made for its owner alone (safetensors: 0600) the mode that any
    new file gets there: 0666 less the umask.
    """
    # Of a file made to see it: to ask for the umask is to set it, which other threads would notice.
    temporary, file = _temporary(path)
    with file:
        temporary.unlink()
        with suppress(OSError):  # a file system without modes
            os.chmod(path, stat.S_IMODE(os.fstat(file.fileno()).st_mode))


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(temporary, path)
    temporary.unlink(missing_ok=True)


def mark(folder: Path, kind: str) -> Path:
    """`folder`'s file .fastpref, which says that `fastpref KIND` writes there; both are made if
    need be, and what a killed one left is removed. ValueError: another command's folder. (Empty, as
    it once was: any command's.)
    """
    if folder.is_symlink() and not folder.exists():
        raise ValueError(
            f"output_dir {folder} is a link to {folder.readlink()}, which is not there: make that "
            "folder, or choose another one"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file: choose another one")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".fastpref"
    if not path.exists():
        path.write_text(f"{kind}\n")  # in place: another name renamed to it would have another lock
    before = path.read_text(errors="replace").strip()
    if before not in ("", kind):
        raise ValueError(
            f"output_dir {folder} is one of fastpref {before}, expected one of fastpref {kind}: "
            "choose another one"
        )
    tidy(folder)
    return path


@contextmanager
def locked(marked: Path) -> Iterator[None]:
    """No other process writes into the folder of `marked`, its .fastpref, meanwhile."""
    with marked.open("r+") as file:  # NFS locks what is open for writing alone
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"output_dir {marked.parent}: another fastpref is writing there; wait for it, or "
                "choose another one"
            ) from None
        except OSError:  # a file system without locks: nobody can be asked
            pass
        yield


def model_identity(model: str | Path) -> str:
    """The identity of a local model folder, or a hub id itself."""
    return identity(Path(model)) if Path(model).exists() else str(model)


def identity(path: Path) -> str:
    """Hex digest of a file, or of the model files (weights, configs, vocabularies) of a folder."""
    digest = hashlib.blake2b(digest_size=16)
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path)
            hidden = any(part.startswith(".") for part in name.parts)
            if file.is_file() and file.suffix in MODEL_FILES and not hidden:
                digest.update(f"{name.as_posix()}={identity(file)}\n".encode())
        return digest.hexdigest()
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with open(path, "rb") as file:
        digest.update(file.read(EDGE))
        if size > EDGE:
            for i in range(1, WINDOWS):
                file.seek(size * i // WINDOWS)
                digest.update(file.read(WINDOW))
            file.seek(max(EDGE, size - EDGE))
            digest.update(file.read())
    return digest.hexdigest()
