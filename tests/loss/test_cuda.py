"""The operators on a GPU against the same operators on the CPU and against float64 arithmetic."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

import fastpref
import fastpref.loss.ops  # defines the operators
from fastpref import objective
from fastpref.loss import native as core
from fastpref.loss.objectives import OBJECTIVES

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

OP = torch.ops.fastpref
GPU = torch.device("cuda", 0)
EPS32 = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 13, 1024, 8192, 8193, 3 * 8192 + 5]
OPTIONS = {
    "dpo": {"label_smoothing": 0.1},
    "hinge": {"sft_weight": 0.25},
    "dmpo": {"alpha": 0.05},
    "sdpo": {"combine": "mean", "inverse_weight": True},
}


@pytest.fixture(autouse=True)
def built_for_cuda():
    """Without it the oracle would serve, and every comparison would hold."""
    assert hasattr(core._C, "cuda"), f"built without CUDA: {fastpref.build_info()['why_not_cuda']}"


def on_gpu(value):
    """The same on the GPU: a tensor keeps its distance from a 16-byte boundary."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(on_gpu, value))
    if not isinstance(value, Tensor):
        return value
    offset = value.storage_offset()
    out = torch.empty(offset + value.numel(), dtype=value.dtype, device=GPU)
    out = out[offset:].view(value.shape)
    return out.copy_(value).requires_grad_(value.requires_grad)


def random(rows: int, elements: int, dtype=torch.float32, offset: int = 0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rows + elements)
    flat = torch.randn(offset + rows * elements, generator=generator).to(dtype)
    return flat[offset:].view(rows, elements)


def draws(pairs: int) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
    """(seed, pair_id, index, p, q)."""
    n = torch.arange(pairs)
    return 2**40 + 7, n * 2**40 - 3, n + 2, 0.9 - 0.01 * n, -0.4 - 0.02 * n


NO_DRAWS = (0, None, None, None, None)


def regenerated(x0: Tensor, made: tuple) -> Tensor:
    """y as the kernels see it, by the CPU: float32."""
    seed, pair_id, index, p, q = made
    return OP.add_noise(x0.float(), pair_id, index, q, p, seed, torch.float32)


def per_pair(name: str, pairs: int, elements: int):
    """(hyper, gain, weight, number) of an objective, on the CPU."""
    beta = 10.0 if name == "spo" else 20.0 * math.sqrt(elements)
    obj = objective(name, beta=beta, **OPTIONS.get(name, {}))
    generator = torch.Generator().manual_seed(pairs)
    gain, weight = torch.rand(2, pairs, generator=generator, dtype=torch.float64)
    return obj.hyper_tensor(torch.device("cpu")), 0.3 * gain, 2 * weight, obj.number


def same_bits(first, second) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def flat(*values: Tensor) -> list[Tensor]:
    """At least one-dimensional, so that bits can be looked at."""
    return [value.detach().reshape(-1) for value in values]


