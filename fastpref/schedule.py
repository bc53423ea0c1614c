"""The noise schedule that a diffusers scheduler's config describes."""

from typing import Any

import torch
from torch import Tensor

MOST_TIMESTEPS = 10**6  # published ones have 1000; a damaged config's 10**12 would fill the memory


def timesteps(config: dict[str, Any]) -> int:
    """num_train_timesteps of a scheduler's config."""
    total = config.get("num_train_timesteps", 1000)
    if type(total) is not int or not 1 <= total <= MOST_TIMESTEPS:
        raise ValueError(
            f"scheduler config: num_train_timesteps must be an integer from 1 to {MOST_TIMESTEPS},"
            f" got {total!r}"
        )
    return total


def checked_betas(name: str, values: Any) -> list[float]:
    """Values of a scheduler's config that must be betas, one at least."""
    numbers = values if isinstance(values, list | tuple) else []
    if not numbers or not all(isinstance(b, int | float) and 0 <= b <= 1 for b in numbers):
        raise ValueError(f"scheduler config: {name} must be from 0 to 1, got {values!r:.80}")
    return [float(b) for b in numbers]


def alphas_cumprod(config: dict[str, Any]) -> Tensor:
    """abar [T] float64 of a scheduler's config, with the scheduler classes' own defaults."""
    cogvideox = str(config.get("_class_name", "")).startswith("CogVideoX")
    start, end = (0.00085, 0.012) if cogvideox else (0.0001, 0.02)
    start, end = checked_betas(
        "beta_start, beta_end", (config.get("beta_start", start), config.get("beta_end", end))
    )
    total = timesteps(config)
    schedule = config.get("beta_schedule", "scaled_linear" if cogvideox else "linear")
    if config.get("trained_betas") is not None:
        betas = torch.tensor(
            checked_betas("trained_betas", config["trained_betas"]), dtype=torch.float64
        )
    elif schedule == "linear":
        betas = torch.linspace(start, end, total, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, total, dtype=torch.float64).square()
    elif schedule == "squaredcos_cap_v2":
        # The cosine schedule of arXiv 2102.09672, capped as diffusers caps it.
        time = torch.arange(total + 1, dtype=torch.float64) / total
        bar = ((time + 0.008) / 1.008 * torch.pi / 2).cos().square()
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    else:
        raise ValueError(
            "scheduler config: beta_schedule must be linear, scaled_linear or squaredcos_cap_v2,"
            f" got {schedule!r}"
        )
    abar = (1 - betas).cumprod(0)
    scale = config.get("snr_shift_scale", 3.0 if cogvideox else 1.0)
    # SNR / scale, and before the rescaling, as in CogVideoX's schedulers.
    abar = abar / (scale + (1 - scale) * abar)
    if config.get("rescale_betas_zero_snr", False):
        # Shift and scale sqrt(abar) so that its last value is 0 and its first stays (2305.08891).
        root = abar.sqrt()
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    return abar
