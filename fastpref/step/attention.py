"""Which attention backend a model runs with: chosen on the run's own shapes, set, taken back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import backends
from .backends import BACKENDS, Call

Name = Literal["auto", "native", "cudnn", "flash", "flash3", "flash_attn", "xformers"]

_MARGIN = 0.03  # of native attention's time: what another has to be faster by


@dataclass(frozen=True)
class Choice:
    """What `choose` picked, and on what grounds.

    seconds: of a forward and backward on the run's largest attention, of all that ran and agreed.
    refused: why the others were not considered, one line each.
    """

    name: str
    seconds: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        others = [f"{name} {1e3 * s:.3g} ms" for name, s in sorted(self.seconds.items())]
        others += [f"{name}: {why}" for name, why in self.refused.items()]
        return self.name + (f" ({'; '.join(others)})" if others else "")


def choose(
    wanted: Name,
    model: nn.Module,
    probe: Callable[[], object],
    device: torch.device,
    *,
    rounds: int = 5,
) -> Choice:
    """The backend that `model` shall run with; `use` sets it.

    auto times forward and backward of every backend at hand on the largest attention that `probe`
    (a forward of the run's batch) computes, leaves out those that are not finite or stray from
    native attention, on inputs of size 1 or of size 16, and takes the fastest, native unless
    another is faster by 3 %. Where there is nothing to choose, as on a CPU, it is native at once.
    Another name is checked on the same attention and taken.

    Raises:
        ValueError: `wanted` does not exist, is not installed, or does not run on this shape, dtype,
            model or device; one line that says what to do.
    """
    if wanted != "auto" and wanted not in BACKENDS:
        raise ValueError(f"attention: expected auto or one of {', '.join(BACKENDS)}, got {wanted}")
    if wanted == "native" or (wanted == "auto" and device.type != "cuda"):
        return Choice("native")
    calls = [] if device.type != "cuda" else backends.observe(probe)
    if wanted != "auto":
        why = why_not(wanted, model, calls, device)
        if why:
            raise ValueError(f"attention {wanted}: {why}, or use attention auto")
        return Choice(wanted)
    if not calls:
        return Choice("native")
    runners, refused = {"native": calls[0]}, {}
    for name in BACKENDS:
        why = why_not(name, model, calls, device) if name != "native" else None
        if why:
            refused[name] = why
        else:
            runners[name] = calls[0]
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):  # in turn: a clock that changes hits all alike
        for name, call in runners.items():
            taken[name].append(backends.seconds(name, call))
    seconds = {name: sorted(each)[rounds // 2] for name, each in taken.items()}
    fastest = min(seconds, key=seconds.__getitem__)
    # Native may well be the same kernel: noise shall not decide between them.
    clearly = seconds[fastest] < (1 - _MARGIN) * seconds["native"]
    return Choice(fastest if clearly else "native", seconds, refused)


@contextmanager
def use(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, `model` computes its attention with backend `name`, also in a backward's recompute.

    A model that goes through diffusers' dispatcher is told there. Of one that calls PyTorch's
    attention, which backend comes first is set for the process; what that cannot compute falls to
    the others. Enter it before anything is compiled.
    """
    dispatched, first = BACKENDS[name]
    with ExitStack() as stack:
        stack.enter_context(backends.serving(name))
        if name != "native" and through_dispatcher(model):
            stack.callback(model.reset_attention_backend)
            # That leaves the process's default, which the dispatcher was told too.
            stack.callback(model.set_attention_backend, "native")
            model.set_attention_backend(dispatched)
            if name == "flash_attn":
                stack.enter_context(casting(model))
        elif name == "xformers":
            model.enable_xformers_memory_efficient_attention()
            stack.callback(model.disable_xformers_memory_efficient_attention)
        elif first is not None:
            rest = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
            rest += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
            stack.enter_context(sdpa_kernel([first, *rest], set_priority=True))
        yield


@contextmanager
def natively(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes with PyTorch's own attention whatever it, or the process, was told.

    For a copy that is thrown away: it stays told.
    """
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            processor._attention_backend = "native"
        elif "XFormers" in type(processor).__name__:
            model.disable_xformers_memory_efficient_attention()
            break
    every = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with sdpa_kernel([*every, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


def through_dispatcher(model: nn.Module) -> bool:
    """Whether the model's attention asks diffusers' dispatcher which backend to run."""
    return bool(dispatched(model))


def why_not(name: str, model: nn.Module, calls: list[Call], device: torch.device) -> str | None:
    """Why `model` cannot run with backend `name` here and what to do about it, or None."""
    if why := backends.why_not_here(name, device):
        return why
    dispatcher = through_dispatcher(model)
    foreign = name == "flash_attn" or (name == "xformers" and not _swappable(model))
    if foreign and not dispatcher:
        return f"{type(model).__name__} calls PyTorch's attention itself: use cudnn or flash"
    # Who is not dispatched falls back where a backend cannot serve one of the smaller attentions.
    reasons = (backends.why_not_on(call, name) for call in (calls if dispatcher else calls[:1]))
    for why in reasons:
        if why:
            return why
    try:
        with use(model, name):  # diffusers refuses old versions of a package, say
            return None
    except (RuntimeError, ImportError, ValueError) as error:
        return f"cannot be set ({backends.first_line(error)}): use another"


def _swappable(model: nn.Module) -> bool:
    """Whether diffusers can put xformers' processor in: it has plain attention processors alone."""
    processors = getattr(model, "attn_processors", {}).values()
    return bool(processors) and {type(p).__name__ for p in processors} <= {
        "AttnProcessor", "AttnProcessor2_0",
    }  # fmt: skip


def dispatched(model: nn.Module) -> list[Any]:
    """The attention processors that ask diffusers' dispatcher."""
    processors = (getattr(module, "processor", None) for module in model.modules())
    return [p for p in processors if hasattr(p, "_attention_backend")]


def _cast(
    dispatch: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, **how: Any
) -> Tensor:
    place = query.device.type
    if torch.is_autocast_enabled(place):
        dtype = torch.get_autocast_dtype(place)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    return dispatch(query, key, value, **how)


@contextmanager
def casting(model: nn.Module) -> Iterator[None]:
    """What `model` asks the dispatcher for has autocast's dtype inside.

    Autocast casts for PyTorch's attention, not for a package's, and leaves the norms of queries and
    keys in float32.
    """
    with ExitStack() as stack:
        for module in {sys.modules[type(p).__module__] for p in dispatched(model)}:
            dispatch = getattr(module, "dispatch_attention_fn", None)
            if dispatch is None:
                raise ValueError(f"{module.__name__} has no dispatch_attention_fn")
            stack.callback(setattr, module, "dispatch_attention_fn", dispatch)
            module.dispatch_attention_fn = partial(_cast, dispatch)
        yield
