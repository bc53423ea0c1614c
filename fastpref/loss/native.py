"""The compiled core called with tensors: checks, addresses, and the oracle where it cannot serve.

One function for each operator of `ops`. Row r of a target belongs to pair r % pairs, winners first,
and reads prediction row r % len(pred). A target is a tensor, or x0 with pair_id, index [P] int64
and p, q [P] float32: y = p eps + q x0, eps regenerated from (seed, pair_id, index). Whatever is one
number per row or pair is float64. Outputs are allocated here, nothing is mutated, nothing waits for
the device, and the stream is read on every call.
"""

import math
import os
import warnings
from typing import NoReturn

import torch
from torch import Tensor

from . import oracle

try:
    from .. import _C
except ImportError as error:
    _C = None
    warnings.warn(
        f"fastpref: the compiled core is missing ({error}): everything runs on the slower pure"
        " PyTorch implementation; `pip install -e .` in the source tree builds it",
        stacklevel=2,
    )
else:
    # For measuring and for doubts about one of them: results are the same bits.
    if (_asked := os.environ.get("FASTPREF_CPU")) and not _C.cpu.use(_asked):
        raise ValueError(
            f"FASTPREF_CPU: expected avx512, avx2 or portable, as this machine allows, got {_asked}"
        )

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Dtype of csrc/kernels.h
HYPERS = len(oracle.Hyper._fields)


def build_info() -> dict[str, object]:
    """What was compiled: cpu (instruction set in use), compiler, cuda (archs), nvcc, or why not."""
    if _C is None:
        nothing = dict.fromkeys(("cpu", "compiler", "cuda", "nvcc"), "")
        return nothing | {"why_not_cuda": "_C was not built"}
    return dict(_C.build_info())


# --- Calling the core ---


def launchers(like: Tensor, *dtypes: torch.dtype):
    """The launchers for these dtypes on the tensor's device, or None: the oracle has to serve."""
    for dtype in dtypes:
        if dtype not in DTYPES:
            return None
    # is_cpu first: device.type makes a string at every look, 8 us with cold caches.
    native = getattr(_C, "cpu" if like.is_cpu else like.device.type, None)
    if native is None and like.is_cuda and _C is not None:
        warnings.warn(
            "fastpref: the compiled core has no CUDA kernels"
            f" ({_C.build_info()['why_not_cuda']}): CUDA tensors run on slower PyTorch code",
            stacklevel=2,
        )
    return native


def known(objective: int) -> bool:
    """Whether the core has this objective; one that stands in the oracle alone is served there."""
    return _C is not None and objective < _C.objectives


def last(like: Tensor) -> int:
    """A launcher's last argument: the number of threads, or the current stream."""
    if like.is_cpu:
        return torch.get_num_threads()
    # As Inductor's code asks; torch.cuda.current_stream() makes an object of it first.
    return torch._C._cuda_getCurrentRawStream(like.device.index)


def _launch(launcher, like: Tensor, *arguments) -> None:
    """Call the core on like's device: tensors as addresses, None as 0, dtypes as numbers."""
    alive, plain = [], []  # what is read must lie in memory as it is, until the core returns
    for argument in arguments:
        if argument is None:
            plain.append(0)
        elif type(argument) in (int, float):  # the slower questions only for what needs them
            plain.append(argument)
        elif isinstance(argument, torch.dtype):
            plain.append(DTYPES[argument])
        elif not isinstance(argument, Tensor):
            plain.append(argument)  # an integer of another type, such as numpy's
        else:
            # A negated view's sign is a flag of the tensor: its memory holds the other one.
            if argument.is_neg() or not argument.is_contiguous():
                argument = argument.resolve_neg().contiguous()
                alive.append(argument)
            plain.append(argument.data_ptr())
    # CUDA refuses to launch into a stream of a device that is not the current one.
    if like.is_cuda and torch.cuda.device_count() > 1:
        with torch.cuda.device(like.device):
            return launcher(*plain, last(like))
    return launcher(*plain, last(like))


def empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=like.device)


