"""The architectures that steps are timed on, true ones with random weights, and what they cost."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

PEAK = 989e12  # dense bf16 FLOP/s of an H100 or H200 SXM, what MFU is measured against


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A transformer of a family, and the pixels it is timed at.

    layers, dim, ffn: of the blocks. text: tokens and width of the prompt's embedding. crosses: text
    comes in by cross-attention (else it stands in the sequence). patch: latents per token in time,
    height and width. stride: pixels per latent in time and in space.
    """

    family: str
    kind: str
    config: dict[str, Any]
    scheduler: dict[str, Any]
    shape: str
    layers: int
    dim: int
    ffn: int
    text: tuple[int, int]
    crosses: bool
    channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    stride: tuple[int, int] = (4, 8)
    small: tuple[str, ...] = field(default=("17x256x256", "1x480x832"))

    def latent(self, shape: str) -> tuple[int, int, int, int]:
        """[C, f, h, w] of a clip FRAMESxHEIGHTxWIDTH.

        Raises ValueError on another form, or on sizes that do not divide.
        """
        try:
            frames, height, width = (int(n) for n in shape.split("x"))
        except ValueError:
            raise ValueError(f"--shape: expected FRAMESxHEIGHTxWIDTH, got {shape}") from None
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

    def tokens(self, shape: str) -> int:
        _, *sizes = self.latent(shape)
        video = 1
        for size, patch in zip(sizes, self.patch, strict=True):
            video *= size // patch
        return video if self.crosses else video + self.text[0]

    def forward_flops(self, shape: str) -> tuple[float, float]:
        """(products with weights, attention) of one sample's forward.

        Per block on n tokens of width d: projections 8 n d^2, feed-forward 4 n d ffn, scores and
        values 4 n^2 d; cross-attention to m tokens 4 n d^2 + 4 m d^2 and 4 n m d.
        """
        n, d, m = self.tokens(shape), self.dim, self.text[0]
        products = 8 * n * d**2 + 4 * n * d * self.ffn
        attention = 4.0 * n**2 * d
        if self.crosses:
            products += 4 * n * d**2 + 4 * m * d**2
            attention += 4 * n * m * d
        return float(self.layers * products), self.layers * attention

    def pair_flops(self, shape: str, *, online: bool) -> float:
        """Useful FLOPs of a pair's training step with adapters, nothing recomputed.

        Backward: the products once more (towards the activations), attention 2.5 times its forward
        (five products for two). online: the reference's two forwards as well.
        """
        products, attention = self.forward_flops(shape)
        forward = products + attention
        return 2 * (forward + products + 2.5 * attention) + (2 * forward if online else 0.0)

    def make(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The model with random weights, its parameters in the dtypes that loading gives them."""
        import diffusers

        torch.manual_seed(0)
        kind = getattr(diffusers, self.kind)
        with device:
            model = kind(**self.config).requires_grad_(False)
        kept = kind._keep_in_fp32_modules
        if kept is None:
            return nn.Module.to(model, dtype)  # diffusers' own warns of what is not the case here
        for name, p in model.named_parameters():
            if not set(kept) & set(name.split(".")):
                p.data = p.data.to(dtype)
        return model

    def inputs(
        self, shape: str, pairs: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents [2B, C, f, h, w], winners first, and the condition, one prompt per pair."""
        random = torch.Generator(device).manual_seed(0)
        options = {"generator": random, "device": device}
        latents = torch.randn(2 * pairs, *self.latent(shape), **options).to(dtype)
        return latents, {
            "text": torch.randn(pairs, *self.text, **options).to(dtype).repeat(2, 1, 1)
        }


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
    return Architecture(
        family="cogvideox", kind="CogVideoXTransformer3DModel", config=config, scheduler=scheduler,
        shape="49x480x720", layers=layers, dim=64 * heads, ffn=256 * heads, text=(226, 4096),
        crosses=False,
    )  # fmt: skip


_FLOW = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
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
    return Architecture(
        kind="WanTransformer3DModel", config=config, scheduler=_FLOW, layers=layers,
        dim=heads * head_dim, ffn=ffn, text=text, crosses=True, **values,
    )  # fmt: skip


ARCHITECTURES = {
    "wan": _wan(12, 128, 8960, 30, (512, 4096)),  # Wan2.1-1.3B
    "cogvideox-2b": _cogvideox(30, 30, rotary=False, shift=3.0),
    "cogvideox-5b": _cogvideox(48, 42, rotary=True, shift=1.0),
    "toy": _wan(
        4, 24, 192, 4, (8, 32), family="toy", shape="8x12x12", channels=3, patch=(1, 4, 4),
        stride=(1, 1), small=("8x12x12",),
        config={"patch_size": (1, 4, 4), "in_channels": 6, "out_channels": 3, "freq_dim": 64,
                "rope_max_seq_len": 64},
    ),
    # What a CPU gets: the same blocks, few and narrow.
    "tiny": _wan(4, 32, 512, 4, (16, 64), shape="9x128x128", small=("1x64x64",),
                 config={"rope_max_seq_len": 64}),
}  # fmt: skip