# --- Against the CPU and float64 ---


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    "dtypes", list(product(DTYPES, DTYPES)), ids=lambda d: "-".join(str(x)[6:] for x in d)
)
def test_draws_have_the_bits_of_the_cpu(dtypes, offset, members):
    for elements, pairs in [*((n, 3) for n in SIZES), (1_000_003, 1)]:
        seed, pair_id, index, a, s = draws(pairs)
        x0 = random(members * pairs, elements, dtypes[0], offset)
        arguments = (x0, pair_id, index, a, s, seed, dtypes[1])
        expected = OP.add_noise(*arguments)
        assert torch.equal(OP.add_noise(*on_gpu(arguments)).cpu(), expected), elements


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("regenerate", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    "dtypes", list(product(DTYPES, DTYPES)), ids=lambda d: "-".join(str(x)[6:] for x in d)
)
def test_errors_gradients_and_seeds(dtypes, offset, regenerate, shared):
    """METHODS section 4: err to 4 eps32, gradients to 8 eps32 of their terms and an ulp."""
    for elements, pairs, members in product(SIZES, (1, 3), (2,) if shared else (1, 2)):
        pred = random(pairs if shared else members * pairs, elements, dtypes[0], offset, 1)
        target = random(members * pairs, elements, dtypes[1], offset, 2)
        made = draws(pairs) if regenerate else NO_DRAWS
        y = (regenerated(target, made) if regenerate else target).double()
        wide = pred.double().repeat(members if shared else 1, 1)
        coef = torch.linspace(-2, 3, len(target), dtype=torch.float64)
        grad = torch.tensor(0.75, dtype=torch.float64)
        d_pred, d_target, d_coef, d_grad, d_made = on_gpu([pred, target, coef, grad, made])

        err = OP.pair_error(d_pred, d_target, *d_made).cpu()
        torch.testing.assert_close(err, (wide - y).square().mean(1), rtol=4 * EPS32, atol=0)
        torch.testing.assert_close(err, OP.pair_error(pred, target, *made), rtol=8 * EPS32, atol=0)

        def check(got: Tensor, factor: Tensor, wide=wide, y=y, pred=pred) -> None:
            each = (factor[:, None] * (wide - y)).view(-1, *pred.shape)
            slack = 8 * EPS32 * factor.abs()[:, None] * (wide.abs() + y.abs())
            info, exact = torch.finfo(pred.dtype), each.sum(0)
            slack = slack.view(each.shape).sum(0) + info.eps * exact.abs() + info.tiny * info.eps
            assert got.dtype == pred.dtype and not got.isnan().any()
            assert ((got.double() - exact).abs() <= slack).all()

        # One grad_pred of a video's size of D would underflow fp16: the scale stands for it here.
        got = OP.pair_grad(d_pred, d_target, d_coef, d_grad, float(elements), *d_made).cpu()
        check(got, coef * 1.5)
        if not shared:
            err_too, seed = OP.unit_seed(d_pred, d_target, 2.0 * elements, *d_made)
            assert torch.equal(err_too.cpu(), err)
            check(seed.cpu(), torch.full_like(coef, 4.0))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_functor_is_the_cpus(name):
    """loss_epilogue to 1e-9, for one pair and for more pairs than a block has threads."""
    for pairs in (1, 2, 700):
        hyper, gain, weight, number = per_pair(name, pairs, 1)
        err, ref_err = torch.rand(2, 2 * pairs, dtype=torch.float64)
        cross = err[:pairs] - 0.4
        arguments = (err, ref_err, hyper, gain, weight, cross, number)
        got = [value.cpu() for value in OP.loss_epilogue(*on_gpu(arguments))]
        for value, expected in zip(got, OP.loss_epilogue(*arguments), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_launch_is_its_parts(name):
    """pair_loss with the reference's predictions, with its cached errors, and in two steps."""
    sizes = list(zip(DTYPES, SIZES[-3:], strict=True))
    for (dtype, elements), regenerate in product(sizes, (False, True)):
        shared = name == "spo" and regenerate
        hyper, gain, weight, number = per_pair(name, 3, elements)
        pred = random(3 if shared else 6, elements, dtype, seed=1)
        ref = (pred + 0.05 * random(*pred.shape, seed=2)).to(dtype)
        target = random(6, elements, torch.float32, seed=3)
        made = draws(3) if regenerate else NO_DRAWS
        pred, ref, target, hyper, gain, weight, made = on_gpu(
            [pred, ref, target, hyper, gain, weight, made]
        )
        guarded = len(pred) == 6 and regenerate
        rest = (hyper, gain, weight, number, guarded, *made)
        loss, pair_loss, err, ref_err, margin, importance, share, coef = OP.pair_loss(
            pred, target, ref, None, *rest
        )
        whole = flat(loss, pair_loss, err, ref_err, margin, importance, share, coef)
        cached = OP.pair_loss(pred, target, None, ref_err, *rest)
        assert same_bits(whole, flat(*cached))
        parts = [OP.pair_error(tensor, target, *made) for tensor in (pred, ref)]
        assert same_bits([err, ref_err], parts)
        cross = OP.pair_cross(pred, target, *made) if guarded else None
        if guarded:
            cpu = OP.pair_cross(
                *(x.cpu() if isinstance(x, Tensor) else x for x in (pred, target, *made))
            )
            torch.testing.assert_close(cross.cpu(), cpu, rtol=1e-5, atol=1e-6)
        epilogue = OP.loss_epilogue(err, ref_err, hyper, gain, weight, cross, number)
        assert same_bits(flat(loss, pair_loss, margin, importance, share, coef), flat(*epilogue))

        policy = pred.clone().requires_grad_()
        (3 * OP.pair_loss(policy, target, ref, None, *rest)[0]).backward()
        upstream = torch.tensor(3.0, dtype=torch.float64, device=GPU)
        assert torch.equal(policy.grad, OP.pair_grad(pred, target, coef, upstream, 1 / 3, *made))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_preference_loss_is_the_cpus(name, dtype):
    """The public function at a latent's shape: errors, loss and gradient, CPU against GPU."""
    shape, beta = (4, 16, 5, 12, 20), 10.0 if name == "spo" else 200.0
    obj = objective(name, beta=beta, **OPTIONS.get(name, {}))
    x0 = random(4, math.prod(shape[1:])).view(shape).to(dtype)
    rows = 2 if name == "spo" else 4
    pred = random(rows, math.prod(shape[1:]), seed=5).view(rows, *shape[1:]).to(dtype)
    ref = (pred + 0.02 * random(rows, math.prod(shape[1:]), seed=6).view(pred.shape)).to(dtype)
    results = []
    for place in (torch.device("cpu"), GPU):
        seed, pair_id, index, p, q = (
            value.to(place) if isinstance(value, Tensor) else value for value in draws(2)
        )
        target = fastpref.Target(x0.to(place), fastpref.Draws(seed, pair_id, index), p, q)
        gain = torch.full((2,), 0.1, dtype=torch.float64, device=place) if obj.needs_gain else None
        policy = pred.to(place).requires_grad_()
        out = fastpref.preference_loss(policy, target, ref.to(place), obj, gain=gain)
        out.loss.backward()
        results.append([value.cpu() for value in (*out, policy.grad) if value is not None])
    for expected, got in zip(*results, strict=True):
        # A margin is a small difference of errors, a half-precision gradient one of two neighbours.
        close = 1e-2 if got.dtype in (torch.bfloat16, torch.float16) else 1e-3
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=close, atol=close * scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["pred", "ref", "target"])
def test_nan_and_inf_reach_the_loss(where, bad):
    """One bad element, the last of a row, in a pair that the mask would drop."""
    hyper, _, _, number = per_pair("dpo_cm", 3, 1)
    tensors = {"pred": 1, "ref": 2, "target": 3}
    tensors = {name: random(6, 8195, seed=seed) for name, seed in tensors.items()}
    tensors[where][4, -1] = bad
    pred, ref, target = (on_gpu(tensors[name]) for name in ("pred", "ref", "target"))
    gain = torch.full((3,), 1e30, dtype=torch.float64, device=GPU)
    pred.requires_grad_()
    loss, pair_loss, *_ = OP.pair_loss(
        pred, target, ref, None, on_gpu(hyper), gain, None, number, False, *NO_DRAWS
    )
    loss.backward()
    assert not loss.isfinite()
    assert pair_loss.isfinite().tolist() == [True, False, True]
    finite = pred.grad.isfinite()
    assert not finite[[1, 4]].any() and finite[[0, 2, 3, 5]].all()


