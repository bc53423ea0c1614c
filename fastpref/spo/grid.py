"""A sampler's steps as the Gaussians that step-wise preferences are about."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from ..process import Diffusion, FlowMatching, estimates

Spacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step t -> r of a sampler: x_r = on_x x_t + on_pred pred + sigma z, z ~ N(0, I).

    With x0-hat and eps-hat of the prediction (`process.estimates`) it is DDIM's (arXiv 2010.02502),
    for flow matching the posterior's:
        x_r = a_r x0-hat + sqrt(s_r^2 - sigma^2) eps-hat + sigma z
        sigma = eta s_r sqrt(1 - kappa^2),  kappa = a_t s_r / (a_r s_t)
    t, r: as the network is fed them; r = 0: what comes out is a finished sample. level: t as a
    share of all timesteps. mix: a, s, p and q at t, of which x0-hat is made.
    """

    t: float
    r: float
    level: float
    on_x: float
    on_pred: float
    sigma: float
    mix: tuple[float, float, float, float]

    @property
    def gain(self) -> float:
        """k = on_pred^2 / sigma^2: a candidate's log-probability per dimension is -(k/2) e, e its
        error against the target that it implies. Needs sigma > 0.
        """
        return (self.on_pred / self.sigma) ** 2

    def take(self, x_t: Tensor, pred: Tensor, z: Tensor | None) -> Tensor:
        """x_r."""
        mean = self.on_x * x_t + self.on_pred * pred
        return mean if z is None else mean + self.sigma * z

    def implied(self, pred: Tensor, z: Tensor) -> Tensor:
        """The prediction whose mean is the x_r that pred and z led to: (x_r - on_x x_t) / on_pred,
        without that difference's rounding.
        """
        return pred + self.sigma / self.on_pred * z

    def clean(self, x_t: Tensor, pred: Tensor) -> Tensor:
        """x0-hat."""
        return estimates(x_t, pred, *self.mix)[0]


def timesteps(process: FlowMatching | Diffusion) -> int:
    """How many it was trained with."""
    flow = isinstance(process, FlowMatching)
    return process.num_train_timesteps if flow else len(process.alphas_cumprod)


def network_times(
    process: FlowMatching | Diffusion,
    scheduler_config: dict[str, Any],
    count: int,
    spacing: Spacing | None = None,
) -> list[float]:
    """Where a sampler of `count` steps asks the network, from noise on, and 0 at the end.

    Flow matching: even in time before the shift. Diffusion: as DDIMScheduler spaces them by the
    config (spacing: otherwise than that says); the last step ends at timestep 0 with its own abar.

    Raises:
        ValueError: more steps than there are timesteps, or fewer than 1; a spacing without effect.
    """
    total = timesteps(process)
    if not 1 <= count <= total:
        raise ValueError(f"sampling_steps: expected 1 to {total}, got {count}")
    if isinstance(process, FlowMatching):
        if spacing:
            raise ValueError("timestep_spacing has no effect on FlowMatching: remove it")
        u = torch.linspace(1, 1 / total, count + 1, dtype=torch.float64)[:-1]
        return [*(total * process.shifted(u)).tolist(), 0.0]
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        num_train_timesteps=total,
        timestep_spacing=spacing or scheduler_config.get("timestep_spacing", "leading"),
        steps_offset=scheduler_config.get("steps_offset", 0),
    )
    scheduler.set_timesteps(count)
    return [*(float(t) for t in scheduler.timesteps), 0.0]


def steps(
    process: FlowMatching | Diffusion,
    times: list[float],
    *,
    eta: float = 1.0,
    window: tuple[int, int] | None = None,
) -> list[Step]:
    """The steps between neighbouring times. window: (first, end) of the steps that are stochastic,
    deterministic ones stand elsewhere; None: all are.
    """
    total = timesteps(process)
    first, end = window or (0, len(times) - 1)
    if end > len(times) - 1:
        raise ValueError(f"sde_window: expected at most {len(times) - 1} steps, got {end}")
    mixes = process.coefficients(torch.tensor(times, dtype=torch.float64)).T.tolist()
    found = []
    for i, (here, there) in enumerate(pairwise(mixes)):
        (a, s, p, q), (a_r, s_r, *_) = here, there
        kappa = min(1.0, a * s_r / (a_r * s))
        sigma = eta * s_r * math.sqrt(1 - kappa**2) if first <= i < end else 0.0
        rest = math.sqrt(s_r**2 - sigma**2)
        determinant = p * a - s * q
        found.append(
            Step(
                t=times[i],
                r=times[i + 1],
                level=times[i] / total,
                on_x=(a_r * p - rest * q) / determinant,
                on_pred=(rest * a - a_r * s) / determinant,
                sigma=sigma,
                mix=(a, s, p, q),
            )
        )
    return found
