"""Trains every objective and the controls over a grid of betas and seeds, on the same pairs and
draws, and writes a row a run: `python -m bench.evidence --world toy`

A run that has its row is not done again, and a killed one goes on, so that hours can be spent in
pieces (`--minutes`).
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench import timing
from bench.evidence import runs
from bench.evidence.grid import ALPHAS, NAMES, Setting, grid
from bench.evidence.world import World
from fastpref.files import differences, locked, mark, write_atomic
from fastpref.run.folder import read_record
from fastpref.run.parsing import Parser, betas, names

WORLDS = ("toy", "mid")


@dataclass(frozen=True)
class Options:
    """What the command can be asked for, filled in from its world."""

    world: ModuleType
    settings: list[Setting]
    output_dir: Path
    pairs: int
    steps: int
    clips: int
    minutes: float

    @property
    def record(self) -> dict[str, Any]:
        """What is the same for all runs of a folder."""
        world = self.world.__name__.rpartition(".")[2]
        return {"world": world, "pairs": self.pairs, "steps": self.steps, "clips": self.clips}


def parse(arguments: Sequence[str]) -> Options:
    """Flags to options; ValueError with one line for any mistake."""
    parser = Parser(prog="python -m bench.evidence", description=__doc__.strip())
    add = parser.add_argument
    add("--world", default="toy", choices=WORLDS)
    add("--objectives", default=",".join(NAMES), help="comma-separated; default: %(default)s")
    add("--betas", help="comma-separated, for all that have no scale of their own (ipo, spo)")
    add("--alphas", default=",".join(f"{a:g}" for a in ALPHAS), help="dmpo's: %(default)s")
    add("--seeds", type=int, default=3, help="initialisations and data orders of each setting")
    add("--output_dir", type=Path, help="default: runs/evidence-WORLD")
    add("--pairs", type=int, help="preference pairs to make")
    add("--steps", type=int, help="training steps of a run")
    add("--clips", type=int, help="clips to choose on, and as many to report on")
    add("--minutes", type=float, default=float("inf"), help="no run begins later than that")
    found = parser.parse_args(list(arguments))
    world = importlib.import_module(f"bench.evidence.{found.world}")
    for name, least in (("pairs", 8), ("steps", 1), ("clips", 1)):
        if getattr(found, name) is None:
            setattr(found, name, getattr(world, name.upper()))
        if getattr(found, name) < least:
            raise ValueError(f"--{name}: expected at least {least}, got {getattr(found, name)}")
    if found.seeds < 1:
        raise ValueError(f"--seeds: expected at least 1, got {found.seeds}")
    alphas = betas("--alphas", found.alphas)
    asked = names("--objectives", found.objectives, list(NAMES))
    some = betas("--betas", found.betas) if found.betas else world.BETAS
    return Options(
        world=world,
        settings=grid(asked, some, world.OWN, alphas, found.seeds),
        output_dir=found.output_dir or Path("runs") / f"evidence-{found.world}",
        pairs=found.pairs,
        steps=found.steps,
        clips=found.clips,
        minutes=found.minutes,
    )


def claim(options: Options) -> None:
    """A folder keeps the data and the rows of one size of one world."""
    path, now = options.output_dir / "evidence.json", options.record
    if not path.exists():
        write_atomic(path, json.dumps(now).encode())
    before = read_record(path)
    if before != now:
        raise ValueError(
            f"{options.output_dir} holds another comparison: {differences(before, now)}. "
            "Choose another output_dir, or the same values"
        )


def compare(options: Options) -> int:
    """Does the runs that have no row yet; how many are left when time is up."""
    start, folder = time.perf_counter(), options.output_dir
    path, world_name = folder / "rows.jsonl", options.record["world"]
    rows = runs.read(path)
    world = options.world.prepare(folder / "world", options.pairs, options.clips)
    if not rows:
        rows = [base_row(world, world_name, options)]
        runs.append(path, [], rows[0])
    have = {runs.key(row) for row in rows}
    left = [s for s in options.settings if runs.key(vars(s)) not in have]
    if world.spo is None:
        left = [s for s in left if s.name != "spo"]
    print(f"{len(left)} runs of {len(options.settings)} to do", flush=True)
    for number, setting in enumerate(left):
        begin = time.perf_counter()
        if begin - start > 60 * options.minutes:
            print(f"{options.minutes:g} minutes are over: {len(left) - number} runs left")
            return len(left) - number
        run = folder / "runs" / setting.label
        new = runs.row(world, setting, options.steps, run, rows[0])
        runs.append(path, rows, new)
        rows.append(new)
        runs.lighten(run)
        print(f"{setting.label}: {runs.line(new, rows[0])} ({time.perf_counter() - begin:.0f} s)")
        sys.stdout.flush()
    return 0


def base_row(world: World, name: str, options: Options) -> dict[str, Any]:
    """Of the base model, and what holds for all rows."""
    model = world.load(None)
    return {
        "name": "base",
        **options.record,
        "prompts": {"choice": world.choice[0], "report": world.report[0]},
        "parameters": sum(p.numel() for p in model.parameters()),
        **runs.looked(world, model),
        **timing.environment(torch.device("cpu")),
    }


def main(arguments: Sequence[str] = ()) -> int:
    options = parse(arguments)
    with locked(mark(options.output_dir, "evidence")):
        claim(options)
        return compare(options)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"bench.evidence: {error}")
