"""The CogVideoX text-to-video family: v-prediction in 2B (added positions) and 5B (rotary), T5."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..process import Diffusion, from_config
from .encoders import Encoders, Normal, Sizes, drawn, pixels, to_frames
from .folder import config_of, load_model, with_values

# Projections of the joint attention over text and video, as diffusers names them.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
BLOCKS = "transformer_blocks"


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The transformer of a diffusers folder or hub id, in `dtype`.

    Raises:
        ValueError: no such model, another family's, or one that takes more than text.
    """
    from diffusers import CogVideoXTransformer3DModel

    model = load_model(CogVideoXTransformer3DModel, path, "transformer", dtype)
    if model.config.in_channels != model.config.out_channels:
        raise ValueError(
            f"cogvideox.load: {path} has {model.config.in_channels} input and "
            f"{model.config.out_channels} output channels; expected a text-to-video model, which "
            "has as many of each"
        )
    return model


def process(scheduler_config: dict[str, Any]) -> Diffusion:
    """The scheduler's alphas, shifted (2B) and rescaled to zero terminal SNR; v-prediction."""
    result = from_config(scheduler_config)
    if not isinstance(result, Diffusion) or result.prediction_type != "v_prediction":
        raise ValueError(
            "cogvideox.process: expected a CogVideoX scheduler with prediction_type v_prediction, "
            f"got {scheduler_config.get('_class_name')} with "
            f"{scheduler_config.get('prediction_type')}"
        )
    return result


def predict(model: nn.Module, noisy: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """v = a eps - s x0 at `noisy [N, C, F, h, w]` and timesteps `t [N]`; the model has F before C.

    5B's rotary embeddings follow the clip's size as CogVideoXPipeline's do.
    """
    embedding = None
    if model.config.use_rotary_positional_embeddings:
        c = model.config
        sizes = (c.patch_size, c.patch_size_t, c.sample_height, c.sample_width)
        embedding = rotary(c.attention_head_dim, sizes, tuple(noisy.shape[2:]), noisy.device)
    return model(
        hidden_states=noisy.permute(0, 2, 1, 3, 4),
        encoder_hidden_states=cond["text"].to(noisy.dtype),
        timestep=t,
        image_rotary_emb=embedding,
        return_dict=False,
    )[0].permute(0, 2, 1, 3, 4)


@lru_cache(maxsize=16)
def rotary(
    head_dim: int,
    sizes: tuple[int, int | None, int, int],
    shape: tuple[int, int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """cos and sin `[tokens, head_dim]` for latents of `shape` (F, h, w).

    sizes: the config's patch_size, patch_size_t (1.5 alone has it), sample_height, sample_width.
    1.0 stretches the grid into the one it was trained on; 1.5 takes the first rows and columns.
    """
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    patch, patch_t, *base = sizes
    frames, *grid = shape
    height, width = (n // patch for n in base)
    grid = tuple(n // patch for n in grid)
    if patch_t is None:
        corners = get_resize_crop_region_for_grid(grid, width, height)
        how = {"crops_coords": corners, "temporal_size": frames}
    else:
        how = {"crops_coords": None, "temporal_size": frames // patch_t}
        how |= {"grid_type": "slice", "max_size": (height, width)}
    with with_values():
        return get_3d_rotary_pos_embed(embed_dim=head_dim, grid_size=grid, device=device, **how)


class Parts(Encoders):
    """Encoders whose scheduler has the `step` of every other family's."""

    @property
    def scheduler(self) -> Any:
        from diffusers import CogVideoXDPMScheduler

        found = super().scheduler
        return DPM(found) if isinstance(found, CogVideoXDPMScheduler) else found


class DPM:
    """CogVideoXDPMScheduler with the `step` of other schedulers: it remembers the step before.

    The noise that it adds lies as in its pipeline's latents, frames before channels.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)

    def set_timesteps(self, steps: int, device: torch.device) -> None:
        self.scheduler.set_timesteps(steps, device=device)
        self.clean = self.before = None

    def step(
        self, pred: Tensor, t: Tensor, x: Tensor, generator: Any, return_dict: bool
    ) -> tuple[Tensor]:
        pred, x = pred.transpose(1, 2), x.transpose(1, 2)
        x, self.clean = self.scheduler.step(
            *(pred, self.clean, t, self.before, x), generator=generator, return_dict=return_dict
        )
        self.before = t
        return (x.transpose(1, 2),)


def pipeline(path: str | Path, dtype: torch.dtype = torch.float32) -> Encoders:
    """T5 and the VAE in `dtype`, each loaded when first used."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel

    pipe = Parts(CogVideoXPipeline, path, dtype)
    transformer = config_of(CogVideoXTransformer3DModel, path, "transformer")
    pipe.tokens = transformer["max_text_seq_length"]
    pipe.sizes = sizes(config_of(AutoencoderKLCogVideoX, path, "vae"), transformer)
    return pipe


def sizes(vae: dict[str, Any], transformer: dict[str, Any]) -> Sizes:
    """By the configs. 1.5 (patch_size_t) has rotary positions up to its own size alone; learned
    positions are of their own size alone.
    """
    patch, patch_t = transformer["patch_size"], transformer["patch_size_t"]
    own = tuple(transformer[f"sample_{n}"] // patch * patch for n in ("height", "width"))
    sliced = patch_t is not None and transformer["use_rotary_positional_embeddings"]
    return Sizes(
        time=vae["temporal_compression_ratio"],
        space=2 ** (len(vae["block_out_channels"]) - 1),
        patch=(patch_t or 1, patch, patch),
        most=(math.inf, *(own if sliced else (math.inf, math.inf))),
        fixed=own if transformer["use_learned_positional_embeddings"] else None,
    )


@torch.no_grad()
def encode_media(pipe: Encoders, frames: Tensor, normal: Normal | None = None) -> Tensor:
    """Pixels `uint8 [F, H, W, 3]` -> `[C, (F-1)/4+1, H/8, W/8]`: posterior mode * scaling_factor.

    normal: gives eps; the posterior's mean + std eps stands in place of its mode.

    The VAE's `invert_scale_latents` concerns the picture that image-to-video models start from,
    not the latents a model denoises, in every published CogVideoX.

    Raises:
        ValueError: F is not 4k+1 (8k+5 for 1.5), or H or W not divisible by 16 (`sizes`).
    """
    x = pixels(frames, pipe.sizes)
    media = pipe.media
    x = x.to(pipe.device, media.vae.dtype)
    return drawn(media.vae.encode(x).latent_dist, normal)[0] * media.vae_scaling_factor_image


@torch.no_grad()
def encode_text(pipe: Encoders, prompts: list[str]) -> list[dict[str, Tensor]]:
    """One `{"text": [226, D]}` per prompt, padding embedded too, as CogVideoXPipeline does."""
    embeddings, _ = pipe.embed(prompts, max_sequence_length=pipe.tokens)
    return [{"text": row} for row in embeddings]


def decode(pipe: Encoders, latents: Tensor) -> Tensor:
    """`[C, f, h, w]` -> pixels `uint8 [4(f-1)+1, 8h, 8w, 3]`."""
    return decode_many(pipe, latents[None])[0]


@torch.no_grad()
def decode_many(pipe: Encoders, latents: Tensor) -> list[Tensor]:
    """`[N, C, f, h, w]` -> N clips as of `decode`, in one call of the VAE."""
    media = pipe.media
    # In the order of CogVideoXPipeline, to the same bits.
    x = 1 / media.vae_scaling_factor_image * latents.to(pipe.device, media.vae.dtype)
    return [to_frames(clip) for clip in media.vae.decode(x).sample]
