"""The Stable Diffusion family: SD1.5 (one CLIP) and SDXL (two, and sizes); the folder says which.

Images are clips of one frame: latents `[C, 1, h, w]`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..process import Diffusion, from_config
from .encoders import Encoders, Normal, Sizes, drawn, pixels, to_frames
from .folder import load_model, read_config, with_values

# Self- and cross-attention projections of every transformer block, as diffusers names them.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
BLOCKS = "down_blocks mid_block up_blocks"  # a UNet has no single list of blocks

VAE_FACTOR = 8  # pixels per latent of every published Stable Diffusion


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The UNet of a diffusers folder or hub id, in `dtype`.

    Raises:
        ValueError: no such model, another family's, or one that takes more than text.
    """
    from diffusers import UNet2DConditionModel

    model = load_model(UNet2DConditionModel, path, "unet", dtype)
    c = model.config
    if c.in_channels != c.out_channels or c.addition_embed_type not in (None, "text_time"):
        raise ValueError(
            f"stable_diffusion.load: {path} has {c.in_channels} input and {c.out_channels} output "
            f"channels, addition_embed_type {c.addition_embed_type}; expected a text-to-image "
            "model (SD1.5 or SDXL), which has as many of each and null or text_time"
        )
    # SDXL is told sizes in pixels, which latents alone do not say.
    model.vae_factor = vae_factor(path) if (Path(path) / "vae").is_dir() else VAE_FACTOR
    return model


def vae_factor(path: str | Path) -> int:
    """Pixels per latent of the folder's VAE."""
    from diffusers import AutoencoderKL

    return 2 ** (len(read_config(AutoencoderKL, path, "vae")["block_out_channels"]) - 1)


def process(scheduler_config: dict[str, Any]) -> Diffusion:
    """The scheduler's alphas and prediction type: epsilon in SD1.5 and SDXL."""
    result = from_config(scheduler_config)
    if not isinstance(result, Diffusion):
        raise ValueError(
            "stable_diffusion.process: expected a diffusion scheduler, got the flow-matching "
            f"{scheduler_config.get('_class_name')}"
        )
    return result


def predict(model: nn.Module, noisy: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """The noise (or what the scheduler's prediction_type names) in `noisy [N, C, 1, h, w]`.

    cond: `text` and, for SDXL, `pooled`; SDXL's added time ids say that the image had the size it
    is trained at, uncropped, as its pipeline says when it samples.
    """
    wanted = model.config.addition_embed_type == "text_time"
    if wanted != ("pooled" in cond):
        have, base = ("no", "SDXL") if wanted else ("an", "SD1.5")
        raise ValueError(
            f"stable_diffusion.predict: {have} embedding `pooled` for a UNet of {base}: the set "
            "was encoded with another base; encode it again with this model"
        )
    added = None
    if wanted:
        size = tuple(n * getattr(model, "vae_factor", VAE_FACTOR) for n in noisy.shape[-2:])
        ids = time_ids(size, noisy.device).to(noisy.dtype).expand(len(noisy), -1)
        added = {"text_embeds": cond["pooled"].to(noisy.dtype), "time_ids": ids}
    return model(
        noisy.squeeze(2),
        t,
        encoder_hidden_states=cond["text"].to(noisy.dtype),
        added_cond_kwargs=added,
        return_dict=False,
    )[0].unsqueeze(2)


# Kept on the device: a CUDA graph cannot record a copy from the host.
@lru_cache(maxsize=16)
def time_ids(size: tuple[int, int], device: torch.device) -> Tensor:
    """`[6]`: original height and width, top and left of the crop, target height and width."""
    with with_values():
        return torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=device)


