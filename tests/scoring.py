"""A scorer and its server, in a process of its own, for the tests of both ends."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from fastpref.spo import server

HOW = {"device": "cpu", "dtype": torch.float32}
PROMPTS = ["a fox", "schnee, größer", "line\nbreak", "a fox", ""]


def clips(count: int = len(PROMPTS)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(i % 3 + 1, 4 + i, 6, 3) for i in range(count)]
    return [torch.randint(256, s, generator=generator, dtype=torch.uint8) for s in sizes]


TIMES = torch.tensor([0.0, 999.0, 1000 / 3, 0.1, 1e-9], dtype=torch.float64)

# Adds up what it is told; the prompts "wait", "fail", "leave" and "nan" say what it does beside.
MODULE = """
import time
import numpy as np

inside = 0

def scored(frames, prompts, t):
    global inside
    inside += 1
    assert inside == 1, "two calls at a time"
    for clip in frames:
        assert isinstance(clip, np.ndarray) and clip.dtype == np.uint8 and clip.ndim == 4
        clip += 0  # may be written to
    if "wait" in prompts:
        time.sleep(0.3)
    inside -= 1
    if "leave" in prompts:
        raise SystemExit("no card")
    if "fail" in prompts:
        raise RuntimeError("no\\nmemory" + "!" * 999)
    weights = [np.arange(clip.size) @ clip.reshape(-1).astype(np.int64) for clip in frames]
    scores = [w / 7 + len(p) + x for w, p, x in zip(weights, prompts, t)]
    return [float("nan") if p == "nan" else s for s, p in zip(scores, prompts)]
"""


class Running:
    """A server of MODULE's function; `again` starts one at the same port. setup: code before."""

    def __init__(self, folder: Path, setup: str = "") -> None:
        (folder / "mine.py").write_text(MODULE)
        self.folder, self.setup, self.port = folder, setup, 0
        self.again()

    def again(self) -> None:
        code = f"import fastpref.spo.server as s\n{self.setup}\ns.main()"
        arguments = ["--scorer", "mine:scored", "--port", str(self.port)]
        log = self.folder / "server.log"
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, *arguments],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(Path(server.__file__).parents[2])},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        line = self.process.stdout.readline()
        assert line.startswith("mine:scored at http://127.0.0.1:"), log.read_text()
        self.url = line.split()[2]
        self.port = int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()
