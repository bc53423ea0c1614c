"""The operators `fastpref::*` of torch: schemas, fakes, gradients, over the functions of `native`.

float32, bfloat16 and float16 on CPU and CUDA run natively; the oracle computes the rest, and
everything where the core was not built, which is said once.
"""

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from . import native
from .native import empty

_TARGET = "int seed, Tensor? pair_id, Tensor? index, Tensor? p, Tensor? q"
SCHEMAS = {
    "add_noise": "(Tensor x0, Tensor pair_id, Tensor index, Tensor a, Tensor s, int seed,"
    " ScalarType? dtype=None) -> Tensor",
    "pair_error": f"(Tensor pred, Tensor target, {_TARGET}) -> Tensor",
    "pair_cross": f"(Tensor pred, Tensor target, {_TARGET}) -> Tensor",
    "pair_loss": "(Tensor pred, Tensor target, Tensor? ref, Tensor? ref_err, Tensor hyper,"
    f" Tensor? gain, Tensor? weight, int objective, bool safeguard, {_TARGET}) -> (Tensor loss,"
    " Tensor pair_loss, Tensor err, Tensor ref_err, Tensor margin, Tensor importance, Tensor share,"
    " Tensor coef)",
    "pair_grad": f"(Tensor pred, Tensor target, Tensor coef, Tensor? grad, float scale, {_TARGET})"
    " -> Tensor",
    "loss_epilogue": "(Tensor err, Tensor ref_err, Tensor hyper, Tensor? gain, Tensor? weight,"
    " Tensor? cross, int objective) -> (Tensor loss, Tensor pair_loss, Tensor margin,"
    " Tensor importance, Tensor share, Tensor coef)",
    "unit_seed": f"(Tensor pred, Tensor target, float scale, {_TARGET}) -> (Tensor err,"
    " Tensor seed)",
}
_library = torch.library.Library("fastpref", "DEF")
for _name, _schema in SCHEMAS.items():
    # The tag promises what torch.library.opcheck holds the operators to in the tests.
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


# --- Fakes: allocate only ---


def _fake_add_noise(x0, pair_id, index, a, s, seed, dtype=None):
    return torch.empty(x0.shape, dtype=dtype or x0.dtype, device=x0.device)


def _fake_pair_error(pred, target, *_):
    return empty(pred, target.shape[0])


def _fake_pair_cross(pred, target, *_):
    return empty(pred, target.shape[0] // 2)


def _fake_pair_loss(pred, target, ref, ref_err, hyper, gain, weight, objective, safeguard, *_):
    rows = target.shape[0]
    pairs = rows // 2
    share = pairs if safeguard else 0
    sizes = [(), (pairs,), (rows,), (rows,), (pairs,), (rows,), (share,), (rows,)]
    return tuple(empty(pred, *size) for size in sizes)


def _fake_pair_grad(pred, *_):
    # Contiguous, as the kernel writes it, whatever strides pred has.
    return torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)


def _fake_loss_epilogue(err, ref_err, hyper, gain, weight, cross, objective):
    rows = err.shape[0]
    pairs = rows // 2
    sizes = [(), (pairs,), (pairs,), (rows,), (0 if cross is None else pairs,), (rows,)]
    return tuple(empty(err, *size) for size in sizes)


def _fake_unit_seed(pred, target, *_):
    return empty(pred, target.shape[0]), _fake_pair_grad(pred)


