"""Context parallelism: the tokens of a clip over several processes, as diffusers shares them out.

Between a model's first block and its last layer each of N processes has one N-th of the tokens.
Attention sees all of them: heads change places with tokens (ulysses), or keys and values go round
(ring). What goes in, the gathered prediction and so the loss are the same on all N. Gathering hands
a process's backward its own tokens' gradient alone: every parameter's gradient there is a part, and
the sum over the N is the gradient.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import nn

from ..ranks import rank, world
from .attention import Choice, casting, dispatched

# Backends that diffusers can share out. Their operators keep the log-sum-exp, which a ring needs;
# without it (native) a backward runs its whole attention forward again.
WITH_LSE = ("cudnn", "flash", "flash3", "flash_attn")


def settled(choice: Choice) -> Choice:
    """What auto chose, among what can be shared out: the fastest with a log-sum-exp, native where
    none ran. A backend that was asked for, and so not timed, stays.
    """
    if choice.name in WITH_LSE or not choice.seconds:
        return choice
    fit = {name: s for name, s in choice.seconds.items() if name in WITH_LSE}
    return replace(choice, name=min(fit, key=fit.__getitem__) if fit else "native")


def check(
    model: nn.Module, *, ulysses: int, ring: int, backend: str, checkpointing: str, compiled: bool
) -> None:
    """ValueError: why `model` cannot train so, and what to do. backend: of its attention."""
    kind, off = type(model).__name__, "use ulysses_degree 1 and ring_degree 1"
    version = importlib.metadata.version("diffusers")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (0, 40):
        raise ValueError(
            f"context parallelism: gradients of diffusers {version} are wrong, expected 0.40 or "
            f"later: pip install -U diffusers, or {off}"
        )
    plan = getattr(model, "_cp_plan", None)
    if not plan or not dispatched(model):
        raise ValueError(f"context parallelism: diffusers has no plan for {kind}: {off}")
    # Behind the gathering every process has all tokens, and a layer's gradient would count as often
    # as there are processes. Modules are named in the order of their calls.
    gathered = [name for name, part in plan.items() if not isinstance(part, dict)]
    parts = model.named_modules()
    last = [name for name, part in parts if next(part.parameters(recurse=False), None) is not None]
    if len(gathered) != 1 or not f"{last[-1]}.".startswith(f"{gathered[0]}."):
        raise ValueError(
            f"context parallelism: {kind} gathers its tokens at {', '.join(gathered[:3])}, and its "
            f"last layer is {last[-1]}: gradients behind a gathering would count twice: {off}"
        )
    heads = math.gcd(*(part.heads for part in model.modules() if hasattr(part, "heads")))
    if heads % ulysses:
        raise ValueError(
            f"ulysses_degree {ulysses}: does not divide the {heads} attention heads of {kind}, "
            f"expected one of {_divisors(heads)}"
        )
    if backend not in ("native", *WITH_LSE):
        raise ValueError(
            f"context parallelism: diffusers cannot share out attention {backend}, use one of "
            f"native, {', '.join(WITH_LSE)}"
        )
    others = f"with attention {', '.join(WITH_LSE)}, on a GPU with mixed_precision bf16"
    if ring > 1 and backend == "native":
        raise ValueError(
            f"ring_degree {ring}: runs {others}, got {backend}: use one of them or ulysses_degree"
        )
    if ring > 1 and checkpointing != "none" and not compiled:
        raise ValueError(
            f"ring_degree {ring}: reads twice in the backward what it kept, which checkpointing "
            f"{checkpointing} refuses: use compile, ulysses_degree, or checkpointing none"
        )
    if compiled and backend == "native":
        raise ValueError(
            f"context parallelism: compile runs {others}, got {backend}: use one of them or no "
            "compile"
        )


def check_shape(model: nn.Module, latents: Sequence[int], text: int, *, contexts: int) -> None:
    """ValueError: so many processes cannot have equal parts of a sample. latents: its shape
    [C, F, h, w]; text: the tokens of its prompt.
    """
    sides, patch = latents[1:], getattr(model.config, "patch_size", 1)
    if isinstance(patch, int):
        patch = [1] * (len(sides) - 2) + [patch] * 2
    tokens = math.prod(side // n for side, n in zip(sides, patch, strict=True))
    counts = {f"latents of {'x'.join(map(str, sides))}": tokens}
    plan = [part for part in model._cp_plan.values() if isinstance(part, dict)]
    if any("encoder_hidden_states" in part for part in plan):
        counts["a prompt"] = text
    for what, tokens in counts.items():
        if tokens % contexts:
            raise ValueError(
                f"ulysses_degree x ring_degree = {contexts}: does not divide the {tokens} tokens "
                f"of {what}: expected one of {_divisors(tokens, contexts)}, or other clips"
            )


def _divisors(number: int, below: int | None = None) -> str:
    found = [n for n in range(1, (below or number + 1)) if number % n == 0]
    return ", ".join(map(str, found))


@contextmanager
def use(
    models: Sequence[nn.Module], *, ulysses: int, ring: int, device: torch.device
) -> Iterator[None]:
    """Inside, each of `models` (the policy, a frozen reference) is called by all processes of a
    context at once, with equal inputs, and each is told the whole prediction. A context is ulysses
    * ring neighbouring ranks; the world is a multiple.

    Enter it after adapters, checkpointing and compiling: they replace a block's forward, and this
    goes around it.
    """
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel, remove_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    shape = (world() // (ulysses * ring), ring, ulysses)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "ring", "ulysses"))
    parts = ContextParallelConfig(ulysses_degree=ulysses, ring_degree=ring, mesh=mesh)
    config = ParallelConfig(context_parallel_config=parts)
    config.setup(rank(), world(), device, mesh=mesh)
    # They say of a time per clip that it is none per token, and of a function that it is renamed.
    logging.getLogger("diffusers.hooks.context_parallel").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*all_gather_tensor", FutureWarning)
    with ExitStack() as stack:
        for model in models:
            # What enable_parallelism does, which divides by the number of GPUs, on a CPU by 0.
            for processor in dispatched(model):
                processor._parallel_config = config
                stack.callback(setattr, processor, "_parallel_config", None)
            apply_context_parallel(model, parts, model._cp_plan)
            stack.callback(remove_context_parallel, model, model._cp_plan)
            # Its operators run below autocast, which would have given them one dtype.
            stack.enter_context(casting(model))
        yield
