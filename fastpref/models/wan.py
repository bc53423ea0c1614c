"""The Wan2.1 text-to-video family: flow matching on AutoencoderKLWan's normalised latents, UMT5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..process import FlowMatching, from_config
from .encoders import Encoders, Normal, Sizes, drawn, pixels, to_frames
from .folder import check_rotary, config_of, load_model

# Self- and cross-attention projections of every block, as diffusers names them.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
BLOCKS = "blocks"

TEXT_TOKENS = 512  # WanPipeline's own length; embeddings beyond a prompt's end are zeros


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The transformer of a diffusers folder or hub id, in `dtype`.

    Raises:
        ValueError: no such model, another family's, or one that takes more than text.
    """
    from diffusers import WanTransformer3DModel

    model = load_model(WanTransformer3DModel, path, "transformer", dtype)
    if model.config.in_channels != model.config.out_channels or model.config.image_dim:
        raise ValueError(
            f"wan.load: {path} has {model.config.in_channels} input and "
            f"{model.config.out_channels} output channels; expected a text-to-video model, which "
            "has as many of each and no image encoder"
        )
    return model


def process(scheduler_config: dict[str, Any]) -> FlowMatching:
    """Flow matching with the scheduler's shift: x_t = (1 - sigma) x0 + sigma eps, y = eps - x0."""
    result = from_config(scheduler_config)
    if not isinstance(result, FlowMatching):
        raise ValueError(
            "wan.process: expected a flow-matching scheduler (use_flow_sigmas, flow_prediction), "
            f"got {scheduler_config.get('_class_name')} with prediction_type "
            f"{scheduler_config.get('prediction_type')}"
        )
    return result


def predict(model: nn.Module, noisy: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """Velocity eps - x0 at `noisy [N, C, F, h, w]` and times `t [N]` = 1000 sigma, floats."""
    check_rotary(model, noisy)
    return model(
        hidden_states=noisy,
        timestep=t,
        encoder_hidden_states=cond["text"].to(noisy.dtype),
        return_dict=False,
    )[0]


def pipeline(path: str | Path, dtype: torch.dtype = torch.float32) -> Encoders:
    """UMT5 in `dtype` and the VAE in float32, as Wan's authors run it; loaded when first used."""
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    pipe = Encoders(WanPipeline, path, dtype, vae_dtype=torch.float32, clean=prompt_clean)
    if pipe.index.get("boundary_ratio") is not None or pipe.index.get("expand_timesteps"):
        raise ValueError(
            f"wan.pipeline: {path} is a Wan2.2 model (two transformers, or a time per token); "
            "expected Wan2.1 text-to-video"
        )
    pipe.tokens = TEXT_TOKENS
    pipe.sizes = sizes(
        config_of(AutoencoderKLWan, path, "vae"),
        config_of(WanTransformer3DModel, path, "transformer"),
    )
    return pipe


def sizes(vae: dict[str, Any], transformer: dict[str, Any]) -> Sizes:
    """By the configs: what the patches divide, as far as the rotary table reaches."""
    patch, limit = tuple(transformer["patch_size"]), transformer["rope_max_seq_len"]
    return Sizes(
        time=vae["scale_factor_temporal"],
        space=vae["scale_factor_spatial"],
        patch=patch,
        most=tuple(n * limit for n in patch),
    )


@torch.no_grad()
def encode_media(pipe: Encoders, frames: Tensor, normal: Normal | None = None) -> Tensor:
    """Pixels `uint8 [F, H, W, 3]` -> `[C, (F-1)/4+1, H/8, W/8]`: (posterior mode - mean) / std.

    normal: gives eps; the posterior's mean + std eps stands in place of its mode.

    Raises:
        ValueError: F is not 4k+1, or H or W not divisible by 16 (`sizes`).
    """
    x = pixels(frames, pipe.sizes)
    media = pipe.media
    posterior = media.vae.encode(x.to(pipe.device, media.vae.dtype)).latent_dist
    latents = drawn(posterior, normal)[0].float()
    mean, std = statistics(media.vae, latents)
    return ((latents - mean) / std).to(pipe.dtype)


@torch.no_grad()
def encode_text(pipe: Encoders, prompts: list[str]) -> list[dict[str, Tensor]]:
    """One `{"text": [512, D]}` per prompt: cleaned and cut as WanPipeline does, zeros behind."""
    embeddings, _ = pipe.embed(prompts, max_sequence_length=TEXT_TOKENS)
    return [{"text": row} for row in embeddings]


def decode(pipe: Encoders, latents: Tensor) -> Tensor:
    """`[C, f, h, w]` -> pixels `uint8 [4(f-1)+1, 8h, 8w, 3]`."""
    return decode_many(pipe, latents[None])[0]


@torch.no_grad()
def decode_many(pipe: Encoders, latents: Tensor) -> list[Tensor]:
    """`[N, C, f, h, w]` -> N clips as of `decode`, in one call of the VAE."""
    vae = pipe.media.vae
    mean, std = statistics(vae, latents)
    x = (latents.float() * std + mean).to(pipe.device, vae.dtype)
    return [to_frames(clip) for clip in vae.decode(x, return_dict=False)[0]]


def statistics(vae: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """The latents' mean and standard deviation per channel, `[C, 1, 1, 1]`."""
    values = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=like.device)
    mean, std = values.view(2, -1, 1, 1, 1)
    return mean, std
