"""The intervals over prompts and seeds, beside other ways to them."""

from __future__ import annotations

import random

import pytest
import torch

from bench.evidence.intervals import difference, interval, mean, student


def table(seeds: int, prompts: int, a: float, b: float, c: float, seed: int) -> torch.Tensor:
    """Normal effects of seeds (sd a), of prompts (b), and of both together (c)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return a * normal(seeds, 1) + b * normal(1, prompts) + c * normal(seeds, prompts)


def test_students_points():
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 11: 2.201, 35: 2.030, 1000: 1.962}
    for freedom, point in known.items():
        assert student(freedom) == pytest.approx(point, rel=0.008)


def test_an_interval_is_that_of_a_bootstrap_written_out():
    """Loops and Python's own random numbers, 4,000 times, beside it."""
    x = table(3, 5, 0.3, 1.0, 0.1, 1)
    z, r = 1.959963984540054, random.Random(1)
    stretch = {3: 4.30265 / z, 5: 2.77645 / z}

    def weights(n: int) -> list[float]:
        drawn = [r.randrange(n) for _ in range(n - 1)]
        return [1 / n + stretch[n] * (drawn.count(i) / (n - 1) - 1 / n) for i in range(n)]

    found = []
    for _ in range(4000):
        u, v = weights(3), weights(5)
        found.append(sum(u[s] * v[p] * x[s, p].item() for s in range(3) for p in range(5)))
    found.sort()
    ours = mean(x)
    assert ours.value == pytest.approx(x.mean().item(), abs=1e-12)
    assert ours.low == pytest.approx(found[99], abs=0.06)
    assert ours.high == pytest.approx(found[3899], abs=0.06)


def test_an_interval_has_the_width_of_both_variances():
    """sqrt(t_S^2 s_S^2/S + t_P^2 s_P^2/P), where effects add and both are many."""
    x = table(10, 40, 1.0, 2.0, 0.0, 2)
    variance = 2.262**2 * x.mean(1).var() / 10 + 2.023**2 * x.mean(0).var() / 40
    ours = mean(x)
    assert (ours.high - ours.low) / 2 == pytest.approx(variance.sqrt().item(), rel=0.05)
    one = mean(x[:1])  # one seed: prompts alone
    alone = 2.023 * (x[0].var() / 40).sqrt().item()
    assert (one.high - one.low) / 2 == pytest.approx(alone, rel=0.1)


@pytest.mark.parametrize("seeds, prompts", [(3, 12), (3, 8), (2, 12), (3, 36)])
@pytest.mark.parametrize("a, b, c", [(1, 1, 0.3), (0, 1, 0), (1, 0, 0), (0, 0, 1)])
def test_intervals_of_a_few_seeds_hold_the_truth(seeds, prompts, a, b, c):
    """Least where a seed's part is all there is: then the interval is that of a few atoms."""
    held = 0
    for seed in range(150):
        low, high = mean(table(seeds, prompts, a, b, c, 100 + seed))[1:]
        held += low <= 0 <= high
    assert held / 150 >= 0.88, held / 150


def test_a_difference_is_paired():
    """What seeds and prompts do to both alike falls out."""
    both = table(3, 12, 5.0, 5.0, 0.0, 3)
    one, other = both + 0.1 + table(3, 12, 0, 0, 0.01, 4), both
    found = difference(one, other)
    assert 0.08 < found.low < found.value < found.high < 0.12


def test_the_statistic_is_of_means_not_a_mean_of_statistics():
    x, y = table(3, 6, 0, 0, 1, 5) + 4, table(3, 6, 0, 0, 1, 6) + 8
    found = interval(lambda m: m[..., 0] / m[..., 1], [x, y])
    assert found.value == pytest.approx((x.mean() / y.mean()).item())
    assert found.low < found.value < found.high
