"""`fastpref demo`: pairs from a tiny video model, training on them, a table of who wins."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import ranks
from ..files import write_atomic
from ..look import evaluate
from ..look.report import Comparison, run_report
from ..models import toy
from ..pairs.dataset import PairDataset
from ..pairs.encode import encode
from ..process import from_config
from ..run import adapters
from ..run.config import OFFLINE, Config
from ..run.folder import alone, read_record
from ..run.parsing import Parser, betas, names
from ..run.train import train
from . import clips, online
from .pairs import CANDIDATES, SEEDS, Sampler, judge_all, make_pairs, shuffle_labels
from .summary import Row, summarise
from .timeline import Spent, curve, elapsed

BASE = Path(__file__).parent / "base"
OBJECTIVES = [*OFFLINE, "spo"]
CONTROLS = ("sft", "dpo_windowed", "dpo_shuffled")
PAIRS_PER_STEP = 8
VALIDATION_PAIRS = 24
RANKED = 3  # times as many prompts as pairs are ranked for the preference model
VALIDATION_SEED = 7

# What an objective needs beside beta. Times are unshifted here, so a grid of 5 steps decides what
# dpo_cm and sdpo mask: roughly s < 0.4. dmpo's alpha is the paper's.
HYPER: dict[str, dict[str, Any]] = {
    "dmpo": {"alpha": 0.01},
    "dpo_cm": {"importance_steps": 5},
    "sdpo": {"importance_steps": 5},
    "sft": {"objective": "sft", "beta": None},
    "dpo_windowed": {"objective": "dpo", "timestep_range": (0.35, 1.0)},
    "dpo_shuffled": {"objective": "dpo"},
}


@dataclass
class Options:
    """What `fastpref demo` can be asked for."""

    objectives: list[str] = field(default_factory=lambda: ["dpo"])
    betas: list[float] = field(default_factory=lambda: [2000.0])
    seeds: int = 1
    output_dir: Path = Path("runs/demo")
    pairs: int = 96
    steps: int = 80
    clips: int = 96


def parse(arguments: Sequence[str]) -> Options:
    """Flags to options; ValueError with one line for any mistake."""

    default = Options()
    parser = Parser(prog="fastpref demo", description=__doc__.strip())
    add = parser.add_argument
    add("--objectives", default="dpo", help=f"comma-separated, of {','.join(OBJECTIVES)}")
    every = "comma-separated; every objective is trained at each (spo has a scale of its own)"
    add("--betas", default="2000", help=every)
    add("--seeds", type=int, default=1, help="initialisations and data orders per objective")
    add("--output_dir", type=Path, default=default.output_dir)
    add("--pairs", type=int, default=default.pairs, help="preference pairs to make")
    add("--steps", type=int, default=default.steps, help="training steps of 8 pairs")
    add("--clips", type=int, default=default.clips, help="clips to evaluate on")
    found = parser.parse_args(list(arguments))
    for name, least in (("seeds", 1), ("pairs", 8), ("steps", 1), ("clips", 1)):
        if getattr(found, name) < least:
            raise ValueError(f"--{name}: expected at least {least}, got {getattr(found, name)}")
    return Options(
        objectives=names("--objectives", found.objectives, OBJECTIVES),
        betas=betas("--betas", found.betas),
        seeds=found.seeds,
        output_dir=found.output_dir,
        pairs=found.pairs,
        steps=found.steps,
        clips=found.clips,
    )


def base_sampler() -> Sampler:
    """The shipped base model."""
    config = json.loads((BASE / "scheduler" / "scheduler_config.json").read_text())
    return Sampler(toy.load(BASE).eval(), toy, from_config(config), toy.pipeline(BASE))


def evaluation_set(count: int) -> tuple[list[str], list[int]]:
    """Held-out prompts in turn, each with seeds of its own that nothing else uses."""
    prompts = [clips.HELD_OUT[i % len(clips.HELD_OUT)] for i in range(count)]
    return prompts, [SEEDS["evaluation"] + i for i in range(count)]


def say(text: str) -> None:
    print(text, flush=True)


class Demo:
    """One demo's folder, base model, data and evaluation, made once and shared by all its runs."""

    def __init__(self, options: Options) -> None:
        self.options, self.folder = options, options.output_dir
        self.base = base_sampler()
        ranks.by_main(self.claim)
        self.prepare_data()
        self.prompts, self.seeds = evaluation_set(options.clips)
        self.validation = PairDataset(self.folder / "encoded" / "validation")
        if ranks.main():  # which looks at the runs of all
            self.base_clips = self.base.clips(self.prompts, self.seeds)
            self.base_scores = judge_all(self.prompts, self.base_clips)
            self.base_errors = self.errors(self.base)
        # Whose way to their score gain is looked at.
        self.timed = ("dpo", "spo") if "spo" in options.objectives else ()

    def claim(self) -> None:
        """A folder keeps the data of one size of demo; runs in it are taken up where they stand."""
        path = self.folder / "demo.json"
        now = {"pairs": self.options.pairs, "steps": self.options.steps}
        if path.exists():
            try:
                before = json.loads(path.read_bytes())
            except (OSError, ValueError, RecursionError):
                before = None
            if not isinstance(before, dict) or before.keys() != now.keys():
                raise ValueError(
                    f"{path}: expected a JSON object with {' and '.join(now)}; "
                    "choose another output_dir"
                )
            if before != now:
                raise ValueError(
                    f"output_dir {self.folder} holds a demo with {before['pairs']} pairs and "
                    f"{before['steps']} steps, got {now['pairs']} and {now['steps']}: "
                    "choose another output_dir"
                )
        elif self.folder.exists() and {p.name for p in self.folder.iterdir()} - {".fastpref"}:
            raise ValueError(f"output_dir {self.folder} holds something else: choose another one")
        else:
            write_atomic(path, json.dumps(now).encode())

    def prepare_data(self) -> None:
        """Candidates, labels, clips on disk, and the encoded sets made of them."""
        start, folder = time.perf_counter(), self.folder
        labels = folder / "labels.json"
        ranks.by_main(partial(self.label, labels))
        wanted = {"right": float, "swapped": list, "gaps": list, "seconds": float}
        self.labels = read_record(labels, wanted)
        took, right = time.perf_counter() - start, 100 * self.labels["right"]
        rows = folder / "pairs" / "metadata.jsonl"
        say(f"   {rows}: {self.options.pairs} pairs, {right:.0f} % labelled right, {took:.0f} s")
        for name in ("pairs", "validation", "pairs-shuffled"):
            encode("toy", BASE, folder / name, folder / "encoded" / name, progress=False)

    def label(self, labels: Path) -> None:
        """Pairs, and the same with shuffled labels, onto the disk, once."""
        folder = self.folder
        if not labels.exists():
            count = self.options.pairs
            say(f"1. sampling {CANDIDATES} clips for each of {count} pairs from the base model,")
            say("   scoring them with a noisy judge, writing them as mp4 ...")
            known = self.make("pairs", count)
            self.make("validation", min(VALIDATION_PAIRS, count))
            known["swapped"] = shuffle_labels(folder / "pairs", folder / "pairs-shuffled")
            write_atomic(labels, json.dumps(known).encode())

    def make(self, block: str, count: int) -> dict[str, Any]:
        """`make_pairs` into the folder of that name, once; what it says, and its `seconds`."""
        record = self.folder / f"{block}.json"
        if not record.exists():
            start = time.perf_counter()
            known = make_pairs(self.base, self.folder / block, count, block)
            known["seconds"] = time.perf_counter() - start
            write_atomic(record, json.dumps(known).encode())
        return read_record(record, {"right": float, "gaps": list, "seconds": float})

    def errors(self, sampler: Sampler) -> Tensor:
        return evaluate.errors(
            sampler.model, toy, sampler.process, self.validation, seed=VALIDATION_SEED
        )

    def config(self, name: str, beta: float, seed: int, folder: Path) -> Config:
        """The same options as `fastpref train` takes, for one row of the table."""
        every = online.QUARTERS if name in self.timed else 1
        data = "pairs-shuffled" if name == "dpo_shuffled" else "pairs"
        settings: dict[str, Any] = {"objective": name, "beta": beta, **HYPER.get(name, {})}
        return Config(
            family="toy",
            model=str(BASE),
            data=str(self.folder / "encoded" / data),
            output_dir=str(folder),
            lora_rank=8,
            learning_rate=5e-4,
            **online.shared(PAIRS_PER_STEP),
            max_train_steps=self.options.steps,
            checkpointing_steps=max(1, self.options.steps // every),
            checkpoints_total_limit=2 * every,
            logging_steps=min(10, self.options.steps),
            seed=seed,
            **settings,
        )

    def train(
        self, name: str, beta: float | None, seed: int, folder: Path
    ) -> tuple[dict[str, Any], float | None, Spent]:
        """What the loop of a row returned, its beta, and what was spent before it began."""
        if name != "spo":
            config = self.config(name, beta, seed, folder)
            return train(config), config.beta, Spent(before=self.labels["seconds"])
        steps, data = self.options.steps, self.folder / "encoded" / "ranked"
        made = ranks.by_main(partial(self.make, "ranked", RANKED * self.options.pairs))
        labelled = made["seconds"]
        with contextlib.redirect_stderr(sys.stdout):  # into the log
            encode("toy", BASE, self.folder / "ranked" / "ranked.jsonl", data, progress=False)
            taught = online.learn_preferences(BASE, data, self.folder / "spm", 2 * steps)
        scorer, seconds = taught["artifact"], elapsed(self.folder / "spm", online.LEARNED_PER_STEP)
        right = online.accuracy(self.base, scorer, self.validation, VALIDATION_SEED)
        trained = online.train(
            BASE, self.folder / "pairs", scorer, folder, seed, max(1, steps // 5)
        )
        before = labelled + seconds[2 * steps]
        spent = Spent(before=before, accuracy=right, sampled=trained["online"])
        return trained, None, spent

    def run(self, name: str, beta: float | None, seed: int, label: str) -> Row:
        """Trains, samples and evaluates one row of the table; writes its folder and report."""
        start = time.perf_counter()
        folder = self.folder / label
        folder.mkdir(parents=True, exist_ok=True)
        where = self.folder / f"{label}.log" if ranks.main() else os.devnull
        with open(where, "w") as log, contextlib.redirect_stdout(log):
            trained, beta, spent = self.train(name, beta, seed, folder)

        def look() -> Row:
            row = self.evaluated(name, beta, seed, folder, trained, spent)
            say(f"   {label}: {row.line()} ({time.perf_counter() - start:.0f} s)")
            return row

        return ranks.by_main(look)

    def evaluated(
        self,
        name: str,
        beta: float | None,
        seed: int,
        folder: Path,
        trained: dict[str, Any],
        spent: Spent,
    ) -> Row:
        """A row's clips, scores and errors, and its report."""
        model = adapters.load_lora(trained["artifact"], toy.load(BASE)).eval()
        tuned = Sampler(model, toy, self.base.process, self.base.pipe)
        if name in self.timed:
            pairs = online.PAIRS_PER_STEP if name == "spo" else PAIRS_PER_STEP
            gains = curve(folder, pairs, model, lambda: self.gain(tuned))
            spent = replace(spent, curve=gains)
        videos = tuned.clips(self.prompts, self.seeds)
        scores = judge_all(self.prompts, videos)
        winner, loser = evaluate.relative_errors(self.errors(tuned), self.base_errors)
        row = Row(
            name=name,
            beta=beta,
            seed=seed,
            folder=folder,
            scores=scores,
            base_scores=self.base_scores,
            winner_error=winner,
            loser_error=loser,
            seconds_per_pair=trained["seconds_per_pair"],
            spent=spent,
        )
        run_report(folder, self.comparisons(videos, scores["score"]), row.results())
        return row

    def gain(self, sampler: Sampler) -> float:
        """Mean score over the base's."""
        scores = judge_all(self.prompts, sampler.clips(self.prompts, self.seeds))["score"]
        return (scores - self.base_scores["score"]).mean().item()

    def comparisons(self, videos: list[Tensor], scores: Tensor) -> list[Comparison]:
        """The first clip of every held-out prompt, base against tuned."""
        chosen = range(min(len(clips.HELD_OUT), len(videos)))
        return [
            Comparison(
                f"{self.prompts[i]}   score {self.base_scores['score'][i]:.2f} -> {scores[i]:.2f}",
                self.base_clips[i],
                videos[i],
            )
            for i in chosen
        ]


def main(arguments: Sequence[str] = ()) -> list[Row]:
    """Runs the demo and prints its table; returns the rows."""
    options = parse(arguments)
    if PAIRS_PER_STEP % ranks.world():
        raise ValueError(
            f"{ranks.world()} processes: expected 1, 2, 4 or 8, which share the "
            f"{PAIRS_PER_STEP} pairs of a step"
        )
    start = time.perf_counter()
    names = ", ".join(options.objectives)
    say(f"fastpref demo: {names} and three controls, into {options.output_dir}")
    with ranks.group(), alone(options.output_dir, "demo"):
        demo = Demo(options)
        # The controls stand beside the first beta only.
        wanted = [
            (name, beta)
            for name in options.objectives
            for beta in (options.betas if name != "spo" else [None])
        ]
        wanted += [(name, options.betas[0]) for name in CONTROLS]
        say(f"2. training ({options.steps} steps of 8 pairs), sampling, evaluating ...")
        rows = []
        for name, beta in wanted:
            for seed in range(options.seeds):
                label = name
                if len(options.betas) > 1 and name not in (*CONTROLS, "spo"):
                    label += f"-beta{beta:g}"
                if options.seeds > 1:
                    label += f"-seed{seed}"
                rows.append(demo.run(name, beta, seed, label))
        if ranks.main():
            summarise(demo.folder, rows, demo.labels, time.perf_counter() - start)
    return rows
