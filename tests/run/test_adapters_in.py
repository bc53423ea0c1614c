"""Adapters of other tools (diffusers#12159, #6087, musubi-tuner#29): each key form changes each
layer as it says, and as diffusers' own pipeline has it where that reads the form.
"""

from __future__ import annotations

import json

import loras
import peft
import pytest
import torch
from commands import BASE
from families import FAMILIES, tiny
from loras import DIFFUSERS, KOHYA, OLD, PEFT, alike, applied, flat
from safetensors.torch import save_file

from fastpref.models import names, toy
from fastpref.run import adapters
from fastpref.run.adapters import load_lora

# name: (how a layer is called, tensors, .alpha, mixed ranks); o: the layer's original name.
FORMS = {
    "diffusers": (lambda c, n, o: f"{c}.{n}", DIFFUSERS, False),
    "lora.down": (lambda c, n, o: f"{c}.{n}", OLD, False),
    "peft": (lambda c, n, o: f"base_model.model.{n}", DIFFUSERS, False),
    "peft, default": (lambda c, n, o: f"base_model.model.{n}", PEFT, False),
    "kohya": (lambda c, n, o: f"lora_unet_{flat(n)}", KOHYA, True),
    "kohya, no alpha": (lambda c, n, o: f"lora_unet_{flat(n)}", KOHYA, False),
    "kohya, original": (lambda c, n, o: f"lora_unet_{flat(o)}", KOHYA, True),
    "videox-fun": (lambda c, n, o: f"lora_unet__{flat(n)}", KOHYA, True),
    "onetrainer": (lambda c, n, o: f"lora_transformer_{flat(n)}", KOHYA, True),
    "comfyui": (lambda c, n, o: f"diffusion_model.{o}", DIFFUSERS, False),
    "comfyui, alpha": (lambda c, n, o: f"diffusion_model.{o}", KOHYA, True),
    "diffsynth": (lambda c, n, o: o, PEFT, False),
}
# What diffusers' own pipeline reads.
OTHERS = {
    "wan": {"diffusers", "kohya, original", "comfyui", "comfyui, alpha"},
    "cogvideox": {"diffusers"},
    "stable_diffusion": {"diffusers", "lora.down", "kohya", "kohya, no alpha"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "cogvideox-5b"])
def test_every_form_of_every_family(name, form, tmp_path):
    case = tiny(name)
    spelled, parts, alphas = FORMS[form]
    model = case.module.load(case.path)
    component, original = adapters.component_of(model), names.originals(model)
    layers = loras.targets(model, loras.BLOCK[case.family.name])

    def written(found):
        def word(layer):
            return spelled(component, layer, original[layer])

        path = loras.save(tmp_path / "a.safetensors", found, word, parts, alphas=alphas)
        plain = {layer: loras.product(each) for layer, each in found.items()}
        return path, loras.scaled(found) if alphas else plain

    path, wanted = written(loras.random(model, layers))
    assert alike(applied(load_lora(path, case.module.load(case.path))), wanted)
    theirs = OTHERS[case.family.name] | ({"kohya, original"} if name == "sdxl" else set())
    if form in theirs:
        # diffusers 0.35 takes one rank for every alpha; 0.42 loses alphas of a UNet's layers.
        path, wanted = written(loras.random(model, layers, ranks=(4,), alphas=(2.0,)))
        assert alike(applied(load_lora(path, model)), wanted)
        assert alike(loras.diffusers_applies(name, path), wanted)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_attention_processors_of_old(name, tmp_path):
    """`attn1.processor.to_q_lora.down.weight`, to_out without its number."""
    case = tiny(name)
    model = case.module.load(case.path)
    layers = loras.targets(model, ("to_q", "to_out"))
    found = loras.random(model, layers, ranks=(4,))

    def spelled(layer: str) -> str:
        return f"unet.{layer.removesuffix('.0').replace('.to_', '.processor.to_')}_lora"

    path = loras.save(tmp_path / "a.safetensors", found, spelled, ("down.weight", "up.weight"))
    plain = {layer: loras.product(each) for layer, each in found.items()}
    assert alike(applied(load_lora(path, model)), plain)
    assert alike(loras.diffusers_applies(name, path), plain)