def pipeline(path: str | Path, dtype: torch.dtype = torch.float32) -> Encoders:
    """CLIP in `dtype`, and the VAE, in float32 where its `force_upcast` asks for it."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline

    index = read_config(StableDiffusionPipeline, path)
    # The extras: else one pipeline warns of a checker that nobody hands it, and the other loads a
    # watermark's library wherever there is one.
    if index.get("text_encoder_2") is None:
        kind, extra = StableDiffusionPipeline, {"requires_safety_checker": False}
    elif index.get("text_encoder", (None,))[0] is None:
        raise ValueError(f"stable_diffusion.pipeline: {path} is a refiner; expected SDXL's base")
    else:
        kind, extra = StableDiffusionXLPipeline, {"add_watermarker": False}
    # True: AutoencoderKL's own default.
    upcast = read_config(AutoencoderKL, path, "vae").get("force_upcast", True)
    pipe = Encoders(kind, path, dtype, vae_dtype=torch.float32 if upcast else dtype, **extra)
    # Images; of any height and width in latents, for which the UNet has no places.
    pipe.sizes = Sizes(space=vae_factor(path), most=(1, math.inf, math.inf))
    return pipe


@torch.no_grad()
def encode_media(pipe: Encoders, frames: Tensor, normal: Normal | None = None) -> Tensor:
    """An image `uint8 [1, H, W, 3]` -> `[C, 1, H/8, W/8]`: the posterior's mode, scaled.

    (mode - mean) * scaling_factor / std, with a mean and a std only where SDXL's VAE has them.

    normal: gives eps; the posterior's mean + std eps stands in place of its mode.

    Raises:
        ValueError: more than one frame, or H or W not divisible by 8.
    """
    x = pixels(frames, pipe.sizes)[:, :, 0]
    vae = pipe.media.vae
    x = x.to(pipe.device, vae.dtype)
    mean, std = statistics(pipe, x)
    latents = drawn(vae.encode(x).latent_dist, normal)
    latents = (latents - mean) * vae.config.scaling_factor / std
    return latents.to(pipe.dtype).permute(1, 0, 2, 3)


@torch.no_grad()
def encode_text(pipe: Encoders, prompts: list[str]) -> list[dict[str, Tensor]]:
    """One `{"text": [77, D]}` per prompt, for SDXL also `pooled [D2]`.

    SDXL's empty prompt is zeros where the folder says `force_zeros_for_empty_prompt`, as its
    pipeline guides against it and as it was trained.
    """
    embeddings, _, *pooled = pipe.embed(prompts, num_images_per_prompt=1)
    if not pooled:
        return [{"text": row} for row in embeddings]
    rows = [{"text": a, "pooled": b} for a, b in zip(embeddings, pooled[0], strict=True)]
    if pipe.index.get("force_zeros_for_empty_prompt", True):
        for i, prompt in enumerate(prompts):
            if not prompt:
                rows[i] = {name: torch.zeros_like(value) for name, value in rows[i].items()}
    return rows


def decode(pipe: Encoders, latents: Tensor) -> Tensor:
    """`[C, 1, h, w]` -> pixels `uint8 [1, 8h, 8w, 3]`."""
    return decode_many(pipe, latents[None])[0]


@torch.no_grad()
def decode_many(pipe: Encoders, latents: Tensor) -> list[Tensor]:
    """`[N, C, 1, h, w]` -> N images `uint8 [1, 8h, 8w, 3]`, in one call of the VAE."""
    vae = pipe.media.vae
    x = latents.squeeze(2).to(pipe.device, vae.dtype)
    mean, std = statistics(pipe, x)
    x = x * std / vae.config.scaling_factor + mean
    return [to_frames(image[:, None]) for image in vae.decode(x, return_dict=False)[0]]


def statistics(pipe: Encoders, like: Tensor) -> tuple[Tensor, Tensor]:
    """The latents' mean and standard deviation per channel, `[C, 1, 1]`, as SDXL's pipeline
    applies them where its VAE's config has both (Playground 2.5); else 0 and 1.
    """
    config = pipe.media.vae.config
    values = [config.get("latents_mean"), config.get("latents_std")]
    if None in values or pipe.index.get("text_encoder_2") is None:
        values = [[0.0], [1.0]]
    mean, std = torch.tensor(values, dtype=like.dtype, device=like.device).view(2, -1, 1, 1)
    return mean, std
