"""What context parallelism refuses before anything runs, each by its name."""

from __future__ import annotations

import importlib.metadata

import pytest
import tiny

from fastpref.step import context
from fastpref.step.attention import Choice

FITS = {"ulysses": 2, "ring": 1, "backend": "native", "checkpointing": "full", "compiled": False}
RING = {"ulysses": 1, "ring": 2, "backend": "cudnn", "checkpointing": "none"}


@pytest.fixture(scope="module")
def wan():
    return tiny.case("wan").model


def heads(count: int):
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=count, attention_head_dim=12, text_dim=8, freq_dim=8, ffn_dim=8,
        num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"backend": "flash", "compiled": True},
        RING,
        RING | {"checkpointing": "full", "compiled": 1},
    ],
)
def test_what_fits(how, wan):
    context.check(wan, **FITS | how)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"ulysses": 3}, "ulysses_degree 3: does not divide the 2 attention heads of Wan"),
        ({"backend": "xformers"}, "cannot share out attention xformers, use one of native, cudnn"),
        (RING | {"backend": "native"}, "ring_degree 2: runs with attention cudnn, flash, flash3"),
        (RING | {"checkpointing": "full"}, "checkpointing full refuses: use compile, ulysses_deg"),
        ({"compiled": True}, "compile runs with attention cudnn, .* or no compile"),
    ],
)
def test_how_a_model_is_not_shared_out(how, said, wan):
    with pytest.raises(ValueError, match=said) as raised:
        context.check(wan, **FITS | how)
    assert "\n" not in str(raised.value)


def test_degrees_that_divide_the_heads_are_said():
    with pytest.raises(ValueError, match=r"expected one of 1, 2, 3, 4, 6, 12$"):
        context.check(heads(12), **FITS | {"ulysses": 8})


@pytest.mark.parametrize("name", ["cogvideox-2b", "sd15"])
def test_a_model_without_a_plan(name):
    model = tiny.case(name).model
    with pytest.raises(ValueError, match=f"diffusers has no plan for {type(model).__name__}"):
        context.check(model, **FITS)


def test_layers_behind_the_gathering(monkeypatch, wan):
    """Their gradients would be whole on every process."""
    plan = {**wan._cp_plan, "blocks.3": wan._cp_plan["proj_out"]}
    monkeypatch.setattr(type(wan), "_cp_plan", plan)
    with pytest.raises(ValueError, match=r"gathers its tokens at proj_out, blocks.3, and its last"):
        context.check(wan, **FITS)
    del plan["proj_out"]
    with pytest.raises(ValueError, match=r"tokens at blocks.3, and its last layer is proj_out"):
        context.check(wan, **FITS)


@pytest.mark.parametrize("version", ["0.39.0", "0.40.0.dev0", "0.40.1", "1.0.0"])
def test_old_versions(version, monkeypatch, wan):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    if version == "0.39.0":
        with pytest.raises(ValueError, match=r"gradients of diffusers 0.39.0 are wrong"):
            context.check(wan, **FITS)
    else:
        context.check(wan, **FITS)


def test_shapes(wan, monkeypatch):
    context.check_shape(wan, (16, 21, 60, 104), 512, contexts=8)
    with pytest.raises(
        ValueError, match=r"32760 tokens of latents of 21x60x104: .* 1, 2, 3, 4, 5, 6, 7, 8, "
    ):
        context.check_shape(wan, (16, 21, 60, 104), 512, contexts=16)
    context.check_shape(wan, (16, 21, 60, 104), 511, contexts=8)  # Wan's text is on all
    split = {**wan._cp_plan[""], "encoder_hidden_states": None}
    monkeypatch.setattr(type(wan), "_cp_plan", {**wan._cp_plan, "": split})
    with pytest.raises(ValueError, match="the 511 tokens of a prompt"):
        context.check_shape(wan, (16, 21, 60, 104), 511, contexts=8)


@pytest.mark.parametrize(
    ("name", "seconds", "settled"),
    [
        ("native", {"native": 1.0, "flash": 1.2, "cudnn": 1.1}, "cudnn"),
        ("xformers", {"native": 1.0, "xformers": 0.5}, "native"),
        ("flash", {"native": 1.0, "flash": 0.5, "cudnn": 0.4}, "flash"),
        ("native", {}, "native"),
        ("xformers", {}, "xformers"),
    ],
)
def test_auto_prefers_what_need_not_run_its_forward_again(name, seconds, settled):
    assert context.settled(Choice(name, seconds)).name == settled
