"""Clips sampled while a run trains: the base's beside the policy's, same prompts, same noise."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .. import ranks
from ..files import write_atomic
from ..mesh import Mesh
from ..models.encoders import open_pipeline
from ..models.folder import scheduler_of
from ..progress import stage, warn
from ..step import compiling
from .report import Comparison, contact_sheet
from .sample import check_finite, sample


class Prompts:
    """Prompts embedded once; `clips` samples and decodes one clip each from a model as it is.

    The text encoders are let go after embedding; what decodes is loaded on first use and stays.
    """

    def __init__(
        self,
        family: ModuleType,
        path: str,
        prompts: Sequence[str],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        guidance_scale: float = 1.0,
    ) -> None:
        self.family, self.path, self.guidance = family, path, guidance_scale
        self.prompts, self.device = list(prompts), device

        def embedded() -> list[dict[str, Tensor]]:
            pipe = open_pipeline(family, path, dtype, device)
            with stage("text encoder: loading, and the prompts"):
                rows = family.encode_text(pipe, [*self.prompts, ""])
            for i, cut in enumerate(pipe.cut(self.prompts) if hasattr(pipe, "cut") else (), 1):
                if cut:
                    warn(f"prompt {i} is cut: {cut}")
            return [{name: value.cpu() for name, value in row.items()} for row in rows]

        *rows, empty = ranks.by_main(embedded)  # a large encoder is in memory once
        self.cond = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        for value in self.cond.values():
            check_finite(value, "the prompts' embeddings", self.prompts)
        self.negative = None
        if guidance_scale != 1:
            self.negative = {k: torch.stack([v] * len(rows)) for k, v in empty.items()}
        self.pipe = open_pipeline(family, path, dtype, device)

    def shape(self, num_frames: int, height: int, width: int) -> torch.Size:
        """Of the latents of a clip of that size."""
        blank = torch.zeros(num_frames, height, width, 3, dtype=torch.uint8)
        return self.family.encode_media(self.pipe, blank).shape

    def clips(
        self,
        model: nn.Module,
        shape: Sequence[int],
        steps: int,
        seeds: Sequence[int],
        rows: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """One clip per prompt and seed, uint8 [F, H, W, 3]; rows: of these prompts alone.

        Raises:
            ValueError: as `sample`, or a clip's pixels are not finite.
        """
        rows = list(range(len(self.prompts)) if rows is None else rows)
        prompts = [self.prompts[row] for row in rows]
        latents = sample(
            model,
            self.family,
            scheduler_of(self.pipe, self.path),
            {name: value[rows] for name, value in self.cond.items()},
            shape,
            steps=steps,
            seeds=seeds,
            guidance_scale=self.guidance,
            negative=self.negative and {k: v[rows] for k, v in self.negative.items()},
            names=prompts,
        )
        clips = []
        for prompt, latent in zip(prompts, latents, strict=True):
            try:
                clips.append(self.family.decode(self.pipe, latent).cpu())
            except ValueError as error:
                raise ValueError(f"sample: {prompt!r:.80}: {error}") from None
        return clips


def draw_sheet(
    folder: Path,
    step: int,
    prompts: Prompts,
    model: nn.Module,
    shape: Sequence[int],
    steps: int,
    mesh: Mesh,
) -> None:
    """Samples a clip per prompt, at the same seeds whenever, and writes them beside the base's.
    Several processes share the prompts.

    Those that a policy cannot make are left out with a warning: they are no reason to stop.
    """
    said = stage("validation clips of the base") if step == 0 else nullcontext()
    # One that has none left draws the first again: of a sharded model all must call it.
    rows = list(mesh.dealt(range(len(prompts.prompts)))) or [0]
    drawn: dict[int, Tensor] | str
    try:
        with said, compiling.eagerly():
            clips = prompts.clips(model, shape, steps, rows, rows)
        drawn = dict(zip(rows, clips, strict=True))
    except ValueError as error:
        drawn = str(error)
    every = ranks.of_main(drawn)

    def write() -> None:
        found: dict[int, Tensor] = {}
        try:
            for some in every:
                if isinstance(some, str):
                    raise ValueError(some)
                found |= some
            write_sheet(folder, step, prompts.prompts, [found[row] for row in sorted(found)])
        except ValueError as error:
            if step == 0:
                raise
            warn(f"step {step}: no validation clips: {error}")

    ranks.by_main(write)


def write_sheet(folder: Path, step: int, prompts: list[str], clips: list[Tensor]) -> None:
    """Step 0 is kept as the base; later steps become a sheet of base beside tuned frames."""
    folder.mkdir(exist_ok=True)
    names = [str(i) for i in range(len(prompts))]
    kept = folder / "base.safetensors"
    if step == 0:
        write_atomic(kept, save(dict(zip(names, clips, strict=True))))
    try:
        base = load_file(kept)
        rows = [Comparison(p, base[n], c) for p, n, c in zip(prompts, names, clips, strict=True)]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{kept}: the base's clips cannot be read ({error})") from None
    contact_sheet(folder / f"step-{step:06d}.png", rows)
