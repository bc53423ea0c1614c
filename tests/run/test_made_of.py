"""What a run is made of, against values worked out by hand: process, rates, metrics, draws."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from commands import options
from tiny import case

import fastpref
from fastpref import models
from fastpref.loss.functional import PairLoss
from fastpref.pairs.dataset import Batch
from fastpref.process import MASKED
from fastpref.progress import stage
from fastpref.run import parts, telemetry
from fastpref.run.assemble import DRAWS, noising
from fastpref.run.config import Config
from fastpref.run.optimisation import schedule
from fastpref.run.parts import preparer
from fastpref.run.telemetry import pair_values
from fastpref.run.train import train
from fastpref.step import checkpointing, reference


def config(**changes):
    return Config(**options("data", "run", **changes))


def make_process(config, family):
    return parts.make_process(family, config.model, **noising(config))


def test_times_are_stratified_over_the_draws_of_a_pair():
    """strata, K: the K draws of a pair fall one into each K-th of the distribution."""
    family = models.family("toy")
    assert make_process(config(), family).strata is None
    assert make_process(config(draws_per_pair=5), family).strata == 5


def test_importance_steps_reach_the_process():
    family, index = models.family("toy"), torch.arange(64)
    draws = fastpref.Draws(0, index + 1, index)
    gains = []
    for steps in (5, 50):
        process = make_process(config(objective="dpo_cm", importance_steps=steps), family)
        assert process.importance_steps == steps
        gains.append(process.gain(draws))
    masks = [gain.clamp(max=10) > 0.5 for gain in gains]
    assert not torch.equal(*masks)


def test_times_without_weight_are_not_drawn():
    """Where another objective, the SFT term or a shared cache needs them they are."""
    family = models.family("toy")
    index = torch.arange(50_000)
    draws = fastpref.Draws(0, index, torch.zeros_like(index))

    def masked(**change):
        return (make_process(config(**change), family).gain(draws) == MASKED).sum().item()

    for objective in ("dpo_cm", "sdpo"):
        assert masked(objective=objective) == 0
        assert masked(objective=objective, timestep_range=(0.0, 0.1), importance_steps=5) == 0
        for change in ({"sft_weight": 0.1}, {"reference": "cached"}):
            assert masked(objective=objective, **change) > 20
    assert masked(objective="dpo") > 20 and masked(objective="sft", beta=None) > 20
    with pytest.raises(ValueError, match="holds only times with importance weight 0"):
        make_process(config(objective="sdpo", timestep_range=(0.0, 5e-4)), family)
    window = make_process(config(objective="sdpo", timestep_range=(0.35, 1.0)), family)
    assert window.timestep_range == (0.35, 1.0)


def test_a_cache_holds_eight_draws_unless_told():
    assert config(reference="cached").draws_per_pair == 8
    assert config(reference="cached", draws_per_pair=3).draws_per_pair == 3
    assert config().draws_per_pair is None


HALF = 0.5 * (1 + math.cos(math.pi / 4))


@pytest.mark.parametrize(
    ("kind", "warm", "factors"),
    [
        ("constant", 0, [1] * 4),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0, [1, HALF, 0.5, 1 - HALF]),
        ("constant", 4, [0.25, 0.5, 0.75, 1, 1, 1]),
        ("linear", 2, [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", 2, [0.5, 1, 1, HALF, 0.5, 1 - HALF]),
    ],
)
def test_schedule(kind, warm, factors):
    c = {"lr_scheduler": kind, "lr_warmup_steps": warm, "max_train_steps": len(factors)}
    assert [schedule(i, **c) for i in range(len(factors))] == pytest.approx(factors)


def test_the_first_step_is_as_long_as_the_scheduled_rate(pairs, tmp_path):
    """Adam's first step is the rate, whatever the gradient; B starts at zero."""
    from safetensors.torch import load_file

    change = {"max_train_steps": 1, "weight_decay": 0.0, "adam_epsilon": 1e-20}
    for warm in (0, 4):
        folder = tmp_path / str(warm)
        train(Config(**options(pairs, folder, lr_warmup_steps=warm, **change)))
        values = load_file(folder / "pytorch_lora_weights.safetensors")
        moved = torch.cat([v.abs().flatten() for k, v in values.items() if "lora_B" in k])
        assert moved.median().item() == pytest.approx(1e-3 / max(1, warm), rel=1e-3)


def test_other_inputs_are_not_answered_with_what_was_recorded():
    c = case("wan", half=True)
    policy, ref = reference.shared_prefix(c.model, c.family.predict)
    noisy, t, _ = c.inputs()
    text = {name: value + 1 for name, value in c.cond.items()}
    with torch.no_grad():
        for other in ((noisy + 1, t, c.cond), (noisy, t / 2, c.cond), (noisy, t, text)):
            ref(noisy, t, c.cond)
            assert torch.equal(policy(*other), c.policy(*other))


class Folder:
    """Of an encoded set, what `preparer` reads."""

    def __init__(self) -> None:
        self.empty_cond = {"text": torch.zeros(2)}

    def __getitem__(self, i: int) -> SimpleNamespace:
        return SimpleNamespace(cond={"text": torch.ones(2)})


