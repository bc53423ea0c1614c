"""What a run checks of policy and reference: adapters that are off and on, the margin's noise while
both are the same model, a cache against the reference of now.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import ranks
from ..loss.functional import Draws
from ..pairs.dataset import Batch, PairDataset, batches
from ..progress import stage, warn
from ..step.cache import ErrorCache
from ..step.filling import Prepare
from ..step.reference import PairMode, Policy, Reference, adapter_layers, changes, disabled, errors


def check_finite(base_says: Tensor) -> None:
    """Self-check: what the base says of the first batch."""
    if not base_says.isfinite().all():
        raise ValueError(
            "self-check: the base model's prediction of the first batch is not finite: look at its "
            "weights and at the encoded latents, or use mixed_precision no"
        )


def check_off(model: nn.Module, probe: Callable[[], Tensor], base_says: Tensor) -> None:
    """Self-check: with its adapters off the model says what the base said, bit for bit."""
    with disabled(adapter_layers(model)):
        off = probe()
    if not torch.equal(off, base_says):
        raise ValueError(
            "self-check: with its adapters off the model differs from the base by "
            f"{(off.float() - base_says.float()).abs().max():.3g}, so it cannot be the reference"
        )


def check_on(model: nn.Module, probe: Callable[[], Tensor]) -> None:
    """Self-check after the first optimiser step: the adapters change what the model says."""
    on = probe()
    with disabled(adapter_layers(model)):
        off = probe()
    if torch.equal(on, off):
        warn(
            "self-check: after the first step the adapters change nothing (the learning rate may "
            "be too small for this dtype)"
        )


def check_step(err: Tensor, ref_err: Tensor) -> None:
    """Self-check of the first step after an update, in the form it has in the loop (compiled,
    recorded, resumed): switching the adapters off reaches it, so policy and reference differ.
    """
    if torch.equal(err, ref_err):
        warn(
            "self-check: policy and reference still say the same in the training step: the "
            "learning rate is too small for this dtype, or switching the adapters has no effect "
            "there (try without compile and cuda_graphs)"
        )


def first_pairs(
    dataset: PairDataset, batch_size: int, seed: int, prepare: Prepare
) -> Iterator[tuple[Batch, Draws]]:
    """The run's first batches, of 8 pairs together or a few more."""
    stream = batches(dataset, batch_size, seed)
    for _ in range(math.ceil(8 / batch_size)):
        yield prepare(*next(stream))


def margin_noise(
    policy: Policy,
    online: Reference,
    process: Any,
    batches: Iterable[tuple[Batch, Draws]],
    *,
    pair_mode: PairMode,
    beta: float,
) -> float | None:
    """max |m| over the batches while policy and reference are the same model: what rounding alone
    makes of the margin in the run's own step, whose forwards it runs. None: it is not finite.
    """
    seen = []
    with stage("margin noise: forwards of the first 8 pairs"):
        for batch, draws in batches:
            w, l = changes(policy, online, process, batch, draws, pair_mode).chunk(2)
            seen.append((0.5 * beta * (w - l)).abs().max())
        worst = torch.stack(seen).max().item()
    return noted_noise(worst)


def noted_noise(worst: float) -> float | None:
    """A run's margin noise, warned of where it is large. None: it is not finite."""
    if not worst <= 0.05:
        warn(f"margin noise {worst:.3g} is above 0.05: rounding moves the loss")
    return worst if math.isfinite(worst) else None


@torch.no_grad()
def drift(
    cache: ErrorCache,
    online: Reference,
    process: Any,
    batches: Iterable[tuple[Batch, Draws]],
    *,
    beta: float,
    margin_noise: float,
) -> tuple[float, float]:
    """(max |m_cached - m_online| over the batches, max(2 margin_noise, 1e-6 beta): what it may be).

    m_cached - m_online = (beta/2) (change of r_w - change of r_l), whatever the policy says. Of the
    batches whose errors are there; 0 if none are. Prints a warning when it is not within.
    """
    worst, allowed = 0.0, max(2 * margin_noise, 1e-6 * beta)
    with stage("cache: what it has of the first 8 pairs, against the reference"):
        for batch, draws in batches:
            kept = cache.get(draws)
            if all(ranks.gathered(kept is not None)):  # of shards a pass is one of all
                now = errors(online, process, batch, draws, cache.fingerprint["pair_mode"])
                w, l = (kept - now).chunk(2)
                change = (0.5 * beta * (w - l)).abs().max().item()
                worst = max(worst, change) if math.isfinite(change) else math.inf
    if not worst <= allowed:
        warn(
            f"cached and online margins differ by {worst:.3g}, expected at most {allowed:.3g}: the "
            "reference is computed otherwise here than where the cache was filled; delete the "
            "cache's folder, or name another reference_cache, and run the same command again"
        )
    return worst, allowed
