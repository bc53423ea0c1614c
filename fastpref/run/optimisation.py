"""The optimiser of a run: AdamW, its learning rate's schedule, the gradients' clipping."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import Config


def adamw(
    config: Config, parameters: list[Tensor], rate: Tensor | None = None
) -> torch.optim.AdamW:
    """rate: the learning rate as a tensor, which a recorded step reads: to be changed in place."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate if rate is None else rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
        capturable=rate is not None,
    )


def schedule(config: Config, step: int) -> float:
    """The learning rate's factor at a step: linear warm-up, then constant, linear or cosine to
    0.
    """
    if step < config.lr_warmup_steps:
        return (step + 1) / config.lr_warmup_steps
    if config.lr_scheduler == "constant":
        return 1.0
    done = (step - config.lr_warmup_steps) / max(1, config.max_train_steps - config.lr_warmup_steps)
    return 1 - done if config.lr_scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def clip_gradients(parameters: list[Tensor], max_norm: float) -> Tensor:
    """The gradients' total norm before clipping, left on the device."""
    if max_norm:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
