"""95 % intervals over prompts and seeds: a bootstrap of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastpref.look.evaluate import Interval, Z

RESAMPLES = 10_000


def student(freedom: int) -> float:
    """Student's 97.5 % point: exact for 1 and 2 degrees of freedom, beyond them by Fisher's
    expansion in 1 / freedom (from 3 on within 0.4 %).
    """
    if freedom < 3:
        return {1: 12.7062, 2: 4.30265}[freedom]
    z, n = Z, freedom
    terms = (
        (z**3 + z) / (4 * n),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3),
    )
    return z + sum(terms)


def interval(statistic: Callable[[Tensor], Tensor], tables: Sequence[Tensor]) -> Interval:
    """A statistic of means, and its interval, where seeds are crossed with prompts.

    tables: K of [S, P], a number for each seed and prompt (mean over the prompt's clips).
    statistic: from means [..., K] to [...]. Its value is that of the plain means.

    A resample draws S-1 of S seeds and P-1 of P prompts with replacement, the same for all tables
    (one fewer: then the variance of a mean is unbiased), n_s and n_p times each:

        u_s = 1/S + t_S (n_s / (S-1) - 1/S),   v_p likewise,   mean_k = sum u_s v_p x_ksp

    t_S = Student's 97.5 % point of S-1 degrees of freedom over the normal one (3 seeds: 2.2; 12
    prompts: 1.12), since few say little of how they differ. The interval is from the 2.5 % to the
    97.5 % point of the resamples' statistics. What is alone (one seed, one prompt) is not
    resampled: the interval then says nothing of others.
    """
    x = torch.stack([t.double() for t in tables])
    generator = torch.Generator().manual_seed(0)
    u, v = (_weights(n, generator) for n in x.shape[1:])
    found = statistic(torch.einsum("rs,ksp,rp->rk", u, x, v)).sort().values
    low, high = (found[round(q * (len(found) - 1))].item() for q in (0.025, 0.975))
    return Interval(statistic(x.mean((1, 2))).item(), low, high)


def _weights(n: int, generator: torch.Generator) -> Tensor:
    """[RESAMPLES, n], of sum 1."""
    if n == 1:
        return torch.ones(RESAMPLES, 1, dtype=torch.float64)
    draws = torch.randint(n, (RESAMPLES, n - 1), generator=generator)
    counts = torch.zeros(RESAMPLES, n, dtype=torch.float64)
    counts.scatter_add_(1, draws, torch.ones(draws.shape, dtype=torch.float64))
    return 1 / n + student(n - 1) / Z * (counts / (n - 1) - 1 / n)


def mean(table: Tensor) -> Interval:
    return interval(lambda m: m[..., 0], [table])


def difference(one: Tensor, other: Tensor) -> Interval:
    """Of two means, paired: seed with seed, prompt with prompt."""
    return mean(one - other)
