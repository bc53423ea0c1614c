"""The attention backends there are: each computes, alone, what a forward was observed to ask for.

Its outputs and gradients are compared with native attention's, and both are timed.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# native: whatever PyTorch itself prefers. flash: the FlashAttention-2 inside PyTorch. flash3: the
# same operator, served by the package flash-attn-3. flash_attn: FlashAttention-2 as its package
# flash-attn has it, with operators of its own. First the name in diffusers' dispatcher.
BACKENDS: dict[str, tuple[str, SDPBackend | None]] = {
    "native": ("native", None),
    "cudnn": ("_native_cudnn", SDPBackend.CUDNN_ATTENTION),
    "flash": ("_native_flash", SDPBackend.FLASH_ATTENTION),
    "flash3": ("_native_flash", SDPBackend.FLASH_ATTENTION),
    "flash_attn": ("flash", None),
    "xformers": ("xformers", None),
}
_PACKAGES = {
    "flash3": (
        "flash_attn_interface",
        "pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu130",
    ),
    # Compiled where it is installed, against the torch that is there, hence the flag.
    "flash_attn": ("flash_attn", "pip install flash-attn --no-build-isolation"),
    "xformers": ("xformers", "pip install fastpref[attention]"),
}

# Norm of the difference to native attention over the norm of native attention, outputs and
# gradients: a few roundings of the dtype.
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
SCALES = (1.0, 16.0)  # of the inputs: a kernel may be right at one size alone


@dataclass(frozen=True)
class Call:
    """Shape, type and place of one attention: query [batch, heads, queries, dim], keys.

    dtype: what PyTorch computes in, under autocast its type. mixed: query, key and value come in
    different types, as where autocast keeps their norms in float32.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    dtype: torch.dtype
    device: torch.device
    mixed: bool = False

    def __str__(self) -> str:
        sizes = [self.batch, self.heads, self.queries, self.dim]
        return f"{sizes} on {self.keys} keys in {str(self.dtype).removeprefix('torch.')}"


def observe(run: Callable[[], object]) -> list[Call]:
    """The different attentions that `run` computes, largest first, each [B, H, N, D]."""
    with _Watch() as watch:
        run()
    cost = {call: call.batch * call.heads * call.queries * call.keys for call in watch.calls}
    return sorted(watch.calls, key=cost.__getitem__, reverse=True)


class _Watch(torch.overrides.TorchFunctionMode):
    """Notes what `scaled_dot_product_attention` is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention:
            names = ("query", "key", "value")
            q, k, v = (kwargs[n] if n in kwargs else args[i] for i, n in enumerate(names))
            place, dtype = q.device.type, q.dtype
            if torch.is_autocast_enabled(place) and dtype != torch.float64:  # casts inside the call
                dtype = torch.get_autocast_dtype(place)
            mixed = not q.dtype == k.dtype == v.dtype
            call = Call(*q.shape[:3], k.shape[2], q.shape[3], dtype, q.device, mixed)
            if call not in self.calls:
                self.calls.append(call)
        return function(*args, **kwargs)


def why_not_here(name: str, device: torch.device) -> str | None:
    """Why backend `name` is not to be had on this machine and what to do about it, or None."""
    if device.type != "cuda":
        return f"needs an NVIDIA GPU, this run is on {device.type}: use attention native"
    if name in _PACKAGES:
        package, install = _PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed: {install}"
    if name == "flash3" and torch.cuda.get_device_capability(device)[0] != 9:
        return "its kernels are for Hopper GPUs (compute capability 9): use cudnn or flash"
    return None


def why_not_on(call: Call, name: str) -> str | None:
    """Why backend `name` cannot compute `call`, or computes something else, or None."""
    if call.dtype not in _TOLERANCE and name != "xformers":
        kind = str(call.dtype).removeprefix("torch.")
        return f"computes in bfloat16 or float16, this run in {kind}: use mixed_precision bf16"
    if call.mixed and name == "xformers":  # the others are PyTorch's, which autocast casts for
        return f"does not cast queries, keys and values of {call} to one dtype: use another"
    for scale in SCALES:
        # Far from 0 a softmax has all but decided, and q's and k's gradients are small differences
        # of products this large: where few queries are undecided they may be rounding alone.
        size = scale * math.sqrt(call.batch * call.heads * call.queries * call.dim)
        least = (0.0, size, size, 0.0) if scale > 1 else (0.0,) * 4
        try:
            off = difference(results(name, call, scale), results("native", call, scale), least)
        except (RuntimeError, ImportError, ValueError) as error:
            return f"does not run on {call} ({first_line(error)}): use another"
        if not off <= _TOLERANCE.get(call.dtype, 1e-3):
            return (
                f"strays from native attention on {call} with inputs of size {scale:g}, by"
                f" {off:.2g} of its norm: use another"
            )
    return None


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def inputs(call: Call, scale: float = 1.0) -> list[Tensor]:
    """Normal q, k, v times `scale` and the gradient of the output, laid out as models make them:
    heads side by side.
    """
    random = torch.Generator(call.device).manual_seed(0)
    made = []
    for tokens in (call.queries, call.keys, call.keys, call.queries):
        shape = (call.batch, tokens, call.heads, call.dim)
        options = {"dtype": call.dtype, "device": call.device}
        made.append(torch.randn(shape, generator=random, **options).transpose(1, 2))
    return [(scale * x).requires_grad_() for x in made[:3]] + made[3:]


def attend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One attention, [B, H, N, D], by this backend alone, inside `serving` it."""
    if name == "native":
        return scaled_dot_product_attention(q, k, v)
    if name == "xformers":
        from xformers.ops import memory_efficient_attention

        out = memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2)
    if name == "flash_attn":
        from flash_attn import flash_attn_func

        return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    if name == "cudnn":  # as diffusers does
        q, k, v = (x.contiguous() for x in (q, k, v))
    with sdpa_kernel(BACKENDS[name][1]):
        return scaled_dot_product_attention(q, k, v)


def results(name: str, call: Call, scale: float = 1.0) -> list[Tensor]:
    """The output and the three gradients, of `inputs`."""
    q, k, v, grad = inputs(call, scale)
    with serving(name):
        out = attend(name, q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def difference(
    mine: list[Tensor], others: list[Tensor], least: tuple[float, ...] = (0.0,) * 4
) -> float:
    """How far `mine` are from `others` at most, relative to their norms, or to `least` where that
    is more; inf if not finite.
    """
    worst = 0.0
    for one, other, floor in zip(mine, others, least, strict=True):
        other = other.float()
        off = ((one.float() - other).norm() / other.norm().clamp(min=floor)).item()
        worst = max(worst, off) if off == off else float("inf")
    return worst


def seconds(name: str, call: Call) -> float:
    """Of one forward and backward, after one that warms up."""
    q, k, v, grad = inputs(call)
    wait = partial(torch.cuda.synchronize, call.device) if call.device.type == "cuda" else int
    with serving(name):
        for _ in range(2):
            wait()
            begin = time.perf_counter()
            torch.autograd.grad(attend(name, q, k, v), (q, k, v), grad)
            wait()
    return time.perf_counter() - begin


@contextmanager
def serving(name: str) -> Iterator[None]:
    """For flash3, PyTorch's flash attention is FlashAttention-3's inside, forward and backward."""
    if name != "flash3":
        yield
        return
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    activate_flash_attention_impl("FA3")
    try:
        yield
    finally:
        restore_flash_attention_impl()
