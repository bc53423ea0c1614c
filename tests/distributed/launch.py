"""Commands under torchrun, as users start them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
FASTPREF = str(Path(sys.executable).with_name("fastpref"))


def start(world: int, *parts: str, torchrun: list[str] | None = None, **extra) -> subprocess.Popen:
    """`torchrun --nproc-per-node WORLD --no-python fastpref PARTS`, or of a Python file."""
    script = [*parts] if parts[0].endswith(".py") else ["--no-python", FASTPREF, *parts]
    return subprocess.Popen(
        [*TORCHRUN, *(torchrun or []), "--nproc-per-node", str(world), *script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **extra},
    )


def run(world: int, *parts: str, code: int = 0, **extra) -> tuple[str, list[str]]:
    """(stdout, lines that `fastpref` said on stderr) of one that ends with `code`."""
    process = start(world, *parts, **extra)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, out[-2000:] + err[-6000:]
    return out, said(err)


def said(err: str) -> list[str]:
    """The lines of a stderr that are fastpref's own words and not torchrun's."""
    return [line for line in err.splitlines() if line.startswith(("fastpref ", "warning: "))]


def workers(process: subprocess.Popen) -> dict[int, int]:
    """{rank: pid} of what a torchrun has started."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (path / "environ").read_bytes()
        except (OSError, ValueError, IndexError):
            continue
        if parent == process.pid:
            variables = dict(v.partition(b"=")[::2] for v in environment.split(b"\0"))
            if b"RANK" in variables:
                found[int(variables[b"RANK"])] = int(path.name)
    return found


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.time() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.time() < end
        time.sleep(0.005)


def kill(process: subprocess.Popen, rank: int, number: int = signal.SIGKILL) -> None:
    """Sends one process of a torchrun a signal."""
    os.kill(workers(process)[rank], number)
