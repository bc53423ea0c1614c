"""The operators against float64 arithmetic, and as PyTorch has them: compiled, traced, refused."""

import math
import subprocess
import sys

import pytest
import torch
from operands import DTYPES, EPS32, NO_DRAWS, OP, draws, same_bits, unaligned
from torch import Tensor
from torch.autograd import forward_ad

import fastpref
from fastpref import objective, oracle
from fastpref.loss import native as core
from fastpref.loss import ops
from fastpref.loss.objectives import OBJECTIVES


def made(x0: Tensor, seed: int, pair_id, index, p, q) -> Tensor:
    """The target that the draws stand for."""
    if pair_id is None:
        return x0
    return OP.add_noise(x0, pair_id, index, q, p, seed, torch.float32)


def gradient64(pred: Tensor, y: Tensor, coef: Tensor) -> Tensor:
    """sum over the rows of each prediction row of coef * 2 (pred - y) / D, in float64."""
    times, elements = len(y) // len(pred), y[0].numel()
    factor = (coef * 2 / elements)[:, None]
    return (factor * (pred.double().repeat(times, 1) - y.double())).view(times, *pred.shape).sum(0)


def assert_gradient(got: Tensor, true: Tensor, pred: Tensor, y: Tensor, coef: Tensor) -> None:
    """Within an ulp of the dtype and what rounding the residual to float32 costs."""
    size = pred.double().abs().repeat(len(y) // len(pred), 1) + y.double().abs()
    slack = (coef.abs()[:, None] * size * 8 * EPS32 / y[0].numel()).view(-1, *pred.shape).sum(0)
    least = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    ulp = true.abs() * torch.finfo(got.dtype).eps + least
    assert ((got.double() - true).abs() <= ulp + slack).all()


@pytest.mark.parametrize("elements", [1, 3, 8191, 8193, 100003])
@pytest.mark.parametrize("regenerated", [False, True])
@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_and_gradients(dtype, target_dtype, regenerated, elements, device):
    """Every mix of types, odd sizes, unaligned rows, one prediction for both members or two."""
    pairs = 2
    target = unaligned(2 * pairs, elements, target_dtype, device)
    source = draws(pairs, device) if regenerated else NO_DRAWS
    y = made(target, *source)
    coef = torch.tensor([3.0, -1.0, 0.25, 40.0], dtype=torch.float64, device=device)
    grad = torch.tensor(0.5, dtype=torch.float64, device=device)
    for pred_rows in (2 * pairs, pairs):
        pred = unaligned(pred_rows, elements, dtype, device, seed=1)
        err, err64 = OP.pair_error(pred, target, *source), oracle.pair_error(pred, y)
        torch.testing.assert_close(err, err64, rtol=4 * EPS32, atol=0)
        got = OP.pair_grad(pred, target, coef, grad, 2.0, *source)
        assert got.dtype == dtype
        assert_gradient(got, gradient64(pred, y, coef), pred, y, coef)
    pred = unaligned(2 * pairs, elements, dtype, device, seed=1)
    scale = 2.0 ** math.floor(math.log2(elements))
    err, seed = OP.unit_seed(pred, target, scale, *source)
    assert torch.equal(err, OP.pair_error(pred, target, *source))
    coef = torch.full_like(coef, scale)
    assert_gradient(seed, gradient64(pred, y, coef), pred, y, coef)


@pytest.mark.parametrize("ref_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_loss_is_errors_then_epilogue(ref_dtype, device):
    """One launch gives the bits of the separate steps, with the reference given in either way."""
    pred, ref, target = (unaligned(6, 10007, torch.bfloat16, device, seed) for seed in range(3))
    ref = ref.to(ref_dtype)
    gain, weight = torch.tensor([[0.1, 0.2, 5.0], [1.0, 0.0, 2.0]], device=device).double()
    obj = objective("sdpo", beta=700.0, safeguard=0.6)
    hyper = obj.hyper_tensor(pred.device)
    for source in (NO_DRAWS, draws(3, device)):
        err, ref_err = (OP.pair_error(x, target, *source) for x in (pred, ref))
        for guarded in (False, True):
            arguments = (hyper, gain, weight, obj.number, guarded)
            out = OP.pair_loss(pred, target, ref, None, *arguments, *source)
            cached = OP.pair_loss(pred, target, None, ref_err, *arguments, *source)
            cross = OP.pair_cross(pred, target, *source) if guarded else None
            loss, pair_loss, *rest = OP.loss_epilogue(
                err, ref_err, hyper, gain, weight, cross, obj.number
            )
            for got in (out, cached):
                expected = (loss, pair_loss, err, ref_err, *rest)
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# --- As torch operators ---


def calls() -> dict[str, tuple]:
    """Arguments of each operator, those that may be differentiated asking for it."""
    pred, ref, target = (torch.randn(4, 3, 35).bfloat16() for _ in range(3))
    hyper = objective("dpo", beta=10.0).hyper_tensor(pred.device)
    coef, err, ref_err = torch.rand(3, 4, dtype=torch.float64)
    weight = torch.ones(2, dtype=torch.float64)
    seed, pair_id, index, p, q = source = draws(2)
    learned, learned_err = pred.clone().requires_grad_(), err.clone().requires_grad_()
    return {
        "add_noise": (target, pair_id, index, p, q, seed),
        "pair_error": (learned, target, *source),
        "pair_cross": (pred, target, *source),
        "pair_loss": (learned, target, ref, None, hyper, None, weight, 0, True, *source),
        "pair_grad": (pred, target, coef, err[0].clone(), 0.5, *source),
        "loss_epilogue": (learned_err, ref_err.clone(), hyper, None, weight, ref_err[:2] - 0.5, 0),
        "unit_seed": (pred, target, 64.0, *source),
    }


@pytest.mark.parametrize("name", list(ops.SCHEMAS))
def test_opcheck(name):
    """Schema, fake, autograd registration and tracing with dynamic shapes."""
    torch.library.opcheck(getattr(OP, name).default, calls()[name])


@pytest.mark.parametrize("name", list(ops.SCHEMAS))
def test_compiles_whole(name):
    """torch.compile(fullgraph=True) gives the bits of eager mode, gradients too."""
    arguments = calls()[name]

    def run(call) -> list[Tensor]:
        out = call(*arguments)
        results = list(out) if isinstance(out, tuple) else [out]
        learned = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        grads = torch.autograd.grad(results[0].sum(), learned) if learned else ()
        return [x.detach() for x in (*results, *grads)]

    torch._dynamo.reset()
    op = getattr(OP, name)
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    assert same_bits(run(op), run(compiled))


@pytest.mark.parametrize("name", list(ops.SCHEMAS))
def test_without_the_core_the_oracle_serves(name, monkeypatch):
    """The same schemas, the same numbers within rounding, gradients too."""
    arguments = calls()[name]

    def run() -> list[Tensor]:
        out = getattr(OP, name)(*arguments)
        results = list(out) if isinstance(out, tuple) else [out]
        learned = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        return [*results, *(torch.autograd.grad(results[0].sum(), learned) if learned else ())]

    with_core = run()
    monkeypatch.setattr(core, "_C", None)
    for a, b in zip(with_core, run(), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        rtol = 2 * torch.finfo(a.dtype).eps if a.dtype != torch.float64 else 1e-5
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-5)


def test_the_short_way_is_the_operator():
    """ops.checked_pair_loss and the operator: the same bits, gradients, marks and refusals."""
    arguments = calls()["pair_loss"]
    for call in (ops.checked_pair_loss, OP.pair_loss):
        out = call(*arguments)
        assert [x.requires_grad for x in out] == [True] + [False] * 7
        with pytest.raises(ValueError, match="target must not require a gradient"):
            call(arguments[0], arguments[1].clone().requires_grad_(), *arguments[2:])
        with torch.no_grad():
            assert not call(*arguments)[0].requires_grad
        (grad,) = torch.autograd.grad(out[0], arguments[0], create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            (grad.square().sum() + arguments[0].sum()).backward()

    def run(call) -> list[Tensor]:
        out = call(*arguments)
        return [*(x.detach() for x in out), *torch.autograd.grad(2 * out[0], arguments[0])]

    assert same_bits(run(ops.checked_pair_loss), run(OP.pair_loss))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(ops.checked_pair_loss(*arguments)[0], torch._subclasses.FakeTensor)


def test_a_missing_core_is_said_once():
    code = (
        "import sys; sys.modules['fastpref._C'] = None\n"
        "import fastpref; print(fastpref.build_info()['why_not_cuda'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and "not built" in run.stdout
    assert run.stderr.count("the compiled core is missing") == 1


def test_import_is_light():
    """`import fastpref` loads neither torch nor the core; the operators load no diffusers."""
    code = (
        "import sys, fastpref; assert 'torch' not in sys.modules\n"
        "fastpref.preference_loss; assert 'diffusers' not in sys.modules\n"
        "import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_objective_of_the_oracle_alone_trains(monkeypatch):
    """Errors natively, its functor by the oracle."""
    square = len(oracle.OBJECTIVES)
    added = (*oracle.OBJECTIVES, lambda h, e_w, e_l, r_w, r_l, gain: (e_w**2 - e_l, e_w))
    monkeypatch.setattr(oracle, "OBJECTIVES", added)
    pred, target = torch.randn(4, 70, requires_grad=True), torch.randn(4, 70)
    ref_err = torch.rand(4, dtype=torch.float64)
    out = OP.pair_loss(pred, target, None, ref_err, HYPER, None, None, square, False, *NO_DRAWS)
    err_w = OP.pair_error(pred, target, *NO_DRAWS)[:2]
    expected = torch.cat((2 * err_w, -torch.ones(2)))
    torch.testing.assert_close(out[-1], expected.detach(), rtol=1e-12, atol=0)
    out[0].backward()
    assert_gradient(pred.grad, gradient64(pred, target, out[-1] / 2), pred, target, out[-1] / 2)
    public = objective("dpo", beta=1.0)
    monkeypatch.setattr(type(public), "number", square)
    assert same_bits(fastpref.preference_loss(pred, target, ref_err, public).coef, out[-1])


@pytest.mark.parametrize("name", ["pair_error", "pair_loss", "loss_epilogue"])
def test_no_second_derivative(name):
    """Double backward raises rather than being silently wrong; expanded gradients are fine."""
    arguments = calls()[name]
    learned = next(a for a in arguments if isinstance(a, Tensor) and a.requires_grad)
    out = getattr(OP, name)(*arguments)
    first = out[0] if isinstance(out, tuple) else out
    (grad,) = torch.autograd.grad(first.sum(), learned, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        (grad.square().sum() + learned.sum()).backward()


TARGET, ERRORS = torch.zeros(4, 5), torch.zeros(4, dtype=torch.float64)
HYPER = objective("dpo", beta=1.0).hyper_tensor(TARGET.device)
BAD_CALLS = {
    "pred must be like the target": lambda: OP.pair_error(torch.zeros(4, 6), TARGET, *NO_DRAWS),
    "the batch must be": lambda: OP.pair_error(torch.zeros(3, 5), TARGET, *NO_DRAWS),
    "pair_id must be torch.int64 [2]": lambda: OP.pair_grad(
        TARGET, TARGET, ERRORS, None, 1.0, 0, torch.zeros(2), *draws(2)[2:]
    ),
    "p must be torch.float32 [2]": lambda: OP.pair_error(
        TARGET, TARGET, *draws(2)[:3], torch.zeros(3), torch.zeros(2)
    ),
    "coef must be torch.float64 [4]": lambda: OP.pair_grad(
        TARGET, TARGET, ERRORS[:3], None, 1.0, *NO_DRAWS
    ),
    "one of ref and ref_err": lambda: OP.pair_loss(
        TARGET, TARGET, None, None, HYPER, None, None, 0, False, *NO_DRAWS
    ),
    "weight must be torch.float64 [2]": lambda: OP.loss_epilogue(
        ERRORS, ERRORS, HYPER, None, torch.zeros(2), None, 0
    ),
    "cross must be torch.float64 [2]": lambda: OP.loss_epilogue(
        ERRORS, ERRORS, HYPER, None, None, ERRORS, 0
    ),
    "pred must be of the target's 4 rows": lambda: OP.pair_cross(TARGET[:2], TARGET, *NO_DRAWS),
    "target must not require a gradient": lambda: OP.pair_error(
        TARGET, TARGET.clone().requires_grad_(), *NO_DRAWS
    ),
    "objective must be": lambda: OP.loss_epilogue(
        ERRORS, ERRORS, HYPER, None, None, None, len(OBJECTIVES)
    ),
}


@pytest.mark.parametrize("message", list(BAD_CALLS))
def test_what_pointers_read_is_checked(message):
    with pytest.raises(ValueError, match=r"^fastpref\.") as error:
        BAD_CALLS[message]()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_forward_mode_derivative_is_refused_not_zero():
    """By torch.func.jvp and by dual tensors: without a word both would say 0."""
    p, y, r, tangent = torch.randn(4, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    dpo = fastpref.objective("dpo", beta=10.0)
    errors = torch.rand(2, dtype=torch.float64)
    losses = [
        lambda p: fastpref.preference_loss(p, y, r, dpo).loss,
        lambda p: fastpref.pair_error(p, y).sum(),
        lambda p: fastpref.loss_from_errors(p.double().mean((1, 2)), errors, dpo).loss,
    ]
    for loss in losses:
        with pytest.raises(RuntimeError, match="no forward-mode derivative here: use backward"):
            torch.func.jvp(loss, (p,), (tangent,))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode tangent"):
            loss(forward_ad.make_dual(p, tangent))
