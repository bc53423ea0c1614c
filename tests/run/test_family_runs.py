"""Whole runs per family, as users make them: media to an adapter that the family's pipeline loads,
with a kill -9 in the middle.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import arguments, kill_at, options
from families import FAMILIES, PROMPTS, Case, generators, ours, run, tiny, write_media
from safetensors.torch import load_file

from fastpref.cli import main
from fastpref.look.sample import sample, starting_noise
from fastpref.pairs.encode import encode
from fastpref.run.config import Config
from fastpref.run.parts import add_lora
from fastpref.run.train import train

STEPS = 12


def trained(
    case: Case, given: dict, checkpoint: Path, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """The base with the parameters of a checkpoint, through no export."""
    model = case.module.load(case.path, dtype).requires_grad_(False)
    add_lora(model, case.module.LORA_TARGETS, given.get("lora_rank"))
    values = load_file(checkpoint / "parameters.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(values.pop(name))
    assert not values
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_from_media_to_an_adapter_that_loads(name, tmp_path):
    case = tiny(name)
    media = write_media(case.family, tmp_path / "media")
    encoded = tmp_path / "encoded"
    flags = {"family": case.family.name, "model": case.path, "data": media, "output_dir": encoded}
    if case.family.frames > 1:
        flags["num_frames"] = case.family.frames - 4
    assert main(["encode", *arguments(flags)]) == 0
    assert json.loads((encoded / "counts.json").read_text())["pairs"] == len(PROMPTS)

    change = {"family": case.family.name, "model": str(case.path), "learning_rate": 0.02}
    change |= {"max_train_steps": STEPS, "checkpointing_steps": 1, "prompt_dropout": 0.2}
    whole, broken = (options(encoded, tmp_path / part, **change) for part in ("whole", "broken"))
    assert main(["train", *arguments(whole)]) == 0
    kill_at(tmp_path / "broken" / "checkpoint-3", "train", *arguments(broken))
    assert not (tmp_path / "broken" / "result.json").exists()
    again = ["--resume_from_checkpoint", "latest"]
    assert main(["train", *arguments(broken), *again]) == 0

    files = [f"checkpoint-{STEPS}/parameters", f"checkpoint-{STEPS}/optimizer"]
    for file in (*files, "pytorch_lora_weights"):
        a, b = (load_file(tmp_path / part / f"{file}.safetensors") for part in ("whole", "broken"))
        assert a.keys() == b.keys() and len(a) > 0
        for key in a:
            assert torch.equal(a[key], b[key]), key
    assert any(value.abs().sum() > 0 for key, value in a.items() if "lora_B" in key)

    # The adapter in the family's pipeline against the base, and against the model as it trained.
    shape = next(iter(load_file(p) for p in encoded.glob("pairs/*/*")))["latents_w"].shape
    noise, steps = starting_noise(shape, [1, 2]), 4
    component = "unet" if case.family.frames == 1 else "transformer"
    model = trained(case, broken, tmp_path / "broken" / f"checkpoint-{STEPS}")
    pipes = {part: case.pipe() for part in ("base", "tuned", "own")}
    pipes["tuned"].load_lora_weights(tmp_path / "broken")
    setattr(pipes["own"], component, model)
    extra = {} if case.family.frames == 1 else {"num_frames": case.family.frames - 4}
    clips, latents = {}, {}
    for part, pipe in pipes.items():
        made = {}
        for kind in ("np", "latent"):
            own = {"generator": generators([1, 2]), "output_type": kind, **extra}
            made[kind] = run(case, pipe, noise, steps, **own)
        clips[part], latents[part] = np.asarray(made["np"]), ours(case, made["latent"])
    assert np.array_equal(clips["tuned"], clips["own"])
    assert torch.equal(latents["tuned"], latents["own"])
    moved = (latents["tuned"] - latents["base"]).abs().max()
    assert moved > 1e-2 and np.abs(clips["tuned"] - clips["base"]).max() > 1e-3
    drawn = sample(
        *(model, case.module, case.scheduler, case.cond(PROMPTS[:2]), shape),
        steps=steps,
        seeds=[1, 2],
    )
    assert (drawn - latents["tuned"]).abs().max() < 1e-4 * moved


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_other_ways_to_train(name, tmp_path):
    """Recomputed activations give the same gradient, bf16 trains and samples, full training saves
    a folder that loads.
    """
    case = tiny(name)
    encoded = tmp_path / "encoded"
    media = write_media(case.family, tmp_path / "media")
    encode(case.family.name, case.path, media, encoded, progress=False)

    def first_steps(part: str, **change) -> tuple[dict, list[dict]]:
        given = {"family": case.family.name, "model": str(case.path), "max_train_steps": 2}
        given = options(encoded, tmp_path / part, **given, **change)
        train(Config(**given))
        lines = (tmp_path / part / "metrics.jsonl").read_text().splitlines()
        return given, [json.loads(line) for line in lines]

    _, plain = first_steps("plain")
    _, recomputed = first_steps("recomputed", checkpointing="full")
    for a, b in zip(plain, recomputed, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4) and a["grad_norm"] > 0

    given, half = first_steps("bf16", mixed_precision="bf16", checkpointing="full")
    assert half[0]["rewards/margins"] == 0 and half[1]["rewards/margins"] != 0
    assert half[0]["errors/policy_w"] == pytest.approx(plain[0]["errors/policy_w"], rel=0.05)
    model = trained(case, given, tmp_path / "bf16" / "checkpoint-2", torch.bfloat16)
    how = {"steps": 2, "seeds": [1]}
    cond = case.cond(PROMPTS[:1])
    clips = [
        sample(m, case.module, case.scheduler, cond, case.latents.shape[1:], **how)
        for m in (model, trained(case, given, tmp_path / "bf16" / "checkpoint-2"))
    ]
    assert (clips[0] - clips[1]).abs().mean() < 0.05 * clips[1].abs().mean()

    first_steps("full", tuning="full", lora_rank=None, learning_rate=1e-3)
    tuned = case.module.load(tmp_path / "full")
    values = load_file(tmp_path / "full" / "checkpoint-2" / "parameters.safetensors")
    assert values.keys() == dict(tuned.named_parameters()).keys()
    assert all(torch.equal(p, values[k]) for k, p in tuned.named_parameters())
