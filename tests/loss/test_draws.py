"""Draws: functions of (seed, pair id, index) alone, whatever the company or the thread count."""

import math
import statistics
from enum import IntEnum

import pytest
import torch

from fastpref import Draws, Target, add_noise, objective, oracle, pair_error, preference_loss

SEED = 2**62 + 12345
PAIRS = torch.tensor([0, 1, -1, 2**31, 2**62 + 3, -(2**63)])
INDEX = torch.tensor([0, 1, 2, 7, 2**28 - 1, 0])


def noise(pair_id=PAIRS, index=INDEX, elements=64, seed=SEED, members=1, device="cpu"):
    """The normals the kernels draw: x_t with a = 0, s = 1."""
    x0 = torch.zeros(members * len(pair_id), elements, device=device)
    zero, one = torch.zeros(len(pair_id)).to(device), torch.ones(len(pair_id)).to(device)
    return add_noise(x0, Draws(seed, pair_id.to(device), index.to(device)), zero, one)


@pytest.mark.parametrize("elements", [1, 2, 3, 4, 5, 33, 1000, 8193])
def test_native_normals_are_the_oracles(elements, device):
    """Native polynomials against exact Box-Muller of the same words; equal bits on every device."""
    exact = oracle.normal(SEED, PAIRS, INDEX, elements)
    native = noise(elements=elements, device=device).cpu()
    torch.testing.assert_close(native, exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(native, noise(elements=elements))


def test_the_stream_never_changes():
    """Written down once: a reference cache of one version must hold in the next."""
    known = [0.48329553, -0.33547983, -0.51374745, 0.45902991]
    known += [-2.07252526, 1.62301922, -0.0295416042, 1.47751963]
    got = noise(torch.tensor([123456789012345]), torch.tensor([3]), elements=8, seed=42)
    assert got[0].tolist() == pytest.approx(known, rel=1e-6)


def test_each_part_of_the_key_matters():
    """Seed words, id words, index and domain all change the numbers."""
    base = (5, torch.tensor([9]), torch.tensor([2]))
    changed = [
        (6, base[1], base[2]),
        (5 + 2**32, base[1], base[2]),
        (5, base[1] + 1, base[2]),
        (5, base[1] + 2**32, base[2]),
        (5, base[1], base[2] + 1),
    ]
    first = oracle.normal(*base, 256)
    others = [oracle.normal(*key, 256) for key in changed]
    others += [oracle.normal(*base, 256, domain) for domain in range(5) if domain != oracle.NOISE]
    for other in others:
        assert not torch.isclose(first, other).any()
        assert abs((first * other).mean()) < 5 / 16


def test_a_seed_is_any_integer():
    """Those of an enumeration, say, and True, which Python counts among them."""
    pred, x0 = torch.randn(2, 2, 9)
    dpo, ids, one = objective("dpo", beta=1.0), torch.tensor([3]), torch.ones(1)
    expected, *others = (
        preference_loss(pred, Target(x0, Draws(seed, ids, ids), one, one), pred + 1, dpo).err
        for seed in (1, IntEnum("Seeds", "first").first, True)
    )
    assert all(torch.equal(expected, other) for other in others)


def test_members_company_and_order_do_not_matter():
    """Winner and loser share eps; a pair alone, or in another place, gets the same bits."""
    whole = noise(members=2, elements=777)
    assert torch.equal(whole[:6], whole[6:])
    order = torch.tensor([4, 0, 2, 5, 1, 3])
    assert torch.equal(noise(PAIRS[order], INDEX[order], 777), whole[order])
    for pair in range(6):
        alone = noise(PAIRS[[pair]], INDEX[[pair]], 777)
        assert torch.equal(alone[0], whole[pair])
    assert torch.equal(noise(elements=30), whole[:6, :30])


def test_threads_do_not_matter():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(noise(elements=40_001))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_the_loss_sees_the_noise_that_was_added():
    """The regenerated target is exact: predicting the noise that add_noise put in gives error 0."""
    x0 = torch.randn(4, 3, 7, 11)
    draws = Draws(7, torch.tensor([10, 20]), torch.tensor([0, 5]))
    zero, one = torch.zeros(2), torch.ones(2)
    eps = add_noise(torch.zeros_like(x0), draws, zero, one)
    assert pair_error(eps, Target(x0, draws, one, zero)).tolist() == [0.0] * 4
    assert pair_error(eps - x0, Target(x0, draws, one, -one)).tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("out", [None, torch.float32, torch.bfloat16, torch.float16])
def test_add_noise_rounds_once(dtype, out):
    """a x0 + s eps in fp32 with one fma, then one rounding to the output's dtype."""
    x0 = torch.randn(4, 5, 13).to(dtype)
    draws = Draws(1, torch.tensor([3, 4]), torch.tensor([0, 0]))
    a, s = torch.tensor([0.9, 0.1]), torch.tensor([0.3, 0.95])
    eps = noise(draws.pair_id, draws.index, 65, seed=1)
    x_t = add_noise(x0, draws, a, s, out)
    assert x_t.dtype == (out or dtype)
    # float64 is the oracle's, whose normals are exact.
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 0, "atol": 0}
    exact = oracle.mix(x0, eps, a, s).to(out or dtype)
    torch.testing.assert_close(x_t, exact, **close)
    plain = a.repeat(2).view(4, 1, 1) * x0.float() + s.repeat(2).view(4, 1, 1) * eps.repeat(
        2, 1
    ).view_as(x0)
    eps_out = torch.finfo(out or dtype).eps
    torch.testing.assert_close(x_t.float(), plain, rtol=eps_out, atol=1e-6)


def test_normals_are_normal():
    """Moments, correlation between neighbours, and the distribution function over 2^20 numbers."""
    pair_id = torch.arange(64) * 7919
    x = noise(pair_id, torch.zeros_like(pair_id), 2**14).double()
    n = x.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        moment = x.pow(power).mean().item()
        assert abs(moment - expected) < 5 * math.sqrt(variance / n), power
    for step in (1, 2, 3, 4, 5):  # words, and the sine and cosine of one angle
        assert abs((x[:, step:] * x[:, :-step]).mean().item()) < 5 / math.sqrt(n)
    assert abs((x[1:] * x[:-1]).mean().item()) < 5 / math.sqrt(n)
    # Kolmogorov-Smirnov: sqrt(n) sup |F_n - F| exceeds 1.95 once in a thousand.
    ordered = torch.special.ndtr(x.flatten().sort().values)
    grid = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (ordered - grid).abs().max().item() * math.sqrt(n) < 1.95
    # The tails: a 32-bit radius reaches 6.66.
    assert 4.0 < x.abs().max() < 6.7
    beyond = (x.abs() > 3).double().mean().item()
    expected = 2 * statistics.NormalDist().cdf(-3)
    assert abs(beyond - expected) < 5 * math.sqrt(expected / n)


def test_uniform_is_open_and_uniform():
    pair_id = torch.arange(100_000)
    u = oracle.uniform(3, pair_id, torch.zeros_like(pair_id), oracle.TIMESTEP)
    assert u.dtype == torch.float64 and u.min() > 0 and u.max() < 1
    grid = torch.arange(1, 100_001, dtype=torch.float64) / 100_000
    assert (u.sort().values - grid).abs().max() * math.sqrt(100_000) < 1.95
    # By hand, from the words.
    x, y, _, _ = oracle.words(3, pair_id[:1], pair_id[:1], torch.zeros(1).long(), oracle.TIMESTEP)
    by_hand = (((x.item() << 20) | (y.item() >> 12)) + 0.5) / 2**52
    assert u[0].item() == by_hand
