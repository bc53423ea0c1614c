"""The operators against float64 arithmetic, and what must not show: threads, vectors, forks."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import product

import pytest
import torch
from torch import Tensor

from fastpref import objective, ops, oracle

OP = torch.ops.fastpref
EPS32 = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NO_DRAWS = (0, None, None, None, None)
native = pytest.mark.skipif(ops._C is None, reason="needs the compiled core")


def instruction_sets() -> list[str]:
    if ops._C is None:
        return []
    used = ops._C.cpu.features()
    found = [name for name in ("portable", "avx2", "avx512") if ops._C.cpu.use(name)]
    ops._C.cpu.use(used)
    return found


@pytest.fixture(params=instruction_sets())
def instruction_set(request):
    """Every set of vector loops this machine can run."""
    used = ops._C.cpu.features()
    assert ops._C.cpu.use(request.param)
    yield request.param
    ops._C.cpu.use(used)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def unaligned(rows: int, elements: int, dtype: torch.dtype, device="cpu", seed: int = 0) -> Tensor:
    """Random numbers that start one element past an aligned address."""
    random = torch.Generator().manual_seed(seed)
    flat = torch.randn(rows * elements + 1, generator=random).to(device, dtype)
    return flat[1:].view(rows, elements)


def draws(pairs: int, device="cpu") -> tuple:
    """(seed, pair_id, index, p, q)."""
    numbers = torch.arange(pairs, device=device)
    p, q = 1.0 + 0.1 * numbers, -1.0 - 0.2 * numbers
    return 2**62 + 5, numbers * 2**60 - 7, numbers + 3, p, q


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
    obj = objective("sdpo", beta=700.0)
    hyper = obj.hyper_tensor(pred.device)
    for source in (NO_DRAWS, draws(3, device)):
        err, ref_err = (OP.pair_error(x, target, *source) for x in (pred, ref))
        arguments = (hyper, gain, weight, obj.number)
        out = OP.pair_loss(pred, target, ref, None, *arguments, *source)
        cached = OP.pair_loss(pred, target, None, ref_err, *arguments, *source)
        loss, pair_loss, *rest = OP.loss_epilogue(err, ref_err, *arguments)
        for got in (out, cached):
            expected = (loss, pair_loss, err, ref_err, *rest)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# --- What must not show ---


def all_outputs(elements: int = 400_003, pairs: int = 2) -> list[Tensor]:
    """Every operator's results on numbers that fill several chunks, in every mix of types."""
    results = []
    for dtype, target_dtype in product(DTYPES, DTYPES):
        pred, ref = (unaligned(2 * pairs, elements, dtype, seed=seed) for seed in (1, 2))
        target = unaligned(2 * pairs, elements, target_dtype)
        hyper = objective("dpo", beta=300.0).hyper_tensor(pred.device)
        for source in (NO_DRAWS, draws(pairs)):
            out = OP.pair_loss(pred, target, ref, None, hyper, None, None, 0, *source)
            grad = OP.pair_grad(pred, target, out[-1], out[0], 0.5, *source)
            shared = OP.pair_grad(pred[:pairs], target, out[-1], None, 1.0, *source)
            results += [*out, grad, shared, *OP.unit_seed(pred, target, 4096.0, *source)]
        seed, pair_id, index, p, q = draws(pairs)
        results.append(OP.add_noise(target, pair_id, index, q, p, seed, dtype))
    return results


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    views = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return all(
        torch.equal(x.view(views[x.itemsize]), y.view(views[y.itemsize]))
        for x, y in zip(a, b, strict=True)
    )


@native
def test_bits_do_not_depend_on_the_instruction_set_or_the_threads(threads):
    used = ops._C.cpu.features()
    try:
        threads(1)
        ops._C.cpu.use("portable")
        first = all_outputs(40_003)
        for name, count in product(instruction_sets(), (1, 3)):
            ops._C.cpu.use(name)
            threads(count)
            assert same_bits(first, all_outputs(40_003)), f"{name}, {count} threads"
    finally:
        ops._C.cpu.use(used)


@native
def test_bits_do_not_depend_on_many_threads(threads):
    threads(1)
    first = all_outputs()
    for count in (2, 5, 16):
        threads(count)
        assert same_bits(first, all_outputs()), count


@native
def test_callers_at_once(threads):
    """Python threads that call at the same time share the pool without sharing results."""
    threads(3)
    expected = all_outputs(100_003)
    outcomes: list[bool] = []

    def call() -> None:
        outcomes.append(same_bits(expected, all_outputs(100_003)))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert outcomes == [True] * 4


