"""Samples as the model's pipeline draws them: a loop over its scheduler, noise keyed by seeds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..loss import oracle
from ..step.pair import in_shards


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
    names: Sequence[str] | None = None,
) -> Tensor:
    """Latents `[N, *shape]` for `cond` of `[N, ...]`, one seed each; no randomness but the seeds.

    Two models sampled with the same seeds start from the same noise, so their clips can be compared
    pair by pair. `scheduler` is one of diffusers, or an object that is called as one. `negative` is
    the condition of the empty prompt, needed when `guidance_scale` is not 1:
    pred = negative + guidance_scale (cond - negative). names: of the rows, in what is said of them.

    Raises:
        ValueError: what does not belong together, a scheduler that cannot do it, or latents that
            are not finite.
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
    try:
        with named(scheduler, steps):
            # What a scheduler adds of its own is drawn row by row: the same in any batch.
            own = {"eta": 0.0, "generator": [torch.Generator().manual_seed(seed) for seed in seeds]}
            own = {k: v for k, v in own.items() if k in signature(scheduler.step).parameters}
            start(scheduler, steps, device)
        sigma = getattr(scheduler, "init_noise_sigma", 1.0)
        x = starting_noise(shape, seeds).to(device) * sigma
        # Of a model in shards who left early would leave the others waiting in their next pass.
        fault, together = None, in_shards(list(model.parameters()))
        for i, t in enumerate(scheduler.timesteps, 1):
            scaled = x
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(x, t)
            pred = predict(scaled, t)
            with named(scheduler, steps):
                x = scheduler.step(pred, t, x, **own, return_dict=False)[0]
            try:
                check_finite(x, f"step {i} of {len(scheduler.timesteps)}", names or seeds)
            except ValueError as error:
                fault = fault or error
                if not together:
                    break
    finally:
        model.train(was_training)
    if fault is not None:
        raise fault
    return x


def check_finite(x: Tensor, where: str, names: Sequence[Any]) -> None:
    """ValueError: a row of `x` is not finite; it would be a black clip."""
    bad = (~x.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"sample: {where}: {names[bad[0]]!r:.80}: expected finite values, got NaN or infinity "
            f"({len(bad)} of {len(x)} so): look at the weights of the model, of its text encoders "
            "and of what was trained"
        )


def check_memory(count: int, num_frames: int, height: int, width: int) -> None:
    """ValueError: clips whose pixels alone, in float32, are more than this machine's memory."""
    need = 12 * count * num_frames * height * width
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise ValueError(
            f"{count} clips of {num_frames}x{height}x{width} have {need / 1e9:.3g} GB of pixels, "
            f"and {have / 1e9:.3g} GB of memory are there: lower --num_frames, --height or --width"
        )


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
