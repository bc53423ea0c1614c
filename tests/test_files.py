"""Files: modes as the umask says, what a killed process leaves and who removes it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastpref import files
from fastpref.files import TEMPORARY, mark, share, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture(params=[0o002, 0o022, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_have_the_mode_that_the_umask_says(umask, tmp_path):
    write_atomic(tmp_path / "ours", b"1")
    save_file({"a": torch.zeros(2)}, tmp_path / "theirs")
    share(tmp_path / "theirs")
    assert mode(tmp_path / "ours") == mode(tmp_path / "theirs") == 0o666 & ~umask
    assert names(tmp_path) == ["ours", "theirs"]
    assert os.umask(umask) == umask


KILLED = """
import os, sys
from pathlib import Path
from fastpref import files
files.os.fsync = lambda descriptor: os.kill(os.getpid(), int(sys.argv[2]))
files.write_atomic(Path(sys.argv[1]), b"half")
"""


def stopped_in_a_write(path: Path, signal_: int) -> subprocess.Popen:
    """A process that is stopped or killed before it renames what it has written."""
    script = [sys.executable, "-c", KILLED, str(path), str(int(signal_))]
    process = subprocess.Popen(script)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
    return process


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    users = ["notes.tmp", "notes.123.tmp", "a.deadbeef.tmp", ".fastprefs.tmp", ".fastpref-x"]
    for name in users:
        (tmp_path / name).write_text("a user's")
    assert stopped_in_a_write(tmp_path / "file", signal.SIGKILL).wait() == -signal.SIGKILL
    (left,) = tmp_path.glob(f"{TEMPORARY}*.file.tmp")
    assert left.read_bytes() == b"half"  # whole when it is flushed to the disk
    alive = stopped_in_a_write(tmp_path / "other", signal.SIGSTOP)
    try:
        (kept,) = tmp_path.glob(f"{TEMPORARY}*.other.tmp")
        mark(tmp_path, "train")
        assert not left.exists() and kept.exists()
    finally:
        alive.send_signal(signal.SIGCONT)
    assert alive.wait() == 0 and (tmp_path / "other").read_bytes() == b"half"
    assert names(tmp_path) == sorted([*users, "other", ".fastpref"])


def test_a_file_removed_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    real, removed = files.fcntl.flock, []

    def flock(file, how):
        if not removed:
            removed.append(True)
            for path in tmp_path.glob(f"{TEMPORARY}*"):
                path.unlink()
        real(file, how)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    write_atomic(tmp_path / "file", b"whole")
    assert removed and (tmp_path / "file").read_bytes() == b"whole"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_is_the_first_ones(links, tmp_path, monkeypatch):
    """Where there are no links what is there cannot be seen: the last one stands."""

    def refused(*_):
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr(files.os, "link", refused)
    for text in (b"first", b"second"):
        write_atomic(tmp_path / "sub" / "file", text, new=True)
    expected = b"first" if links else b"second"
    assert (tmp_path / "sub" / "file").read_bytes() == expected
    write_atomic(tmp_path / "sub" / "file", b"third")
    assert (tmp_path / "sub" / "file").read_bytes() == b"third"
    assert names(tmp_path / "sub") == ["file"]


def test_a_write_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "file" / "in the way").mkdir(parents=True)
    with pytest.raises(
        OSError, match=r"file cannot be written \(.*\): mend that, and run the same"
    ):
        write_atomic(tmp_path / "file", b"1")
    assert names(tmp_path) == ["file"]


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with files.locked(mark(tmp_path / "run", "train")):
        write_atomic(tmp_path / "run" / "file", b"whole")
    assert names(tmp_path / "run") == [".fastpref", "file"]