def wait_for(child: int) -> int:
    """The exit code of a forked child, or a failure after half a minute."""
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


@native
def test_survives_a_fork(threads):
    """A child has none of its parent's threads, nor OpenMP: many calls at once on its own pool."""
    threads(4)
    pred, target = torch.randn(2, 1_000_003), torch.randn(2, 1_000_003)
    expected = OP.pair_error(pred, target, *NO_DRAWS).tolist()

    def same(times: int) -> bool:
        runs = (OP.pair_error(pred, target, *NO_DRAWS).tolist() for _ in range(times))
        return all(run == expected for run in runs)

    child = os.fork()
    if child == 0:
        outcomes: list[bool] = []
        callers = [threading.Thread(target=lambda: outcomes.append(same(20))) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        os._exit(0 if [*outcomes, same(3)] == [True] * 4 else 1)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0 and same(3)


@native
@pytest.mark.parametrize("asked, expected", [("portable", "portable"), ("sse9", "FASTPREF_CPU")])
def test_an_instruction_set_can_be_asked_for(asked, expected):
    run = subprocess.run(
        [sys.executable, "-c", "import fastpref; print(fastpref.build_info()['cpu'])"],
        env={**os.environ, "FASTPREF_CPU": asked},
        capture_output=True,
        text=True,
    )
    last = (run.stdout or run.stderr).strip().splitlines()[-1]
    assert (run.returncode == 0) == (asked == expected) and expected in last


# --- The numbers themselves: conversions, NaN and Inf, memory ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_are_torchs(dtype, instruction_set):
    """All 65536 values widen exactly; floats of every size, ties and NaN round as torch rounds."""

    def convert(x: Tensor, to: torch.dtype) -> Tensor:
        zero, one = torch.zeros(1), torch.ones(1)
        number = torch.zeros(1, dtype=torch.int64)
        return OP.add_noise(x[None], number, number, one, zero, 0, to)[0]

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))

    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert same(convert(halves, torch.float32), halves.float())
    assert same(convert(halves, dtype), halves)
    bits = torch.randint(-(2**31), 2**31, (300_001,), generator=torch.Generator().manual_seed(0))
    everywhere = bits.to(torch.int32).view(torch.float32)
    spacing = halves.float().nan_to_num(0, 0, 0)
    ties = (spacing + torch.roll(spacing, 1)) / 2  # halfway between neighbours, most of them
    for x in (everywhere, ties, ties * (1 + EPS32), ties * (1 - EPS32)):
        assert same(convert(x, dtype), x.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", [0, 77, 8192, 9000])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_pass_through(bad, where, dtype, instruction_set):
    """One bad element: its row's error, all of its pair's coefficients, its place in the seed."""
    clean, target, ref = (torch.randn(4, 9001).to(dtype) for _ in range(3))
    hyper = objective("dpo_cm", beta=9.0).hyper_tensor(clean.device)
    for tensor in range(3):
        inputs = [clean.clone(), target.clone(), ref.clone()]
        inputs[tensor][2, where] = bad
        out = OP.pair_loss(*inputs, None, hyper, None, None, 4, *NO_DRAWS)
        err, coef = (out[3] if tensor == 2 else out[2]), out[-1]
        assert err.isfinite().tolist() == [True, True, False, True]
        assert coef.isnan().tolist() == [True, False, True, False] and not out[0].isfinite()
        if tensor == 2:
            continue
        err, seed = OP.unit_seed(*inputs[:2], 8192.0, *NO_DRAWS)
        assert err.isfinite().tolist() == [True, True, False, True]
        wrong = (~seed.isfinite()).nonzero().tolist()
        assert wrong == [[2, where]]
        assert not math.isnan(bad) or seed[2, where].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("elements", [1, 63, 64, 8257])
def test_outputs_are_written_whole_and_nothing_else(elements, dtype, instruction_set):
    """Poisoned, misaligned outputs between guards, written by pointer."""
    guard, code = 67, ops._DTYPES[dtype]
    pred, target = unaligned(2, elements, dtype), unaligned(2, elements, dtype, seed=1)
    coef = torch.tensor([3.0, -2.0], dtype=torch.float64)
    seed, pair_id, index, p, q = draws(1)
    err = torch.empty(2, dtype=torch.float64)
    y = (target.data_ptr(), code, seed, *(t.data_ptr() for t in (pair_id, index, p, q)))

    def noise(out: int) -> None:
        a, s = q.data_ptr(), p.data_ptr()
        ops._C.cpu.add_noise(2, 1, elements, target.data_ptr(), code, out, code, *y[2:5], a, s, 2)

    def grad(out: int) -> None:
        shape = (2, 1, 2, elements)
        ops._C.cpu.pair_grad(*shape, pred.data_ptr(), code, *y, coef.data_ptr(), 0, 1.0, out, 2)

    def unit(out: int) -> None:
        shape = (2, 1, elements)
        ops._C.cpu.unit_seed(*shape, pred.data_ptr(), code, *y, err.data_ptr(), 0, 64.0, out, 2)

    source = (seed, pair_id, index, p, q)
    expected = {
        noise: OP.add_noise(target, pair_id, index, q, p, seed, dtype),
        grad: OP.pair_grad(pred, target, coef, None, 1.0, *source),
        unit: OP.unit_seed(pred, target, 64.0, *source)[1],
    }
    for launch, values in expected.items():
        memory = torch.full((2 * elements + 2 * guard,), math.nan, dtype=dtype)
        launch(memory[guard:].data_ptr())
        assert memory[:guard].isnan().all() and memory[-guard:].isnan().all()
        assert torch.equal(memory[guard:-guard].view(2, elements), values)


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
        "pair_loss": (learned, target, ref, None, hyper, None, weight, 0, *source),
        "pair_grad": (pred, target, coef, err[0].clone(), 0.5, *source),
        "loss_epilogue": (learned_err, ref_err.clone(), hyper, None, weight, 0),
        "unit_seed": (pred, target, 64.0, *source),
    }