def workspace_of(
    native, shape: tuple, with_ref: bool, like: Tensor, with_cross: bool = False
) -> Tensor | None:
    if like.is_cpu:
        return None
    size = native.workspace_bytes(*shape, with_ref, with_cross)
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def _fail(op: str, argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"fastpref.{op}: {argument} must be {expected}, got {got}")


def _check_vector(
    op: str, name: str, t: Tensor | None, n: int, dtype: torch.dtype, like: Tensor
) -> None:
    """Pointers follow: whatever reaches the core has the size, type and device it is read with."""
    if t is not None and (t.numel() != n or t.dtype != dtype or t.device != like.device):
        got = f"{t.dtype} {list(t.shape)} on {t.device}"
        _fail(op, name, f"{dtype} [{n}] on {like.device}", got)


def _check_objective(op: str, objective: int) -> None:
    if not 0 <= objective < len(oracle.OBJECTIVES):
        _fail(op, "objective", f"a number from 0 to {len(oracle.OBJECTIVES) - 1}", objective)


def _check_draws(op: str, pairs: int, like: Tensor, **vectors: Tensor) -> None:
    for name, tensor in vectors.items():
        dtype = torch.int64 if name in ("pair_id", "index") else torch.float32
        _check_vector(op, name, tensor, pairs, dtype, like)


def _shape(
    op: str, pred: Tensor, target: Tensor, pairs: int | None, pair_id, index, p, q
) -> tuple[int, int, int, int]:
    """(rows, pairs, pred_rows, elements) as in kernels.h, after checking what pointers read."""
    rows, pred_rows = target.shape[0], pred.shape[0]
    if pairs is None:
        pairs = len(pair_id) if pair_id is not None else min(rows, pred_rows)
    elements = math.prod(target.shape[1:])
    if pred.shape[1:] != target.shape[1:] or elements == 0:
        _fail(op, "pred", f"like the target but for rows, {list(target.shape)}", list(pred.shape))
    if rows not in (pairs, 2 * pairs) or pred_rows not in (pairs, rows) or rows == 0:
        _fail(op, "the batch", f"{pairs} or {2 * pairs} rows", f"pred {pred_rows}, target {rows}")
    if pred.device != target.device:
        _fail(op, "target", f"on {pred.device}", target.device)
    if pair_id is not None:
        if index is None or p is None or q is None:
            _fail(op, "index, p and q", "given with pair_id", "None")
        _check_draws(op, pairs, pred, pair_id=pair_id, index=index, p=p, q=q)
    return rows, pairs, pred_rows, elements


def _regenerated(target: Tensor, seed: int, pair_id, index, p, q) -> Tensor:
    """The target as a tensor, by the oracle."""
    if pair_id is None:
        return target
    eps = oracle.normal(seed, pair_id, index, math.prod(target.shape[1:]))
    return oracle.mix(target, eps, q, p)


# --- Implementations ---


def add_noise(x0, pair_id, index, a, s, seed, dtype=None):
    dtype = dtype or x0.dtype
    pairs = len(pair_id)
    rows, elements = x0.shape[0], math.prod(x0.shape[1:])
    if rows not in (pairs, 2 * pairs) or elements == 0 or rows == 0:
        _fail("add_noise", "x0", f"[{pairs} or {2 * pairs}, ...]", list(x0.shape))
    _check_draws("add_noise", pairs, x0, pair_id=pair_id, index=index, a=a, s=s)
    native = launchers(x0, x0.dtype, dtype)
    if native is None:
        return oracle.mix(x0, oracle.normal(seed, pair_id, index, elements), a, s).to(dtype)
    out = torch.empty(x0.shape, dtype=dtype, device=x0.device)
    _launch(
        native.add_noise, x0, rows, pairs, elements, x0, x0.dtype, out, dtype,
        seed, pair_id, index, a, s,
    )  # fmt: skip
    return out


