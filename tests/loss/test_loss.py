"""The native losses and gradients against the float64 oracle.

Tolerances are derived, not tuned: fp32 residuals move an error e by some eps32 e, and what that
does to a loss or a coefficient follows from the oracle's own derivatives.
"""

import math

import pytest
import torch
from torch import Tensor

import fastpref
from fastpref import oracle
from fastpref.loss.objectives import OBJECTIVES, Objective, objective

EPS32 = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VARIANTS = {
    "dpo": {"label_smoothing": 0.1},
    "ipo": {},
    "hinge": {"sft_weight": 0.25},
    "dmpo": {"alpha": 0.05},
    "dpo_cm": {"label_smoothing": 0.2, "sft_weight": 0.1},
    "sdpo": {},
    "sdpo-min": {"combine": "min", "inverse_weight": True, "clip": 0.05},
    "sdpo-mean": {"combine": "mean", "label_smoothing": 0.3, "mask_threshold": 0.85},
    "spo": {},
}
# Per row: one element; odd; odd in two dimensions; a video; over a chunk of 8192, not a multiple of
# any vector; exactly two chunks.
SHAPES = [(1,), (13,), (5, 7), (3, 2, 5, 4), (2, 3, 5, 17, 17), (16384,)]


def make_objective(variant: str, elements: int) -> Objective:
    """At a beta that keeps most margins of `make_batch` within the losses' bends."""
    name = variant.split("-")[0]
    beta = 10.0 if name == "spo" else min(60.0 * math.sqrt(elements), 5000.0)
    return objective(name, beta=beta, **VARIANTS[variant])


class Batch:
    """Predictions near a target, and everything else a loss takes; y is the target on the CPU."""

    def __init__(
        self,
        obj: Objective,
        pairs: int,
        shape,
        dtype,
        regenerated=False,
        shared=False,
        device="cpu",
    ):
        g = torch.Generator().manual_seed(hash((obj.number, pairs, shape, regenerated)) % 2**31)

        def randn(rows: int) -> Tensor:
            return torch.randn(rows, *shape, generator=g)

        rows, elements = 2 * pairs, math.prod(shape)
        x0 = randn(rows).to(dtype)
        if regenerated:
            pair_id = torch.randint(-(2**62), 2**62, (pairs,), generator=g)
            draws = fastpref.Draws(2**40 + 7, pair_id, torch.arange(pairs) + 3)
            p, q = torch.rand(2, pairs, generator=g) - 0.5
            self.target = fastpref.Target(x0, draws, p, q)
            zero, one = torch.zeros(pairs), torch.ones(pairs)
            eps = fastpref.add_noise(x0.float(), draws, zero, one)
            self.y = oracle.mix(x0, eps[:pairs].flatten(1), q, p)
        else:
            # The target's dtype need not be the prediction's.
            self.target = self.y = x0.float() if pairs == 1 else x0
        n = pairs if shared else rows
        pred = self.y[:n].float() + 0.7 * randn(n)
        self.ref = (pred + 0.02 * randn(n)).to(dtype)
        self.pred = pred.to(dtype).requires_grad_()
        self.gain = None
        if obj.needs_gain:
            scale = 8 * math.sqrt(elements) if obj.name == "spo" else 0.5
            self.gain = scale * torch.rand(pairs, generator=g, dtype=torch.float64)
        self.weight = torch.rand(pairs, generator=g, dtype=torch.float64) * 2
        self.weight[0] = 0.0 if pairs > 1 else 1.7
        if torch.device(device).type == "cpu":
            return
        self.pred = self.pred.detach().to(device).requires_grad_()
        self.ref, self.weight = self.ref.to(device), self.weight.to(device)
        self.gain = None if self.gain is None else self.gain.to(device)
        if regenerated:
            draws = fastpref.Draws(draws.seed, pair_id.to(device), draws.index.to(device))
            self.target = fastpref.Target(x0.to(device), draws, p.to(device), q.to(device))
        else:
            self.target = self.target.to(device)


