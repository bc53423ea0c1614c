"""What the reference model says of a batch: the policy with its adapters off, or a frozen copy."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# (noisy, t, cond) -> prediction
Predict = Callable[[nn.Module, Tensor, Tensor, dict[str, Tensor]], Tensor]
Reference = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """The LoRA layers that peft put into `model`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def disabled(layers: list[nn.Module]) -> Iterator[None]:
    """The base model inside, the adapted one after.

    Sets the flag that every peft layer's forward reads. peft's own `enable_adapters` also switches
    `requires_grad` of every adapter tensor, which would break a graph recorded between two calls.
    """
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapters_off(model: nn.Module, predict: Predict) -> Reference:
    """One copy of the weights: the policy itself with its adapters off, without gradient."""
    layers = adapter_layers(model)
    if not layers:
        raise ValueError("reference adapters_off: the model has no LoRA layers; use frozen_copy")

    @torch.no_grad()
    def reference(noisy: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        with disabled(layers):
            return predict(model, noisy, t, cond)

    return reference


def check_off(model: nn.Module, probe: Callable[[], Tensor], base_says: Tensor) -> None:
    """Self-check: with its adapters off the model says what the base said, bit for bit."""
    with disabled(adapter_layers(model)):
        off = probe()
    if not torch.equal(off, base_says):
        raise ValueError(
            "self-check: with its adapters off the model differs from the base by "
            f"{(off.float() - base_says.float()).abs().max():.3g}, so it cannot be the reference"
        )


def check_on(model: nn.Module, probe: Callable[[], Tensor]) -> None:
    """Self-check after the first optimiser step: the adapters change what the model says."""
    on = probe()
    with disabled(adapter_layers(model)):
        off = probe()
    if torch.equal(on, off):
        print(
            "warning: self-check: after the first step the adapters change nothing "
            "(the learning rate may be too small for this dtype)",
            file=sys.stderr,
        )


def frozen_copy(model: nn.Module, predict: Predict) -> Reference:
    """A second copy of the weights as they are now, for full fine-tuning."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def reference(noisy: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return predict(frozen, noisy, t, cond)

    return reference