def pair_error(pred, target, seed, pair_id, index, p, q):
    shape = _shape("pair_error", pred, target, None, pair_id, index, p, q)
    native = launchers(pred, pred.dtype, target.dtype)
    if native is None:
        return oracle.pair_error(pred, _regenerated(target, seed, pair_id, index, p, q))
    err = empty(pred, shape[0])
    workspace = workspace_of(native, shape, False, pred)
    _launch(
        native.pair_error, pred, *shape, pred, None, pred.dtype, target, target.dtype,
        seed, pair_id, index, p, q, err, None, workspace, None,
    )  # fmt: skip
    return err


def pair_cross(pred, target, seed, pair_id, index, p, q):
    shape = _shape_of_pairs("pair_cross", pred, target, True, pair_id, index, p, q)
    native = launchers(pred, pred.dtype, target.dtype)
    if native is None:
        return oracle.pair_cross(pred, _regenerated(target, seed, pair_id, index, p, q))
    err, cross = empty(pred, shape[0]), empty(pred, shape[1])
    workspace = workspace_of(native, shape, False, pred, True)
    _launch(
        native.pair_error, pred, *shape, pred, None, pred.dtype, target, target.dtype,
        seed, pair_id, index, p, q, err, None, workspace, cross,
    )  # fmt: skip
    return cross


def pair_loss(
    pred, target, ref, ref_err, hyper, gain, weight, objective, safeguard, seed, pair_id, index, p,
    q,
):  # fmt: skip
    shape = _shape_of_pairs("pair_loss", pred, target, safeguard, pair_id, index, p, q)
    pairs = shape[1]
    if (ref is None) == (ref_err is None):
        _fail("pair_loss", "one of ref and ref_err", "given", "both or neither")
    if ref is not None and (ref.shape != pred.shape or ref.device != pred.device):
        _fail("pair_loss", "ref", f"{list(pred.shape)} on {pred.device}", list(ref.shape))
    _check_scalars("pair_loss", pairs, pred, hyper, gain, weight, ref_err)
    _check_objective("pair_loss", objective)
    native = launchers(pred, pred.dtype, target.dtype) if known(objective) else None
    # The kernel reads prediction and reference in one dtype.
    if ref is not None and (native is None or ref.dtype != pred.dtype):
        ref, ref_err = None, pair_error(ref, target, seed, pair_id, index, p, q)
    if native is None:
        err = pair_error(pred, target, seed, pair_id, index, p, q)
        cross = pair_cross(pred, target, seed, pair_id, index, p, q) if safeguard else None
        loss, *rest = loss_epilogue(err, ref_err, hyper, gain, weight, cross, objective)
        # A clone, here and below: no output of an operator may be one of its inputs (opcheck).
        return loss, rest[0], err, ref_err.clone(), *rest[1:]
    return checked_pair_loss(
        native, shape, pred, target, ref, ref_err, hyper, gain, weight, objective, safeguard, seed,
        pair_id, index, p, q,
    )  # fmt: skip


