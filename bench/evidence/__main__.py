"""Trains every objective and the controls over a grid of betas and seeds, on the same pairs and
draws, and writes a row a run: `python -m bench.evidence --world toy`

A run that has its row is not done again, and a killed one goes on, so that hours can be spent in
pieces (`--minutes`). `--table ROWS` makes tables, verdicts and pictures from rows alone, `--page`
bench/EVIDENCE.md from those in bench/results.
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
from bench.evidence import page, rows, runs
from bench.evidence.grid import ALPHAS, NAMES, SAFEGUARD, Run, grid
from bench.evidence.pictures import draw
from bench.evidence.results import Results
from bench.evidence.tables import markdown
from bench.evidence.world import World
from fastpref.faults import INTERRUPTED, ended, interrupt, on_signals
from fastpref.files import differences, locked, mark, model_identity, write_atomic
from fastpref.run.folder import read_record
from fastpref.run.parsing import Parser, betas, names

WORLDS = ("toy", "mid")


@dataclass(frozen=True)
class Options:
    """What the command can be asked for, filled in from its world."""

    world: ModuleType
    settings: list[Run]
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


def parse(arguments: Sequence[str]) -> Options | Path | None:
    """Flags to options, or the rows whose table is asked for, or None for the page; ValueError with
    one line for any mistake.
    """
    parser = Parser(prog="python -m bench.evidence", description=__doc__.strip())
    add = parser.add_argument
    add("--world", default="toy", choices=WORLDS)
    add("--objectives", default=",".join(NAMES), help="comma-separated; default: %(default)s")
    add("--betas", help="comma-separated, for all that have no scale of their own (ipo, spo)")
    add("--alphas", default=",".join(f"{a:g}" for a in ALPHAS), help="dmpo's: %(default)s")
    add("--seeds", type=int, default=3, help="initialisations and data orders of each setting")
    add("--output_dir", help="default: runs/evidence-WORLD")
    add("--pairs", type=int, help="preference pairs to make")
    add("--steps", type=int, help="training steps of a run")
    add("--clips", type=int, help="clips to choose on, and as many to report on")
    add("--minutes", type=float, default=float("inf"), help="no run begins later than that")
    add(
        "--table", type=Path, metavar="ROWS", help="print what these rows say; pictures beside them"
    )
    add("--page", action="store_true", help="write bench/EVIDENCE.md and its pictures")
    found = parser.parse_args(list(arguments))
    if found.page:
        return None
    if found.table:
        return found.table
    world = importlib.import_module(f"bench.evidence.{found.world}")
    for name, least in (("pairs", 8), ("steps", 1), ("clips", 1)):
        if getattr(found, name) is None:
            setattr(found, name, getattr(world, name.upper()))
        if getattr(found, name) < least:
            raise ValueError(f"--{name}: expected at least {least}, got {getattr(found, name)}")
    if not found.minutes >= 0:
        raise ValueError(f"--minutes: expected at least 0, got {found.minutes:g}")
    if found.output_dir == "":
        raise ValueError("--output_dir: expected a folder, got nothing")
    if found.seeds < 1:
        raise ValueError(f"--seeds: expected at least 1, got {found.seeds}")
    alphas = betas("--alphas", found.alphas)
    asked = names("--objectives", found.objectives, list(NAMES))
    some = betas("--betas", found.betas) if found.betas else world.BETAS
    return Options(
        world=world,
        settings=grid(asked, some, world.OWN, alphas, found.seeds),
        output_dir=Path(found.output_dir or f"runs/evidence-{found.world}"),
        pairs=found.pairs,
        steps=found.steps,
        clips=found.clips,
        minutes=found.minutes,
    )


def claim(folder: Path, record: str, now: dict[str, Any]) -> None:
    """A folder keeps the data and the rows of one size of one world."""
    path = folder / record
    if not path.exists():
        write_atomic(path, json.dumps(now).encode())
    before, now = read_record(path), json.loads(json.dumps(now))
    if before != now:
        raise ValueError(
            f"{folder} holds another comparison: {differences(before, now)}. "
            "Choose another output_dir, or the same values"
        )


def made_of(world: World) -> dict[str, Any]:
    """What all runs of a world share, beside its size."""
    how = {"settings": world.settings, "hyper": world.hyper, "safeguard": SAFEGUARD}
    return how | {"model": model_identity(world.model)}


def compare(options: Options) -> int:
    """Does the runs that have no row yet; how many are left when time is up."""
    start, folder = time.perf_counter(), options.output_dir
    path, size = folder / "rows.jsonl", options.record
    done = rows.read(path)
    if done and (wrong := differences({k: done[0][k] for k in size}, size)):
        raise ValueError(f"{path} line 1: another comparison's: {wrong}. Choose another output_dir")
    world = options.world.prepare(folder / "world", options.pairs, options.clips)
    claim(folder, "settings.json", made_of(world))
    if not done:
        done = [base_row(world, options)]
        rows.append(path, [], done[0])
    have = {rows.key(row) for row in done}
    left = [s for s in options.settings if rows.key(vars(s)) not in have]
    if world.spo is None:
        left = [s for s in left if s.name != "spo"]
    for setting in left:  # a mistake is told before hours are spent
        if setting.name != "spo":
            runs.config(world, setting, options.steps, folder / "runs" / setting.label)
    print(f"{counted(len(left))} of {len(options.settings)} to do", flush=True)
    for number, setting in enumerate(left):
        begin = time.perf_counter()
        if begin - start > 60 * options.minutes:
            print(f"{options.minutes:g} minutes are over: {counted(len(left) - number)} left")
            return len(left) - number
        run = folder / "runs" / setting.label
        new = runs.row(world, setting, options.steps, run, done[0])
        rows.append(path, done, new)
        done.append(new)
        runs.lighten(run)
        took = time.perf_counter() - begin
        print(f"{setting.label}: {rows.line(new, done[0])} ({took:.0f} s)", flush=True)
    return 0


def counted(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def base_row(world: World, options: Options) -> dict[str, Any]:
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


def tell(path: Path) -> None:
    """Prints the tables and verdicts of a file of rows; pictures beside it."""
    if path.suffix != ".jsonl" or not path.is_file():
        raise ValueError(f"--table {path}: expected a file of rows, rows.jsonl of an output_dir")
    found = rows.read(path)
    if not found:
        raise ValueError(f"--table {path}: expected rows, got an empty file")
    results = Results(found)
    print(markdown(results, draw(results, path.parent, path.stem)))


def main(arguments: Sequence[str] = ()) -> int:
    """Runs left to do, 0 when all have their rows."""
    options = parse(arguments)
    if options is None:
        page.write()
        return 0
    if isinstance(options, Path):
        tell(options)
        return 0
    with locked(mark(options.output_dir, "evidence")):
        claim(options.output_dir, "evidence.json", options.record)
        left = compare(options)
    if len(rows.read(options.output_dir / "rows.jsonl")) > 1:
        tell(options.output_dir / "rows.jsonl")
    return left


if __name__ == "__main__":
    on_signals(interrupt)
    left: list[int] = []
    code = ended("bench.evidence", lambda: left.append(main(sys.argv[1:])))
    sys.exit(code or (INTERRUPTED if any(left) else code))
