"""Samples as the model's pipeline draws them: a loop over its scheduler, noise keyed by seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..loss import oracle


def starting_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Unit normals `[len(seeds), *shape]`, each row a function of its seed alone."""
    pair_id = torch.tensor(list(seeds), dtype=torch.int64)
    elements = torch.Size(shape).numel()
    return oracle.normal(0, pair_id, torch.zeros_like(pair_id), elements).view(-1, *shape)


@torch.no_grad()
def sample(
    model: nn.Module,
    family: ModuleType,
    scheduler: Any,
    cond: dict[str, Tensor],
    shape: Sequence[int],
    *,
    steps: int,
    seeds: Sequence[int],
    guidance_scale: float = 1.0,
    negative: dict[str, Tensor] | None = None,
) -> Tensor:
    """Latents `[N, *shape]` for `cond` of `[N, ...]`, one seed each; no randomness but the seeds.

    Two models sampled with the same seeds start from the same noise, so their clips can be compared
    pair by pair. `scheduler` is one of diffusers, or an object that is called as one. `negative` is
    the condition of the empty prompt, needed when `guidance_scale` is not 1:
    pred = negative + guidance_scale (cond - negative).
    """
    for name, value in cond.items():
        if len(value) != len(seeds):
            raise ValueError(
                f"sample: cond[{name!r}] expected {len(seeds)} rows, one per seed, got {len(value)}"
            )
    if (guidance_scale != 1) != (negative is not None):
        raise ValueError(
            "sample: guidance_scale other than 1 and negative belong together, got "
            f"guidance_scale={guidance_scale} and negative={'given' if negative else None}"
        )
    device = next(p for p in model.parameters() if p.is_floating_point()).device
    cond = {k: v.to(device) for k, v in cond.items()}
    negative = negative and {k: v.to(device) for k, v in negative.items()}

    def predict(x: Tensor, t: Tensor) -> Tensor:
        noisy = x.to(model.dtype)
        times = t.to(device).float().expand(len(x))
        pred = family.predict(model, noisy, times, cond).float()
        if negative is not None:
            without = family.predict(model, noisy, times, negative).float()
            pred = without + guidance_scale * (pred - without)
        return pred

    was_training = model.training
    model.eval()
    with named(scheduler, steps):
        # What a scheduler adds of its own is drawn row by row: the same in any batch.
        own = {"eta": 0.0, "generator": [torch.Generator().manual_seed(seed) for seed in seeds]}
        own = {k: v for k, v in own.items() if k in signature(scheduler.step).parameters}
        start(scheduler, steps, device)
    x = starting_noise(shape, seeds).to(device) * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        pred = predict(scaled, t)
        with named(scheduler, steps):
            x = scheduler.step(pred, t, x, **own, return_dict=False)[0]
    model.train(was_training)
    return x


def start(scheduler: Any, steps: int, device: torch.device) -> None:
    """Lays the scheduler's grid of `steps` steps, from noise to clean latents."""
    most = scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:  # beyond it some repeat a timestep, some end in nan
        raise ValueError(f"expected 1 to {most} steps")
    scheduler.set_timesteps(steps, device=device)
    if scheduler.timesteps[0] < scheduler.timesteps[-1]:
        raise ValueError("expected a scheduler that goes from noise to clean latents")
    if hasattr(scheduler, "set_begin_index"):  # else it looks for a timestep, and may find a later
        scheduler.set_begin_index(0)


@contextmanager
def named(scheduler: Any, steps: int) -> Iterator[None]:
    """Whatever a scheduler raises as a ValueError with its name and the steps it was asked for."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        name = type(scheduler).__name__
        raise ValueError(f"sample: {name}, {steps} steps: {error}") from error
