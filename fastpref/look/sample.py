"""Deterministic samplers: Euler for flow matching, DDIM for diffusion, noise keyed by seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor, nn

from ..loss import oracle
from ..process import Diffusion, FlowMatching

Predict = Callable[[Tensor, float], Tensor]  # (x, t) -> prediction


def starting_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Unit normals `[len(seeds), *shape]`, each row a function of its seed alone."""
    pair_id = torch.tensor(list(seeds), dtype=torch.int64)
    elements = torch.Size(shape).numel()
    return oracle.normal(0, pair_id, torch.zeros_like(pair_id), elements).view(-1, *shape)


@torch.no_grad()
def sample(
    model: nn.Module,
    family: ModuleType,
    process: FlowMatching | Diffusion,
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
    pair by pair. `negative` is the condition of the empty prompt, needed when `guidance_scale` is
    not 1: pred = negative + guidance_scale (cond - negative).
    """
    for name, value in cond.items():
        if len(value) != len(seeds):
            raise ValueError(
                f"sample: cond[{name!r}] expected {len(seeds)} rows, one per seed, got {len(value)}"
            )
    limit = 10**6 if isinstance(process, FlowMatching) else len(process.alphas_cumprod)
    if not 1 <= steps <= limit:
        raise ValueError(f"sample: steps expected 1 to {limit}, got {steps}")
    if (guidance_scale != 1) != (negative is not None):
        raise ValueError(
            "sample: guidance_scale other than 1 and negative belong together, got "
            f"guidance_scale={guidance_scale} and negative={'given' if negative else None}"
        )
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    x = starting_noise(shape, seeds).to(parameter.device)
    cond = {k: v.to(parameter.device) for k, v in cond.items()}
    negative = negative and {k: v.to(parameter.device) for k, v in negative.items()}

    def predict(x: Tensor, t: float) -> Tensor:
        noisy = x.to(model.dtype)
        times = torch.full((len(x),), t, device=x.device)
        pred = family.predict(model, noisy, times, cond).float()
        if negative is not None:
            without = family.predict(model, noisy, times, negative).float()
            pred = without + guidance_scale * (pred - without)
        return pred

    was_training = model.training
    model.eval()
    x = (_euler if isinstance(process, FlowMatching) else _ddim)(process, predict, x, steps)
    model.train(was_training)
    return x


def _euler(process: FlowMatching, predict: Predict, x: Tensor, steps: int) -> Tensor:
    """dx = (r - s) v from sigma s to r, along the process's own grid from 1 to 0."""
    sigmas = process.sigmas(steps).tolist()
    for s, r in pairwise(sigmas):
        x = x + (r - s) * predict(x, process.num_train_timesteps * s)
    return x


def _ddim(process: Diffusion, predict: Predict, x: Tensor, steps: int) -> Tensor:
    """x_r = a_r x0-hat + s_r eps-hat with eta 0, on a grid that starts at the last timestep."""
    alphas = process.alphas_cumprod.double()
    total = len(alphas)
    times = [round(total - i * total / steps) - 1 for i in range(steps)]
    for i, t in enumerate(times):
        a, s = alphas[t].sqrt().item(), (1 - alphas[t]).sqrt().item()
        last = i + 1 == steps
        a_r = 1.0 if last else alphas[times[i + 1]].sqrt().item()
        s_r = 0.0 if last else (1 - alphas[times[i + 1]]).sqrt().item()
        pred = predict(x, float(t))
        if process.prediction_type == "v_prediction":
            clean, noise = a * x - s * pred, s * x + a * pred
        elif process.prediction_type == "sample":
            clean, noise = pred, (x - a * pred) / s
        else:
            clean, noise = (x - s * pred) / a, pred
        x = a_r * clean + s_r * noise
    return x