@pytest.mark.parametrize("change", [{}, {"use_rslora": True}, {"lora_bias": True}])
def test_a_folder_of_peft(change, tmp_path):
    """As PEFT saves and applies it, with ranks and alphas by pattern."""
    patterns = {"rank_pattern": {"ffn.net.2": 2}, "alpha_pattern": {"^blocks.0.attn1.to_q": 1}}
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False,
        **patterns, **change,
    )  # fmt: skip
    torch.manual_seed(0)
    model = peft.get_peft_model(toy.load(BASE), config)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("lora_B.default.bias"):
                value += torch.randn_like(value)
    model.save_pretrained(tmp_path)
    ours = load_lora(tmp_path, toy.load(BASE))
    assert alike(applied(ours), applied(model.base_model.model))
    x = torch.randn(2, 6, 2, 8, 8)
    said = (m(x, torch.ones(2), torch.ones(2, 8, 32), return_dict=False)[0] for m in (ours, model))
    torch.testing.assert_close(*said, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.LoHaConfig(target_modules=["to_q"], init_weights=False), "peft_type 'LOHA'"),
        (peft.LoKrConfig(target_modules=["to_q"], init_weights=False), "peft_type 'LOKR'"),
        (peft.LoraConfig(target_modules=["to_q"], use_dora=True), "use_dora"),
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_what_is_no_plain_lora_of_peft(config, kind, told, tmp_path):
    """Named by its settings, and by its keys where there are none."""
    peft.get_peft_model(toy.load(BASE), config).save_pretrained(tmp_path)
    if not told:
        (tmp_path / "adapter_config.json").unlink()
        kind = {"use_dora": "DoRA"}.get(kind, "LoHa" if "LOHA" in kind else "LoKr")
    with pytest.raises(ValueError, match=f"{kind}: only plain LoRA is") as error:
        load_lora(tmp_path, toy.load(BASE))
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def plain():
    """An adapter on two layers of the shipped base as tensors by key."""
    model = toy.load(BASE)
    found = loras.random(model, ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q"], ranks=(4,))
    values = {}
    for layer, each in found.items():
        values |= {f"{layer}.lora_A.weight": each.a, f"{layer}.lora_B.weight": each.b}
    return {f"transformer.{key}": value for key, value in values.items()}


Q = "transformer.blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({f"{Q}.dora_scale": torch.ones(96)}, "'transformer.*dora_scale' is of DoRA"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(96)}, "is of DoRA: only plain LoRA is read"),
        ({"lora_unet_x.hada_w1_a": torch.ones(4)}, "'lora_unet_x.hada_w1_a' is of LoHa"),
        ({"lora_unet_x.lokr_w1": torch.ones(4)}, "is of LoKr"),
        ({"lora_unet_x.lora_mid.weight": torch.ones(4)}, "is of LoCon with a middle"),
        ({"diffusion_model.blocks.0.norm3.diff": torch.ones(4)}, "difference of whole weights"),
        ({"diffusion_model.head.head.diff_b": torch.ones(4)}, "difference of whole weights"),
        ({"text_encoder.x.lora_A.weight": torch.ones(4)}, "is of a text encoder: only adapters"),
        ({"lora_te1_x.lora_down.weight": torch.ones(4)}, "is of a text encoder"),
        ({"transformer_2.blocks.0.attn1.to_q.lora_A.weight": torch.ones(4)}, "is of no layer of"),
        ({"transformer.blocks.9.attn1.to_q.lora_A.weight": torch.ones(4)}, "another model's"),
        ({"lora_A": torch.ones(4)}, "'lora_A' is of no layer of WanTransformer3DModel in the key"),
        ({"\x1b[31m" + "x" * 10**6: torch.ones(4)}, "'.x1b.31mx+ is of no layer"),
        ({f"{Q}.lora_A.bias": torch.ones(4)}, "is of no layer"),
        ({"lora_unet_blocks_0_attn1_to_q.lora_up.weight": torch.ones(96, 4)}, "is there twice"),
        ({f"{Q}.lora_B.weight": None}, "lora_A.weight' has no lora_B beside it"),
        ({f"{Q}.lora_A.weight": torch.ones(3, 96)}, "do not fit weights of .96, 96."),
        ({f"{Q}.lora_A.weight": torch.ones(0, 96)}, "do not fit weights of .96, 96."),
        ({f"{Q}.lora_B.weight": torch.ones(4)}, "do not fit weights of .96, 96."),
        ({f"{Q}.lora_B.weight": torch.full((96, 4), torch.nan)}, "finite floating-point values"),
        ({f"{Q}.lora_B.weight": torch.ones(96, 4).int()}, "finite floating-point values"),
        ({f"{Q}.alpha": torch.tensor(torch.inf)}, "expected finite alphas, got inf"),
        ({f"{Q}.alpha": torch.ones(2)}, "too many values"),
        ({f"{Q}.lora_B.bias": torch.ones(95)}, "lora_B.bias' does not fit the layer's bias"),
    ],
)
def test_what_is_not_read_is_named(change, says, plain, tmp_path):
    path = tmp_path / "a.safetensors"
    values = {key: value for key, value in {**plain, **change}.items() if value is not None}
    save_file(values, path)
    model = toy.load(BASE)
    with pytest.raises(ValueError, match=says) as error:
        load_lora(path, model)
    said = str(error.value)
    assert said.startswith(f"{path}: expected a LoRA file of WanTransformer3DModel (")
    assert said.isprintable() and len(said) < 600 + len(str(path))
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_an_adapter_of_another_dtype(dtype, plain, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({key: value.to(dtype) for key, value in plain.items()}, path)
    model = load_lora(path, toy.load(BASE))
    values = {k.replace(".default", ""): v for k, v in model.named_parameters() if "lora" in k}
    for key, value in plain.items():
        assert torch.equal(values[key.removeprefix("transformer.")], value.to(dtype).float())


ENDLESS = "(.*.*)*(.*.*)*(.*.*)*!"


def saying(plain, path, said):
    said = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in said.items()})}
    save_file(plain, path, metadata=said)
    return path


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "rank_pattern"])
def test_no_pattern_of_a_file_is_matched(name, plain, tmp_path):
    """Matched, this one would take until the sun is cold."""
    value = {ENDLESS: 4} if name == "rank_pattern" else ENDLESS
    path = saying(plain, tmp_path / "a.safetensors", {"r": 8, "lora_alpha": 8, name: value})
    if name != "rank_pattern":
        with pytest.raises(ValueError, match="rank 8, but lora_A of rank 4"):
            load_lora(path, toy.load(BASE))
        saying(plain, path, {"r": 4, "lora_alpha": 8, name: value})
    found = adapters.read(path, toy.load(BASE))
    assert [each.alpha for each in found.values()] == [8, 8]
    assert len(applied(load_lora(path, toy.load(BASE)))) == 2


