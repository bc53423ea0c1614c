"""The win rate over the base on prompts that do not train, at fixed seeds, by the run's scorer."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..files import write_atomic
from ..look.evaluate import gain
from ..look.evaluate import win_rate as rate
from ..look.sample import sample
from ..progress import printable, stage, warn
from ..run.assemble import Run
from ..step import compiling
from ..step.reference import adapter_layers, disabled
from .assemble import Online


def forget_later(run: Run, online: Online) -> None:
    """Drops what was measured after the step that a run goes on from; of a new run everything,
    which another attempt may have measured with other options.
    """
    path = run.folder / "win_rate.json"
    ranks.by_main(partial(_forget, path, run, online))


def _forget(path: Path, run: Run, online: Online) -> None:
    if run.start is None:
        path.unlink(missing_ok=True)
    elif path.exists():
        record = read(path, len(online.held_out))
        record["rounds"] = [row for row in record["rounds"] if row["global_step"] <= run.step]
        write_atomic(path, json.dumps(record).encode())


def win_rate(run: Run, online: Online) -> None:
    """Samples the held-out prompts as the model's pipeline does, scores them at t = 0 and compares
    with the base's clips from the same noise. Kept in win_rate.json, once a step; what a policy
    cannot make is left out with a warning.
    """
    path = run.folder / "win_rate.json"
    record = ranks.by_main(partial(read, path, len(online.held_out)))
    done = [row for row in record["rounds"] if row["global_step"] == run.step]
    if not online.held_out or done:
        run.own |= {"win_rate": logged(done[0])} if done else {}
        return
    if "base" not in record:
        if run.step and not adapter_layers(run.model):
            warn(f"{path}: the base's scores are lost, and it is not there any more: no win rate")
            return
        with stage("win rate: clips of the base"), disabled(adapter_layers(run.model)):
            record["base"] = scores(run, online).tolist()
        ranks.by_main(lambda: write_atomic(path, json.dumps(record).encode()))
    base = torch.tensor(record["base"], dtype=torch.float64)
    try:
        tuned = scores(run, online) if run.step else base
    except ValueError as error:
        warn(f"step {run.step}: no win rate: {error}")
        return
    won, gained = rate(tuned, base), gain(tuned, base)
    row = {"global_step": run.step, "round": run.own["round"], "win_rate": list(won)}
    row |= {"score_gain": list(gained), "scores": tuned.tolist()}
    record["rounds"].append(row)
    ranks.by_main(lambda: write_atomic(path, json.dumps(record).encode()))
    run.own["win_rate"] = logged(row)
    if run.step:
        gains = f"{gained.value:+.3g} [{gained.low:+.3g}, {gained.high:+.3g}]"
        said = f"win rate over the base on {len(base)} prompts {won}, score gain {gains}"
        run.bar.write(printable(f"step {run.step}: {said}"))


def read(path: Path, count: int) -> dict[str, Any]:
    """What win_rate.json says of `count` prompts; of a damaged one a warning: it is made again, but
    for rounds that are over.
    """
    new: dict[str, Any] = {"rounds": []}
    if not path.exists():
        return new
    try:
        found = json.loads(path.read_bytes())
        for row in found["rounds"]:
            logged(row), row["global_step"] + 0
        if torch.tensor(found["base"], dtype=torch.float64).shape == (count,):
            return found
    except (ValueError, TypeError, LookupError, RuntimeError, OverflowError, RecursionError):
        pass
    warn(f"{path} is damaged: it begins again with the base")
    return new


def logged(row: dict[str, Any]) -> dict[str, float]:
    return {"online/win_rate": row["win_rate"][0], "online/score_gain": row["score_gain"][0]}


def scores(run: Run, online: Online) -> Tensor:
    """[held out] float64 of the model as it is; several processes share the samples.

    Raises:
        ValueError: some cannot be made or scored, on any process.
    """
    try:
        mine: dict[int, Tensor] | str = _scores(run, online)
    except ValueError as error:
        mine = str(error)
    every = ranks.gathered(mine)
    for said in every:
        if isinstance(said, str):
            raise ValueError(said)
    found = {first: values for said in every for first, values in said.items()}
    return torch.cat([found[first] for first in sorted(found)])


def _scores(run: Run, online: Online) -> dict[int, Tensor]:
    """Those of this process, by the place of the first of each batch."""
    rows, config = online.held_out, run.config
    cond = online.prompts.cond(rows, run.device)
    negative = None
    if config.guidance_scale != 1:
        empty = online.prompts.empty_cond
        negative = {name: torch.stack([value] * len(rows)) for name, value in empty.items()}
    found = {}
    size = min(config.sample_batch_size, config.sample_rows or len(rows))
    for some in run.mesh.dealt(torch.arange(len(rows)).split(size)):
        take = slice(int(some[0]), int(some[-1]) + 1)
        with compiling.eagerly():
            latents = sample(
                run.model,
                run.family,
                online.scheduler,
                {name: value[take] for name, value in cond.items()},
                online.shape,
                steps=config.sampling_steps,
                seeds=some.tolist(),
                guidance_scale=config.guidance_scale,
                negative=negative and {name: value[take] for name, value in negative.items()},
                names=[online.prompts.prompts[row] for row in rows[take]],
            )
        found[int(some[0])] = online.score(latents, rows[take], 0.0).cpu()
    return found