# --- Determinism, streams, graphs ---


class Step:
    """Noise, loss, gradient and unit seed of one batch, from inputs that stay where they are."""

    def __init__(self, elements: int = 300_001, pairs: int = 3, dtype=torch.bfloat16):
        self.x0 = on_gpu(random(2 * pairs, elements, dtype, seed=1))
        self.pred = on_gpu(random(2 * pairs, elements, dtype, seed=2))
        self.ref = on_gpu(random(2 * pairs, elements, dtype, seed=3))
        hyper, gain, weight, self.number = per_pair("sdpo", pairs, elements)
        self.hyper, self.gain, self.weight = on_gpu([hyper, gain, weight])
        self.draws = on_gpu(draws(pairs))

    def __call__(self) -> list[Tensor]:
        seed, pair_id, index, p, q = self.draws
        x_t = OP.add_noise(self.x0, pair_id, index, p, q, seed)
        loss, *rest = OP.pair_loss(
            self.pred, self.x0, self.ref, None, self.hyper, self.gain, self.weight, self.number,
            True, *self.draws,
        )  # fmt: skip
        grad = OP.pair_grad(self.pred, self.x0, rest[-1], loss, 0.5, *self.draws)
        return flat(x_t, loss, *rest, grad, *OP.unit_seed(self.pred, self.x0, 2.0, *self.draws))

    def select(self, rows: list[int], pairs: list[int]) -> None:
        """Keep some of the batch."""
        self.x0, self.pred, self.ref = self.x0[rows], self.pred[rows], self.ref[rows]
        self.gain, self.weight = self.gain[pairs], self.weight[pairs]
        self.draws = (self.draws[0], *(value[pairs] for value in self.draws[1:]))