for _name in SCHEMAS:
    # One implementation for every device: it looks at the tensors itself.
    _library.impl(_name, getattr(native, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastpref::{_name}", globals()[f"_fake_{_name}"], lib=_library)


# --- Gradients: of pair_error and of the loss, by the prediction or the policy's errors alone ---


def _only(op: str, ctx, names: dict[int, str]) -> None:
    for place, name in names.items():
        if ctx.needs_input_grad[place]:
            raise ValueError(f"fastpref.{op}: {name} must not require a gradient; detach it")


def _keep_pair_error(ctx, inputs, output) -> None:
    _only("pair_error", ctx, {1: "target"})
    pred, target, ctx.seed, *draws = inputs
    ctx.save_for_backward(pred, target, *draws)


def _backward_pair_error(ctx, grad):
    pred, target, *draws = ctx.saved_tensors
    grad_pred = torch.ops.fastpref.pair_grad(pred, target, grad, None, 1.0, ctx.seed, *draws)
    return grad_pred, *[None] * 6


def _keep_pair_loss(ctx, inputs, output) -> None:
    _only("pair_loss", ctx, {1: "target", 2: "ref", 3: "ref_err", 5: "gain", 6: "weight"})
    pred, target, *_, ctx.seed, pair_id, index, p, q = inputs
    ctx.save_for_backward(pred, target, output[-1], pair_id, index, p, q)
    ctx.mark_non_differentiable(*output[1:])
    # Else each backward would fill zeros for the seven outputs that have no gradient.
    ctx.set_materialize_grads(False)


def _backward_pair_loss(ctx, grad, *_):
    if grad is None:
        return (None,) * 14
    pred, target, coef, *draws = ctx.saved_tensors
    scale = 2.0 / target.shape[0]
    grad_pred = torch.ops.fastpref.pair_grad(pred, target, coef, grad, scale, ctx.seed, *draws)
    return grad_pred, *[None] * 13


def _keep_loss_epilogue(ctx, inputs, output) -> None:
    _only("loss_epilogue", ctx, {1: "ref_err", 3: "gain", 4: "weight", 5: "cross"})
    ctx.save_for_backward(inputs[0], output[-1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_loss_epilogue(ctx, grad, *_):
    err, coef = ctx.saved_tensors
    grad_err = None if grad is None else coef * (grad * (2.0 / coef.shape[0]))
    # To autograd coef is a constant: a second derivative would be missing without a word.
    if grad_err is not None and torch.is_grad_enabled():  # create_graph
        grad_err = _Final.apply(grad_err, err)
    return grad_err, *[None] * 6


def _keep_pair_grad(ctx, inputs, output) -> None:
    pass


def _backward_pair_grad(ctx, *_):
    # Without this a gradient penalty added to another loss would silently have no gradient.
    raise RuntimeError("fastpref: the gradient of the loss has no derivative (double backward)")


class _Final(torch.autograd.Function):
    """The value itself, as a function of what it was made of that cannot be differentiated."""

    @staticmethod
    def forward(ctx, value, source):
        return value.clone()

    backward = staticmethod(_backward_pair_grad)


for _name in ("pair_error", "pair_loss", "pair_grad", "loss_epilogue"):
    torch.library.register_autograd(
        f"fastpref::{_name}",
        globals()[f"_backward_{_name}"],
        setup_context=globals()[f"_keep_{_name}"],
        lib=_library,
    )


# --- The loss without the dispatcher, which costs 0.2 ms when the caches are cold ---


def _unwatched(tensor: Tensor) -> bool:
    """Plain eager mode: nothing traces, fakes or transforms what is done to this tensor."""
    return (
        not is_dynamo_compiling()
        and type(tensor) in (Tensor, Parameter)
        and (tensor.is_cpu or tensor.is_cuda)
        # Both private: torch has no public question for either, and each is one C++ call.
        and _len_torch_dispatch_stack() == 0
        and not _are_functorch_transforms_active()
    )


class _PairLoss(torch.autograd.Function):
    """One tensor in, one out: autograd need not look at the others, which come in a tuple."""

    @staticmethod
    def forward(ctx, pred, core, shape, inputs, rest):
        loss, *others = native.checked_pair_loss(core, shape, pred, *inputs)
        # By a list of the caller's: what is returned autograd wraps, one by one.
        rest += others
        target, *_, ctx.seed, pair_id, index, p, q = inputs
        ctx.core, ctx.shape = core, shape
        ctx.save_for_backward(pred, target, others[-1], pair_id, index, p, q)
        return loss

    @staticmethod
    def backward(ctx, grad):
        pred, target, coef, *draws = ctx.saved_tensors
        rest = (pred, target, coef, grad, 2.0 / ctx.shape[0], ctx.seed, *draws)
        # The operator refuses create_graph, and a mode entered since the forward sees it.
        if torch.is_grad_enabled() or not _unwatched(pred):
            return torch.ops.fastpref.pair_grad(*rest), None, None, None, None
        return native.checked_pair_grad(ctx.core, ctx.shape, *rest), None, None, None, None


# Function.apply itself looks at length for tensors that outlived their torch.func transform: here
# they are refused, having no memory.
_apply = super(torch.autograd.Function, _PairLoss).apply


def checked_pair_loss(
    pred: Tensor, target: Tensor, ref, ref_err, hyper, gain, weight, objective: int,
    safeguard: bool, *draws,
) -> tuple[Tensor, ...]:  # fmt: skip
    """torch.ops.fastpref.pair_loss of checked inputs, by the shortest way that gives the same.

    Of the tensors only pred and target may require a gradient.
    """
    inputs = target, ref, ref_err, hyper, gain, weight, objective, safeguard, *draws
    recorded = torch.is_grad_enabled()
    core = native.launchers(pred, pred.dtype, target.dtype) if _unwatched(pred) else None
    if core is None or not native.known(objective) or (recorded and target.requires_grad):
        return torch.ops.fastpref.pair_loss(pred, *inputs)
    rows = target.shape[0]
    shape = rows, rows // 2, pred.shape[0], target.numel() // rows
    if not (recorded and pred.requires_grad):
        return native.checked_pair_loss(core, shape, pred, *inputs)
    rest: list[Tensor] = []
    loss = _apply(pred, core, shape, inputs, rest)
    return loss, *rest
