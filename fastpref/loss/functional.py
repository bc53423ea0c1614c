"""add_noise, pair_error, preference_loss and their kin: checks that name the fault, then the ops.

No check reads a value on the device, so none of them synchronises.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .objectives import Objective

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class Draws:
    """Which random numbers a batch of pairs takes: pure functions of (seed, pair_id, index).

    seed: 0 <= seed < 2^63. pair_id [B] int64: a stable hash of each pair's content. index [B]
    int64: the draw's number (the epoch by default), of which the low 28 bits count.
    Raises TypeError or ValueError on another dtype, shape or range.
    """

    seed: int
    pair_id: Tensor
    index: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"Draws: seed must be an integer, 0 <= seed < 2^63, got {self.seed!r}")
        for name, value in (("pair_id", self.pair_id), ("index", self.index)):
            if not isinstance(value, Tensor) or value.dtype != torch.int64:
                raise TypeError(f"Draws: {name} must be an int64 tensor, got {_describe(value)}")
            if value.dim() != 1:
                raise ValueError(f"Draws: {name} must be [B], one per pair, got {_describe(value)}")
        if self.pair_id.shape != self.index.shape or self.pair_id.device != self.index.device:
            raise ValueError(
                f"Draws: index must be like pair_id, {_describe(self.pair_id)},"
                f" got {_describe(self.index)}"
            )

    def to(self, device: torch.device | str) -> "Draws":
        """The same draws, their tensors on `device`."""
        ids = (self.pair_id.to(device, non_blocking=True), self.index.to(device, non_blocking=True))
        return Draws(self.seed, *ids)


@dataclass(frozen=True, eq=False)
class Target:
    """The regression target y = p eps + q x0, its noise regenerated from the draws when it is read.

    x0 [2B, ...] (or [B, ...] for single members), p and q [B] float32.
    """

    x0: Tensor
    draws: Draws
    p: Tensor
    q: Tensor


class PairLoss(NamedTuple):
    """What `preference_loss` returns, float64; only `loss` carries a gradient."""

    loss: Tensor  # [] mean over the pairs of weight * (L + sft_weight * err_w)
    pair_loss: Tensor  # [B] the terms of that mean
    err: Tensor  # [2B] policy errors, winners first
    ref_err: Tensor  # [2B] reference errors
    margin: Tensor  # [B] what the loss sees: weighted in dpo_cm, clamped in spo
    importance: Tensor | None  # [2B] the unclipped wbar of each member; None where there is none
    coef: Tensor  # [2B] d pair_loss / d err, the losers' times the safeguard's lambda
    safeguard: Tensor | None  # [B] that lambda; None where there is none


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {value!r}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"


def _check_tensor(function: str, name: str, value: Any, device: torch.device | None) -> None:
    if not isinstance(value, Tensor) or value.dtype not in _DTYPES:
        raise TypeError(
            f"{function}: {name} must be a float32, bfloat16, float16 or float64 tensor,"
            f" got {_describe(value)}"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{function}: {name} must be a dense tensor, got {value.layout}")
    if device is not None and value.device != device:
        raise ValueError(f"{function}: {name} must be on {device}, got {_describe(value)}")
    _check_tangent(function, name, value)


def _check_rows(function: str, name: str, value: Any) -> None:
    _check_tensor(function, name, value, None)
    if value.dim() < 2 or value.numel() == 0:
        raise ValueError(
            f"{function}: {name} must be [rows, ...] with at least one element a row,"
            f" got {_describe(value)}"
        )


def _check_tangent(function: str, name: str, value: Tensor) -> None:
    """Without this a forward-mode derivative would silently be zero."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise RuntimeError(
            f"{function}: {name} has a forward-mode tangent, and there is no forward-mode"
            " derivative here: use backward, or detach it"
        )


def _check_per_pair(function: str, name: str, value: Any, count: int, device: torch.device) -> None:
    _check_tensor(function, name, value, device)
    if value.shape != (count,):
        raise ValueError(
            f"{function}: {name} must be [{count}], one number each, got {_describe(value)}"
        )


def _check_draws(function: str, draws: Any, x0: Tensor, pairs: int | None) -> None:
    if not isinstance(draws, Draws):
        raise TypeError(f"{function}: draws must be fastpref.Draws, got {_describe(draws)}")
    rows, length = x0.shape[0], draws.pair_id.shape[0]
    if length != pairs if pairs is not None else rows not in (length, 2 * length):
        expected = pairs if pairs is not None else f"{rows} or {rows // 2}"
        raise ValueError(
            f"{function}: draws must have {expected} pairs for {rows} rows of x0, got {length}"
        )
    if draws.pair_id.device != x0.device:
        raise ValueError(
            f"{function}: draws must be on {x0.device}, got {_describe(draws.pair_id)}"
        )