def test_bits_do_not_depend_on_the_run():
    """Also while another stream keeps the GPU busy, so that blocks finish in other orders."""
    step = Step()
    first = step()
    other, busy = torch.cuda.Stream(), torch.randn(2048, 2048, device=GPU)
    for _ in range(30):
        with torch.cuda.stream(other):
            busy = (busy @ busy).clamp(-1, 1)
        assert same_bits(first, step())
    torch.cuda.synchronize()


def test_bits_do_not_depend_on_the_company():
    """A pair alone (another grid, other alignment of its rows) has the bits it has in a batch."""
    whole = Step()()
    for pair in range(3):
        step = Step()
        step.select([pair, pair + 3], [pair])
        alone = step()
        assert torch.equal(alone[2], whole[2][[pair]])  # pair_loss
        assert torch.equal(alone[3], whole[3][[pair, pair + 3]])  # err
        elements = step.x0.shape[1]
        assert torch.equal(alone[0].view(2, elements), whole[0].view(6, elements)[[pair, pair + 3]])


def test_they_run_on_the_current_stream():
    """Inputs that a side stream writes late are read after that, without a synchronisation."""
    step = Step()
    expected = step()
    kept = step.pred.clone()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step.pred.zero_()
        torch.cuda._sleep(50_000_000)
        step.pred.copy_(kept)
        got = step()
    side.synchronize()
    assert same_bits(expected, got)


def test_a_captured_graph_replays_with_new_inputs_and_hyper_parameters():
    step = Step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # loads the kernels
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    torch.cuda.synchronize()
    for beta, seed in [(5.0, 11), (9.0, 12), (9.0, 12)]:
        step.hyper.copy_(on_gpu(torch.tensor(objective("sdpo", beta=beta).hyper()).double()))
        step.pred.copy_(random(*step.pred.shape, step.pred.dtype, seed=seed))
        step.draws[2].add_(1)
        for tensor in captured:
            tensor.view(torch.uint8).fill_(255)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(captured, step())


def test_nothing_waits_for_the_gpu():
    step = Step()
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- As torch operators ---


