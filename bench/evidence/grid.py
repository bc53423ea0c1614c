"""The runs of a comparison: objectives and controls, each with its betas, alphas and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# lambda = (1 - mu) <R_w, R_w> / <R_w, R_l> scales the loser's gradient. 0.6 is the milder of the
# paper's two: 0.9 leaves the loser a tenth, little more than SFT. Set before any run.
SAFEGUARD = 0.6
LONGER = 4  # times the steps have the runs that look for a late collapse

# Every name, with what it asks of Config beside beta, alpha and the world's own.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "ipo": {},
    "hinge": {},
    "dmpo": {},
    "dpo_cm": {},
    "dpo_cm_loss": {"objective": "dpo_cm", "placement": "loss"},
    "sdpo": {},
    "sdpo_ratio": {"objective": "sdpo", "placement": "ratio"},
    "dpo_safeguard": {"objective": "dpo", "safeguard": SAFEGUARD},
    "spo": {},
}
CONTROLS: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo_windowed": {"objective": "dpo"},
    "dpo_shuffled": {"objective": "dpo"},
    "dpo_long": {"objective": "dpo"},
    "dpo_cm_long": {"objective": "dpo_cm"},
    "sdpo_long": {"objective": "sdpo"},
}
NAMES = OBJECTIVES | CONTROLS
LONG = tuple(name for name in NAMES if name.endswith("_long"))
ONCE = ("dpo_shuffled", *LONG)  # at the middle beta alone, which is fixed beforehand
ALPHAS = (0.001, 0.01, 0.1)
TIMED = ("dpo", "spo", *LONG)  # whose clips are judged on the way too


@dataclass(frozen=True)
class Setting:
    """One run. alpha: dmpo's; beta is None for sft alone."""

    name: str
    beta: float | None
    alpha: float | None
    seed: int

    @property
    def label(self) -> str:
        alpha = "" if self.alpha is None else f"-alpha{self.alpha:g}"
        beta = "" if self.beta is None else f"-beta{self.beta:g}"
        return f"{self.name}{alpha}{beta}-seed{self.seed}"

    @property
    def objective(self) -> str:
        return NAMES[self.name].get("objective", self.name)

    def steps(self, steps: int) -> int:
        return LONGER * steps if self.name in LONG else steps


def grid(
    names: Sequence[str],
    betas: Sequence[float],
    own: Mapping[str, Sequence[float]],
    alphas: Sequence[float],
    seeds: int,
) -> list[Setting]:
    """All runs, seed by seed, so that what is there when time is up covers every setting.

    own: betas of the objectives whose beta has another scale. ValueError: an even number of betas,
    which has no middle, with a name that wants one.
    """
    found = []
    for seed in range(seeds):
        for name in names:
            mine: Sequence[float | None] = own.get(name, betas)
            if name == "sft":
                mine = (None,)
            elif name in ONCE:
                mine = (middle(betas, name),)
            for alpha in alphas if name == "dmpo" else (None,):
                found += [Setting(name, beta, alpha, seed) for beta in mine]
    return found


def middle(betas: Sequence[float], name: str) -> float:
    if len(betas) % 2 == 0:
        raise ValueError(
            f"--betas: {name} is trained at the middle one: expected an odd number of them, got "
            f"{len(betas)}"
        )
    return sorted(betas)[len(betas) // 2]
