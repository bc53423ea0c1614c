"""One pair step's loss and backward: all members at once (joint), one after the other (deferred),
or winners and losers on two processes (split).

All leave the same gradient of `scale * loss` in `.grad` (split: its part of that sum); they differ
in what they hold on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..loss.functional import (
    PairLoss,
    Target,
    loss_from_errors,
    pair_cross,
    pair_error,
    preference_loss,
    unit_seed,
)
from ..loss.objectives import Objective
from .reference import Policy, Reference, member, part


def training_loss(
    pred: Tensor,
    target: Tensor | Target,
    ref: Tensor,
    objective: Objective | None,
    *,
    gain: Tensor | None = None,
    weight: Tensor | None = None,
) -> PairLoss:
    """`preference_loss` of 2B members, winners first; objective None is the sft control, whose loss
    is the mean of weight e_w.

    ref: predictions like pred, or errors [2B] float64. gain [B] is left out where the objective
    needs none.
    """
    if objective is None:
        ref_err = ref if ref.dim() == 1 else pair_error(ref, target)
        return supervised(pair_error(pred, target), ref_err, weight)
    gain = gain if objective.needs_gain else None
    return preference_loss(pred, target, ref, objective, gain=gain, weight=weight)


def backward(
    out: PairLoss, *, scale: float = 1.0, parameters: Sequence[Tensor], skip_zeros: bool = False
) -> None:
    """Adds d(scale loss)/dp to each p.grad.

    skip_zeros reads the coefficients on the host and leaves out a backward that could only add
    zeros (every pair masked, or beyond hinge's margin): the same gradient, one synchronisation.
    """
    if skip_zeros and not out.coef.any():
        fill_gradients(parameters)
    else:
        # Of a model in shards the graph has the gathered weights, and FSDP brings their gradients
        # to the shards.
        (out.loss * scale).backward(inputs=None if in_shards(parameters) else list(parameters))


def deferred(
    policy: Policy,
    reference: Reference | None,
    noisy: Tensor,
    t: Tensor,
    target: Tensor | Target,
    cond: dict[str, Tensor],
    ref_err: Tensor | None = None,
    *,
    objective: Objective | None,
    gain: Tensor | None = None,
    weight: Tensor | None = None,
    scale: float = 1.0,
    parameters: Sequence[Tensor],
    skip_zeros: bool = False,
) -> PairLoss:
    """The gradient of `backward(training_loss(...))`, to `.grad` as well, with one member's
    activations at a time, at the price of one buffer.

    noisy, t, target, cond: [2B, ...], winners first. ref_err: the reference's errors [2B] float64
    where they are known; it is not asked then.

    A pair's gradient is f_w grad e_w + f_l grad e_l, and the scalars f need both errors. So the
    winner's backward runs first, from e_w itself, into a side buffer S; its graph is freed; the
    loser's forward completes the errors; its backward runs with its true seed; then
    grad += f_w S. Exact for every objective of four errors; the coefficients never leave the
    device. A safeguard keeps the winner's prediction until the loser's is there. skip_zeros spares
    the loser's backward where both coefficients are zero; the winner's has run by then.

    Of a model in shards there is no buffer, which would be as large as the whole: the winner's
    forward runs once more instead, before all else and without gradient.

    Raises ValueError for spo, where one prediction serves both members: there is nothing to split.
    """
    rows = len(target.x0 if isinstance(target, Target) else target)
    if len(noisy) != rows:
        raise ValueError(
            f"deferred: noisy must have {rows} rows like target, winners then losers, got"
            f" {len(noisy)} (one prediction that serves both members is for preference_loss)"
        )
    pairs = rows // 2
    if in_shards(parameters):
        inputs = (noisy, t, target, cond, ref_err)
        return _winner_twice(policy, reference, *inputs, objective, gain, weight, scale)
    known, err, said, crosses = ref_err is not None, [], [], []
    for i in range(pairs):
        own = [None if v is None else v[i : i + 1] for v in (gain, weight)]

        inputs, y = member(noisy, t, target, cond, i, pairs)
        refs = [ref_err[i::pairs]] if known else [pair_error(reference(*inputs), y)]
        pred = policy(*inputs)
        err_w, seed, unit = unit_seed(pred, y)
        # allow_unused: what the pass has not reached, `backward` too would leave alone.
        side = torch.autograd.grad(pred, parameters, seed, allow_unused=True)
        winner = pred.detach() if guarded(objective) else None
        del pred, seed

        inputs, y = member(noisy, t, target, cond, pairs + i, pairs)
        if not known:
            refs.append(pair_error(reference(*inputs), y))
        pred = policy(*inputs)
        err_l = pair_error(pred, y)
        cross = products(winner, pred, target, i, pairs)
        crosses.append(cross)
        del pred, winner
        if objective is None:  # sft leaves the loser alone, but a pass without gradient would be
            err_l = err_l.detach()  # other code to compile
        err.append(torch.cat([err_w, err_l]))
        said.append(torch.cat(refs))

        out = finish(err[-1], said[-1], objective, *own, cross)
        if skip_zeros and not out.coef.any():
            fill_gradients(parameters)
        else:
            if out.loss.requires_grad:  # in sft it does not
                (out.loss * (scale / pairs)).backward(inputs=list(parameters))
            add_scaled(parameters, side, out.coef[0] * (scale / (pairs * unit)))
    return summary(err, said, crosses, objective, gain, weight)


def _winner_twice(
    policy: Policy,
    reference: Reference | None,
    noisy: Tensor,
    t: Tensor,
    target: Tensor | Target,
    cond: dict[str, Tensor],
    ref_err: Tensor | None,
    objective: Objective | None,
    gain: Tensor | None,
    weight: Tensor | None,
    scale: float,
) -> PairLoss:
    """`deferred` by a forward more, each backward with its true coefficient."""
    pairs, err, said, crosses = len(noisy) // 2, [], [], []
    for i in range(pairs):
        own = [None if v is None else v[i : i + 1] for v in (gain, weight)]
        (winner, y), (loser, z) = (
            member(noisy, t, target, cond, row, pairs) for row in (i, pairs + i)
        )
        if ref_err is None:
            refs = [pair_error(reference(*winner), y), pair_error(reference(*loser), z)]
        said.append(torch.cat(refs) if ref_err is None else ref_err[i::pairs])
        with torch.no_grad():
            pred_w = policy(*winner)
            err_w = pair_error(pred_w, y)
        pred = policy(*loser)
        err_l = pair_error(pred, z)
        cross = products(pred_w if guarded(objective) else None, pred, target, i, pairs)
        crosses.append(cross)
        del pred, pred_w
        if objective is None:  # sft leaves the loser alone
            err_l = err_l.detach()
        err.append(torch.cat([err_w, err_l]))
        out = finish(err[-1], said[-1], objective, *own, cross)
        if out.loss.requires_grad:
            (out.loss * (scale / pairs)).backward()
        (pair_error(policy(*winner), y) * (out.coef[0] * (scale / pairs))).sum().backward()
    return summary(err, said, crosses, objective, gain, weight)


def summary(
    err: list[Tensor],
    said: list[Tensor],
    crosses: list[Tensor | None],
    objective: Objective | None,
    gain: Tensor | None,
    weight: Tensor | None,
) -> PairLoss:
    """Once more over all pairs, of each one's: the numbers of a joint step."""
    every = (torch.stack(v).detach().T.reshape(-1) for v in (err, said))
    cross = torch.cat(crosses) if guarded(objective) else None
    return finish(*every, objective, gain, weight, cross)


def split(
    policy: Policy,
    reference: Reference | None,
    noisy: Tensor,
    t: Tensor,
    target: Tensor | Target,
    cond: dict[str, Tensor],
    ref_err: Tensor | None = None,
    *,
    member_of: int,
    exchange: Callable[[Tensor], Tensor],
    objective: Objective | None,
    gain: Tensor | None = None,
    weight: Tensor | None = None,
    scale: float = 1.0,
    parameters: Sequence[Tensor],
    skip_zeros: bool = False,
) -> PairLoss:
    """The step of the process that has one member of every pair: its part of the gradient of
    `backward(training_loss(...))`, which is the sum of both processes' parts.

    noisy, t, target, cond: [2B, ...], winners first, of which member_of 0 takes the winners, 1 the
    losers. exchange: values [n] -> [2, n], those of both processes, winners' first. ref_err: as in
    `deferred`.

    Between forward and backward a pair's two processes tell each other two float64 numbers, e and
    r; either then knows the loss, and what its own error's gradient counts in it. Exact for every
    objective of four errors, with half the activations of a batch. With a safeguard they also tell
    each other their predictions.
    """
    pairs = len(noisy) // 2
    inputs, y = member(noisy, t, target, cond, member_of * pairs, pairs, pairs)
    own_ref = (
        pair_error(reference(*inputs), y) if ref_err is None else ref_err.view(2, -1)[member_of]
    )
    pred = policy(*inputs)
    err, cross = pair_error(pred, y), None
    if guarded(objective):
        both = exchange(pred.detach().reshape(-1))
        cross = pair_cross(both.view(2 * pairs, *pred.shape[1:]), target)
    said = exchange(torch.cat([err.detach(), own_ref])).view(2, 2, pairs)  # [member, e or r, pair]
    every = list(said[:, 0])
    every[member_of] = err
    out = finish(torch.cat(every), said[:, 1].reshape(-1), objective, gain, weight, cross)
    backward(out, scale=scale, parameters=parameters, skip_zeros=skip_zeros)
    return out


def finish(
    err: Tensor,
    ref_err: Tensor,
    objective: Objective | None,
    gain: Tensor | None,
    weight: Tensor | None,
    cross: Tensor | None = None,
) -> PairLoss:
    """The loss of errors [2B], differentiable in err; cross [B] for a safeguard."""
    if objective is None:
        return supervised(err, ref_err, weight)
    gain = gain if objective.needs_gain else None
    return loss_from_errors(err, ref_err, objective, gain=gain, weight=weight, cross=cross)


def guarded(objective: Objective | None) -> bool:
    """Whether it has a safeguard, which needs the product of a pair's residuals."""
    return objective is not None and objective.safeguard is not None


def products(
    winner: Tensor | None, loser: Tensor, target: Tensor | Target, i: int, pairs: int
) -> Tensor | None:
    """`pair_cross` [1] of pair i by its two predictions [1, ...]; None without the winner's."""
    if winner is None:
        return None
    own = part(target, slice(i, None, pairs), slice(i, i + 1))
    return pair_cross(torch.cat([winner, loser.detach()]), own)


def supervised(err: Tensor, ref_err: Tensor, weight: Tensor | None) -> PairLoss:
    """The sft control in PairLoss's form: loss = mean of weight e_w, no margin."""
    pairs = len(err) // 2
    weight = err.new_ones(pairs) if weight is None else weight.detach().to(err.dtype)
    pair_loss, zeros = weight * err[:pairs], torch.zeros_like(weight)
    coef = torch.cat([weight, zeros])
    plain = (pair_loss.detach(), err.detach(), ref_err.detach())
    return PairLoss(pair_loss.mean(), *plain, zeros, None, coef)


def in_shards(parameters: Sequence[Tensor]) -> bool:
    """Whether each process has a part of them (FSDP2)."""
    return any(hasattr(p, "to_local") for p in parameters)


def fill_gradients(parameters: Sequence[Tensor]) -> None:
    """A gradient of zero where there is none yet: AdamW then steps as after a zero backward."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)


def add_scaled(parameters: Sequence[Tensor], side: Sequence[Tensor | None], factor: Tensor) -> None:
    """grad += factor * side, factor a scalar on the device.

    Half-precision gradients are scaled in float32: a coefficient rounded to 8 bits would favour one
    member of every pair.
    """
    used = [(p, s) for p, s in zip(parameters, side, strict=True) if s is not None]
    if not used:
        return
    fill_gradients([p for p, _ in used])
    wide = [s.float() if s.dtype.itemsize < 4 else s for _, s in used]
    torch._foreach_mul_(wide, factor.to(wide[0].dtype))  # in place: nobody reads `side` again
    torch._foreach_add_([p.grad for p, _ in used], wide)
