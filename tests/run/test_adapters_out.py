"""An adapter that is written applies at one strength everywhere (ComfyUI#12191, #15830,
SimpleTuner#1853): here, in diffusers, in ComfyUI and in a loader that reads tensors alone.
"""

from __future__ import annotations

import json
import os
import stat

import loras
import peft
import pytest
import torch
from commands import BASE, fails, options
from families import FAMILIES, tiny
from loras import KOHYA, alike, applied, diffusers_applies
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastpref.cli import main
from fastpref.models import names, toy
from fastpref.run import adapters, artifact
from fastpref.run.adapters import Lora, load_lora
from fastpref.run.config import Config
from fastpref.run.parts import add_lora
from fastpref.run.train import train


def tensors_alone(path, scaled_by_alpha=True):
    """What a file adds to each layer that it names: alpha / rank B A as ComfyUI reads it, where a
    layer without `.alpha` has scale 1; or B A of a reader that knows of no alpha.
    """
    values, found = load_file(path), {}
    for key, up in values.items():
        for a, b in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
            if key.endswith(f".{b}.weight"):
                layer = key.removesuffix(f".{b}.weight")
                down = values[f"{layer}.{a}.weight"]
                alpha = values.get(f"{layer}.alpha") if scaled_by_alpha else None
                scale = 1.0 if alpha is None else alpha.item() / len(down)
                found[layer] = loras.product(Lora(down, up, 1.0), scale)
    return found


def trained(case, rank, alpha):
    """A model with an adapter as a run makes it, of random values."""
    model = case.module.load(case.path).requires_grad_(False)
    add_lora(model, case.module.LORA_TARGETS, rank, alpha)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(("rank", "alpha"), [(4, 16), (6, 5)])
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "cogvideox-5b"])
def test_one_strength_everywhere(name, rank, alpha, tmp_path):
    case = tiny(name)
    model = trained(case, rank, alpha)
    wanted = applied(model)
    path = artifact.export(tmp_path, model)
    component = adapters.component_of(model)
    for read in (tensors_alone(path), tensors_alone(path, False)):
        assert alike({k.removeprefix(f"{component}."): v for k, v in read.items()}, wanted)
    ours = applied(load_lora(path, case.module.load(case.path)))
    theirs = diffusers_applies(name, path)
    assert alike(ours, wanted) and all(torch.equal(theirs[k], ours[k]) for k in wanted)
    bare = tmp_path / "bare.safetensors"  # without metadata
    save_file(load_file(path), bare)
    theirs = diffusers_applies(name, bare)
    assert all(torch.equal(theirs[k], ours[k]) for k in wanted)
    if alpha == 16:  # a power of two: B is exact, and so is everything
        assert all(torch.equal(ours[k], wanted[k]) for k in wanted)


