"""What the reference says of a batch: the policy with its adapters off, or a frozen copy.

A reference is a function (noisy, t, cond) -> predictions like noisy, without gradient. Where its
errors are known (`cache`), a step takes those in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..loss.functional import Draws, Target, pair_error
from ..pairs.dataset import Batch
from .prefix import Prefix

# (model, noisy, t, cond) -> prediction
Predict = Callable[[nn.Module, Tensor, Tensor, dict[str, Tensor]], Tensor]
Policy = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
Reference = Policy
PairMode = Literal["joint", "deferred", "split"]


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """The LoRA layers that peft put into `model`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def disabled(layers: list[nn.Module]) -> Iterator[None]:
    """The base model inside, the adapted one after.

    Sets the flag that every peft layer's forward reads. peft's own `enable_adapters` also switches
    `requires_grad` of every adapter tensor, which would break a graph recorded between two calls.
    """
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapters_off(model: nn.Module, predict: Predict) -> Reference:
    """One copy of the weights: the policy itself with its adapters off, without gradient."""
    layers = _adapters(model)

    @torch.no_grad()
    def reference(noisy: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        with disabled(layers):
            return predict(model, noisy, t, cond)

    return reference


def shared_prefix(
    model: nn.Module, predict: Predict, *, checked: bool = False
) -> tuple[Policy, Reference]:
    """(policy, reference) over one copy of the weights, as `adapters_off`, but whatever stands
    below the first adapter runs once: called after the reference on the very same tensors, the
    policy starts there. Any other call of either is a whole pass.

    checked: the first such call is not compared with a whole pass, as where tensors have no values.
    """
    layers = _adapters(model)
    prefix = Prefix(model, layers)
    prefix.checked = checked

    @torch.no_grad()
    def reference(noisy: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        with disabled(layers), prefix.record(noisy, t, cond):
            return predict(model, noisy, t, cond)

    def policy(noisy: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return prefix.run(lambda: predict(model, noisy, t, cond), noisy, t, cond)

    return policy, reference


def _adapters(model: nn.Module) -> list[nn.Module]:
    layers = adapter_layers(model)
    if not layers:
        raise ValueError("reference adapters_off: the model has no LoRA layers; use frozen_copy")
    return layers


def base(model: nn.Module, predict: Predict) -> Reference:
    """The model as it is, without gradient: a frozen copy, or what a cache is filled from."""

    @torch.no_grad()
    def reference(noisy: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return predict(model, noisy, t, cond)

    return reference


def of_run(
    model: nn.Module, frozen: nn.Module | None, predict: Predict, *, shared: bool
) -> tuple[Policy, Reference | None]:
    """(policy, reference) of a run: its frozen copy, or the model with its adapters off, which
    shares its prefix with the policy's pass where one follows the other (shared). None: it has
    neither.
    """
    if frozen is None and shared:
        return shared_prefix(model, predict)
    says = None
    if frozen is not None:
        says = base(frozen, predict)
    elif adapter_layers(model):
        says = adapters_off(model, predict)
    return lambda noisy, t, cond: predict(model, noisy, t, cond), says


# ---- Errors of a batch


def member(
    noisy: Tensor,
    t: Tensor,
    target: Tensor | Target,
    cond: dict[str, Tensor],
    row: int,
    pairs: int,
    count: int = 1,
) -> tuple[tuple[Tensor, Tensor, dict[str, Tensor]], Tensor | Target]:
    """((noisy, t, cond), target) of `count` rows of 2 * pairs, all winners or all losers, from
    `row` on.
    """
    here = slice(row, row + count)
    own = part(target, here, slice(row % pairs, row % pairs + count))
    return (noisy[here], t[here], {name: value[here] for name, value in cond.items()}), own


def part(target: Tensor | Target, rows: slice, pairs: slice) -> Tensor | Target:
    """Some rows of a target, which are of these pairs."""
    if not isinstance(target, Target):
        return target[rows]
    draws = Draws(target.draws.seed, target.draws.pair_id[pairs], target.draws.index[pairs])
    return Target(target.x0[rows], draws, target.p[pairs], target.q[pairs])


def passes(
    process: Any, batch: Batch, draws: Draws, pair_mode: PairMode
) -> Iterator[tuple[tuple[Tensor, Tensor, dict[str, Tensor]], Tensor | Target]]:
    """What a training step asks of a model: all members at once (joint), one after the other
    (deferred), or winners and losers apart (split). Each time ((noisy, t, cond), target).
    """
    noisy, t, target = process.noise(batch.latents, draws)
    if pair_mode == "joint":
        yield (noisy, t, batch.cond), target
        return
    pairs = len(draws.pair_id)
    count = 1 if pair_mode == "deferred" else pairs
    for row in range(0, 2 * pairs, count):
        yield member(noisy, t, target, batch.cond, row, pairs, count)


@torch.no_grad()
def errors(
    reference: Reference, process: Any, batch: Batch, draws: Draws, pair_mode: PairMode
) -> Tensor:
    """The reference's errors [2B] float64 of a batch, in the compositions of a training step."""
    each = passes(process, batch, draws, pair_mode)
    return torch.cat([pair_error(reference(*inputs), target) for inputs, target in each])


def changes(
    policy: Policy,
    reference: Reference,
    process: Any,
    batch: Batch,
    draws: Draws,
    pair_mode: PairMode,
) -> Tensor:
    """The policy's errors less the reference's, [2B] float64, from the forwards of a training step
    alone: the policy's with gradient, its graph freed as soon as it has spoken.
    """
    parts = []
    for inputs, target in passes(process, batch, draws, pair_mode):
        ref_err = pair_error(reference(*inputs), target)
        # Without gradient a compiled block is other code: one compilation more, and it may round
        # otherwise than the one that trains.
        parts.append(pair_error(policy(*inputs).detach(), target) - ref_err)
    return torch.cat(parts)
