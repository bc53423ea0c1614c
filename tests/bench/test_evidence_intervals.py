"""The intervals over prompts and seeds, beside other ways to them."""

from __future__ import annotations

import random

import pytest
import torch

from bench.evidence.intervals import STUDENT, difference, interval, mean


def table(seeds: int, prompts: int, a: float, b: float, c: float, seed: int) -> torch.Tensor:
    """Normal effects of seeds (sd a), of prompts (b), and of both together (c)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return a * normal(seeds, 1) + b * normal(1, prompts) + c * normal(seeds, prompts)


def test_an_interval_is_that_of_a_bootstrap_written_out():
    """Loops and Python's own random numbers, 4,000 times, beside it."""
    x = table(3, 5, 0.3, 1.0, 0.1, 1)
    stretch, r = STUDENT[2] / 1.959963984540054, random.Random(1)
    grand = x.mean().item()
    by_prompt = x.mean(0).tolist()
    found = []
    for _ in range(4000):
        seeds = [r.randrange(3) for _ in range(2)]
        prompts = [r.randrange(5) for _ in range(4)]
        drawn = sum(x[s, p].item() for s in seeds for p in prompts) / 8
        over_all_seeds = sum(by_prompt[p] for p in prompts) / 4
        found.append(over_all_seeds + stretch * (drawn - over_all_seeds))
    found.sort()
    ours = mean(x)
    assert ours.value == pytest.approx(grand, abs=1e-12)
    assert ours.low == pytest.approx(found[99], abs=0.06)
    assert ours.high == pytest.approx(found[3899], abs=0.06)


def test_an_interval_has_the_width_of_both_variances():
    """z sqrt(t^2/z^2 s_S^2/S + s_P^2/P), where effects add and both are many."""
    x = table(10, 40, 1.0, 2.0, 0.0, 2)
    variance = (STUDENT[9] / 1.96) ** 2 * x.mean(1).var() / 10 + x.mean(0).var() / 40
    ours = mean(x)
    assert (ours.high - ours.low) / 2 == pytest.approx(1.96 * variance.sqrt().item(), rel=0.05)
    one = mean(x[:1])  # one seed: prompts alone
    alone = 1.96 * (x[0].var() / 40).sqrt().item()
    assert (one.high - one.low) / 2 == pytest.approx(alone, rel=0.1)


@pytest.mark.parametrize("a, b, c", [(1, 1, 0.3), (0.1, 1, 0.3), (1, 0.1, 0.3)])
def test_intervals_of_three_seeds_and_twelve_prompts_hold_the_truth(a, b, c):
    held = 0
    for seed in range(200):
        low, high = mean(table(3, 12, a, b, c, 100 + seed))[1:]
        held += low <= 0 <= high
    assert 0.86 <= held / 200 <= 0.995, held / 200


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
