"""What a block keeps for its backward: everything, its attention outputs, or its input alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from . import compiling

Mode = Literal["none", "attention", "full"]


def apply(model: nn.Module, blocks: str, mode: Mode) -> int:
    """Checkpoints every block of `model`, in place, before any is compiled; returns how many.

    none: activations stay. full: a block keeps its input and runs again in the backward. attention:
    so too, but what its attention kernels gave (output and log-sum-exp) stays, so that attention,
    most of a video model's forward, is not computed twice.

    blocks: paths of the family's blocks, a space between them: lists of blocks, or single ones.
    Nothing is checkpointed where no gradient is recorded. Random state is not restored for the
    second run: active dropout in a block is refused. Applied again, the last mode holds.

    Raises:
        ValueError: an unknown mode, a path that leads nowhere, active dropout in a block.
    """
    if mode not in ("none", "attention", "full"):
        raise ValueError(f"checkpointing: expected none, attention or full, got {mode!r}")
    found = compiling.blocks(model, blocks)
    wrapped: dict[type, Callable[..., Any]] = {}  # blocks of a class share code once compiled
    for block in found:
        if getattr(block.forward, "is_checkpointed", False):
            del block.forward  # the instance's own: the class's comes back
        if mode == "none":
            continue
        for part in block.modules():
            if isinstance(part, nn.Dropout) and part.p and part.training:
                raise ValueError(
                    f"checkpointing {mode}: {type(block).__name__} has dropout {part.p}, which "
                    "would differ between a block's two runs: use checkpointing none or no dropout"
                )
        kind = type(block)
        wrapped[kind] = wrapped.get(kind) or _checkpointed(kind.forward, mode)
        # A method, so that a copy of the model runs the copy's blocks.
        block.forward = MethodType(wrapped[kind], block)
    return 0 if mode == "none" else len(found)


def keeps(op: Any) -> bool:
    """Whether `op` is an attention kernel's forward, whose outputs mode `attention` keeps.

    By name, since each backend has its own operator: aten's flash, memory-efficient, cuDNN and CPU
    kernels, flex attention, and those that flash-attn 2 and 3, xformers and diffusers register.
    What a library calls without an operator, and aten's math path, is made of plain products and is
    computed again.
    """
    name = str(op).lower()
    attends = any(part in name for part in ("attention", "flash"))
    return attends and not any(part in name for part in ("backward", "bwd"))


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keeps(op) else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpointed(forward: Callable[..., Any], mode: Mode) -> Callable[..., Any]:
    # Reentrant checkpoints take no keywords and no choice of what stays. Keeping the random state
    # asks the generator in every block, which a CUDA graph's recording refuses.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "attention":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() and _records(block, args, kwargs)):
            return forward(block, *args, **kwargs)
        return checkpoint(forward, block, *args, **options, **kwargs)

    run.is_checkpointed = True
    return run


def _records(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a graph is recorded. Below the first adapter there is none, and nothing to run again:
    torch.compile refuses checkpoints there.
    """
    given = (*args, *kwargs.values(), *block.parameters())
    return any(isinstance(v, torch.Tensor) and v.requires_grad for v in given)