@pytest.mark.parametrize(
    ("pattern", "alphas"),
    [
        ({"to_q": 1, "blocks.0.attn1.to_q": 2}, [1, 1]),
        ({"blocks.0.attn1.to_q": 2, "to_q": 1}, [2, 1]),
        ({"^to_q": 1, r"^blocks\.1\.attn1\.to_q$": 2, "o_q": 3}, [8, 2]),
        ({"self_attn.q": 1}, [1, 1]),  # the original code's name of it
    ],
)
def test_alphas_by_name_are_those_of_peft(pattern, alphas, plain, tmp_path):
    """The first that is a layer's name or the end of one."""
    said = {"r": 4, "lora_alpha": 8, "alpha_pattern": pattern}
    path = saying(plain, tmp_path / "a.safetensors", said)
    assert [each.alpha for each in adapters.read(path, toy.load(BASE)).values()] == alphas


def test_a_layers_own_alpha_wins(plain, tmp_path):
    path = tmp_path / "a.safetensors"
    said = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}
    save_file({**plain, f"{Q}.alpha": torch.tensor(2)}, path, metadata=said)
    assert [each.alpha for each in adapters.read(path, toy.load(BASE)).values()] == [2, 8]


def test_a_config_beside_a_file_is_peft_s_alone(plain, tmp_path):
    """And bounded: it is text of a stranger."""
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    for name, alpha in (("adapter_model", 8), ("mine", 4)):
        path = tmp_path / f"{name}.safetensors"
        save_file(plain, path)
        found = adapters.read(path, toy.load(BASE))
        assert [each.alpha for each in found.values()] == [alpha] * 2
    config.write_text(" " * (1 << 21))
    long = saying(plain, tmp_path / "mine.safetensors", {"r": 4, "x": " " * (1 << 20)})
    for text, got in (("null", "None"), ("[1]", r"\[1\]")):
        save_file(plain, tmp_path / "b.safetensors", metadata={"lora_adapter_metadata": text})
        with pytest.raises(ValueError, match=f"settings: expected a JSON object, got {got}"):
            load_lora(tmp_path / "b.safetensors", toy.load(BASE))
    for given in (tmp_path, long):
        with pytest.raises(ValueError, match="settings of more than 1048576 characters"):
            load_lora(given, toy.load(BASE))


class Mine(torch.nn.Module):
    """A model of one's own: one layer's name is the end of another's, two are alike when flat."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(4, 4, bias=False)
        self.inner = torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4)})
        self.inner_proj = torch.nn.Linear(4, 4)


def test_layers_are_told_apart_by_their_whole_names(tmp_path):
    path = tmp_path / "a.safetensors"
    for layers in (["proj"], ["inner.proj", "proj"]):
        found = loras.random(Mine(), layers)
        loras.save(path, found, lambda n: f"transformer.{n}")
        plain = {layer: loras.product(each) for layer, each in found.items()}
        assert alike(applied(load_lora(path, Mine())), plain)
    loras.save(path, loras.random(Mine(), ["inner.proj"]), lambda n: f"lora_unet_{flat(n)}", KOHYA)
    with pytest.raises(ValueError, match=r"'lora_unet_inner_proj.*' is of no layer of Mine"):
        load_lora(path, Mine())
    values = {"proj.lora_A.weight": torch.ones(1, 4), "proj.lora_B.weight": torch.ones(4, 1)}
    save_file({**values, "proj.lora_B.bias": torch.ones(4)}, path)
    with pytest.raises(ValueError, match=r"lora_B.bias' does not fit the layer's bias"):
        load_lora(path, Mine())
