"""What a tuned model is worth: win rate and score gain over the base, errors beside its."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..loss.functional import Draws, pair_error
from ..pairs.dataset import PairDataset, collate
from ..pairs.shards import pair_file
from ..process import Diffusion, FlowMatching
from ..step.reference import adapter_layers, disabled

Z = 1.959963984540054  # 97.5 % point of the normal distribution


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def win_rate(tuned: Tensor, base: Tensor) -> Interval:
    """Share of pairs of scores `[N]` that `tuned` wins, ties counted 0.5, with Wilson's interval.

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). Ties only make it too wide.
    """
    _check("win_rate", tuned, base)
    wins = (tuned > base).double() + 0.5 * (tuned == base).double()
    n, p = len(wins), wins.mean().item()
    middle = p + Z * Z / (2 * n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    return Interval(p, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))


def gain(tuned: Tensor, base: Tensor, *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean of `tuned - base` over pairs `[N]`, with a paired bootstrap's percentile interval."""
    _check("gain", tuned, base)
    difference = tuned.double() - base.double()
    n = len(difference)
    draws = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    means = difference[draws].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(difference.mean().item(), low, high)


def _check(name: str, tuned: Tensor, base: Tensor) -> None:
    if tuned.ndim != 1 or tuned.shape != base.shape or len(tuned) == 0:
        raise ValueError(
            f"{name}: expected two score vectors of one length, not empty; got "
            f"{list(tuned.shape)} and {list(base.shape)}"
        )


@torch.no_grad()
def errors(
    model: nn.Module,
    family: ModuleType,
    process: FlowMatching | Diffusion,
    dataset: PairDataset,
    *,
    seed: int,
    draws_per_pair: int = 8,
    batch_size: int = 32,
) -> Tensor:
    """Mean errors `[pairs, 2]` (winner, loser) of `model` on draws fixed by `seed`, float64.

    Any two models called with one seed see the same timesteps and noise.

    Raises:
        ValueError: a pair's errors are not finite.
    """
    was_training = model.training
    model.eval()
    waiting: dict[str, list[int]] = {}
    for i, shape in enumerate(dataset.shapes):
        waiting.setdefault(shape, []).append(i)
    batches = (
        g[i : i + batch_size] for g in waiting.values() for i in range(0, len(g), batch_size)
    )
    result = torch.zeros(len(dataset), 2, dtype=torch.float64)
    for rows in batches:
        batch = collate([dataset[i] for i in rows])
        batch = batch.to(next(model.parameters()).device, model.dtype)
        for k in range(draws_per_pair):
            draws = Draws(seed, batch.pair_id, torch.full_like(batch.pair_id, k))
            noisy, t, target = process.noise(batch.latents, draws)
            pred = family.predict(model, noisy, t, batch.cond)
            result[rows] += pair_error(pred, target).cpu().view(2, -1).T
    model.train(was_training)
    bad = (~result.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        winner, loser = (result[bad[0]] / draws_per_pair).tolist()
        raise ValueError(
            f"{pair_file(dataset.folder, dataset.pair_ids[bad[0]])}: errors expected finite, got "
            f"{winner:g} (chosen), {loser:g} (rejected), and {len(bad)} of {len(dataset)} pairs "
            "are so: of a few encode the pairs again, of all look at the model and its adapter"
        )
    return result / draws_per_pair


def relative_errors(policy: Tensor, reference: Tensor) -> tuple[float, float]:
    """How far the mean error of winners and of losers lies above the reference's (0.1 is 10 %)."""
    change = policy.mean(0) / reference.mean(0) - 1
    return change[0].item(), change[1].item()


def against_base(
    model: nn.Module,
    family: ModuleType,
    process: FlowMatching | Diffusion,
    dataset: PairDataset,
    *,
    seed: int,
    draws_per_pair: int,
    tune: Callable[[], None] | None = None,
) -> dict[str, float]:
    """A tuned model beside its base, on the same draws: implicit accuracy, and by how much the
    errors of chosen and rejected changed (0.1 is 10 %).

    tune: makes the tuned model of the base, in place; None: it has adapters, and without them is
    the base.
    """
    how = {"seed": seed, "draws_per_pair": draws_per_pair}
    with disabled(adapter_layers(model)):
        base = errors(model, family, process, dataset, **how)
    if tune is not None:
        tune()
    policy = errors(model, family, process, dataset, **how)
    margin = (policy - base)[:, 1] - (policy - base)[:, 0]
    winner, loser = relative_errors(policy, base)
    right = (margin > 0).double() + 0.5 * (margin == 0).double()
    return {
        "pairs": len(dataset),
        "implicit_acc": right.mean().item(),
        "chosen_error_change": winner,
        "rejected_error_change": loser,
    }
