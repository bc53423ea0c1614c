"""Clips sampled while a run trains: the base model's beside the policy's, same prompts, same
noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from .config import Config
from .files import write_atomic
from .report import Comparison, contact_sheet
from .sample import sample


def sample_prompts(
    config: Config, family: Any, process: Any, model: torch.nn.Module, shape: torch.Size
) -> list[Tensor]:
    """One clip per validation prompt from the policy as it is, uint8 [F, H, W, 3]."""
    pipe = family.pipeline(config.model, torch.float32)  # not kept: text encoders are large
    rows = family.encode_text(pipe, config.validation_prompts)
    latents = sample(
        model,
        family,
        process,
        {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
        shape,
        steps=config.validation_sampling_steps,
        seeds=range(len(rows)),
    )
    return [family.decode(pipe, latent.cpu()) for latent in latents]


def write_validation(folder: Path, step: int, prompts: list[str], clips: list[Tensor]) -> None:
    """Step 0 is kept as the base; later steps become a sheet of base beside tuned frames."""
    folder.mkdir(exist_ok=True)
    names = [str(i) for i in range(len(prompts))]
    kept = folder / "base.safetensors"
    if step == 0:
        write_atomic(kept, save(dict(zip(names, clips, strict=True))))
    base = load_file(kept)
    rows = [Comparison(p, base[n], c) for p, n, c in zip(prompts, names, clips, strict=True)]
    contact_sheet(folder / f"step-{step:06d}.png", rows)
