"""The safeguard against its formula in plain float64, and against what it promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastpref
from fastpref import oracle
from fastpref.loss.objectives import OBJECTIVES, objective

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NOISE_ERRORS = [name for name in OBJECTIVES if name != "spo"]
PLACED = [*NOISE_ERRORS, "dpo_cm loss", "sdpo ratio", "dpo sft"]


def make(name: str, safeguard: float | None, beta: float = 3.0):
    """With masks and optima in the middle of what `batch` gives."""
    name, _, how = name.partition(" ")
    extra = {"sft_weight": 0.4} if how == "sft" else {"placement": how} if how else {}
    extra |= {"mask_threshold": 0.5} if name in ("dpo_cm", "sdpo") else {}
    extra |= {"alpha": 0.3} if name == "dmpo" else {}
    return objective(name, beta=beta, safeguard=safeguard, **extra)


def batch(shape: tuple[int, ...], dtype: torch.dtype, seed: int, regenerated: bool = False):
    """(pred, ref, y, target, gain, weight) of 6 pairs whose members' residuals have much in common
    in some and little, or the opposite sign, in others.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    pairs = 6
    y = target = normal(2 * pairs, *shape).to(dtype)
    if regenerated:
        draws = fastpref.Draws(5, torch.arange(pairs) * 2**50, torch.arange(pairs))
        p, q = torch.linspace(0.5, 1.0, pairs), torch.linspace(-1.0, -0.5, pairs)
        target = fastpref.Target(y, draws, p, q)
        y = oracle.mix(y, oracle.normal(5, draws.pair_id, draws.index, y[0].numel()), q, p)
    common = normal(pairs, *shape)
    share = torch.linspace(-0.9, 1.5, pairs).view(-1, *[1] * len(shape))
    sizes = torch.linspace(0.3, 1.4, pairs).roll(2).view(share.shape)
    members = torch.cat([sizes * common, share * common + 0.4 * normal(pairs, *shape)])
    pred = (y.double() + members).to(dtype)
    ref = (pred.double() + 0.3 * normal(2 * pairs, *shape)).to(dtype)
    gain = torch.linspace(0.1, 1.5, pairs, dtype=torch.float64)
    return pred, ref, y, target, gain, torch.linspace(0.5, 2, pairs, dtype=torch.float64)


def by_hand(pred: Tensor, y: Tensor, coef: list[float], mu: float, pairs: int) -> list[float]:
    """lambda of every pair: sums in Python's floats, the published formula and, where the winner
    counts for less than the loser, as much less of it.
    """
    said = []
    for w in range(pairs):
        one, other = (
            (pred[row].double() - y[row].double()).flatten().tolist() for row in (w, w + pairs)
        )
        both = sum(a * b for a, b in zip(one, other, strict=True))
        own = sum(a * a for a in one)
        c_w, c_l = coef[w], coef[w + pairs]
        if c_l < 0 < both:
            said.append(max(0.0, min(1.0, (1 - mu) * own / both * min(1.0, c_w / -c_l))))
        else:
            said.append(1.0)
    return said


