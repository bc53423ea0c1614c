"""The architectures that people train, known without their weights: configs, latents, prompts."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .folder import shaped


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family's model, and the pixels it was trained at.

    kind: its class in diffusers. shape: FRAMESxHEIGHTxWIDTH. text: tokens and width of a prompt's
    embedding; pooled: width of a pooled one beside it. patch: latents per token in time, height and
    width. stride: pixels per latent in time and in space.
    """

    family: str
    kind: str
    config: dict[str, Any]
    scheduler: dict[str, Any]
    shape: str
    text: tuple[int, int]
    pooled: int | None = None
    channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    stride: tuple[int, int] = (4, 8)

    def latent(self, shape: str) -> tuple[int, int, int, int]:
        """[C, f, h, w] of a clip FRAMESxHEIGHTxWIDTH.

        Raises ValueError on another form, or on sizes that do not divide.
        """
        if not re.fullmatch(r"[0-9]{1,6}x[0-9]{1,6}x[0-9]{1,6}", shape):
            raise ValueError(f"--shape: expected FRAMESxHEIGHTxWIDTH, got {shape}")
        frames, height, width = (int(n) for n in shape.split("x"))
        if self.kind.startswith("UNet2D") and frames != 1:
            raise ValueError(f"--shape {shape}: expected 1 frame, {self.family} makes images")
        time, space = self.stride
        sizes = ((frames - 1) // time + 1, height // space, width // space)
        exact = (frames - 1) % time == 0 and height % space == 0 and width % space == 0
        if (
            min(sizes) < 1
            or not exact
            or any(s % p for s, p in zip(sizes, self.patch, strict=True))
        ):
            raise ValueError(
                f"--shape {shape}: expected {time}k+1 frames, height and width divisible by"
                f" {space * self.patch[1]}"
            )
        return (self.channels, *sizes)

    def make(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The model with random weights (on the device meta: none), in the dtypes of loading."""
        import diffusers

        torch.manual_seed(0)
        return shaped(getattr(diffusers, self.kind), self.config, device, dtype)

    def inputs(
        self, shape: str, pairs: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents [2B, C, f, h, w], winners first, and the condition, one prompt per pair."""
        made = {"device": device}
        if device.type != "meta":  # which has no generator
            made["generator"] = torch.Generator(device).manual_seed(0)
        latents = torch.randn(2 * pairs, *self.latent(shape), **made).to(dtype)
        cond = {"text": torch.randn(pairs, *self.text, **made).to(dtype).repeat(2, 1, 1)}
        if self.pooled is not None:
            cond["pooled"] = torch.randn(pairs, self.pooled, **made).to(dtype).repeat(2, 1)
        return latents, cond

    def of(self, config: dict[str, Any]) -> Architecture:
        """The same family's model by another config: its channels, patches and prompts."""
        width = next((config[n] for n in _TEXT_WIDTHS if config.get(n)), self.text[1])
        tokens = config.get("max_text_seq_length") or self.text[0]
        patch, pooled = config.get("patch_size"), self.pooled
        if isinstance(patch, int):
            patch = (config.get("patch_size_t") or 1, patch, patch)
        if pooled is not None:
            # SDXL's six time ids are embedded beside the pooled text.
            times = 6 * config["addition_time_embed_dim"]
            pooled = config["projection_class_embeddings_input_dim"] - times
        return replace(
            self,
            config=config,
            channels=config.get("out_channels", self.channels),
            text=(tokens, width),
            pooled=pooled,
            patch=tuple(patch or self.patch),
        )


_TEXT_WIDTHS = ("text_dim", "text_embed_dim", "cross_attention_dim")

_FLOW = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,  # for 480p; diffusers names 5 for 720p
}
_DDPM = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}


def _wan(heads: int, head_dim: int, ffn: int, layers: int, text: tuple[int, int], **other: Any):
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "ffn_dim": ffn,
        "num_layers": layers,
        "text_dim": text[1],
    }
    config |= other.pop("config", {})
    values = {"family": "wan", "shape": "81x480x832", **other}
    kind = "WanTransformer3DModel"
    return Architecture(kind=kind, config=config, scheduler=_FLOW, text=text, **values)


def _cogvideox(heads: int, layers: int, rotary: bool, shift: float) -> Architecture:
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": 64,
        "num_layers": layers,
        "use_rotary_positional_embeddings": rotary,
    }
    scheduler = {
        "_class_name": "CogVideoXDDIMScheduler",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": shift,
    }
    kind = "CogVideoXTransformer3DModel"
    return Architecture(
        family="cogvideox", kind=kind, config=config, scheduler=scheduler, shape="49x480x720",
        text=(226, 4096),
    )  # fmt: skip


def _unet(shape: str, width: int, pooled: int | None = None, **config: Any) -> Architecture:
    config["cross_attention_dim"] = width
    return Architecture(
        family="stable_diffusion", kind="UNet2DConditionModel", config=config, scheduler=_DDPM,
        shape=shape, text=(77, width), pooled=pooled, channels=4, patch=(1, 1, 1), stride=(1, 8),
    )  # fmt: skip


# By name, each family's first one standing for it.
PUBLISHED = {
    "wan": _wan(12, 128, 8960, 30, (512, 4096)),  # Wan2.1-1.3B
    "wan-14b": _wan(40, 128, 13824, 40, (512, 4096)),
    "cogvideox-2b": _cogvideox(30, 30, rotary=False, shift=3.0),
    "cogvideox-5b": _cogvideox(48, 42, rotary=True, shift=1.0),
    "sd15": _unet("1x512x512", 768, sample_size=64, attention_head_dim=8),
    "sdxl": _unet(
        "1x1024x1024", 2048, 1280, sample_size=128, block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
        addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816, use_linear_projection=True,
    ),
    "toy": _wan(
        4, 24, 192, 4, (8, 32), family="toy", shape="8x12x12", channels=3, patch=(1, 4, 4),
        stride=(1, 1),
        config={"patch_size": (1, 4, 4), "in_channels": 6, "out_channels": 3, "freq_dim": 64,
                "rope_max_seq_len": 64},
    ),
}  # fmt: skip


def nearest(family: str, config: dict[str, Any] | None = None) -> Architecture | None:
    """A family's first architecture, or that whose own config a model's is most like, with the
    model's; None: the family has none here.
    """
    own = [each for each in PUBLISHED.values() if each.family == family]
    if config is None or not own:
        return own[0] if own else None

    def same(each: Architecture) -> int:
        return sum(config.get(name) == value for name, value in each.config.items())

    return max(own, key=same).of(config)
