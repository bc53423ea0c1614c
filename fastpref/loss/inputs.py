"""What the loss's functions are given: draws and targets, and checks that name the fault.

No check reads a value on the device, so none of them synchronises.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .objectives import Objective

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
                raise TypeError(f"Draws: {name} must be an int64 tensor, got {describe(value)}")
            if value.dim() != 1:
                raise ValueError(f"Draws: {name} must be [B], one per pair, got {describe(value)}")
        if self.pair_id.shape != self.index.shape or self.pair_id.device != self.index.device:
            raise ValueError(
                f"Draws: index must be like pair_id, {describe(self.pair_id)},"
                f" got {describe(self.index)}"
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


def describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {value!r}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"


def check_tensor(function: str, name: str, value: Any, device: torch.device | None) -> None:
    if not isinstance(value, Tensor) or value.dtype not in DTYPES:
        raise TypeError(
            f"{function}: {name} must be a float32, bfloat16, float16 or float64 tensor,"
            f" got {describe(value)}"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{function}: {name} must be a dense tensor, got {value.layout}")
    if device is not None and value.device != device:
        raise ValueError(f"{function}: {name} must be on {device}, got {describe(value)}")
    check_tangent(function, name, value)


def check_rows(function: str, name: str, value: Any) -> None:
    check_tensor(function, name, value, None)
    if value.dim() < 2 or value.numel() == 0:
        raise ValueError(
            f"{function}: {name} must be [rows, ...] with at least one element a row,"
            f" got {describe(value)}"
        )


def check_tangent(function: str, name: str, value: Tensor) -> None:
    """Without this a forward-mode derivative would silently be zero."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise RuntimeError(
            f"{function}: {name} has a forward-mode tangent, and there is no forward-mode"
            " derivative here: use backward, or detach it"
        )


def check_per_pair(function: str, name: str, value: Any, count: int, device: torch.device) -> None:
    check_tensor(function, name, value, device)
    if value.shape != (count,):
        raise ValueError(
            f"{function}: {name} must be [{count}], one number each, got {describe(value)}"
        )


def check_draws(function: str, draws: Any, x0: Tensor, pairs: int | None) -> None:
    if not isinstance(draws, Draws):
        raise TypeError(f"{function}: draws must be fastpref.Draws, got {describe(draws)}")
    rows, length = x0.shape[0], draws.pair_id.shape[0]
    if length != pairs if pairs is not None else rows not in (length, 2 * length):
        expected = pairs if pairs is not None else f"{rows} or {rows // 2}"
        raise ValueError(
            f"{function}: draws must have {expected} pairs for {rows} rows of x0, got {length}"
        )
    if draws.pair_id.device != x0.device:
        raise ValueError(f"{function}: draws must be on {x0.device}, got {describe(draws.pair_id)}")


def unpack(function: str, pred: Tensor, target: Any, paired: bool) -> tuple:
    """Checks pred against target (paired: rows are winners and losers) and takes it apart.

    Returns (data, seed, pair_id, index, p, q) as the ops take them: data is y itself and there are
    no draws, or it is x0 and the rest says how to make y of it.
    """
    check_rows(function, "pred", pred)
    shape = pred.shape
    made = isinstance(target, Target)
    name, data = ("target.x0", target.x0) if made else ("target", target)
    check_tensor(function, name, data, pred.device)
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
    check_draws(function, target.draws, data, rows // 2 if paired else None)
    draws, pairs = target.draws, target.draws.pair_id.shape[0]
    check_per_pair(function, "target.p", target.p, pairs, pred.device)
    check_per_pair(function, "target.q", target.q, pairs, pred.device)
    return data, draws.seed, draws.pair_id, draws.index, target.p.float(), target.q.float()


def per_pair(
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
            f" got {describe(objective)}"
        )
    if objective.needs_gain and gain is None:
        what = "k of the denoising step" if objective.name == "spo" else "process.gain(draws)"
        raise ValueError(f"{function}: {objective.name} needs gain [{pairs}] ({what}), got None")
    if gain is not None:
        if not objective.needs_gain:
            raise ValueError(
                f"{function}: gain has no effect on {objective.name}, expected None,"
                f" got {describe(gain)}"
            )
        check_per_pair(function, "gain", gain, pairs, device)
        gain = gain.detach().double()
    if weight is not None:
        check_per_pair(function, "weight", weight, pairs, device)
        weight = weight.detach().double()
    return gain, weight
