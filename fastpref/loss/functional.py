"""add_noise, pair_error, preference_loss and their kin: checks, then the ops."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .inputs import (
    DTYPES,
    Draws,
    Target,
    check_draws,
    check_per_pair,
    check_rows,
    check_tangent,
    check_tensor,
    describe,
    per_pair,
    unpack,
)
from .objectives import Objective


class PairLoss(NamedTuple):
    """What `preference_loss` returns, float64; only `loss` carries a gradient."""

    loss: Tensor  # [] mean over the pairs of weight * (L + sft_weight * err_w)
    pair_loss: Tensor  # [B] the terms of that mean
    err: Tensor  # [2B] policy errors, winners first
    ref_err: Tensor  # [2B] reference errors
    margin: Tensor  # [B] what the sigmoid sees: weighted at placement ratio, clamped in spo
    importance: Tensor | None  # [2B] the unclipped wbar of each member; None where there is none
    coef: Tensor  # [2B] d pair_loss / d err, the losers' times the safeguard's lambda
    safeguard: Tensor | None = None  # [B] that lambda; None where there is none


def add_noise(
    x0: Tensor, draws: Draws, a: Tensor, s: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """x_t = a x0 + s eps, eps the standard normals of the draws (never stored).

    x0 [2B, ...], winners first (or [B, ...]): winner and loser share eps. a, s [B]. Returns a
    tensor like x0, in `dtype` (default x0's). No gradient flows to x0.
    Raises TypeError or ValueError on a wrong dtype, shape or device.
    """
    check_rows("add_noise", "x0", x0)
    check_draws("add_noise", draws, x0, None)
    pairs = draws.pair_id.shape[0]
    check_per_pair("add_noise", "a", a, pairs, x0.device)
    check_per_pair("add_noise", "s", s, pairs, x0.device)
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(
            f"add_noise: dtype must be float32, bfloat16, float16 or float64, got {dtype}"
        )
    return torch.ops.fastpref.add_noise(
        x0.detach(), draws.pair_id, draws.index, a.float(), s.float(), draws.seed, dtype
    )


def pair_error(pred: Tensor, target: Tensor | Target) -> Tensor:
    """err[r] = mean over elements of (pred[r] - y[r])^2, [rows] float64, differentiable in pred.

    pred [rows, ...], or half the target's rows where one prediction serves both members; target a
    tensor y [rows, ...] or a `Target`. Sums of a few squares in fp32, of these in float64, in a
    fixed order.
    Raises TypeError or ValueError on a wrong dtype, shape or device.
    """
    unpacked = unpack("pair_error", pred, target, False)
    return torch.ops.fastpref.pair_error(pred.contiguous(), *unpacked)


def pair_cross(pred: Tensor, target: Tensor | Target) -> Tensor:
    """<R_w, R_l> / D [B] float64 of the residuals R = pred - y, for `loss_from_errors`.

    pred [2B, ...], winners first; target as in `pair_error`. Not differentiable. Sums as there.
    Raises TypeError or ValueError on a wrong dtype, shape or device.
    """
    unpacked = unpack("pair_cross", pred, target, True)
    if pred.shape[0] != unpacked[0].shape[0]:
        raise ValueError(
            f"pair_cross: pred must have {unpacked[0].shape[0]} rows like target, winners then"
            f" losers, got {pred.shape[0]}"
        )
    return torch.ops.fastpref.pair_cross(
        pred.detach().contiguous(), unpacked[0].detach(), *unpacked[1:]
    )


def preference_loss(
    pred: Tensor,
    target: Tensor | Target,
    ref: Tensor,
    objective: Objective,
    *,
    gain: Tensor | None = None,
    weight: Tensor | None = None,
) -> PairLoss:
    """The objective's loss of B pairs, in one pass over pred, target and ref.

    e = mean (pred - y)^2 and r = mean (ref - y)^2 per row; L is the objective's loss of the four
    errors of a pair (see `fastpref.objectives`: formulas and sources); loss = mean over pairs of
    weight (L + sft_weight e_w). Diffusion-DPO, arXiv 2311.12908, and its kin.

    pred: [2B, ...] float32, bfloat16 or float16, winners first; [B, ...] for SPO, whose one
        prediction serves both members.
    target: y [2B, ...] of any of these dtypes, or a `Target` that regenerates it from the draws.
    ref: the reference's predictions, like pred; or its errors [2B] (float32 or float64), cached.
    gain: [B], the importance gain g of dpo_cm and sdpo (`process.gain(draws)`), or SPO's k.
    weight: [B], default 1.
    Only `loss` carries a gradient, d loss / d pred = weight dL/de 2 (pred - y) / (D B), a loser's
    times lambda with a safeguard; a second derivative raises RuntimeError. A NaN or Inf in any
    error or gain makes the loss NaN.
    Raises TypeError or ValueError on a wrong dtype, shape or device, a missing or useless gain.
    """
    function = "preference_loss"
    data, *draws = unpack(function, pred, target, True)
    rows, device, shape = data.shape[0], pred.device, pred.shape
    gain, weight = per_pair(function, objective, gain, weight, rows // 2, device)
    if shape[0] != rows and objective.name != "spo":
        raise ValueError(
            f"{function}: pred must have {rows} rows like target, winners then losers, got"
            f" {shape[0]} (only in spo one prediction serves both members)"
        )
    check_tensor(function, "ref", ref, device)
    ref = ref.detach() if ref.requires_grad else ref
    if ref.shape == shape:
        if ref.dtype != pred.dtype:
            raise TypeError(
                f"{function}: ref must be in pred's dtype, {describe(pred)}, got {describe(ref)}"
            )
        refs = (ref, None)
    elif ref.shape == (rows,):
        refs = (None, ref.double())
    else:
        raise ValueError(
            f"{function}: ref must be predictions like pred, {list(shape)}, or errors"
            f" [{rows}], got {describe(ref)}"
        )
    hyper = objective.hyper_tensor(device)
    pred = pred.contiguous()  # a model's permuted view is copied once, not again in the backward
    guarded = objective.safeguard is not None
    loss, pair_loss, err, ref_err, margin, importance, share, coef = ops.checked_pair_loss(
        pred, data, *refs, hyper, gain, weight, objective.number, guarded, *draws
    )
    wbar, share = importance if objective.has_importance else None, share if guarded else None
    return PairLoss(loss, pair_loss, err, ref_err, margin, wbar, coef, share)


def loss_from_errors(
    err: Tensor,
    ref_err: Tensor,
    objective: Objective,
    *,
    gain: Tensor | None = None,
    weight: Tensor | None = None,
    cross: Tensor | None = None,
) -> PairLoss:
    """`preference_loss` from errors that are already there: the epilogue of the deferred step.

    err, ref_err: [2B] float64, winners first; gain, weight [B]; cross [B] float64, which a
    safeguard needs: `pair_cross(pred, target)`. `loss` is differentiable in err, by
    coef [2B] = d pair_loss / d err, the losers' times the safeguard's lambda.
    Raises TypeError or ValueError on a wrong dtype, shape or device, a missing or useless gain or
    cross.
    """
    function = "loss_from_errors"
    for name, value in (("err", err), ("ref_err", ref_err)):
        if not isinstance(value, Tensor) or value.dtype != torch.float64:
            raise TypeError(
                f"{function}: {name} must be a float64 tensor [2B], got {describe(value)}"
            )
        check_tangent(function, name, value)
    if err.dim() != 1 or err.shape[0] % 2 or err.shape[0] == 0:
        raise ValueError(
            f"{function}: err must be [2B] with an even number of rows, winners then losers,"
            f" got {describe(err)}"
        )
    if ref_err.shape != err.shape or ref_err.device != err.device:
        raise ValueError(
            f"{function}: ref_err must be like err, {describe(err)}, got {describe(ref_err)}"
        )
    pairs = err.shape[0] // 2
    gain, weight = per_pair(function, objective, gain, weight, pairs, err.device)
    guarded = objective.safeguard is not None
    if guarded != (cross is not None):
        expected = f"[{pairs}] (pair_cross(pred, target))" if guarded else "None without safeguard"
        got = "None" if cross is None else describe(cross)
        raise ValueError(f"{function}: cross must be {expected}, got {got}")
    if guarded:
        check_per_pair(function, "cross", cross, pairs, err.device)
        cross = cross.detach().double()
    loss, pair_loss, margin, importance, share, coef = torch.ops.fastpref.loss_epilogue(
        err,
        ref_err.detach(),
        objective.hyper_tensor(err.device),
        gain,
        weight,
        cross,
        objective.number,
    )
    wbar, share = importance if objective.has_importance else None, share if guarded else None
    return PairLoss(loss, pair_loss, err.detach(), ref_err.detach(), margin, wbar, coef, share)


def unit_seed(pred: Tensor, target: Tensor | Target) -> tuple[Tensor, Tensor, float]:
    """(err, seed, scale): the errors and, in the same pass, the gradient of the deferred backward.

    err [rows] float64 as in `pair_error`; seed = scale 2 (pred - y) / D in pred's dtype, like pred;
    scale, a power of two near D, keeps fp16 from underflowing: divide the coefficient by it.
    Nothing here is differentiable. Raises as `pair_error` does.
    """
    data, *draws = unpack("unit_seed", pred, target, False)
    if data.shape[0] != pred.shape[0]:
        raise ValueError(
            f"unit_seed: pred must have the target's {data.shape[0]} rows, got {pred.shape[0]}"
        )
    scale = 2.0 ** round(math.log2(pred[0].numel()))
    err, seed = torch.ops.fastpref.unit_seed(pred.detach(), data, scale, *draws)
    return err, seed, scale