def near_an_edge(obj: Objective, err: Tensor, ref: Tensor, gain: Tensor, margin: Tensor) -> Tensor:
    """[B] pairs so close to a mask, hinge or clamp edge that rounding decides the side."""
    if obj.name == "hinge":
        return (margin - 1).abs() < 1e-3
    if obj.name == "spo":
        rho = -0.5 * gain * (err - ref).view(2, -1)
        edges = [math.log(1 - obj.clip), math.log(1 + obj.clip)]
        return torch.stack([(rho - e).abs() < 1e-3 for e in edges]).any(0).any(0)
    if not obj.has_importance:
        return torch.zeros_like(margin, dtype=torch.bool)
    w = oracle.importance(err.view(2, -1), gain)
    if obj.name == "sdpo":
        w = {"max": w.amax(0), "min": w.amin(0), "mean": w.mean(0)}[obj.combine][None]
    edges = [obj.mask_threshold, 1 - obj.clip]
    return torch.stack([(w - e).abs() < 1e-5 for e in edges]).any(0).any(0)


def expected_with_tolerance(obj: Objective, err: Tensor, ref: Tensor, gain: Tensor, weight: Tensor):
    """Per pair, by the oracle: loss [B], dL/de [2B], their tolerances, and pairs near an edge."""
    errors = [e.clone().requires_grad_() for e in (*err.chunk(2), *ref.chunk(2))]
    loss = weight * oracle.loss(obj, *errors, gain)
    slopes = torch.autograd.grad(loss.sum(), errors, create_graph=True)

    def tolerance(x: Tensor, derivatives, absolute: Tensor | float) -> Tensor:
        moved = sum(d.abs() * e for d, e in zip(derivatives, errors, strict=True))
        return (1e-5 * x.abs() + 4 * EPS32 * moved + absolute).detach()

    scale = 1e-6 * weight * obj.beta * (gain if obj.name == "spo" else 1)
    coef_tolerance = []
    for slope in slopes[:2]:
        graph = slope.sum() + 0 * sum(e.sum() for e in errors)  # the hinge's slope is a constant
        second = torch.autograd.grad(graph, errors, retain_graph=True)
        coef_tolerance.append(tolerance(slope, second, scale))
    margin = oracle.margin(obj.beta, *(e.detach() for e in errors))
    edge = near_an_edge(obj, err, ref, gain, margin)
    return (
        loss.detach(),
        torch.cat(slopes[:2]).detach(),
        tolerance(loss, slopes, 1e-6),
        torch.cat(coef_tolerance),
        edge,
    )


def assert_within(got: Tensor, expected: Tensor, tolerance: Tensor, keep: Tensor) -> None:
    excess = ((got - expected).abs() - tolerance)[keep]
    assert (excess <= 0).all(), f"beyond tolerance by {excess.max()}"


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    return info.eps * x.abs() + info.smallest_normal * info.eps