@pytest.mark.parametrize("name", list(ops._SCHEMAS))
def test_opcheck(name):
    """Schema, fake, autograd registration and tracing with dynamic shapes."""
    torch.library.opcheck(getattr(OP, name).default, calls()[name])


@pytest.mark.parametrize("name", list(ops._SCHEMAS))
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


@pytest.mark.parametrize("name", list(ops._SCHEMAS))
def test_without_the_core_the_oracle_serves(name, monkeypatch):
    """The same schemas, the same numbers within rounding, gradients too."""
    arguments = calls()[name]

    def run() -> list[Tensor]:
        out = getattr(OP, name)(*arguments)
        results = list(out) if isinstance(out, tuple) else [out]
        learned = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        return [*results, *(torch.autograd.grad(results[0].sum(), learned) if learned else ())]

    with_core = run()
    monkeypatch.setattr(ops, "_C", None)
    for a, b in zip(with_core, run(), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        rtol = 2 * torch.finfo(a.dtype).eps if a.dtype != torch.float64 else 1e-5
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-5)


def test_the_short_way_is_the_operator():
    """ops.pair_loss and the operator: the same bits, gradients, marks and refusals."""
    arguments = calls()["pair_loss"]
    for call in (ops.pair_loss, OP.pair_loss):
        out = call(*arguments)
        assert [x.requires_grad for x in out] == [True] + [False] * 6
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

    assert same_bits(run(ops.pair_loss), run(OP.pair_loss))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(ops.pair_loss(*arguments)[0], torch._subclasses.FakeTensor)


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
    out = OP.pair_loss(pred, target, None, ref_err, HYPER, None, None, square, *NO_DRAWS)
    err_w = OP.pair_error(pred, target, *NO_DRAWS)[:2]
    expected = torch.cat((2 * err_w, -torch.ones(2)))
    torch.testing.assert_close(out[-1], expected.detach(), rtol=1e-12, atol=0)
    out[0].backward()
    assert_gradient(pred.grad, gradient64(pred, target, out[-1] / 2), pred, target, out[-1] / 2)


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
        TARGET, TARGET, None, None, HYPER, None, None, 0, *NO_DRAWS
    ),
    "weight must be torch.float64 [2]": lambda: OP.loss_epilogue(
        ERRORS, ERRORS, HYPER, None, torch.zeros(2), 0
    ),
    "target must not require a gradient": lambda: OP.pair_error(
        TARGET, TARGET.clone().requires_grad_(), *NO_DRAWS
    ),
    "objective must be": lambda: OP.loss_epilogue(ERRORS, ERRORS, HYPER, None, None, 7),
}


@pytest.mark.parametrize("message", list(BAD_CALLS))
def test_what_pointers_read_is_checked(message):
    with pytest.raises(ValueError, match=r"^fastpref\.") as error:
        BAD_CALLS[message]()
    assert message in str(error.value) and "\n" not in str(error.value)