def _unpack(function: str, pred: Tensor, target: Any, paired: bool) -> tuple:
    """Checks pred against target (paired: rows are winners and losers) and takes it apart.

    Returns (data, seed, pair_id, index, p, q) as the ops take them: data is y itself and there are
    no draws, or it is x0 and the rest says how to make y of it.
    """
    _check_rows(function, "pred", pred)
    shape = pred.shape
    made = isinstance(target, Target)
    name, data = ("target.x0", target.x0) if made else ("target", target)
    _check_tensor(function, name, data, pred.device)
    data_shape = data.shape
    rows = data_shape[0] if data_shape else 0
    if paired and rows % 2:
        raise ValueError(
            f"{function}: {name} must have an even number of rows, winners then losers, got {rows}"
        )
    if data_shape != shape and data_shape != (2 * shape[0], *shape[1:]):
        raise ValueError(
            f"{function}: {name} must be shaped like pred, {list(shape)} (or have twice its"
            f" rows, where one prediction serves both members), got {list(data_shape)}"
        )
    if not made:
        return data, 0, None, None, None, None
    _check_draws(function, target.draws, data, rows // 2 if paired else None)
    draws, pairs = target.draws, target.draws.pair_id.shape[0]
    _check_per_pair(function, "target.p", target.p, pairs, pred.device)
    _check_per_pair(function, "target.q", target.q, pairs, pred.device)
    return data, draws.seed, draws.pair_id, draws.index, target.p.float(), target.q.float()


def _per_pair(
    function: str,
    objective: Any,
    gain: Tensor | None,
    weight: Tensor | None,
    pairs: int,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:
    """Checks objective, gain and weight; gain and weight in float64."""
    if not isinstance(objective, Objective):
        raise TypeError(
            f"{function}: objective must be made by fastpref.objective(name, beta=...),"
            f" got {_describe(objective)}"
        )
    if objective.needs_gain and gain is None:
        what = "k of the denoising step" if objective.name == "spo" else "process.gain(draws)"
        raise ValueError(f"{function}: {objective.name} needs gain [{pairs}] ({what}), got None")
    if gain is not None:
        if not objective.needs_gain:
            raise ValueError(
                f"{function}: gain has no effect on {objective.name}, expected None,"
                f" got {_describe(gain)}"
            )
        _check_per_pair(function, "gain", gain, pairs, device)
        gain = gain.detach().double()
    if weight is not None:
        _check_per_pair(function, "weight", weight, pairs, device)
        weight = weight.detach().double()
    return gain, weight


def add_noise(
    x0: Tensor, draws: Draws, a: Tensor, s: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """x_t = a x0 + s eps, eps the standard normals of the draws (never stored).

    x0 [2B, ...], winners first (or [B, ...]): winner and loser share eps. a, s [B]. Returns a
    tensor like x0, in `dtype` (default x0's). No gradient flows to x0.
    Raises TypeError or ValueError on a wrong dtype, shape or device.
    """
    _check_rows("add_noise", "x0", x0)
    _check_draws("add_noise", draws, x0, None)
    pairs = draws.pair_id.shape[0]
    _check_per_pair("add_noise", "a", a, pairs, x0.device)
    _check_per_pair("add_noise", "s", s, pairs, x0.device)
    if dtype is not None and dtype not in _DTYPES:
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
    unpacked = _unpack("pair_error", pred, target, False)
    return torch.ops.fastpref.pair_error(pred.contiguous(), *unpacked)


def pair_cross(pred: Tensor, target: Tensor | Target) -> Tensor:
    """<R_w, R_l> / D [B] float64 of the residuals R = pred - y, for `loss_from_errors`.

    pred [2B, ...], winners first; target as in `pair_error`. Not differentiable. Sums as there.
    Raises TypeError or ValueError on a wrong dtype, shape or device.
    """
    unpacked = _unpack("pair_cross", pred, target, True)
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
    data, *draws = _unpack(function, pred, target, True)
    rows, device, shape = data.shape[0], pred.device, pred.shape
    gain, weight = _per_pair(function, objective, gain, weight, rows // 2, device)
    if shape[0] != rows and objective.name != "spo":
        raise ValueError(
            f"{function}: pred must have {rows} rows like target, winners then losers, got"
            f" {shape[0]} (only in spo one prediction serves both members)"
        )
    _check_tensor(function, "ref", ref, device)
    ref = ref.detach() if ref.requires_grad else ref
    if ref.shape == shape:
        if ref.dtype != pred.dtype:
            raise TypeError(
                f"{function}: ref must be in pred's dtype, {_describe(pred)}, got {_describe(ref)}"
            )
        refs = (ref, None)
    elif ref.shape == (rows,):
        refs = (None, ref.double())
    else:
        raise ValueError(
            f"{function}: ref must be predictions like pred, {list(shape)}, or errors"
            f" [{rows}], got {_describe(ref)}"
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
                f"{function}: {name} must be a float64 tensor [2B], got {_describe(value)}"
            )
        _check_tangent(function, name, value)
    if err.dim() != 1 or err.shape[0] % 2 or err.shape[0] == 0:
        raise ValueError(
            f"{function}: err must be [2B] with an even number of rows, winners then losers,"
            f" got {_describe(err)}"
        )
    if ref_err.shape != err.shape or ref_err.device != err.device:
        raise ValueError(
            f"{function}: ref_err must be like err, {_describe(err)}, got {_describe(ref_err)}"
        )
    pairs = err.shape[0] // 2
    gain, weight = _per_pair(function, objective, gain, weight, pairs, err.device)
    guarded = objective.safeguard is not None
    if guarded != (cross is not None):
        expected = f"[{pairs}] (pair_cross(pred, target))" if guarded else "None without safeguard"
        got = "None" if cross is None else _describe(cross)
        raise ValueError(f"{function}: cross must be {expected}, got {got}")
    if guarded:
        _check_per_pair(function, "cross", cross, pairs, err.device)
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
    data, *draws = _unpack("unit_seed", pred, target, False)
    if data.shape[0] != pred.shape[0]:
        raise ValueError(
            f"unit_seed: pred must have the target's {data.shape[0]} rows, got {pred.shape[0]}"
        )
    scale = 2.0 ** round(math.log2(pred[0].numel()))
    err, seed = torch.ops.fastpref.unit_seed(pred.detach(), data, scale, *draws)
    return err, seed, scale