@pytest.mark.parametrize("regenerated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PLACED)
def test_lambda_and_the_gradient_are_the_formulas(name, dtype, regenerated):
    """The loss stays; of the gradient the loser's part is lambda times what it was."""
    counted = set()
    for seed, shape in enumerate([(1,), (5, 7), (2, 8195)]):
        pred, ref, y, target, gain, weight = batch(shape, dtype, seed, regenerated)
        pred.requires_grad_()
        plain, rule = make(name, None), make(name, 0.3)
        how = {"gain": gain if rule.needs_gain else None, "weight": weight}
        without = fastpref.preference_loss(pred, target, ref, plain, **how)
        (unchanged,) = torch.autograd.grad(without.loss, pred)
        out = fastpref.preference_loss(pred, target, ref, rule, **how)
        (grad,) = torch.autograd.grad(out.loss, pred)
        for field in ("loss", "pair_loss", "err", "ref_err", "margin"):
            assert torch.equal(getattr(out, field), getattr(without, field)), field
        expected = by_hand(pred.detach(), y, without.coef.tolist(), 0.3, 6)
        assert out.safeguard.tolist() == pytest.approx(expected, rel=2e-5, abs=2e-6)
        share = torch.cat([torch.ones(6), torch.tensor(expected)]).double()
        torch.testing.assert_close(out.coef, without.coef * share, rtol=3e-5, atol=3e-6)
        wanted = unchanged.double() * share.view(-1, *[1] * len(shape))
        close = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-5
        torch.testing.assert_close(grad.double(), wanted, rtol=3e-5 + 2 * close, atol=1e-6)
        counted |= {0 if x < 1e-9 else 1 if x == 1 else 0.5 for x in expected}
        # Cached errors of the reference, and the errors alone, say the same.
        cached = fastpref.preference_loss(pred, target, without.ref_err, rule, **how)
        assert torch.equal(cached.coef, out.coef)
        cross = fastpref.pair_cross(pred, target)
        again = fastpref.loss_from_errors(out.err, out.ref_err, rule, cross=cross, **how)
        assert torch.equal(again.coef, out.coef) and torch.equal(again.safeguard, out.safeguard)
    assert {0.5, 1} <= counted


@pytest.mark.parametrize("mu", [0.0, 0.25])
@pytest.mark.parametrize("name", PLACED)
def test_to_first_order_the_winners_error_does_not_rise(name, mu):
    """Both predictions moved by what they share, against the gradient of the loss: d e_w <= 0, and
    of the fall that the winner's own gradient makes at least mu is left, where both pull apart.
    """
    without, rises = [], []
    for seed in range(20):
        pred, ref, y, target, gain, _ = batch((3, 50), torch.float64, 100 + seed)
        shared = torch.zeros_like(pred[:6]).requires_grad_()
        for safeguard, said in ((None, without), (mu, rises)):
            rule = make(name, safeguard)
            how = {"gain": gain if rule.needs_gain else None}
            out = fastpref.preference_loss(pred + shared.repeat(2, 1, 1), target, ref, rule, **how)
            (step,) = torch.autograd.grad(out.loss, shared)
            residual = 2 * (pred - y)[:6].flatten(1) / 150
            said.append(-(residual * step.flatten(1)).sum(1))  # d e_w of each pair
            if safeguard is None:
                continue
            own = -(out.coef[:6] / 6) * residual.square().sum(1)
            works = (out.coef[:6] > 0) & (out.coef[6:] <= 0)
            assert (said[-1] <= mu * own + 1e-12)[works].all()
    pushes = torch.cat(rises)
    # Beyond an optimum (ipo, dmpo) the loss itself asks for more of the winner's error.
    beyond = 0.0 if name not in ("ipo", "dmpo") else None
    assert beyond is None or pushes.max() <= 1e-12
    assert torch.cat(without).max() > 1e-4  # which it does without


def test_beyond_the_optimum_there_is_none():
    """A margin above logit(1-alpha): the loser's gradient helps the winner, and is left alone."""
    pred, _, _, target, _, _ = batch((50,), torch.float32, 1)
    err = fastpref.pair_error(pred, target)
    far = torch.cat([err[:6] + 50, err[6:] - 50])  # the policy is much better than the reference
    for name, beta in (("dmpo", 1.0), ("ipo", 1.0)):
        out = fastpref.preference_loss(pred, target, far, make(name, 0.5, beta))
        assert (out.coef[6:] > 0).all() and (out.safeguard == 1).all(), name
        near = fastpref.preference_loss(pred, target, err, make(name, 0.5, beta))
        assert (near.coef[6:] < 0).all() and (near.safeguard < 1).any(), name


def test_what_is_not_finite_stays():
    pred, ref, _, target, _, _ = batch((9,), torch.float32, 2)
    for bad in (float("nan"), float("inf")):
        for row in (1, 7):
            wrong = pred.clone()
            wrong[row, 3] = bad
            out = fastpref.preference_loss(wrong, target, ref, make("dpo", 0.5))
            assert out.loss.isnan() and out.coef[[1, 7]].isnan().all()
            assert out.coef.isfinite().sum() == 10


def test_mistakes():
    pred, _, _, target, _, _ = batch((9,), torch.float32, 3)
    for mu in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="dpo: safeguard must be finite and >= 0 and < 1"):
            objective("dpo", beta=1.0, safeguard=mu)
    with pytest.raises(ValueError, match="spo: safeguard has no effect"):
        objective("spo", beta=10.0, safeguard=0.5)
    err = fastpref.pair_error(pred, target)
    with pytest.raises(ValueError, match=r"cross must be \[6\] \(pair_cross\(pred, target\)\)"):
        fastpref.loss_from_errors(err, err, make("dpo", 0.5))
    with pytest.raises(ValueError, match="cross must be None without safeguard"):
        fastpref.loss_from_errors(err, err, make("dpo", None), cross=err[:6])
    with pytest.raises(ValueError, match=r"cross must be \[6\], one number each"):
        fastpref.loss_from_errors(err, err, make("dpo", 0.5), cross=err)
    with pytest.raises(ValueError, match="pair_cross: pred must have 12 rows like target"):
        fastpref.pair_cross(pred[:6], target)
