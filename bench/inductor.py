"""Code that Inductor has compiled, carried to the next process or machine in one small file."""

from __future__ import annotations

import io
import warnings
import zipfile
import zlib
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from bench import timing
from fastpref import files

MOST = 16_000_000  # bytes of the file, so that it travels


class Carried:
    """A zip file with an entry per table, under its torch and device; other machines' stay in it.

    Inductor finds code by what it compiles, its own options and the device, so an entry older than
    the sources costs nothing but its bytes. A GPU's kernels are in it as they run, a CPU's as C++
    that is compiled again. Reading an entry can run code, as pickles do: carry files of your own.
    """

    def __init__(self, path: Path, device: torch.device, table: str) -> None:
        name = timing.device_name(device).replace("/", " ")
        self.path, self.place = path, f"{torch.__version__}/{name}/"
        self.entry, self.missed = self.place + table.replace("/", " "), 0

    def load(self) -> int:
        """Hands Inductor what was compiled by this torch for such a device; returns its bytes."""
        entries = [data for name, data in self._entries().items() if name.startswith(self.place)]
        for data in entries:
            torch.compiler.load_cache_artifacts(data)
        return sum(map(len, entries))

    def save(self) -> None:
        """Writes what this process has compiled and found so far, if anything was not found."""
        missed = counters["inductor"]["fxgraph_cache_miss"]
        if missed == self.missed or (made := torch.compiler.save_cache_artifacts()) is None:
            return
        self.missed = missed
        others = self._entries()
        others.pop(self.entry, None)
        first = sorted(others, key=lambda name: name.startswith(self.place))  # to go: other places'
        while True:
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, data in (others | {self.entry: made[0]}).items():
                    archive.writestr(name, data)
            size = file.getbuffer().nbytes
            if size <= MOST:
                files.write_atomic(self.path, file.getvalue())
                return
            if not first:
                what = f"would have {size / 1e6:.1f} MB, at most {MOST / 1e6:g}: unchanged"
                print(f"{self.path} {what}")
                return
            others.pop(first.pop(0))

    def _entries(self) -> dict[str, bytes]:
        if not self.path.exists():
            return {}
        try:
            with zipfile.ZipFile(self.path) as archive:
                return {name: archive.read(name) for name in archive.namelist()}
        except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            warnings.warn(f"{self.path} cannot be read and is begun anew: {error}", stacklevel=3)
            return {}
