"""Random adapters as the files of several tools, and what a model with one loaded applies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from families import tiny
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from fastpref.models import names
from fastpref.run.adapters import Lora

# How files spell a layer (the name of it here, or the original code's) and its tensors.
DIFFUSERS, DEFAULT = ("lora_A.weight", "lora_B.weight"), "lora_{}.default.weight"
OLD, KOHYA = ("lora.down.weight", "lora.up.weight"), ("lora_down.weight", "lora_up.weight")
PEFT = tuple(DEFAULT.format(part) for part in "AB")
BLOCK = {  # layers that tools train, by a part of their names
    "wan": ("attn1.", "attn2.", "ffn."),
    "cogvideox": ("attn1.", "ff."),
    "stable_diffusion": ("attn1.", "attn2.", "ff.", "proj_in", "proj_out", "conv1"),
}


def flat(name: str) -> str:
    return name.replace(".", "_")


def targets(model: nn.Module, parts: Iterable[str]) -> list[str]:
    return [name for name in names.layers(model) if any(part in name for part in parts)]


def random(
    model: nn.Module,
    layers: Iterable[str],
    *,
    ranks: tuple[int, ...] = (2, 4),
    alphas: tuple[float, ...] = (1.0, 4.0, 3.0),
) -> dict[str, Lora]:
    """An adapter on each of the layers, with the ranks and alphas in turn."""
    generator = torch.Generator().manual_seed(3)
    found, known = {}, names.layers(model)
    for i, layer in enumerate(layers):
        rank, weight = ranks[i % len(ranks)], known[layer].weight
        ones = [1] * (weight.dim() - 2)
        a = 0.1 * torch.randn(rank, *weight.shape[1:], generator=generator)
        b = 0.1 * torch.randn(len(weight), rank, *ones, generator=generator)
        found[layer] = Lora(a, b, alphas[i % len(alphas)])
    return found


def save(
    path: Path,
    found: dict[str, Lora],
    spelled: Callable[[str], str],
    parts: tuple[str, str] = DIFFUSERS,
    *,
    alphas: bool = False,
    metadata: dict[str, str] | None = None,
) -> Path:
    values: dict[str, Tensor] = {}
    for layer, each in found.items():
        values |= {f"{spelled(layer)}.{parts[0]}": each.a, f"{spelled(layer)}.{parts[1]}": each.b}
        if alphas:
            values[f"{spelled(layer)}.alpha"] = torch.tensor(each.alpha)
    save_file(values, path, metadata=metadata)
    return path


def product(each: Lora, scale: float = 1.0) -> Tensor:
    """scale B A, float64."""
    a, b = each.a.double(), each.b.double()
    return scale * (b.flatten(1) @ a.flatten(1)).reshape(len(b), *a.shape[1:])


def scaled(found: dict[str, Lora]) -> dict[str, Tensor]:
    """What alpha / rank B A is of each layer."""
    return {layer: product(each, each.alpha / each.rank) for layer, each in found.items()}


def applied(model: nn.Module) -> dict[str, Tensor]:
    """What is added to the weight of each layer that has an adapter."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            (adapter,) = module.active_adapters
            found[name] = module.get_delta_weight(adapter).detach().double()
    return found


def alike(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-6) -> bool:
    """Whether two adapters change the same layers by the same."""
    return a.keys() == b.keys() and all(
        math.isclose(0, (a[k] - b[k]).abs().max() / b[k].abs().max(), abs_tol=tolerance) for k in b
    )


@cache
def pipe_of(name: str) -> Any:
    return tiny(name).pipe()


def diffusers_applies(name: str, path: Path) -> dict[str, Tensor]:
    """The same of the family's pipeline with a file by its own `load_lora_weights`."""
    pipe = pipe_of(name)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    return applied(pipe.unet if hasattr(pipe, "unet") else pipe.transformer)
