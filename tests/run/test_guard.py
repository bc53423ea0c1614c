"""The guard: steps that are not finite are skipped, and a run of many is given up."""

import pytest
import torch

from fastpref.run.guard import Diverged, Guard


def test_guard_skips_and_gives_up():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = Guard(torch.device("cpu"), patience=3)
    for step in range(3):
        weight.grad = torch.full((3,), float("nan"))
        guard.watch(optimizer, weight.grad.norm())
        optimizer.step()
        assert torch.equal(weight.data, torch.ones(3))
        if step == 1:
            assert "2 steps skipped" in guard.judge({}, step)
    with pytest.raises(Diverged, match="1 of the last steps"):
        guard.judge({}, 3)
    weight.grad = torch.ones(3)
    guard.watch(optimizer, weight.grad.norm())
    optimizer.step()
    assert not torch.equal(weight.data, torch.ones(3)) and guard.judge({}, 4) is None
    alternating = Guard(torch.device("cpu"), patience=3)
    for step in range(20):
        alternating.watch(optimizer, torch.tensor(float("nan") if step % 2 else 1.0))
    with pytest.raises(Diverged, match="10 of the last steps"):
        alternating.judge({}, 20)
    del optimizer.found_inf
    warning = guard.judge({"errors/policy_w": 2.0, "errors/reference_w": 1.0}, 5)
    assert "100 % above the reference" in warning
