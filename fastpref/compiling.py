"""Per-block torch.compile: a family's blocks compiled in place, their adapters included."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

# Compilations of one block's code: three to five per shape of batch, and the data's buckets decide
# how many shapes there are. Beyond torch's limit a whole block is an error in the middle of a run,
# so the limit is out of reach: thousands of compilations take days.
LIMIT = 10_000


def compile_blocks(model: nn.Module, paths: str, *, backend: str = "inductor") -> int:
    """Compiles every block of `model` in place; returns how many. After adapters and checkpointing.

    All blocks of a class share their compiled code, and a shape of batch costs three compilations
    of it: adapters off; adapters on, first block (no gradient enters an input below the adapters)
    and the others. Blocks without adapters beside adapted ones are other code and cost one more,
    or two where they also run with gradient (not in `reference.shared_prefix`). A block is compiled
    whole: what cannot be traced is an error. A pass in another mode, such as adapters on without
    gradient, costs a compilation more: `eagerly` avoids that where speed does not count.

    paths: of the family's blocks, a space between them: lists of blocks, or single ones.

    Raises:
        ValueError: a path that leads nowhere.
    """
    found = blocks(model, paths)
    config = torch._dynamo.config
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(config, name, max(getattr(config, name), LIMIT))
    for block in found:
        forward = torch.compile(
            block.forward.__func__, backend=backend, fullgraph=True, dynamic=False
        )
        if block is found[0]:
            forward = _plainly(forward)
        # A method, so that a copy of the model runs the copy's blocks.
        block.forward = MethodType(forward, block)
    return len(found)


def _plainly(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Some models hand their first block slices, with other strides than blocks hand on, and code
    for those would be one compilation more.
    """

    def plain(value: Any) -> Any:
        return value.reshape(-1).view(value.shape) if isinstance(value, Tensor) else value

    def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(block, *map(plain, args), **{k: plain(v) for k, v in kwargs.items()})

    return run


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
