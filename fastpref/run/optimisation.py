"""The optimiser of a run: AdamW, its learning rate's schedule, one update."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import sharding
from .guard import Guard

REDUCED = {"fp32": torch.float32, "bf16": torch.bfloat16}


def adamw(
    parameters: list[Tensor],
    *,
    learning_rate: float,
    adam_beta1: float,
    adam_beta2: float,
    adam_epsilon: float,
    weight_decay: float,
    recorded: torch.device | None = None,
) -> torch.optim.AdamW:
    """recorded: the device of a CUDA graph, which reads the learning rate from a tensor."""
    rate = learning_rate if recorded is None else torch.tensor(learning_rate, device=recorded)
    # fused: the one that reads the guard's found_inf; the others raise where it is set.
    return torch.optim.AdamW(
        parameters,
        lr=rate,
        betas=(adam_beta1, adam_beta2),
        eps=adam_epsilon,
        weight_decay=weight_decay,
        fused=True,
        capturable=recorded is not None,
    )


def schedule(step: int, *, lr_scheduler: str, lr_warmup_steps: int, max_train_steps: int) -> float:
    """The learning rate's factor at a step: linear warm-up, then constant, linear or cosine to
    0.
    """
    if step < lr_warmup_steps:
        # From 1 on: at rate 0 the first step would teach nothing.
        return (step + 1) / lr_warmup_steps
    if lr_scheduler == "constant":
        return 1.0
    done = (step - lr_warmup_steps) / max(1, max_train_steps - lr_warmup_steps)
    return 1 - done if lr_scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate from here on; a tensor keeps its place, as a recorded step reads it there
    (a checkpoint's puts another in its place, but before anything is recorded).
    """
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate


def update(
    optimizer: torch.optim.Optimizer, parameters: list[Tensor], guard: Guard, max_norm: float
) -> Tensor:
    """Clips the gradients, has the guard look at them, and steps; their total norm before
    clipping (max_norm 0: they are not), left on the device. Of shards it is that of the whole.
    """
    if max_norm:
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    else:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = sharding.full(norm)
    guard.watch(optimizer, norm)
    optimizer.step()
    return norm
