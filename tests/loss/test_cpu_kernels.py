"""The CPU kernels: instruction sets, threads and forks do not show; conversions, NaN, memory."""

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
from operands import DTYPES, EPS32, NO_DRAWS, OP, draws, same_bits, unaligned
from torch import Tensor

from fastpref import objective
from fastpref.loss import native as core

native = pytest.mark.skipif(core._C is None, reason="needs the compiled core")


def instruction_sets() -> list[str]:
    if core._C is None:
        return []
    used = core._C.cpu.features()
    found = [name for name in ("portable", "avx2", "avx512") if core._C.cpu.use(name)]
    core._C.cpu.use(used)
    return found


@pytest.fixture(params=instruction_sets())
def instruction_set(request):
    """Every set of vector loops this machine can run."""
    used = core._C.cpu.features()
    assert core._C.cpu.use(request.param)
    yield request.param
    core._C.cpu.use(used)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def all_outputs(elements: int = 400_003, pairs: int = 2) -> list[Tensor]:
    """Every operator's results on numbers that fill several chunks, in every mix of types."""
    results = []
    for dtype, target_dtype in product(DTYPES, DTYPES):
        pred, ref = (unaligned(2 * pairs, elements, dtype, seed=seed) for seed in (1, 2))
        target = unaligned(2 * pairs, elements, target_dtype)
        hyper = objective("dpo", beta=300.0).hyper_tensor(pred.device)
        for source in (NO_DRAWS, draws(pairs)):
            out = OP.pair_loss(pred, target, ref, None, hyper, None, None, 0, False, *source)
            grad = OP.pair_grad(pred, target, out[-1], out[0], 0.5, *source)
            shared = OP.pair_grad(pred[:pairs], target, out[-1], None, 1.0, *source)
            results += [*out, grad, shared, *OP.unit_seed(pred, target, 4096.0, *source)]
        seed, pair_id, index, p, q = draws(pairs)
        results.append(OP.add_noise(target, pair_id, index, q, p, seed, dtype))
    return results


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
def test_bits_do_not_depend_on_the_instruction_set_or_the_threads(threads):
    used = core._C.cpu.features()
    try:
        threads(1)
        core._C.cpu.use("portable")
        first = all_outputs(40_003)
        for name, count in product(instruction_sets(), (1, 3)):
            core._C.cpu.use(name)
            threads(count)
            assert same_bits(first, all_outputs(40_003)), f"{name}, {count} threads"
    finally:
        core._C.cpu.use(used)


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
    assert wait_for(child) == 0 and same(3)


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
        out = OP.pair_loss(*inputs, None, hyper, None, None, 4, False, *NO_DRAWS)
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
    guard, code = 67, core.DTYPES[dtype]
    pred, target = unaligned(2, elements, dtype), unaligned(2, elements, dtype, seed=1)
    coef = torch.tensor([3.0, -2.0], dtype=torch.float64)
    seed, pair_id, index, p, q = draws(1)
    err = torch.empty(2, dtype=torch.float64)
    y = (target.data_ptr(), code, seed, *(t.data_ptr() for t in (pair_id, index, p, q)))

    def noise(out: int) -> None:
        a, s = q.data_ptr(), p.data_ptr()
        core._C.cpu.add_noise(2, 1, elements, target.data_ptr(), code, out, code, *y[2:5], a, s, 2)

    def grad(out: int) -> None:
        shape = (2, 1, 2, elements)
        core._C.cpu.pair_grad(*shape, pred.data_ptr(), code, *y, coef.data_ptr(), 0, 1.0, out, 2)

    def unit(out: int) -> None:
        shape = (2, 1, elements)
        core._C.cpu.unit_seed(*shape, pred.data_ptr(), code, *y, err.data_ptr(), 0, 64.0, out, 2)

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_gradients_go_around_the_caches(dtype, instruction_set):
    """Rows of 4 MiB together, aligned or not, hold what each of them alone gives."""
    elements, code = 2**21 // dtype.itemsize + 1, core.DTYPES[dtype]
    pred, target = (torch.randn(2, elements).to(dtype) for _ in range(2))
    coef, err = torch.tensor([3.0, -2.0]).double(), torch.empty(2, dtype=torch.float64)
    y = (target.data_ptr(), code, *[0] * 5)
    shape, cpu = (2, 1, 2, elements), core._C.cpu
    args = pred.data_ptr(), code, *y
    launches = {
        "grad": lambda out: cpu.pair_grad(*shape, *args, coef.data_ptr(), 0, 1.0, out, 2),
        "unit": lambda out: cpu.unit_seed(2, 1, elements, *args, err.data_ptr(), 0, 64.0, out, 2),
    }
    rows = [(pred[r : r + 1], target[r : r + 1]) for r in range(2)]
    expected = {
        "grad": [OP.pair_grad(*rows[r], coef[r : r + 1], None, 1.0, *NO_DRAWS) for r in range(2)],
        "unit": [OP.unit_seed(*row, 64.0, *NO_DRAWS)[1] for row in rows],
    }
    for name, launch in launches.items():
        memory = torch.full((2 * elements + 128,), math.nan, dtype=dtype)
        launch(memory[64:].data_ptr())
        assert memory[:64].isnan().all() and memory[-64:].isnan().all()
        assert same_bits(list(memory[64:-64].view(2, 1, elements)), expected[name]), name
