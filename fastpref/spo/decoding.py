"""From latents to the clips that are judged: alike in `spm` and in `spo`."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from ..models.encoders import decoded, with_decoder
from .config import Estimates

Decode = Callable[[Tensor], list[Tensor]]  # latents [N, C, F, h, w] -> N clips uint8 [F, H, W, 3]


def decoder(config: Estimates, family: ModuleType, pipe: Any) -> Decode:
    """By the model's own pipe or the VAE that is asked for in place of its."""
    pipe = with_decoder(pipe, config.decoder) if config.decoder else pipe

    def decode(latents: Tensor) -> list[Tensor]:
        return decoded(family, pipe, latents[:, :, : config.decode_frames], config.decode_batch)

    return decode