def test_a_run_of_another_alpha(pairs, tmp_path):
    """The same steps whatever is written, which says alpha = rank; resumed with B as it was."""
    change = {"lora_alpha": 16, "checkpointing_steps": 3}
    train(Config(**options(pairs, tmp_path / "whole", **change)))
    for steps in (3, 6):
        more = {**change, "max_train_steps": steps, "resume_from_checkpoint": "latest"}
        train(Config(**options(pairs, tmp_path / "parts", **more)))
    files = [tmp_path / part / adapters.FILES[0] for part in ("whole", "parts")]
    with safe_open(files[0], "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert said["transformer.r"] == said["transformer.lora_alpha"] == 4
    values = [load_file(file) for file in files]
    kept = load_file(tmp_path / "whole" / "checkpoint-6" / "parameters.safetensors")
    assert len(kept) == len(values[0])
    for key, value in values[0].items():
        assert torch.equal(value, values[1][key])
        own = kept[key.removeprefix("transformer.").replace(".weight", ".default.weight")]
        assert torch.equal(value, 4 * own if "lora_B" in key else own)


@pytest.mark.parametrize("ranks", [(4,), (2, 4)])
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "cogvideox-5b"])
def test_exported_for_comfyui(name, ranks, tmp_path):
    """Of mixed alphas: what ComfyUI adds to which of its layers; and diffusers' own converter,
    where it has one (of one rank, as 0.35 takes one layer's rank for every alpha).
    """
    case = tiny(name)
    model = case.module.load(case.path)
    layers = loras.targets(model, loras.BLOCK[case.family.name])
    found = loras.random(model, layers, ranks=ranks)
    component, original = adapters.component_of(model), names.originals(model)
    given = tmp_path / "given.safetensors"
    loras.save(given, found, lambda n: f"lora_unet_{loras.flat(n)}", KOHYA, alphas=True)
    wanted = loras.scaled(found)
    flags = ["--lora", given, "--family", case.family.name, "--model", case.path]
    out = {form: tmp_path / f"{form}.safetensors" for form in adapters.FORMATS}
    for form, path in out.items():
        assert main(["export", *map(str, flags), "--format", form, "--output", str(path)]) == 0
        assert alike(applied(load_lora(path, case.module.load(case.path))), wanted)
    assert alike(diffusers_applies(name, out["diffusers"]), wanted)
    if component == "unet":
        spelled = {layer: f"lora_unet_{loras.flat(layer)}" for layer in found}
    else:
        spelled = {layer: f"diffusion_model.{original[layer]}" for layer in found}
    for read in (tensors_alone(out["comfyui"]), tensors_alone(out["comfyui"], False)):
        assert alike(read, {spelled[layer]: value for layer, value in wanted.items()})
    if case.family.name != "cogvideox" and len(ranks) == 1:
        assert alike(diffusers_applies(name, out["comfyui"]), wanted)


def test_the_names_that_comfyui_has():
    """Of Wan and CogVideoX, layer by layer; of a UNet what diffusers' converter does not reach."""
    wan, cogvideox = (names.originals(tiny(n).model) for n in ("wan", "cogvideox-2b"))
    assert {k: v for k, v in wan.items() if ".0." in k and "blocks.1" not in k} == {
        **{f"blocks.0.attn1.to_{p}": f"blocks.0.self_attn.{p}" for p in "qkv"},
        **{f"blocks.0.attn2.to_{p}": f"blocks.0.cross_attn.{p}" for p in "qkv"},
        "blocks.0.attn1.to_out.0": "blocks.0.self_attn.o",
        "blocks.0.attn2.to_out.0": "blocks.0.cross_attn.o",
        "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0",
        "blocks.0.ffn.net.2": "blocks.0.ffn.2",
    }
    assert {k: v for k, v in cogvideox.items() if k.startswith("transformer_blocks.0.")} == {
        **{f"transformer_blocks.0.attn1.to_{p}": f"blocks.0.{p}" for p in "qkv"},
        "transformer_blocks.0.attn1.to_out.0": "blocks.0.attn_out",
        "transformer_blocks.0.norm1.linear": "blocks.0.norm1.linear",
        "transformer_blocks.0.norm2.linear": "blocks.0.norm2.linear",
        "transformer_blocks.0.ff.net.0.proj": "blocks.0.ff_proj",
        "transformer_blocks.0.ff.net.2": "blocks.0.ff_out",
    }
    assert cogvideox["time_embedding.linear_1"] == "time_embedding_linear_1"
    assert {k: v for k, v in wan.items() if not k.startswith("blocks.")} == {
        **{
            f"condition_embedder.time_embedder.linear_{i}": f"time_embedding.{2 * i - 2}"
            for i in (1, 2)
        },
        **{
            f"condition_embedder.text_embedder.linear_{i}": f"text_embedding.{2 * i - 2}"
            for i in (1, 2)
        },
        "condition_embedder.time_proj": "time_projection.1",
        "patch_embedding": "patch_embedding",
        "proj_out": "head.head",
    }
    unet = names.originals(tiny("sdxl").model)
    for ours, theirs in (
        ("conv_in", "input_blocks.0.0"),
        ("time_embedding.linear_1", "time_embed.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"),
        ("down_blocks.1.resnets.0.time_emb_proj", "input_blocks.3.0.emb_layers.1"),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.1.2.conv"),
        ("up_blocks.1.resnets.0.conv_shortcut", "output_blocks.2.0.skip_connection"),
        ("conv_out", "out.2"),
    ):
        assert unet[ours] == theirs


