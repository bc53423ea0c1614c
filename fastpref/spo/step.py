"""The step-wise preference loss of transitions: one prediction serves both where they share x_t."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..loss.functional import PairLoss, preference_loss
from ..loss.objectives import SPO
from ..step.reference import Policy, Reference
from .grid import Step
from .resampler import Transition


class Batch(NamedTuple):
    """B transitions of one kind on a device: they share x_t (R = B rows), or not (R = 2B, winners
    first).
    """

    x: Tensor  # [R, ...] in the network's dtype
    t: Tensor  # [R] float32
    cond: dict[str, Tensor]  # [R, ...]
    target: Tensor  # [2B, ...] float32, winners first
    gain: Tensor  # [B] float64, k of each step
    level: Tensor  # [B] float64: of noise, where its step begins, in [0, 1]


def collate(
    transitions: Sequence[Transition],
    steps: list[Step],
    cond: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> Batch:
    """cond: of each transition's prompt, [B, ...]. All are of one kind (`kind`)."""
    at = [steps[each.step] for each in transitions]
    members = len(transitions[0].x)  # 1 or 2
    x = torch.cat([torch.stack([t.x[m] for t in transitions]) for m in range(members)])
    y = torch.cat([torch.stack([t.y[m] for t in transitions]) for m in range(2)])
    times = torch.tensor([step.t for step in at], dtype=torch.float32)
    return Batch(
        x.to(device, dtype),
        times.repeat(members).to(device),
        {name: torch.cat([value] * members).to(device) for name, value in cond.items()},
        y.to(device),
        torch.tensor([step.gain for step in at], dtype=torch.float64, device=device),
        torch.tensor([step.level for step in at], dtype=torch.float64, device=device),
    )


def kind(transition: Transition) -> str:
    """What transitions of a batch have in common."""
    return f"{len(transition.x)} of {list(transition.x.shape[1:])}"


def step_loss(policy: Policy, reference: Reference, batch: Batch, objective: SPO) -> PairLoss:
    """L = -log sigma(beta (clamp(rho_w) - clamp(rho_l))), rho = -(k/2) (e - r): e and r the errors
    of policy and reference against the predictions that the candidates imply. arXiv 2406.04314.

    Where a pair shares x_t one prediction of each serves both members.
    """
    said = reference(batch.x, batch.t, batch.cond)
    pred = policy(batch.x, batch.t, batch.cond)
    return preference_loss(pred, batch.target, said.to(pred.dtype), objective, gain=batch.gain)
