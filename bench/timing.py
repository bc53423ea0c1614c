"""Timing for every benchmark: variants take turns in one process; medians, spread, JSON rows."""

import argparse
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path
from statistics import median, quantiles

import torch

import fastpref


def parser(doc: str) -> argparse.ArgumentParser:
    """Of a benchmark that `doc` describes in its first line, with the options that all have."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    place = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", type=_device, default=place, help="default: %(default)s")
    made.add_argument("--output", type=Path, help="append the rows to this file, JSON a line")
    return made


def _device(name: str) -> torch.device:
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median, the quartiles, and all samples in the order they were taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = quantiles(self.samples, n=4)
        return low, high

    def times_slower_than(self, other: "Timing") -> float:
        """The median of the ratios within a round: noise that lasts longer than a round cancels."""
        return median(a / b for a, b in zip(self.samples, other.samples, strict=True))


def once(call: Callable[[], object], device: torch.device, ahead: int = 0) -> float:
    """Seconds of one call, of a GPU's by events; ahead: cycles that the GPU sleeps before."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if ahead:
        torch.cuda._sleep(ahead)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def orders(names: list[str]) -> Iterator[list[str]]:
    """All orders of the names, shuffled, over and over; random ones where there are too many."""
    shuffled = random.Random(0)
    while True:
        some = list(permutations(names)) if len(names) <= 5 else [names] * 120
        for order in shuffled.sample(some, len(some)):
            yield list(order) if len(names) <= 5 else shuffled.sample(names, len(names))


def interleave(
    variants: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 3,
    busy: bool = False,
) -> dict[str, Timing]:
    """Time each variant once a round: on a GPU by events, elsewhere by the wall clock.

    The GPU is idle when a call begins, so launching it counts. busy: it sleeps 4 million cycles
    (some 2 ms) first, in which the host queues the whole call: what is left is the GPU's own time.

    In as many rounds as there are orders (120 of five variants; up to chance above) each comes up
    once, so that what the variants before leave in the caches, one turn back and also two, falls on
    all alike.
    """
    turns = orders(list(variants))
    measure = partial(once, device=device, ahead=4_000_000 * busy)
    for call in variants.values():
        for _ in range(warmup):
            measure(call)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name in next(turns):
            samples[name].append(measure(variants[name]))
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def environment(device: torch.device) -> dict[str, object]:
    """What a row needs to be repeated: device, versions, commit, instruction set, threads."""
    info = fastpref.build_info()
    gpu = device.type == "cuda"
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "commit": _commit(),
        "cpu_features": info["cpu"],
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if gpu else "",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def device_name(device: torch.device) -> str:
    """Of the card, or of the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "cpu")


def _commit() -> str:
    """FASTPREF_COMMIT names it where the sources lie without their history.

    -dirty: something else than the results, which device.sh appends to, is not committed.
    """
    if told := os.environ.get("FASTPREF_COMMIT"):
        return told
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":!results")
        return _git("describe", "--always", "--abbrev=10") + "-dirty" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    command, here = ["git", *arguments], Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def append(path: Path | None, rows: list[dict[str, object]]) -> None:
    """Append rows to a file of --output, one JSON object a line."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"rows appended to {path}")