def test_a_prompt_is_dropped_for_both_members_of_a_pair():
    count = 2000
    batch = Batch(
        torch.zeros(2 * count, 1), {"text": torch.ones(2 * count, 2)},
        torch.ones(count), torch.arange(1, count + 1), [],
    )  # fmt: skip
    how = config(prompt_dropout=0.3).only(*DRAWS)
    prepare = preparer(Folder(), torch.device("cpu"), torch.float32, **how)
    kept = prepare(0, batch)[0].cond["text"]
    winners, losers = kept.chunk(2)
    assert torch.equal(winners, losers) and torch.equal(kept[:, 0], kept[:, 1])
    assert (winners[:, 0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.04)


def test_every_metric_by_hand():
    """Three pairs: a plain one, one with the loser's coefficient alone zero, one of zeros."""
    err = torch.tensor([1.0, 2.0, 3.0, 4.0, 2.0, 1.0]).double()  # three winners, three losers
    ref = torch.tensor([2.0, 2.0, 2.0, 3.0, 2.0, 2.0]).double()
    importance = torch.tensor([0.75, 1.0, 0.25, 0.5, 1.5, 0.5]).double()
    coef = torch.tensor([0.5, 0.5, 0.0, -0.5, 0.0, 0.0]).double()
    zeros = torch.zeros(3).double()
    out = PairLoss(torch.tensor(0.75).double(), zeros, err, ref, zeros, importance, coef)
    out = out._replace(safeguard=torch.tensor([1.0, 0.5, 0.0]).double())
    rule = fastpref.objective("dpo_cm", beta=4.0, mask_threshold=0.4, clip=0.2, safeguard=0.5)
    assert {k: v.tolist() for k, v in pair_values(out, rule).items()} == {
        "loss": [0.75] * 3,
        "errors/policy_w": [1, 2, 3],
        "errors/policy_l": [4, 2, 1],
        "errors/reference_w": [2, 2, 2],
        "errors/reference_l": [3, 2, 2],
        "zero_gradient": [0, 0, 1],
        "rewards/chosen": [2, 0, -2],
        "rewards/rejected": [-2, 0, 2],
        "rewards/margins": [4, 0, -4],
        "rewards/accuracies": [1, 0.5, 0],
        "implicit_acc": [1, 0.5, 0],
        "safeguard/lambda": [1, 0.5, 0],
        "importance/weight": [0.625, 1.25, 0.375],
        "importance/masked": [0, 0, 0.5],
        "importance/kept_clipped": [1, 0.5, 0.5],
    }


def test_a_margin_that_is_not_a_number_is_not_wrong():
    """One pair of NaN beside one that is right."""
    err = torch.tensor([math.nan, 1.0, 2.0, 3.0]).double()
    ref, zeros = torch.full((4,), 2.0).double(), torch.zeros(4).double()
    out = PairLoss(zeros[0], zeros[:2], err, ref, zeros[:2], None, zeros)
    values = pair_values(out, fastpref.objective("dpo", beta=4.0))
    for name in ("rewards/margins", "rewards/accuracies", "implicit_acc"):
        assert values[name][0].isnan() and values[name][1] > 0, name


def test_the_posterior_step_is_rounded():
    """1000 / 7 = 142.86: from t to t - 143."""
    abar = torch.linspace(0.99, 0.2, 1000, dtype=torch.float64)
    process = fastpref.Diffusion(alphas_cumprod=abar, importance_steps=7)
    index = torch.arange(50)
    draws = fastpref.Draws(0, index + 1, index)
    t = (process.level(draws) * 1000).round().long()
    snr = abar / (1 - abar)
    later = t > 143
    assert later.sum() > 20
    wanted = snr[(t - 143).clamp(min=0)] / snr[t] - 1
    torch.testing.assert_close(process.gain(draws)[later], wanted[later], rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", ["attention", "full"])
def test_a_pass_with_no_grad_is_not_checkpointed(mode, monkeypatch):
    c, calls, real = case("wan"), [], checkpointing.checkpoint
    monkeypatch.setattr(
        checkpointing, "checkpoint", lambda *a, **k: (calls.append(a), real(*a, **k))[1]
    )
    checkpointing.apply(c.model, c.family.BLOCKS, mode)
    noisy, t, _ = c.inputs()
    with torch.no_grad():
        c.policy(noisy, t, c.cond)
    assert not calls
    c.policy(noisy, t, c.cond)
    assert len(calls) == len(c.model.blocks)


def test_a_stage_is_said_before_it_ends_and_a_fault_has_its_own_line(capsys):
    with stage("loading"):
        assert capsys.readouterr().out == "loading ... "
    assert re.fullmatch(r"\d+\.\d s\n", capsys.readouterr().out)
    with pytest.raises(ValueError), stage("reading"):
        raise ValueError
    assert capsys.readouterr().out == "reading ... \n"


def test_a_run_says_what_it_does_before_its_first_step(pairs, tmp_path, capsys):
    """Each with its seconds, the first pass of the loop too; one that goes on measures no noise."""
    before, noise = ["reading the data", "loading the model", "self-check"], ["margin noise"]
    for steps, measured in ((1, noise), (2, [])):
        train(Config(**options(pairs, tmp_path, max_train_steps=steps)))
        lines = capsys.readouterr().out.splitlines()
        said = [line for line in lines if re.search(r" \.\.\. \d+\.\d s$", line)]
        assert [re.split("[,:]| \\.", line)[0] for line in said] == [
            *before, *measured, "first batch",
        ]  # fmt: skip


def test_the_clock_leaves_saves_out_and_counts_waiting(monkeypatch):
    """Steps 4 and 5, of two pairs each: 10 s, of them 3 of waiting and 4 of a save."""
    now = [100.0]
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: now[0])
    clock = telemetry.Clock(3)
    for seconds, part in ((3, clock.waiting), (3, nullcontext), (4, clock.paused)):
        with part():
            now[0] += seconds
    assert clock.lap(5, 2) == {"perf/seconds_per_pair": 1.5, "perf/data_wait_fraction": 0.5}
    now[0] += 8
    assert clock.lap(6, 2) == {"perf/seconds_per_pair": 4.0, "perf/data_wait_fraction": 0.0}
    assert clock.seconds_per_pair(6, 2) == 3.0, "in all, the save too"
    assert clock.seconds_per_pair(3, 2) is None