@pytest.mark.parametrize("scale", [4.0, 0.75])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_b_is_scaled_in_float32_where_its_dtype_would_round_it(scale, dtype):
    b = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    each = Lora(torch.ones(4, 8, dtype=dtype), b, 4 * scale, torch.ones(8, dtype=dtype)).folded()
    exact = torch.float32 if dtype == torch.bfloat16 and scale == 0.75 else dtype
    assert each.b.dtype == exact and each.alpha == each.rank == 4
    assert torch.equal(each.b.double(), (b.to(exact) * scale).double())
    assert torch.equal(each.bias.double(), torch.full((8,), scale).double())


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_files_have_the_mode_that_the_umask_leaves(umask, tuning, tmp_path):
    model = toy.load(BASE)
    if tuning == "lora":
        add_lora(model, toy.LORA_TARGETS)
    before = os.umask(umask)
    try:
        path = artifact.export(tmp_path, model)
    finally:
        os.umask(before)
    files = list(path.iterdir()) if path.is_dir() else [path]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~umask}


def test_an_adapter_of_dora_is_not_exported_as_plain(tmp_path):
    model = toy.load(BASE)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q"], use_dora=True), model)
    with pytest.raises(ValueError, match=r"lora_magnitude_vector.*: only plain LoRA is exported"):
        artifact.export(tmp_path, model)


def test_export_says_what_it_cannot(tmp_path, capsys):
    model = toy.load(BASE)
    found = loras.random(model, ["blocks.0.attn1.to_q"])
    given = loras.save(tmp_path / "given.safetensors", found, lambda n: f"transformer.{n}")
    flags = ["--family", "toy", "--model", str(BASE), "--format", "comfyui"]
    own = ["--lora", str(given), "--output", str(tmp_path / "out.safetensors")]
    (tmp_path / "base" / "transformer").mkdir(parents=True)  # of the model its config is enough
    config = (BASE / "transformer" / "config.json").read_text()
    (tmp_path / "base" / "transformer" / "config.json").write_text(config)
    without = ["--model", str(tmp_path / "base"), "--family", "toy", "--format", "comfyui"]
    assert main(["export", *without, *own]) == 0
    assert len(load_file(tmp_path / "out.safetensors")) == 2
    (tmp_path / "out.safetensors").unlink()
    capsys.readouterr()
    there = [*own[:-1], str(given)]
    for more, says in (
        (own[2:], "--lora is required: the run's folder, or its adapter file"),
        ([*own[:-1], str(tmp_path / "x.pt")], "expected a name that ends in .safetensors"),
        (there, f"--output {given}: is there already"),
        (["--lora", str(tmp_path), *own[2:]], "no such file; expected a run's folder"),
    ):
        assert says in fails(capsys, "export", *flags, *more)
    endless = {k: v._replace(alpha=1e300) for k, v in found.items()}
    with pytest.raises(ValueError, match="its alpha makes values that are not finite"):
        adapters.write(tmp_path / "out.safetensors", model, endless)
    biased = {k: v._replace(bias=torch.ones(96)) for k, v in found.items()}
    with pytest.raises(ValueError, match=r"lora_B.bias: ComfyUI reads no such tensor"):
        adapters.write(tmp_path / "out.safetensors", model, biased, "comfyui")

    class Mine(torch.nn.Sequential):
        pass

    mine = Mine(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="no form is known for adapters of Mine"):
        adapters.write(tmp_path / "out.safetensors", mine, loras.random(mine, ["0"]), "comfyui")
    assert not (tmp_path / "out.safetensors").exists()
