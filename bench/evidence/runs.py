"""One run of the grid: trained, sampled, judged, and what is kept of it, one JSON row."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import timing
from bench.evidence.grid import LONG, NAMES, TIMED, Setting
from bench.evidence.world import Asked, World, clock
from fastpref.demo.timeline import elapsed
from fastpref.files import write_atomic
from fastpref.look import evaluate
from fastpref.look.report import read_metrics
from fastpref.run import checkpoint
from fastpref.run.config import Config
from fastpref.run.train import train

POINTS = 4  # checkpoints of a run, evenly spaced; a long one has twice as many
SCORE, ERROR = 1e-4, 1e-5  # units of the integers in a row
HEAVY = ("checkpoint-*", "*.safetensors", "tensorboard", "result.json")  # of a run that has its row


def config(world: World, setting: Setting, steps: int, folder: Path) -> Config:
    """The same options as `fastpref train` takes."""
    asked = {"objective": setting.objective, **NAMES[setting.name], "beta": setting.beta}
    if setting.alpha is not None:
        asked["alpha"] = setting.alpha
    asked |= world.hyper.get(setting.name, world.hyper.get(setting.objective, {}))
    points = 2 * POINTS if setting.name in LONG else POINTS
    return Config(
        family=world.family,
        model=str(world.model),
        data=str(world.shuffled if setting.name == "dpo_shuffled" else world.data),
        output_dir=str(folder),
        max_train_steps=steps,
        checkpointing_steps=max(1, steps // points),
        checkpoints_total_limit=4 * points,
        logging_steps=max(1, min(10, steps // points)),
        seed=setting.seed,
        **world.settings,
        **asked,
    )


def trained(world: World, setting: Setting, steps: int, folder: Path) -> dict[str, Any]:
    """What the loop returned, with `pairs_per_step` and `before`; what it says goes into a log."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        open(folder.with_suffix(f"{folder.suffix}.log"), "w") as log,
        contextlib.redirect_stdout(log),
    ):
        if setting.name == "spo":
            assert world.spo and setting.beta
            return world.spo(folder, setting.seed, setting.beta, steps)
        asked = config(world, setting, steps, folder)
        pairs = asked.train_batch_size * asked.gradient_accumulation_steps
        return train(asked) | {"pairs_per_step": pairs, "before": world.before}


def looked(world: World, model: nn.Module) -> dict[str, Any]:
    """Scores of both sets and errors of a model, as integers."""
    sets = {"choice": world.choice, "report": world.report}
    scores = {name: _whole(_scores(world, model, asked), SCORE) for name, asked in sets.items()}
    winners, losers = world.errors(model).unbind(1)
    return {"scores": scores, "errors": [_whole(winners, ERROR), _whole(losers, ERROR)]}


def _scores(world: World, model: nn.Module, asked: Asked) -> Tensor:
    return world.judge(asked[0], world.clips(model, asked))["score"]


def _whole(values: Tensor, unit: float) -> list[int]:
    return (values.double().cpu() / unit).round().long().tolist()


def row(
    world: World, setting: Setting, steps: int, folder: Path, base: Mapping[str, Any]
) -> dict[str, Any]:
    """Trains a run (or goes on with it) and says all that tables are made of.

    curve: at each checkpoint its seconds of the loop (by `clock`), the errors of winners and losers
    over the base's mean (0.01: 1 % above), the share of held-out pairs that the implicit reward
    orders right, ties 0.5, and of TIMED names the mean score of each prompt of `report`, in order.
    """
    steps = setting.steps(steps)
    start, wall = clock(), time.perf_counter()
    done = trained(world, setting, steps, folder)
    share = (clock() - start) / (time.perf_counter() - wall)
    model = world.load(Path(done["artifact"]))
    seconds = {k: share * s for k, s in elapsed(folder, done["pairs_per_step"]).items()}
    curve = []
    for saved in reversed(checkpoint.folders(folder)):  # the last one's stay in the model
        curve.append(_point(world, setting, model, saved, seconds, base))
    log = [r for r in read_metrics(folder) if "implicit_acc" in r]
    return {
        **asdict(setting),
        "steps": done["global_step"],
        "pairs_per_step": done["pairs_per_step"],
        **looked(world, model),
        "curve": curve,
        "logged": [[r["global_step"], round(r["implicit_acc"], 4)] for r in log],
        "seconds_per_pair": round(share * done["seconds_per_pair"], 6),
        "before": round(done["before"], 2),
        **timing.environment(next(model.parameters()).device),
    }


def _point(
    world: World,
    setting: Setting,
    model: nn.Module,
    saved: Path,
    seconds: Mapping[int, float],
    base: Mapping[str, Any],
) -> dict[str, Any]:
    from safetensors.torch import load_file

    model.load_state_dict(load_file(saved / "parameters.safetensors"), strict=False)
    reference = ERROR * torch.tensor(base["errors"], dtype=torch.float64).T
    errors = world.errors(model)
    winner, loser = evaluate.relative_errors(errors, reference)
    change = errors - reference
    margin = change[:, 1] - change[:, 0]
    right = (margin > 0).double() + 0.5 * (margin == 0).double()
    step = int(saved.name.removeprefix(checkpoint.PREFIX))
    point = {
        "step": step,
        "seconds": round(seconds[step], 3) if step in seconds else None,
        "winner": round(winner, 5),
        "loser": round(loser, 5),
        "accuracy": round(right.mean().item(), 4),
    }
    if setting.name in TIMED:
        prompts = list(dict.fromkeys(world.report[0]))
        scores = _scores(world, model, world.report)
        each = [scores[[q == p for q in world.report[0]]].mean() for p in prompts]
        point["report"] = _whole(torch.stack(each), SCORE)
    return point


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; ValueError: a line that is none, by its number."""
    found = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            found.append(json.loads(line))
            found[-1]["name"]
        except (ValueError, LookupError, TypeError):
            raise ValueError(
                f"{path} line {number}: expected a row of bench.evidence; remove it"
            ) from None
    return found


def append(path: Path, rows: Sequence[Mapping[str, Any]], new: Mapping[str, Any]) -> None:
    """The rows and a new one, whole or as before."""
    lines = [json.dumps(r, separators=(",", ":")) + "\n" for r in (*rows, new)]
    write_atomic(path, "".join(lines).encode())


def lighten(folder: Path) -> None:
    """Removes what is large of a run that has its row; its config, metrics and log stay."""
    for pattern in HEAVY:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a run is known by."""
    return tuple(row.get(name) for name in ("name", "beta", "alpha", "seed"))


def line(row: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """A run in a line: its gains, and the change of its winners' error."""

    def mean(values: Sequence[int]) -> float:
        return sum(values) / len(values)

    gains = (
        f"{name} {SCORE * (mean(row['scores'][name]) - mean(base['scores'][name])):+.3f}"
        for name in ("choice", "report")
    )
    winner = mean(row["errors"][0]) / mean(base["errors"][0]) - 1
    return f"gain on {' and '.join(gains)}, winners' error {100 * winner:+.1f} %"
