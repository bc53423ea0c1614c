"""The sizes that a model takes: what its configs say is what its transformer does."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from commands import BASE
from families import build_cogvideox, seeded, tiny
from torch import nn

from fastpref import models
from fastpref.models import cogvideox, wan
from fastpref.models.encoders import Sizes

PLACES = (1, 2, 3, 4, 5, 12, 13, 14, 16, 18)


@pytest.fixture(scope="module")
def one_five(tmp_path_factory) -> Path:
    """CogVideoX 1.5: pairs of latent frames are a token, and places end at its own 12x16."""
    return build_cogvideox(tmp_path_factory.mktemp("1.5"), large=True, patch_t=2)


def takes(sizes: Sizes, latent: tuple[int, ...]) -> bool:
    """Whether a clip of so many latents in time, height and width is one of `sizes`."""
    frames, height, width = latent
    try:
        sizes.check(
            (frames - 1) * sizes.time + 1, max(height * sizes.space, 1), width * sizes.space
        )
    except ValueError:
        return False
    return True


@torch.no_grad()
def works(module, model: nn.Module, channels: int, cond, latent: tuple[int, ...]) -> bool:
    noisy = torch.zeros(1, channels, *latent)
    try:
        return module.predict(model, noisy, torch.tensor([500.0]), cond).shape == noisy.shape
    except (ArithmeticError, RuntimeError, ValueError):
        return False


@pytest.mark.parametrize("name", ["toy", "wan", "cogvideox-2b", "cogvideox-5b", "1.5", "sd15"])
def test_what_the_configs_say_is_what_the_transformer_takes(name, one_five):
    if name == "toy":
        module, path, width = models.family("toy"), BASE, 32
    elif name == "1.5":
        module, path, width = cogvideox, one_five, 32
    else:
        case = tiny(name)
        module, path, width = case.module, case.path, 32
    model, sizes = module.load(path), module.pipeline(path).sizes
    channels = {"toy": 3, "wan": 16}.get(name, 4)
    cond = {"text": torch.zeros(1, 24, width)}
    latents = [(f, h, w) for f in (1, 2, 3) for h in PLACES for w in (4, 5, 18)]
    if name == "sd15":
        latents = [latent for latent in latents if latent[0] == 1]
    latents += [(33, 4, 4), (32, 4, 4), (1, 66, 4), (1, 64, 4)] if name == "wan" else []
    latents += [(65, 4, 4), (64, 4, 4), (1, 260, 4), (1, 4, 256)] if name == "toy" else []
    said = {latent: takes(sizes, latent) for latent in latents}
    assert said == {latent: works(module, model, channels, cond, latent) for latent in latents}
    assert len(set(said.values())) == (1 if name == "sd15" else 2)


def test_learned_positions_take_their_own_size_alone(one_five, tmp_path):
    """As in CogVideoX's image-to-video 5B; its transformer refuses any other."""
    from diffusers import CogVideoXTransformer3DModel

    path = shutil.copytree(tiny("cogvideox-5b").path, tmp_path / "model")
    config = json.loads((path / "transformer" / "config.json").read_text())
    config = {k: v for k, v in config.items() if k != "use_learned_positional_embeddings"}
    model = seeded(CogVideoXTransformer3DModel, **config, use_learned_positional_embeddings=True)
    model.save_pretrained(path / "transformer")
    model, sizes = cogvideox.load(path), cogvideox.pipeline(path).sizes
    cond = {"text": torch.zeros(1, 24, 32)}
    for latent in ((3, 12, 16), (3, 12, 14), (3, 14, 16), (3, 16, 12)):
        expected = latent == (3, 12, 16)
        assert takes(sizes, latent) == works(cogvideox, model, 4, cond, latent) == expected
    with pytest.raises(ValueError, match="expected 96x128, whose places the transformer has lea"):
        sizes.check(9, 96, 112)


