"""Latents to pixels: many at once, and with a cheaper decoder than the model's own."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, image_vae, seeded, tiny

from fastpref import models
from fastpref.demo.run import BASE
from fastpref.models import toy
from fastpref.models.encoders import decoded, to_frames, with_decoder

IMAGES = ("sd15", "sdxl")


def tiny_decoder(path: Path, **changes) -> torch.nn.Module:
    """An AutoencoderTiny like TAESD, of four pixels per latent as the tiny models' own."""
    from diffusers import AutoencoderTiny

    config = {
        "encoder_block_out_channels": (8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8),
        "num_encoder_blocks": (1, 1, 1),
        "num_decoder_blocks": (1, 1, 1),
        "latent_channels": 4,
    }
    vae = seeded(AutoencoderTiny, **(config | changes))
    vae.save_pretrained(path)
    return vae


def edit(path: Path, **changes) -> None:
    """Changes entries of a folder's config.json; None takes one away."""
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize("name", FAMILIES)
def test_many_at_once_are_each_alone(name):
    """In one call of the VAE; what a batch changes of the last bits is at most one step of 255."""
    case = tiny(name)
    vae, calls = case.encoders.media.vae, []
    hook = vae.decoder.register_forward_pre_hook(lambda _, given: calls.append(given[0].shape))
    alone = [case.module.decode(case.encoders, row) for row in case.latents]
    count = len(calls) // len(alone)
    calls.clear()
    many = case.module.decode_many(case.encoders, case.latents)
    hook.remove()
    assert len(calls) == count and {shape[0] for shape in calls} == {len(alone)}
    family = case.family
    for a, b in zip(alone, many, strict=True):
        assert b.shape == (family.frames, family.height, family.width, 3)
        assert b.dtype == torch.uint8 and b.is_contiguous()
        difference = (a.int() - b.int()).abs()
        assert difference.max() <= 1 and (difference == 0).float().mean() > 0.999
    assert (alone[0].int() - alone[1].int()).abs().float().mean() > 1


