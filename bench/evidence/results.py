"""Rows as tables of seeds and prompts, and which setting of an objective is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench.evidence.grid import LONG, NAMES
from bench.evidence.intervals import interval
from bench.evidence.rows import ERROR, SCORE, Row
from fastpref.look.evaluate import Interval


@dataclass(frozen=True)
class Setting:
    """An objective's name with its beta and alpha."""

    name: str
    beta: float | None
    alpha: float | None

    def __str__(self) -> str:
        alpha = "" if self.alpha is None else f", alpha {self.alpha:g}"
        return self.name if self.beta is None else f"{self.name}, beta {self.beta:g}{alpha}"


class Results:
    """The rows of one comparison, the base model's first. A name takes part with the seeds that all
    its settings have; a setting of which a run diverged with none: it is never chosen, and named
    apart.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.base, *others = rows
        self.runs: dict[Setting, dict[int, Row]] = {}
        for row in others:
            setting = Setting(row["name"], row["beta"], row["alpha"])
            self.runs.setdefault(setting, {})[row["seed"]] = row
        every = {s: [r for r in each.values() if "diverged" in r] for s, each in self.runs.items()}
        self.diverged = [setting for setting, lost in every.items() if lost]
        for setting in self.diverged:
            del self.runs[setting]
        self.prompts = {name: _places(asked) for name, asked in self.base["prompts"].items()}

    @cached_property
    def names(self) -> list[str]:
        """That have a seed of all their settings, in the grid's order."""
        return [name for name in NAMES if self.settings(name) and self.seeds(name)]

    def settings(self, name: str) -> list[Setting]:
        mine = [s for s in self.runs if s.name == name]
        return sorted(mine, key=lambda s: (s.alpha or 0, s.beta or 0))

    def seeds(self, *names: str) -> list[int]:
        """That every setting of all the names has."""
        each = [set(self.runs[s]) for name in names for s in self.settings(name)]
        return sorted(set.intersection(*each)) if each else []

    def rows(self, setting: Setting, seeds: Sequence[int] | None = None) -> list[Row]:
        mine = self.runs[setting]
        return [mine[s] for s in seeds or self.seeds(setting.name) or sorted(mine)]

    def scores(self, setting: Setting, seeds: Sequence[int] | None = None) -> Tensor:
        """[seeds, clips] of the report set, of every clip."""
        rows = self.rows(setting, seeds)
        return SCORE * torch.tensor([r["scores"]["report"] for r in rows], dtype=torch.float64)

    @cached_property
    def base_scores(self) -> Tensor:
        return SCORE * torch.tensor(self.base["scores"]["report"], dtype=torch.float64)

    def by_prompt(self, values: Tensor, which: str = "report") -> Tensor:
        """[..., clips] to [..., prompts], the mean of each prompt's clips."""
        each = [values[..., places].mean(-1) for places in self.prompts[which]]
        return torch.stack(each, -1)

    def gains(self, setting: Setting, seeds: Sequence[int] | None = None) -> Tensor:
        """[seeds, prompts] of the report set: score over the base's, of the same starting noise."""
        return self.by_prompt(self.scores(setting, seeds) - self.base_scores)

    def wins(self, setting: Setting) -> Tensor:
        """[seeds, prompts]: share of clips with a higher score than the base's, ties 0.5."""
        scores = self.scores(setting)
        ties = (scores == self.base_scores).double()
        return self.by_prompt((scores > self.base_scores).double() + 0.5 * ties)

    def choice_gain(self, setting: Setting) -> float:
        """Mean score gain over seeds on the prompts that settings are chosen on."""
        rows = self.rows(setting)
        scores = torch.tensor([r["scores"]["choice"] for r in rows], dtype=torch.float64)
        base = torch.tensor(self.base["scores"]["choice"], dtype=torch.float64)
        return SCORE * self.by_prompt(scores - base, "choice").mean().item()

    def chosen(self, name: str) -> Setting:
        """The setting with the highest gain on the choice prompts."""
        return max(self.settings(name), key=self.choice_gain)

    def errors(self, setting: Setting, member: int, seeds: Sequence[int] | None = None) -> Tensor:
        """[seeds, pairs], of winners (0) or losers (1)."""
        rows = self.rows(setting, seeds)
        return ERROR * torch.tensor([r["errors"][member] for r in rows], dtype=torch.float64)

    def base_errors(self, member: int) -> Tensor:
        """[1, pairs]"""
        return ERROR * torch.tensor([self.base["errors"][member]], dtype=torch.float64)

    def error(self, setting: Setting, member: int) -> Interval:
        """How far the mean error of winners or losers lies above the base's, 0.01: 1 %."""
        mine = self.errors(setting, member)
        base = self.base_errors(member).expand_as(mine)
        return interval(lambda m: m[..., 0] / m[..., 1] - 1, [mine, base])

    def winner_error(self, setting: Setting) -> float:
        """That of winners alone, without its interval."""
        return (self.errors(setting, 0).mean() / self.base_errors(0).mean()).item() - 1

    def steps(self, setting: Setting, seeds: Sequence[int] | None = None) -> list[int]:
        """Of the checkpoints that all the seeds' runs have."""
        each = [{p["step"] for p in row["curve"]} for row in self.rows(setting, seeds)]
        return sorted(set.intersection(*each))

    def points(self, setting: Setting, what: str, seeds: Sequence[int] | None = None) -> Any:
        """[steps][seeds]: what the curves of the runs have at those checkpoints."""
        rows, steps = self.rows(setting, seeds), self.steps(setting, seeds)
        found = [{p["step"]: p[what] for p in row["curve"]} for row in rows]
        return [[points[step] for points in found] for step in steps]

    def curve(self, setting: Setting, seeds: Sequence[int] | None = None) -> Tensor:
        """[points, seeds, prompts]: gains at the checkpoints of runs whose clips were judged."""
        scores = self.points(setting, "report", seeds)
        return SCORE * torch.tensor(scores, dtype=torch.float64) - self.by_prompt(self.base_scores)

    def seconds(self, setting: Setting, seeds: Sequence[int] | None = None) -> Tensor:
        """[points, seeds] of the training loop."""
        return torch.tensor(self.points(setting, "seconds", seeds), dtype=torch.float64)

    def ordinary(self) -> list[str]:
        """Names without the long runs."""
        return [name for name in self.names if name not in LONG]


def _places(prompts: Sequence[str]) -> list[list[int]]:
    """Where each prompt stands, in the order of their first."""
    return [[i for i, q in enumerate(prompts) if q == p] for p in dict.fromkeys(prompts)]
