"""One run of the grid: trained, sampled, judged, and what is kept of it, one JSON row."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from bench import timing
from bench.evidence.grid import LONG, NAMES, TIMED, Run
from bench.evidence.rows import ERROR, SCORE
from bench.evidence.world import Asked, World, clock
from fastpref.demo.timeline import elapsed
from fastpref.look import evaluate
from fastpref.look.report import read_metrics
from fastpref.run import checkpoint
from fastpref.run.config import Config
from fastpref.run.guard import Diverged
from fastpref.run.train import train

POINTS = 4  # checkpoints of a run, evenly spaced; a long one has twice as many
HEAVY = ("checkpoint-*", "*.safetensors", "tensorboard", "result.json")  # of a run that has its row


def config(world: World, setting: Run, steps: int, folder: Path) -> Config:
    """The same options as `fastpref train` takes."""
    asked = {"objective": setting.objective, **NAMES[setting.name], "beta": setting.beta}
    if setting.alpha is not None:
        asked["alpha"] = setting.alpha
    asked |= world.hyper.get(setting.name, world.hyper.get(setting.objective, {}))
    every = _every(setting, steps)
    return Config(
        family=world.family,
        model=str(world.model),
        data=str(world.shuffled if setting.name == "dpo_shuffled" else world.data),
        output_dir=str(folder),
        max_train_steps=steps,
        checkpointing_steps=every,
        checkpoints_total_limit=4 * steps // every,  # all, and those of interruptions
        logging_steps=min(10, every),
        seed=setting.seed,
        **world.settings,
        **asked,
    )


def _every(setting: Run, steps: int) -> int:
    """Steps from one point of a curve to the next."""
    return max(1, steps // (2 * POINTS if setting.name in LONG else POINTS))


def trained(world: World, setting: Run, steps: int, folder: Path) -> dict[str, Any]:
    """What the loop returned, with `pairs_per_step` and `before`; what it says goes into a log."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.log", "w") as log, _into(log):
        if setting.name == "spo":
            assert world.spo and setting.beta
            return world.spo(folder, setting.seed, setting.beta, steps)
        asked = config(world, setting, steps, folder)
        pairs = asked.train_batch_size * asked.gradient_accumulation_steps
        return train(asked) | {"pairs_per_step": pairs, "before": world.before}


@contextlib.contextmanager
def _into(log: TextIO) -> Iterator[None]:
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


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
    world: World, setting: Run, steps: int, folder: Path, base: Mapping[str, Any]
) -> dict[str, Any]:
    """Trains a run (or goes on with it) and says all that tables are made of.

    curve: at each checkpoint its seconds of the loop (by `clock`), the errors of winners and losers
    over the base's mean (0.01: 1 % above), the share of held-out pairs that the implicit reward
    orders right, ties 0.5, and of TIMED names the mean score of each prompt of `report`, in order.
    Seconds of a run that went on are told by the process's share of its last part. Of a run that
    diverged there is no more than that.
    """
    steps = setting.steps(steps)
    start, wall = clock(), time.perf_counter()
    try:
        done = trained(world, setting, steps, folder)
    except Diverged as error:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return {**asdict(setting), "diverged": str(error), **timing.environment(device)}
    share = (clock() - start) / (time.perf_counter() - wall)
    model = world.load(Path(done["artifact"]))
    seconds = {k: share * s for k, s in elapsed(folder, done["pairs_per_step"]).items()}
    last, curve = done["global_step"], []
    for saved in reversed(checkpoint.folders(folder)):  # the last one's stay in the model
        step = int(saved.name.removeprefix(checkpoint.PREFIX))
        if step % _every(setting, last) == 0 or step == last:  # not of an interruption
            point = {"step": step, "seconds": _up_to(seconds, step)}
            curve.append(point | _point(world, setting, model, saved, base))
    log = [r for r in read_metrics(folder) if "implicit_acc" in r]
    return {
        **asdict(setting),
        "steps": last,
        "pairs_per_step": done["pairs_per_step"],
        **looked(world, model),
        "curve": curve,
        "logged": [[r["global_step"], round(r["implicit_acc"], 4)] for r in log],
        "seconds_per_pair": round(share * done["seconds_per_pair"], 6),
        "before": round(done["before"], 2),
        **timing.environment(next(model.parameters()).device),
    }


def ordered(errors: Tensor, reference: Tensor) -> float:
    """Share of pairs [N, 2] whose winner's error fell more than the loser's, ties 0.5."""
    change = errors - reference
    margin = change[:, 1] - change[:, 0]
    return ((margin > 0).double() + 0.5 * (margin == 0).double()).mean().item()


def _up_to(seconds: Mapping[int, float], step: int) -> float:
    """Of a loop, to the last step that it logged by then."""
    return round(max((s for k, s in seconds.items() if k <= step), default=0.0), 3)


def _point(
    world: World,
    setting: Run,
    model: nn.Module,
    saved: Path,
    base: Mapping[str, Any],
) -> dict[str, Any]:
    from safetensors.torch import load_file

    model.load_state_dict(load_file(saved / "parameters.safetensors"), strict=False)
    reference = ERROR * torch.tensor(base["errors"], dtype=torch.float64).T
    errors = world.errors(model)
    winner, loser = evaluate.relative_errors(errors, reference)
    point = {
        "winner": round(winner, 5),
        "loser": round(loser, 5),
        "accuracy": round(ordered(errors, reference), 4),
    }
    if setting.name in TIMED:
        prompts = list(dict.fromkeys(world.report[0]))
        scores = _scores(world, model, world.report)
        each = [scores[[q == p for q in world.report[0]]].mean() for p in prompts]
        point["report"] = _whole(torch.stack(each), SCORE)
    return point


def lighten(folder: Path) -> None:
    """Removes what is large of a run that has its row; its config, metrics and log stay."""
    for pattern in HEAVY:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
