"""What an online run says of itself: before its first round, of each step, of its sampling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..loss.functional import PairLoss
from ..loss.objectives import SPO
from ..run.announce import announce_model, announce_running
from ..run.assemble import Run
from ..run.checks import noted_noise
from ..run.telemetry import pair_values
from .assemble import Online
from .step import Batch


def announce(run: Run, online: Online) -> None:
    """Says what was picked, a line each."""
    config, sampler = run.config, online.resampler
    trains = [i for i in range(len(sampler.steps)) if sampler.trains(i)]
    kept = f", {len(online.held_out)} kept for the win rate" if online.held_out else ""
    announce_model(run)
    print(f"prompts    {len(online.rows)} train{kept}; {config.prompts_per_round} a round")
    print(
        f"sampling   {len(sampler.steps)} steps, guidance {config.guidance_scale:g}; pairs of "
        f"{sampler.candidates} candidates on steps {trains[0]} to {trains[-1]}"
        + (f", rolled {sampler.rollout_steps} steps" if sampler.rollout_steps > 1 else "")
    )
    print(f"scorer     {config.scorer}, threshold {config.threshold:g}")
    print(f"objective  {run.objective}")
    mode = "one prediction for both members" + (
        " of a first step" if sampler.rollout_steps > 1 else ""
    )
    announce_running(run, mode)


def note_margin_noise(run: Run, margins: list[Tensor]) -> None:
    """Before the first update policy and reference are one model: the largest margin of its pairs
    is what rounding makes of it.
    """
    if run.step == 0:
        worst = torch.cat(margins).abs().max().item()
        run.margin_noise = noted_noise(max(ranks.gathered(worst)))


def values(out: PairLoss, batch: Batch, objective: SPO) -> dict[str, Tensor]:
    """What one batch adds to the metrics, each [B]: rewards are beta rho, before the clamp."""
    found = pair_values(out, objective, batch.gain)
    low, high = math.log1p(-objective.clip), math.log1p(objective.clip)
    rho = torch.stack([found["rewards/chosen"], found["rewards/rejected"]]) / objective.beta
    found["spo/clamped"] = ((rho < low) | (rho > high)).double().mean(0)
    return found


def online(run: Run) -> dict[str, Any]:
    """Of the rounds since the last line of the log: what was kept, scored and spent."""
    counts = run.own.pop("counts", {})
    said: dict[str, Any] = {}
    if counts:
        steps = range(run.config.sampling_steps)
        judged = [counts.get(f"judged/{i}", 0) for i in steps]
        said["online/kept"] = counts["pairs"] / counts["judged"]
        said["online/kept_by_step"] = [
            counts[f"kept/{i}"] / n if n else None for i, n in zip(steps, judged, strict=True)
        ]
        said["online/score"] = counts["scores"] / counts["decodes"]
        said["online/seconds"] = counts["seconds"]
        said |= per_pair(counts, run.config.guidance_scale != 1)
    if "win_rate" in run.own:
        said |= run.own["win_rate"]
    return said


def spent(run: Run) -> dict[str, Any]:
    """Of all rounds: counts, what a kept pair cost, and the last win rate."""
    total = run.own["total"]
    return total | per_pair(total, run.config.guidance_scale != 1) | run.own.get("win_rate", {})


def per_pair(counts: dict[str, Any], guided: bool) -> dict[str, float]:
    """Rows of the network (guidance takes two a sample) and decodes of a kept pair's sampling."""
    pairs = max(1, counts["pairs"])
    rows = counts["network"] * (2 if guided else 1)
    return {
        "online/network_rows_per_pair": rows / pairs,
        "online/decodes_per_pair": counts["decodes"] / pairs,
    }