def _shape_of_pairs(op: str, pred, target, both: bool, pair_id, index, p, q):
    """`_shape` of 2B rows, winners first; both: each with a prediction of its own."""
    rows = target.shape[0]
    if rows % 2:
        _fail(op, "the target's batch", "even, winners first", rows)
    shape = _shape(op, pred, target, rows // 2, pair_id, index, p, q)
    if both and pred.shape[0] != rows:
        _fail(op, "pred", f"of the target's {rows} rows", pred.shape[0])
    return shape


def checked_pair_loss(
    native, shape, pred, target, ref, ref_err, hyper, gain, weight, objective, safeguard, seed,
    pair_id, index, p, q,
):  # fmt: skip
    """pair_loss by these launchers, of what has been checked; shape: as `_shape` gives it."""
    rows, pairs, *_ = shape
    loss, pair_loss, margin = empty(pred), empty(pred, pairs), empty(pred, pairs)
    err, importance, coef = empty(pred, rows), empty(pred, rows), empty(pred, rows)
    ref_err = ref_err.clone() if ref is None else empty(pred, rows)
    cross, share = empty(pred, pairs) if safeguard else None, empty(pred, pairs if safeguard else 0)
    workspace = workspace_of(native, shape, ref is not None, pred, safeguard)
    _launch(
        native.pair_loss, pred, *shape[1:], pred, ref, pred.dtype, target, target.dtype,
        seed, pair_id, index, p, q, err, ref_err, workspace, objective, hyper, gain, weight,
        loss, pair_loss, margin, importance, coef, cross, share if safeguard else None,
    )  # fmt: skip
    return loss, pair_loss, err, ref_err, margin, importance, share, coef


def _check_scalars(op: str, pairs: int, like: Tensor, hyper, gain, weight, *errors) -> None:
    sizes = [("hyper", hyper, HYPERS), ("gain", gain, pairs), ("weight", weight, pairs)]
    sizes += [("the errors", err, 2 * pairs) for err in errors]
    for name, tensor, size in sizes:
        _check_vector(op, name, tensor, size, torch.float64, like)


def loss_epilogue(err, ref_err, hyper, gain, weight, cross, objective):
    pairs, odd = divmod(len(err), 2)
    if odd or pairs == 0:
        _fail("loss_epilogue", "err", "[2B], winners first", list(err.shape))
    _check_scalars("loss_epilogue", pairs, err, hyper, gain, weight, err, ref_err)
    _check_vector("loss_epilogue", "cross", cross, pairs, torch.float64, err)
    _check_objective("loss_epilogue", objective)
    native = launchers(err) if known(objective) else None
    if native is None:
        return oracle.epilogue(objective, hyper, err, ref_err, gain, weight, cross)
    loss, pair_loss, margin = empty(err), empty(err, pairs), empty(err, pairs)
    importance, coef = empty(err, 2 * pairs), empty(err, 2 * pairs)
    share = empty(err, 0 if cross is None else pairs)
    _launch(
        native.loss_epilogue, err, pairs, objective, hyper, gain, weight, err, ref_err,
        loss, pair_loss, margin, importance, coef, cross, None if cross is None else share,
    )  # fmt: skip
    return loss, pair_loss, margin, importance, share, coef


def pair_grad(pred, target, coef, grad, scale, seed, pair_id, index, p, q):
    shape = _shape("pair_grad", pred, target, None, pair_id, index, p, q)
    _check_vector("pair_grad", "coef", coef, shape[0], torch.float64, pred)
    _check_vector("pair_grad", "grad", grad, 1, torch.float64, pred)
    native = launchers(pred, pred.dtype, target.dtype)
    if native is None:
        y = _regenerated(target, seed, pair_id, index, p, q)
        return oracle.pair_grad(pred, y, coef * scale * (1.0 if grad is None else grad))
    return checked_pair_grad(
        native, shape, pred, target, coef, grad, scale, seed, pair_id, index, p, q
    )


def checked_pair_grad(native, shape, pred, target, coef, grad, scale, seed, pair_id, index, p, q):
    """pair_grad by these launchers, of what has been checked."""
    # Not with a permuted prediction's own strides: the kernel writes row after row.
    out = torch.empty_like(pred, memory_format=torch.contiguous_format)
    _launch(
        native.pair_grad, pred, *shape, pred, pred.dtype, target, target.dtype,
        seed, pair_id, index, p, q, coef, grad, scale, out,
    )  # fmt: skip
    return out


def unit_seed(pred, target, scale, seed, pair_id, index, p, q):
    shape = _shape("unit_seed", pred, target, None, pair_id, index, p, q)
    rows, pairs, pred_rows, elements = shape
    if pred_rows != rows:
        _fail("unit_seed", "pred", f"of the target's {rows} rows", pred_rows)
    native = launchers(pred, pred.dtype, target.dtype)
    if native is None:
        y = _regenerated(target, seed, pair_id, index, p, q)
        factor = empty(pred, rows).fill_(scale)
        return oracle.pair_error(pred, y), oracle.pair_grad(pred, y, factor)
    err, out = empty(pred, rows), torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    workspace = workspace_of(native, shape, False, pred)
    _launch(
        native.unit_seed, pred, rows, pairs, elements, pred, pred.dtype,
        target, target.dtype, seed, pair_id, index, p, q, err, workspace, scale, out,
    )  # fmt: skip
    return err, out