def test_many_of_the_toy_family_are_each_alone():
    latents = torch.randn(3, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe = toy.pipeline(BASE)
    many = toy.decode_many(pipe, latents)
    assert len(many) == 3
    for row, clip in zip(latents, many, strict=True):
        assert torch.equal(clip, toy.decode(pipe, row)) and clip.is_contiguous()


def test_batches_keep_the_order_and_their_size():
    """Of a family with decode_many and of one without."""
    latents, calls = torch.arange(5.0).view(5, 1, 1, 1, 1), []

    def many(pipe, rows):
        calls.append(len(rows))
        return [row * pipe for row in rows]

    both = SimpleNamespace(decode=None, decode_many=many)
    want = [0.0, 2.0, 4.0, 6.0, 8.0]
    for size, expected in ((2, [2, 2, 1]), (5, [5]), (9, [5]), (1, [1] * 5)):
        calls.clear()
        assert [clip.item() for clip in decoded(both, 2, latents, size)] == want
        assert calls == expected
    alone = SimpleNamespace(decode=lambda pipe, row: row * pipe)
    assert [clip.item() for clip in decoded(alone, 2, latents, 3)] == want


@pytest.mark.parametrize("scaling", [1.0, 0.5])
@pytest.mark.parametrize("name", IMAGES)
def test_a_tiny_decoder_gives_what_it_gives(name, scaling, tmp_path):
    """Of latents as the model makes them, over its own scaling; prompts are as before, and the
    model's own VAE is never read.
    """
    case = tiny(name)
    vae = tiny_decoder(tmp_path / "taesd", scaling_factor=scaling)
    model = shutil.copytree(case.path, tmp_path / "model")
    for file in (model / "vae").glob("*.safetensors"):
        file.unlink()
    pipe = case.module.pipeline(model)
    cheap = with_decoder(pipe, tmp_path / "taesd")
    with torch.no_grad():
        want = vae.decode(case.latents[:, :, 0] / scaling).sample
    clips = decoded(case.module, cheap, case.latents, 4)
    for clip, image in zip(clips, want, strict=True):
        assert clip.shape == (1, case.family.height, case.family.width, 3)
        assert torch.equal(clip, to_frames(image[:, None]))
    assert clips[0].float().std() > 3
    a, b = (case.module.encode_text(p, ["a fox"])[0] for p in (cheap, case.encoders))
    assert all(torch.equal(a[key], b[key]) for key in b)
    assert cheap.scheduler.config == case.scheduler.config and cheap.sizes == pipe.sizes


def test_the_models_own_decoder_stays(tmp_path):
    """What is given back is another pipe; one that has loaded its VAE already keeps that."""
    case = tiny("sd15")
    tiny_decoder(tmp_path / "taesd")
    before = case.module.decode(case.encoders, case.latents[0])
    cheap = with_decoder(case.encoders, str(tmp_path / "taesd"))
    assert not torch.equal(case.module.decode(cheap, case.latents[0]), before)
    assert torch.equal(case.module.decode(case.encoders, case.latents[0]), before)


def test_a_tiny_decoder_runs_in_the_models_dtype(tmp_path):
    """SDXL's own VAE stays in float32 (force_upcast); TAESD's config asks for nothing."""
    case = tiny("sdxl")
    tiny_decoder(tmp_path / "taesd")
    edit(tmp_path / "taesd", force_upcast=None)  # as the published ones
    pipe = case.module.pipeline(case.path, torch.bfloat16)
    cheap = with_decoder(pipe, tmp_path / "taesd")
    assert pipe.media.vae.dtype == torch.float32 and cheap.media.vae.dtype == torch.bfloat16
    assert case.module.decode(cheap, case.latents[0]).float().std() > 3


# Smaller VAEs of the models' own classes.
PRUNED = {
    "wan": {"base_dim": 4, "decoder_base_dim": 2, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    "cogvideox-2b": {
        "block_out_channels": (4, 4, 4, 2),
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "scaling_factor": 1.15258426,
    },
}


@pytest.mark.parametrize("name", ["sd15", *PRUNED])
def test_a_pruned_vae_of_the_models_own_class(name, tmp_path):
    import diffusers

    case = tiny(name)
    if name == "sd15":
        vae = image_vae(block_out_channels=(4, 4, 4), force_upcast=False)
    else:
        vae = seeded(getattr(diffusers, case.encoders.index["vae"][1]), **PRUNED[name])
    vae.save_pretrained(tmp_path / "pruned")
    cheap = with_decoder(case.module.pipeline(case.path), tmp_path / "pruned")
    loaded = cheap.media.vae
    assert sum(p.numel() for p in loaded.parameters()) < sum(
        p.numel() for p in case.encoders.media.vae.parameters()
    )
    # The same weights in a folder of their own model.
    whole = shutil.copytree(case.path, tmp_path / "model")
    shutil.rmtree(whole / "vae")
    shutil.copytree(tmp_path / "pruned", whole / "vae")
    own = case.module.pipeline(whole)
    for row in case.latents[:2]:
        clip = case.module.decode(cheap, row)
        assert torch.equal(clip, case.module.decode(own, row))
        assert clip.shape == (case.family.frames, case.family.height, case.family.width, 3)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (
            "sd15",
            {"latent_channels": 16},
            "latent_channels expected 4, .*got 16: it is made for ot",
        ),
        ("sd15", {"shift_factor": 0.1}, "shift_factor expected None, .*got 0.1"),
        (
            "sd15",
            {"_class_name": "UNet2DConditionModel"},
            "AutoencoderKL or AutoencoderTiny, got U",
        ),
        ("sd15", {"_class_name": None}, "_class_name AutoencoderKL or AutoencoderTiny, got None"),
        ("wan", {}, "expected _class_name AutoencoderKLWan, got AutoencoderTiny"),
        ("cogvideox-2b", {}, "expected _class_name AutoencoderKLCogVideoX, got AutoencoderTiny"),
        ("sd15", {"act_fn": "none"}, "taesd: weights cannot be read"),
    ],
)
def test_a_decoder_that_does_not_belong(name, changes, said, tmp_path):
    tiny_decoder(tmp_path / "taesd")
    edit(tmp_path / "taesd", **changes)
    if "_class_name" in changes and changes["_class_name"] is None:
        config = json.loads((tmp_path / "taesd" / "config.json").read_text())
        assert "_class_name" not in config
    pipe = tiny(name).module.pipeline(tiny(name).path)
    with pytest.raises(ValueError, match=said) as caught:
        with_decoder(pipe, tmp_path / "taesd")
    assert str(tmp_path / "taesd") in str(caught.value) and "\n" not in str(caught.value)


def test_a_pruned_vae_of_other_latents(tmp_path):
    """SDXL's for SD1.5: as many channels, another scale."""
    sd15, sdxl = (tiny(name) for name in IMAGES)
    with pytest.raises(ValueError, match=r"scaling_factor expected 0.18215, .*got 0.13025"):
        with_decoder(sd15.encoders, sdxl.path / "vae")
    shutil.copytree(tiny("wan").path / "vae", tmp_path / "vae")
    edit(tmp_path / "vae", latents_mean=[0.0] * 16)
    with pytest.raises(ValueError, match="latents_mean expected"):
        with_decoder(tiny("wan").encoders, tmp_path / "vae")


def test_what_has_no_decoder(tmp_path):
    with pytest.raises(ValueError, match="decoder x: the model's family decodes with no VAE"):
        with_decoder(toy.pipeline(BASE), "x")
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=f"model {path}: "):
            with_decoder(tiny("sd15").encoders, path)


def test_a_family_needs_no_decode_many():
    """The tenth name is optional: a family of nine is one."""
    assert "decode_many" not in models.NAMES
    for name in ("toy", "wan", "cogvideox", "stable_diffusion"):
        assert hasattr(models.family(name), "decode_many"), name
