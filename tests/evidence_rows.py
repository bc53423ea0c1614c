"""Rows of a comparison as `python -m bench.evidence` writes them, made up, of known gains."""

from __future__ import annotations

import torch

BETAS = (200.0, 2000.0, 20000.0)
PROMPTS, EACH = 6, 4


def rows_of(truth: dict, seeds: int = 3, noise: float = 0.001) -> list[dict]:
    """Rows of runs with known gains. truth: (name, beta, alpha) to a dict of gain, and where they
    differ choice (gain there), winner (error over the base's), curve (gains), seconds, before.
    """
    g = torch.Generator().manual_seed(0)
    report = [f"prompt {i % PROMPTS}" for i in range(PROMPTS * EACH)]
    choice = [f"other {i % PROMPTS}" for i in range(PROMPTS * EACH)]
    base = [7000 + 10 * i for i in range(PROMPTS * EACH)]
    errors = [10000 + 100 * i for i in range(8)]
    shared = {"device": "a CPU", "torch": "2", "threads": 1, "cuda": "", "commit": "abc"}
    first = {"name": "base", "world": "toy", "pairs": 8, "steps": 4, "clips": len(report)}
    first |= {"prompts": {"choice": choice, "report": report}, "parameters": 1, **shared}
    easier = [v + 500 for v in base]
    first |= {"scores": {"choice": easier, "report": base}, "errors": [errors, errors]}

    def noisy(values: list, mean: float, spread: float) -> list[int]:
        wobble = torch.randn(len(values), generator=g).tolist()
        return [round(v + mean + spread * w) for v, w in zip(values, wobble, strict=True)]

    rows = [first]
    for (name, beta, alpha), true in truth.items():
        for seed in range(seeds):
            curve = []
            for i, gain in enumerate(true.get("curve", [true["gain"]] * 4), 1):
                means = noisy([7000.0] * PROMPTS, 1e4 * gain, 1e4 * noise)
                # the base's mean of each prompt
                means = [m + 10 * p + 60 * 1.5 for p, m in enumerate(means)]
                point = {"step": i, "seconds": i * true.get("seconds", 1.0), "report": means}
                curve.append(point | {"accuracy": 0.8, "winner": 0.0, "loser": 0.0})
            mine = {"name": name, "beta": beta, "alpha": alpha, "seed": seed, **shared}
            mine["scores"] = {
                "report": noisy(base, 1e4 * true["gain"], 1e4 * noise),
                "choice": noisy(easier, 1e4 * true.get("choice", true["gain"]), 1e4 * noise),
            }
            up = [e * true.get("winner", 0.0) for e in errors]
            winners = [round(e + u) for e, u in zip(errors, up, strict=True)]
            mine["errors"] = [noisy(winners, 0, 3), errors]
            mine |= {"curve": curve, "logged": [[1, 0.5], [2, 0.6]], "seconds_per_pair": 0.1}
            rows.append(mine | {"before": true.get("before", 0.0)})
    return rows


def flat(gain: float, **other) -> dict:
    return {"gain": gain, **other}


def over_betas(name: str, gains: tuple, **other) -> dict:
    return {(name, b, None): flat(g, **other) for b, g in zip(BETAS, gains, strict=True)}


def timed(seconds: float, before: float, end: float = 0.06) -> dict:
    """DPO gains 0.04 in 40 s, evenly, after 10; SPO `end` in four times `seconds`."""
    truth = over_betas("dpo", (0.02, 0.04, 0.03), seconds=10.0, before=10.0)
    for setting in truth.values():
        setting["curve"] = [setting["gain"] * i / 4 for i in range(1, 5)]
    way = [end / 4, end / 2, 3 * end / 4, end]
    return truth | {("spo", 10.0, None): flat(end, seconds=seconds, curve=way, before=before)}
