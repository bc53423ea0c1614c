"""A cache against the reference of now: how far margins may move, and what is said of it."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from memory import K, Pairs, kind, prepare
from tiny import STEPS, case

import fastpref
from fastpref.pairs.dataset import Batch
from fastpref.pairs.dataset import batches as in_order
from fastpref.run import checks
from fastpref.step import cache, filling, reference


def test_drift_is_half_beta_times_the_change_of_the_difference():
    """Of errors w, l kept as w + a, l + b: beta/2 |a - b|, the largest over the pairs."""
    draws = fastpref.Draws(0, torch.arange(2), torch.zeros(2, dtype=torch.int64))
    latents = torch.zeros(4, 1)
    batch = Batch(latents, {}, torch.ones(2), draws.pair_id, [])
    process = SimpleNamespace(noise=lambda latents, draws: (latents, None, latents))

    class Kept:
        fingerprint: ClassVar = {"pair_mode": "joint"}

        def get(self, draws):
            return torch.tensor([1.0, 4.0, 9.0, 16.0], dtype=torch.float64)

    def now(noisy, t, cond):  # squared: 1, 4, 9.75, 16.25
        return torch.tensor([[1.0], [2.0], [9.75**0.5], [16.25**0.5]])

    limits = {"beta": 10.0, "margin_noise": 0.1}
    worst, allowed = checks.drift(Kept(), now, process, [(batch, draws)], **limits)
    assert worst == pytest.approx(5 * 0.75, rel=1e-6) and allowed == 0.2


@pytest.mark.parametrize("form", STEPS)
def test_drift_of_a_changed_reference_is_reported(tmp_path, capfd, form):
    c, dataset = case("wan"), Pairs()
    ref = reference.adapters_off(c.model, c.family.predict)
    mark = kind(tmp_path / "data", c, pair_mode=form)
    limits = {"beta": 500.0, "margin_noise": 0.0}

    def batches():
        stream = in_order(dataset, 2, 11)
        return [prepare(*next(stream)) for _ in range(4)]

    def shifted(noisy, t, cond):
        return ref(noisy, t, cond) + 1e-4 * noisy

    errors = cache.ErrorCache(tmp_path / "b", mark, dataset)
    assert checks.drift(errors, shifted, c.process, batches(), **limits)[0] == 0, "nothing is there"
    filling.fill(errors, ref, c.process, prepare)
    worst, allowed = checks.drift(errors, ref, c.process, batches(), **limits)
    assert worst == 0 and allowed == 500e-6 and "warning" not in capfd.readouterr().err
    worst, allowed = checks.drift(errors, shifted, c.process, batches(), **limits)
    said = capfd.readouterr().err
    assert worst > allowed and said.count("\n") == 1
    assert f"cached and online margins differ by {worst:.3g}, expected at most 0.0005" in said
    assert "delete the cache's folder, or name another reference_cache" in said
    limits["margin_noise"] = worst
    assert checks.drift(errors, shifted, c.process, batches(), **limits)[1] == 2 * worst
    broken = checks.drift(errors, lambda x, t, cond: x * torch.nan, c.process, batches(), **limits)
    assert broken[0] == torch.inf and "differ by inf" in capfd.readouterr().err
    # The advice: the files that are there are kept as they are, so the folder has to go.
    limits["margin_noise"] = 0.0
    errors = cache.ErrorCache(tmp_path / "b", mark, dataset)
    assert filling.fill(errors, shifted, c.process, prepare) == 0
    shutil.rmtree(tmp_path / "b")
    errors = cache.ErrorCache(tmp_path / "b", mark, dataset)
    assert filling.fill(errors, shifted, c.process, prepare) == 7 * K
    assert checks.drift(errors, shifted, c.process, batches(), **limits)[0] == 0
    assert "warning" not in capfd.readouterr().err
