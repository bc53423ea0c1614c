"""Per-block torch.compile: a family's blocks compiled in place, their adapters included."""

from __future__ import annotations

import torch
from torch import nn

# Compilations of one block's code: three per shape of batch, and shapes come in buckets.
LIMIT = 96


def compile_blocks(model: nn.Module, paths: str, *, backend: str = "inductor") -> int:
    """Compiles every block of `model` in place; returns how many. After adapters and checkpointing.

    All blocks of a class share their compiled code, and a shape of batch costs three compilations
    of it: adapters off; adapters on, first block (no gradient enters an input below the adapters)
    and the others. Nothing is compiled in the middle of a block: what cannot be is an error.
    A pass in another mode, such as adapters on without gradient, costs a compilation more:
    `eagerly` avoids that where speed does not count.

    paths: of the family's blocks, a space between them: lists of blocks, or single ones.

    Raises:
        ValueError: a path that leads nowhere.
    """
    found = blocks(model, paths)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, LIMIT)
    for block in found:
        # Not block.forward: a copy of the model would run the blocks of the original.
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    return len(found)


def blocks(model: nn.Module, paths: str) -> list[nn.Module]:
    """The blocks at `paths`, in order."""
    found: list[nn.Module] = []
    for path in paths.split():
        try:
            part = model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"{type(model).__name__} has no blocks at {path!r}") from None
        found += list(part) if isinstance(part, nn.ModuleList) else [part]
    return found


def eagerly() -> torch.compiler.set_stance:
    """Inside, compiled blocks run as they were written: for probes and pictures."""
    return torch.compiler.set_stance("force_eager")
