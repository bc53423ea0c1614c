"""Classifier-free guidance as one prediction: prompt and empty prompt in a single call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .reference import Predict


def guided(predict: Predict, empty: dict[str, Tensor] | None, scale: float) -> Predict:
    """pred = u + scale (c - u), u of the empty prompt (arXiv 2207.12598), in float32; with a scale
    of 1 `predict` as it is.

    empty: the empty prompt's condition, without a batch dimension, on the model's device. The rows
    of both stand in one batch: prompts first, then as many empty ones.

    Raises ValueError where a scale other than 1 has no empty prompt, or one of other shapes.
    """
    if scale == 1:
        return predict
    if empty is None:
        raise ValueError(f"guidance_scale {scale:g} needs the empty prompt's condition, got none")

    def both(model: nn.Module, noisy: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        rows = {}
        for name, value in cond.items():
            none = empty[name].to(value)
            if none.shape != value.shape[1:]:
                raise ValueError(
                    f"guidance: the empty prompt's {name} expected {list(value.shape[1:])}, "
                    f"got {list(none.shape)}"
                )
            rows[name] = torch.cat([value, none.expand_as(value)])
        said = predict(model, torch.cat([noisy, noisy]), torch.cat([t, t]), rows).float()
        c, u = said.chunk(2)
        return u + scale * (c - u)

    return both