def check(obj: Objective, batch: Batch, ref: Tensor, weight: Tensor | None) -> int:
    """Forward and backward of one call; returns how many pairs were kept from the edges."""
    pred, y = batch.pred, batch.y
    pred.grad = None
    out = fastpref.preference_loss(pred, batch.target, ref, obj, gain=batch.gain, weight=weight)
    (3 * out.loss).backward()
    assert out.loss.device == pred.grad.device == pred.device
    result = pred.grad.cpu()
    out = fastpref.PairLoss(*(None if x is None else x.detach().cpu() for x in out))
    pred, ref = pred.detach().cpu(), ref.cpu()
    pairs, rows = len(y) // 2, len(y)
    err = oracle.pair_error(pred, y)
    ref_err = ref.double() if ref.shape == (rows,) else oracle.pair_error(ref, y)
    torch.testing.assert_close(out.err, err, rtol=4 * EPS32, atol=0)
    torch.testing.assert_close(out.ref_err, ref_err, rtol=4 * EPS32, atol=0)

    full = torch.ones(pairs, dtype=torch.float64) if weight is None else weight.cpu()
    gain = torch.zeros(pairs, dtype=torch.float64) if batch.gain is None else batch.gain.cpu()
    loss, coef, loss_tol, coef_tol, edge = expected_with_tolerance(obj, err, ref_err, gain, full)
    assert_within(out.pair_loss, loss, loss_tol, ~edge)
    assert_within(out.coef, coef, coef_tol, ~edge.repeat(2))
    assert out.loss.item() == pytest.approx(out.pair_loss.mean().item(), rel=1e-12, abs=1e-300)
    if obj.has_importance:
        torch.testing.assert_close(out.importance, oracle.importance(err, gain.repeat(2)))
    else:
        assert out.importance is None

    # d pred = grad_out / B * coef * 2 (pred - y) / D, the members of a shared prediction summed.
    times = rows // len(pred)
    wide = pred.double().flatten(1).repeat(times, 1)
    flat = y.double().flatten(1)
    per_row = (2 * 3 / pairs / flat.shape[1]) * (wide - flat)
    grad = (coef[:, None] * per_row).view(times, len(pred), -1).sum(0)
    slack = (
        coef_tol[:, None] * per_row.abs()
        + (coef.abs()[:, None] * 8 * EPS32 * 3 / pairs) * (wide.abs() + flat.abs()) / flat.shape[1]
    )
    slack = slack.view(times, len(pred), -1).sum(0) + ulp(grad, pred.dtype)
    keep = ~(edge.repeat(2 // times)[:, None].expand_as(grad))
    assert result.dtype == pred.dtype
    assert_within(result.double().flatten(1), grad, slack, keep)
    return int((~edge).sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_the_oracle(variant, shape, dtype, device):
    """Every objective x dtype x shape x target form x reference form, forward and backward."""
    obj = make_objective(variant, math.prod(shape))
    kept, total = 0, 0
    small = ((1, False), (3, False), (1, True), (5, True))
    for pairs, regenerated in small if math.prod(shape) < 1000 else ((1, False), (2, True)):
        for shared in [False, True] if obj.name == "spo" else [False]:
            batch = Batch(obj, pairs, shape, dtype, regenerated, shared, device)
            kept += check(obj, batch, batch.ref, batch.weight)
            ref_err = oracle.pair_error(batch.ref.cpu(), batch.y).to(device)
            kept += check(obj, batch, ref_err.float(), None)
            total += 2 * pairs
    assert kept >= 0.75 * total


def test_golden(golden, device):
    """loss_from_errors to 1e-9."""

    def f64(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    for case in golden:
        obj = objective(case["objective"], **case["hyper"])
        err = f64(case["err_w"], case["err_l"]).requires_grad_()
        ref = f64(case["ref_w"], case["ref_l"])
        gain = f64(case["gain"]) if obj.needs_gain else None
        out = fastpref.loss_from_errors(err, ref, obj, gain=gain, weight=f64(case["weight"]))
        out.loss.backward()
        slopes = [case["dloss_derr_w"], case["dloss_derr_l"]]
        assert out.loss.item() == pytest.approx(case["loss"], rel=1e-9, abs=0), case
        assert out.pair_loss.item() == out.loss.item()
        assert out.coef.tolist() == pytest.approx(slopes, rel=1e-9, abs=0), case
        assert err.grad.tolist() == pytest.approx(slopes, rel=1e-9, abs=0), case


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("size", [1.0, 1e4, 1e8])
def test_extreme_margins(name, size):
    """|m| up to 1e4 and beyond: finite, and as the oracle says, for both signs."""
    obj = objective(name, beta=2 * size)
    err = torch.tensor([1.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    ref = torch.ones_like(err)
    gain = torch.full((2,), 0.01, dtype=torch.float64) if obj.needs_gain else None
    out = fastpref.loss_from_errors(err, ref, obj, gain=gain)
    arguments = [e.clone().requires_grad_() for e in (*err.chunk(2), *ref.chunk(2))]
    loss = oracle.loss(obj, *arguments, gain)
    slopes = torch.autograd.grad(loss.sum(), arguments[:2])
    assert out.pair_loss.isfinite().all() and out.coef.isfinite().all()
    torch.testing.assert_close(out.pair_loss, loss.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(out.coef, torch.cat(slopes), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_first_step(dtype, device):
    """Policy equal to reference: m is exactly 0, the loss ln 2, the accuracy 0.5."""
    obj = objective("dpo", beta=5000.0)
    batch = Batch(obj, 4, (3, 5, 7), dtype, regenerated=True, device=device)
    out = fastpref.preference_loss(batch.pred, batch.target, batch.pred.detach(), obj)
    assert out.margin.tolist() == [0.0] * 4
    assert out.loss.item() == pytest.approx(math.log(2), rel=1e-15)
    right = (out.margin > 0).double() + 0.5 * (out.margin == 0).double()
    assert right.mean().item() == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["pred", "ref", "ref_err", "target", "x0"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_nan_and_inf_reach_the_loss(name, where, bad, device):
    """One bad element in a masked, saturated pair: the loss and its gradients are not finite."""
    obj = objective(name, beta=1e6)
    batch = Batch(obj, 3, (37,), torch.float32, regenerated=where == "x0", device=device)
    masked = torch.full((3,), 1e30, dtype=torch.float64, device=device)
    gain = masked if obj.needs_gain else None
    pred, target, ref = batch.pred.detach(), batch.target, batch.ref
    if where == "ref_err":
        ref = fastpref.pair_error(ref, target)
        ref[4] = bad
    else:
        tensor = {"pred": pred, "ref": ref, "target": target}.get(where)
        tensor = target.x0 if tensor is None else tensor
        tensor[4, 30] = bad
    pred.requires_grad_()
    out = fastpref.preference_loss(pred, target, ref, obj, gain=gain)
    out.loss.backward()
    assert not out.loss.isfinite()
    assert out.pair_loss.isfinite().tolist() == [True, False, True]
    finite = pred.grad.isfinite()
    assert not finite[[1, 4]].any() and finite[[0, 2, 3, 5]].all()


def test_bits_do_not_depend_on_threads_run_or_company(device):
    """Equal bits from run to run, for 1 to 7 threads, and for a pair alone or in a batch."""
    obj = objective("dpo", beta=500.0)
    batch = Batch(obj, 3, (4, 33, 129), torch.bfloat16, regenerated=True, device=device)
    threads = torch.get_num_threads()

    def run(pred, target, ref):
        pred = pred.detach().requires_grad_()
        out = fastpref.preference_loss(pred, target, ref, obj)
        out.loss.backward()
        seed = fastpref.unit_seed(pred, target)
        return [*(x for x in out if x is not None), pred.grad, seed[0], seed[1]]

    try:
        torch.set_num_threads(1)
        first = run(batch.pred, batch.target, batch.ref)
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            again = run(batch.pred, batch.target, batch.ref)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)
    for pair in range(3):
        rows, whole, t = [pair, pair + 3], batch.target.draws, batch.target
        draws = fastpref.Draws(whole.seed, whole.pair_id[[pair]], whole.index[[pair]])
        target = fastpref.Target(t.x0[rows], draws, t.p[[pair]], t.q[[pair]])
        alone = run(batch.pred[rows], target, batch.ref[rows])
        assert torch.equal(alone[1], first[1][[pair]])  # pair_loss
        assert torch.equal(alone[2], first[2][rows])  # err


def test_layout_and_alignment_do_not_matter():
    """Strided and misaligned views give the values of their contiguous copies."""
    obj = objective("dmpo", beta=50.0)
    whole = torch.randn(3, 7, 4 * 33 + 1)
    pred, target, ref = whole[:, :, 1:].reshape(3, 7, 4, 33).permute(0, 2, 1, 3)
    pred, target, ref = (x.reshape(4, 7, 33)[:, :, 1:] for x in (pred, target, ref))
    plain = fastpref.preference_loss(*(x.clone().contiguous() for x in (pred, target, ref)), obj)
    viewed = fastpref.preference_loss(pred, target, ref, obj)
    assert not pred.is_contiguous() and torch.equal(plain.pair_loss, viewed.pair_loss)
    negated = fastpref.preference_loss(*(torch._neg_view(-x) for x in (pred, target, ref)), obj)
    assert torch.equal(plain.pair_loss, negated.pair_loss)
    storage = torch.randn(4 * 33 + 3)
    for offset in range(3):
        odd = storage[offset : offset + 132].view(4, 33)
        err = fastpref.pair_error(odd, target[:, 0, :1].expand(4, 33))
        exact = oracle.pair_error(odd, target[:, 0, :1].expand(4, 33))
        torch.testing.assert_close(err, exact, rtol=4 * EPS32, atol=0)


def test_pair_error_and_its_gradient():
    """[rows] errors, any number of rows, with any upstream gradient."""
    pred = torch.randn(3, 5, 11, requires_grad=True)
    target = torch.randn(3, 5, 11)
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    fastpref.pair_error(pred, target).backward(upstream)
    wide = pred.detach().double().requires_grad_()
    oracle.pair_error(wide, target).backward(upstream)
    torch.testing.assert_close(pred.grad, wide.grad.float(), rtol=1e-6, atol=1e-8)


def test_float64_is_served_by_the_oracle():
    obj = objective("sdpo", beta=20.0)
    pred, target, ref = torch.randn(3, 4, 9, dtype=torch.float64)
    gain = torch.tensor([0.1, 0.05], dtype=torch.float64)
    out = fastpref.preference_loss(pred.requires_grad_(), target, ref, obj, gain=gain)
    out.loss.backward()
    wide = pred.detach().clone().requires_grad_()
    err, ref_err = oracle.pair_error(wide, target), oracle.pair_error(ref, target)
    loss = oracle.loss(obj, *err.chunk(2), *ref_err.chunk(2), gain).mean()
    loss.backward()
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-14, atol=0)
    torch.testing.assert_close(pred.grad, wide.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("regenerated", [False, True])
def test_the_deferred_form_gives_the_joint_gradient(dtype, regenerated, device):
    """unit_seed times coef / scale is preference_loss's gradient; its errors are pair_error's."""
    obj = objective("dpo", beta=800.0)
    batch = Batch(obj, 3, (3, 57, 49), dtype, regenerated, device=device)
    err, seed, scale = fastpref.unit_seed(batch.pred, batch.target)
    elements = batch.pred[0].numel()
    assert math.log2(scale).is_integer() and 0.7 < scale / elements < 1.42
    assert torch.equal(err, fastpref.pair_error(batch.pred, batch.target))
    out = fastpref.loss_from_errors(err, fastpref.pair_error(batch.ref, batch.target), obj)
    joint = fastpref.preference_loss(batch.pred, batch.target, batch.ref, obj)
    assert torch.equal(out.pair_loss, joint.pair_loss) and torch.equal(out.coef, joint.coef)
    joint.loss.backward()
    deferred = seed.double() * (out.coef / 3 / scale).view(-1, 1, 1, 1)
    grad = batch.pred.grad.double()
    assert ((deferred - grad).abs() <= 2 * ulp(grad, dtype) + 8 * EPS32 * grad.abs()).all()


def test_unit_seed_does_not_underflow_at_video_size():
    """In fp16 residual * 2 / D would be below 6e-8 here and vanish."""
    pred = torch.full((1, 2**21), 1e-2, dtype=torch.float16)
    _, seed, scale = fastpref.unit_seed(pred, torch.zeros_like(pred))
    assert scale == 2.0**21
    torch.testing.assert_close(seed, 2 * pred, rtol=1e-3, atol=0)


def test_only_the_loss_carries_a_gradient_and_only_once():
    obj = objective("dpo_cm", beta=5.0)
    batch = Batch(obj, 2, (11,), torch.float32)
    out = fastpref.preference_loss(batch.pred, batch.target, batch.ref, obj, gain=batch.gain)
    assert out.loss.requires_grad
    assert out.safeguard is None and not any(value.requires_grad for value in out[1:-1])
    (grad,) = torch.autograd.grad(out.loss, batch.pred, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        (grad.square().sum() + batch.pred.sum()).backward()
    err = out.err.clone().requires_grad_()
    again = fastpref.loss_from_errors(err, out.ref_err, obj, gain=batch.gain)
    assert again.loss.requires_grad and not any(value.requires_grad for value in again[1:-1])


@pytest.mark.parametrize(
    ("name", "regenerated", "backend"),
    [
        ("dpo", False, "aot_eager"),
        *((name, True, "aot_eager") for name in OBJECTIVES),
        pytest.param("sdpo", True, "inductor", marks=pytest.mark.slow),
    ],
)
def test_compile_parity(name, regenerated, backend):
    """Noise, loss and gradient under torch.compile(fullgraph=True) have the bits of eager mode."""
    torch.compiler.reset()
    batch = Batch(objective(name, beta=20.0), 2, (3, 5), torch.float32, regenerated)
    obj = objective(name, beta=20.0)  # another, which the compiled function is the first to use
    process = fastpref.FlowMatching(shift=3.0)
    draws = fastpref.Draws(1, torch.tensor([5, 6]), torch.tensor([0, 1]))

    def step(pred, target, ref, gain, draws):
        x_t, t, _ = process.noise(ref, draws)
        out = fastpref.preference_loss(pred, target, ref, obj, gain=gain)
        return out.loss, out.pair_loss, out.margin, out.err, x_t, t

    results = []
    for function in (torch.compile(step, fullgraph=True, backend=backend), step):
        pred = batch.pred.detach().clone().requires_grad_()
        values = function(pred, batch.target, batch.ref, batch.gain, draws)
        values[0].backward()
        results.append([*values, pred.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
