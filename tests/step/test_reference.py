"""The reference from one copy or two, and the self-check of adapters that are off."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from commands import BASE, options, write_pairs
from tiny import case, run

from fastpref import models
from fastpref.pairs.dataset import Batch
from fastpref.run import checks
from fastpref.run.config import Config
from fastpref.run.train import train
from fastpref.step import reference


@pytest.mark.parametrize("name", ["wan", "cogvideox-2b", "sd15"])
def test_adapters_off_and_a_frozen_copy_say_what_the_base_says(name):
    c = case(name)
    noisy, t, _ = c.inputs()
    wanted = c.family.predict(c.base, noisy, t, c.cond)
    off = reference.adapters_off(c.model, c.family.predict)
    copied = reference.base(copy.deepcopy(c.base), c.family.predict)
    assert torch.equal(off(noisy, t, c.cond), wanted)
    with torch.no_grad():
        for p in c.base.parameters():
            p.zero_()
    assert torch.equal(copied(noisy, t, c.cond), wanted)
    assert not torch.equal(c.policy(noisy, t, c.cond), wanted)
    with pytest.raises(ValueError, match="no LoRA layers; use frozen_copy"):
        reference.adapters_off(c.base, c.family.predict)
    with pytest.raises(ValueError, match="no LoRA layers; use frozen_copy"):
        reference.shared_prefix(c.base, c.family.predict)


@pytest.mark.parametrize("form", ["joint", "deferred"])
@pytest.mark.parametrize("half", [False, True])
def test_changes_are_those_of_the_step_without_its_backward(form, half):
    c = case("wan", half=half)
    policy, says = reference.shared_prefix(c.model, c.family.predict)
    out, _ = run(c, form, policy, says)
    batch = Batch(c.latents, c.cond, c.weight, c.draws.pair_id, [])
    found = reference.changes(policy, says, c.process, batch, c.draws, form)
    assert torch.equal(found, out.err - out.ref_err) and found.abs().min() > 1e-4
    assert not found.requires_grad and all(p.grad is None for p in c.parameters)


def test_self_check_sees_a_changed_base():
    family = models.family("toy")
    model = family.load(BASE, torch.float32)
    x, t = torch.ones(1, 3, 8, 12, 12), torch.tensor([500.0])
    cond = {"text": family.encode_text(family.pipeline(BASE), ["a disc"])[0]["text"][None]}

    def probe():
        with torch.no_grad():
            return family.predict(model, x, t, cond)

    before = probe()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=family.LORA_TARGETS), model)
    checks.check_off(model, probe, before)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "base_layer" in name).mul_(1.01)
    with pytest.raises(ValueError, match="self-check: with its adapters off the model differs"):
        checks.check_off(model, probe, before)


def test_a_step_in_which_the_switch_does_nothing_is_told(tmp_path, monkeypatch, capsys):
    """A reference that sees the adapters: margins of zero, which no other check would notice."""
    media = write_pairs(tmp_path / "pairs", count=4)
    train(Config(**options(media, tmp_path / "good", max_train_steps=2)))
    assert "self-check" not in capsys.readouterr().err
    monkeypatch.setattr(
        reference,
        "shared_prefix",
        lambda model, predict: (
            lambda noisy, t, cond: predict(model, noisy, t, cond),
            reference.base(model, predict),
        ),
    )
    train(Config(**options(media, tmp_path / "bad", max_train_steps=2)))
    assert "policy and reference still say the same" in capsys.readouterr().err