def test_opcheck():
    step = Step(elements=77, dtype=torch.float32)
    pred = step.pred.clone().requires_grad_()
    seed, pair_id, index, p, q = step.draws
    loss, _, err, ref_err, *_, coef = OP.pair_loss(
        step.pred, step.x0, step.ref, None, step.hyper, step.gain, step.weight, 5, True, *step.draws
    )
    hyper, gain, weight = step.hyper, step.gain, step.weight
    calls = [
        (OP.add_noise, (step.x0, pair_id, index, p, q, seed, torch.bfloat16)),
        (OP.pair_error, (pred, step.x0, *step.draws)),
        (OP.pair_cross, (step.pred, step.x0, *step.draws)),
        (OP.pair_loss, (pred, step.x0, step.ref, None, hyper, gain, weight, 5, True, *step.draws)),
        (OP.pair_loss, (pred, step.x0, None, ref_err, hyper, None, None, 0, False, *NO_DRAWS)),
        (OP.pair_grad, (step.pred, step.x0, coef, loss, 0.5, *step.draws)),
        (OP.loss_epilogue, (err.requires_grad_(), ref_err, hyper, gain, weight, None, 5)),
        (OP.unit_seed, (step.pred, step.x0, 2.0, *step.draws)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_parity(backend):
    """Forward and backward inside torch.compile(fullgraph=True), among other operations."""
    torch.compiler.reset()
    obj = objective("dpo", beta=100.0)
    step = Step(elements=4099, dtype=torch.float32)
    seed, pair_id, index, p, q = step.draws
    target = fastpref.Target(step.x0, fastpref.Draws(seed, pair_id, index), p, q)

    def train(pred):
        out = fastpref.preference_loss(2.0 * pred, target, step.ref, obj)
        return 3.0 * out.loss, out.err, out.margin

    results = []
    for function in (train, torch.compile(train, fullgraph=True, backend=backend)):
        pred = step.pred.clone().requires_grad_()
        loss, err, margin = function(pred)
        loss.backward()
        results.append(flat(loss, err, margin, pred.grad))
    assert same_bits(*results)


# --- Size, and the sanitizer's errand ---


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info(0)[1] < 40e9, reason="needs 40 GB"
)
def test_more_than_32_bits_of_elements():
    """The last row of 2.6e9 elements, and the ends of a row of 2^31 + 9."""
    pairs, elements = 40_000, 65_536
    seed, pair_id, index, p, q = on_gpu(draws(pairs))
    x0 = torch.zeros(pairs, elements, dtype=torch.bfloat16, device=GPU)
    x0[-1] = on_gpu(random(1, elements, torch.bfloat16))
    last = [value[-1:] for value in (pair_id, index, p, q)]
    x_t = OP.add_noise(x0, pair_id, index, p, q, seed)
    assert torch.equal(x_t[-1:], OP.add_noise(x0[-1:], *last, seed))
    err = OP.pair_error(x_t, x0, seed, pair_id, index, p, q)
    assert torch.equal(err[-1:], OP.pair_error(x_t[-1:], x0[-1:], seed, *last))
    del x0, x_t
    elements = 2**31 + 9
    pred = torch.zeros(1, elements, dtype=torch.bfloat16, device=GPU)
    pred[0, 0], pred[0, -1] = 2.0, 3.0
    target = torch.zeros_like(pred)
    err = OP.pair_error(pred, target, *NO_DRAWS)
    assert err.item() == pytest.approx(13 / elements, rel=1e-12)
    coef = torch.ones(1, dtype=torch.float64, device=GPU)
    grad = OP.pair_grad(pred, target, coef, None, float(elements), *NO_DRAWS)
    assert grad[0, -1].item() == 6.0 and grad[0, 0].item() == 4.0
    assert grad.count_nonzero().item() == 2


def test_for_the_sanitizer():
    """Every kernel on odd sizes, aligned and not: what bench/device.sh gives compute-sanitizer."""
    for (dtype, other), elements in product(product(DTYPES, DTYPES), (3, 8192 + 24, 16_391)):
        for offset, regenerate, shared in product((0, 1), (False, True), (False, True)):
            pred = on_gpu(random(2 if shared else 4, elements, dtype, offset))
            x0 = on_gpu(random(4, elements, other, offset, 1))
            hyper, gain, weight, number = on_gpu(per_pair("spo" if shared else "dpo_cm", 2, 1))
            made = on_gpu(draws(2))
            seed, pair_id, index, p, q = made
            used = made if regenerate else NO_DRAWS
            OP.add_noise(x0, pair_id, index, p, q, seed, dtype)
            rest = (hyper, gain, weight, number, not shared, *used)
            loss, *_, coef = OP.pair_loss(pred, x0, pred, None, *rest)
            OP.pair_grad(pred, x0, coef, None, 1.0, *used)
            if not shared:
                OP.unit_seed(pred, x0, 1.0, *used)
            assert loss.isfinite()
