"""95 % intervals over prompts and seeds: a bootstrap of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastpref.look.evaluate import Z, Interval

RESAMPLES = 10_000
# Student's 97.5 % point by degrees of freedom; beyond them Z, a little too narrow.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(
    statistic: Callable[[Tensor], Tensor], tables: Sequence[Tensor], *, seed: int = 0
) -> Interval:
    """A statistic of means, and its interval, where seeds are crossed with prompts.

    tables: K of [S, P], a number for each seed and prompt (mean over the prompt's clips).
    statistic: from means [..., K] to [...]. Its value is that of the plain means.

    A resample r draws S-1 of S seeds and P-1 of P prompts with replacement, the same for all
    tables (one fewer: then the variance of a mean is unbiased), n_s and n_p times each:

        u_s = 1/S + t (n_s / (S-1) - 1/S),    v_p = n_p / (P-1),    mean_k = sum u_s v_p x_ksp

    t = Student's 97.5 % point of S-1 degrees of freedom over the normal one (3 seeds: 2.2), since a
    few seeds say little of how seeds differ. The interval is from the 2.5 % to the 97.5 % point of
    the resamples' statistics. What is alone (one seed, one prompt) is not resampled: the interval
    then says nothing of others.
    """
    x = torch.stack([t.double() for t in tables])
    _, seeds, prompts = x.shape
    generator = torch.Generator().manual_seed(seed)
    stretch = STUDENT.get(seeds - 1, Z) / Z
    u = 1 / seeds + stretch * (_shares(seeds, generator) - 1 / seeds)
    v = _shares(prompts, generator)
    found = statistic(torch.einsum("rs,ksp,rp->rk", u, x, v)).sort().values
    low, high = (found[round(q * (len(found) - 1))].item() for q in (0.025, 0.975))
    return Interval(statistic(x.mean((1, 2))).item(), low, high)


def _shares(n: int, generator: torch.Generator) -> Tensor:
    """[RESAMPLES, n]: how often each of n is among n-1 draws with replacement, over n-1."""
    if n == 1:
        return torch.ones(RESAMPLES, 1, dtype=torch.float64)
    draws = torch.randint(n, (RESAMPLES, n - 1), generator=generator)
    counts = torch.zeros(RESAMPLES, n, dtype=torch.float64)
    return counts.scatter_add_(1, draws, torch.ones(draws.shape, dtype=torch.float64)) / (n - 1)


def mean(table: Tensor) -> Interval:
    return interval(lambda m: m[..., 0], [table])


def difference(one: Tensor, other: Tensor) -> Interval:
    """Of two means, paired: seed with seed, prompt with prompt."""
    return mean(one - other)
