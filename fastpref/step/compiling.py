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

# How Inductor compiles blocks. On its own it rounds what a backward needs and keeps the rest of a
# fused kernel in float32; a convolution's layout and what is computed twice rather than stored hang
# on the rest of the graph too, and with them the order of a sum. So the graph that trains and the
# reference's, which has no backward, say different things of the same weights, and a run starts on
# gradients of rounding alone. With these both round after every operation, as eager PyTorch does,
# keep its layouts, and store what is read more than once and made of several tensors. Each is in
# torch 2.11 to 2.14; what a later one lacks is left out there, and its margin noise tells. On a CPU
# policy and reference then agree to the bit; on an H100 a little is left (bench/NOTES.md).
AS_EAGER = {
    "emulate_precision_casts": True,
    "layout_optimization": False,
    "realize_reads_threshold": 1,
}


def compile_blocks(
    model: nn.Module,
    paths: str,
    *,
    backend: str = "inductor",
    options: dict[str, Any] | None = AS_EAGER,
) -> int:
    """Compiles every block of `model` in place; returns how many. After adapters and checkpointing.

    All blocks of a class share their compiled code, and a shape of batch costs three compilations
    of it: adapters off; adapters on, first block (no gradient enters an input below the adapters)
    and the others. Blocks without adapters beside adapted ones are other code and cost one more,
    or two where they also run with gradient (not in `reference.shared_prefix`). A block is compiled
    whole: what cannot be traced is an error. A pass in another mode, such as adapters on without
    gradient, costs a compilation more: `eagerly` avoids that where speed does not count.

    paths: of the family's blocks, a space between them: lists of blocks, or single ones.
    options: Inductor's, in forward and backward; other backends have none. None is faster code that
        rounds as it comes: for measurements.

    Raises:
        ValueError: a path that leads nowhere.
    """
    found = blocks(model, paths)
    config = torch._dynamo.config
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(config, name, max(getattr(config, name), LIMIT))
    # Left open, `dynamic` would compile a second shape for all sizes: other kernels, which may
    # round otherwise.
    settings: dict[str, Any] = {"backend": backend, "fullgraph": True, "dynamic": False}
    if backend == "inductor" and options:
        from torch._inductor import config as inductor

        known = inductor.get_config_copy()
        settings["options"] = {name: value for name, value in options.items() if name in known}
    for block in found:
        forward = torch.compile(block.forward.__func__, **settings)
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
        # Not contiguous(): a row cut from a table is that already and has the table's stride.
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
