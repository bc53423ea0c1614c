"""The guard: steps that are not finite are skipped, and a run of many is given up."""

import importlib

import pytest
import torch
from commands import options
from safetensors.torch import load_file

from fastpref.run.config import Config
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


@pytest.mark.parametrize("pair_mode", ["joint", "deferred"])
def test_a_step_that_is_not_finite_leaves_a_run_as_it_was(
    pair_mode, encoded_pairs, tmp_path, monkeypatch, capsys
):
    """The second of three: the run ends as one of the other two steps would."""
    loop = importlib.import_module("fastpref.run.train")
    name = {"joint": "backward", "deferred": "deferred"}[pair_mode]
    calls, real = [], getattr(loop, name)

    def spoiled(*args, parameters, **how):
        calls.append(1)
        out = real(*args, parameters=parameters, **how)
        if len(calls) == 2:
            parameters[0].grad.fill_(torch.nan)
        return out

    monkeypatch.setattr(loop, name, spoiled)
    change = {"max_train_steps": 3, "checkpointing_steps": 1, "pair_mode": pair_mode}
    loop.train(Config(**options(encoded_pairs, tmp_path, **change)))
    assert "1 steps skipped, their loss or gradient was not finite" in capsys.readouterr().err
    one, two, three = (
        load_file(tmp_path / f"checkpoint-{n}" / "parameters.safetensors") for n in (1, 2, 3)
    )
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(two[key], three[key]) for key in two)
    assert all(value.isfinite().all() for value in three.values())