WAN_VAE = {"scale_factor_temporal": 4, "scale_factor_spatial": 8}
WAN = {"patch_size": [1, 2, 2], "rope_max_seq_len": 1024}
COG_VAE = {"temporal_compression_ratio": 4, "block_out_channels": [128, 256, 256, 512]}
COG = {"patch_size": 2, "patch_size_t": None, "sample_height": 60, "sample_width": 90}
COG |= {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": False}
COG_1_5 = {**COG, "patch_size_t": 2, "sample_height": 96, "sample_width": 170}


@pytest.mark.parametrize(
    ("sizes", "given", "says"),
    [
        (wan.sizes(WAN_VAE, WAN), (81, 480, 832), None),
        (wan.sizes(WAN_VAE, WAN), (81, None, None), None),
        (wan.sizes(WAN_VAE, WAN), (1, 16, 16), None),
        (wan.sizes(WAN_VAE, WAN), (80, None, None),
         "frames expected 4k+1, got 80: pass --num_frames 77 or 81"),
        (wan.sizes(WAN_VAE, WAN), (None, 480, 854),
         "height and width expected divisible by 16, got 480x854: pass --height 480 --width 848"
         " or other multiples"),
        (wan.sizes(WAN_VAE, WAN), (4096, None, None), "got 4096: pass --num_frames 4093"),
        (wan.sizes(WAN_VAE, WAN), (4097, None, None), "at most 4093, for which the transformer "
         "has places, got 4097: pass --num_frames 4093"),
        (wan.sizes(WAN_VAE, {**WAN, "patch_size": [1, 2, 4]}), (1, 32, 48), "divisible by 16 and "
         "32, got 32x48: pass --height 32 --width 32 or other multiples"),
        (cogvideox.sizes(COG_VAE, COG), (49, 480, 720), None),
        (cogvideox.sizes(COG_VAE, COG), (49, 720, 1280), None),  # stretched into 480x720
        (cogvideox.sizes(COG_VAE, COG), (48, None, None), "4k+1, got 48: pass --num_frames 45 or "
         "49"),
        (cogvideox.sizes(COG_VAE, COG_1_5), (85, 768, 1360), None),
        (cogvideox.sizes(COG_VAE, COG_1_5), (81, None, None), "latent frames expected divisible "
         "by 2, got 21 from 81 frames: pass --num_frames 77 or 85"),
        (cogvideox.sizes(COG_VAE, COG_1_5), (80, None, None), "frames expected 4k+1, got 80: pass "
         "--num_frames 77 or 85"),
        (cogvideox.sizes(COG_VAE, COG_1_5), (1, None, None), "pass --num_frames 5"),
        (cogvideox.sizes(COG_VAE, COG_1_5), (None, 768, 1376), "at most 768x1360, for which the "
         "transformer has places, got 768x1376: pass --height 768 --width 1360"),
        (cogvideox.sizes(COG_VAE, COG_1_5), (None, 768, 2000), "at most 768x1360, for which the "
         "transformer has places, got 768x2000: pass --height 768 --width 1360"),
        (cogvideox.sizes(COG_VAE, COG_1_5), (None, 760, 2008), "divisible by 16, got 760x2008: "
         "pass --height 752 --width 1360 or other multiples"),
        (Sizes(space=8, most=(1, math.inf, math.inf)), (1, 520, 1000), None),
        (Sizes(space=8, most=(1, math.inf, math.inf)), (5, 512, 512),
         "the model takes images, got 5 frames: pass --num_frames 1"),
        (Sizes(space=8, most=(1, math.inf, math.inf)), (1, 500, 4), "divisible by 8, got 500x4: "
         "pass --height 496 --width 8 or other multiples"),
        (Sizes(), (7, 13, 11), None),
    ],
)  # fmt: skip
def test_a_size_that_is_not_taken_says_what_would_be(sizes, given, says):
    if says is None:
        sizes.check(*given)
        return
    with pytest.raises(ValueError) as error:
        sizes.check(*given)
    assert str(error.value).endswith(says)
