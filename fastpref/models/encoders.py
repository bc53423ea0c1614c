"""What families share of media and prompts: their encoders, frames to pixels and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .folder import arguments, load_part, part_class, read_config

# Beginnings of the names of the parts that encoders have.
PARTS = ("tokenizer", "text_encoder", "vae", "scheduler")

# shape -> standard normals of that shape, float32: the noise of a posterior's sample.
Normal = Callable[[Sequence[int]], Tensor]


class Encoders:
    """VAE and text encoders of a diffusers folder, each loaded when first used.

    `media` and `text` are the family's own pipeline holding the VAE alone, and the tokenizers and
    text encoders alone: a run that only embeds prompts never loads a VAE, and neither ever loads
    the transformer. ValueError: a part that is of no class of diffusers or transformers.

    Attributes:
        index: the folder's model_index.json.
        device: where `to` moved what is loaded, and where the rest will be.
    """

    def __init__(
        self,
        kind: type,
        path: str | Path,
        dtype: torch.dtype,
        *,
        vae_dtype: torch.dtype | None = None,
        **extra: Any,
    ) -> None:
        self.kind, self.path, self.extra = kind, path, extra
        self.dtype, self.vae_dtype = dtype, vae_dtype or dtype
        self.index = read_config(kind, path)
        for part, entry in self.index.items():
            if part.startswith(PARTS) and isinstance(entry, list | tuple) and any(entry):
                part_class(path, part, entry)
        self.device = torch.device("cpu")

    def to(self, device: str | torch.device) -> Encoders:
        """Moves what is loaded and, once it is loaded, the rest to `device`; returns itself."""
        self.device = torch.device(device)
        for name in ("text", "media"):
            if name in self.__dict__:
                self.__dict__[name].to(self.device)
        return self

    @cached_property
    def text(self) -> Any:
        """The pipeline with its tokenizers and text encoders alone."""
        return self._load(("tokenizer", "text_encoder"), self.dtype)

    @cached_property
    def media(self) -> Any:
        """The pipeline with its VAE alone."""
        return self._load(("vae",), self.vae_dtype)

    @property
    def scheduler(self) -> Any:
        """The pipeline's: Stable Diffusion's mends what old folders say of theirs."""
        return self.media.scheduler

    def _load(self, wanted: tuple[str, ...], dtype: torch.dtype) -> Any:
        parts = [name for name, value in self.index.items() if isinstance(value, list | tuple)]
        kept = [name for name in parts if name.startswith(wanted) and self.index[name][0]]
        missing = [name for name in kept if Path(self.path).is_dir() and not self._has(name)]
        if missing or not kept:
            raise ValueError(
                f"model {self.path}: expected {' and '.join(missing or wanted)} beside "
                "model_index.json; media and prompts need the whole diffusers folder"
            )
        # The scheduler is a small JSON file, and constructors look into it.
        kept += [name for name in parts if name == "scheduler"]
        settings = {n: v for n, v in self.index.items() if n in signature(self.kind).parameters}
        loaded = {name: self._part(name, dtype) for name in kept}
        settings |= {**dict.fromkeys(parts), **loaded, **self.extra}
        return self.kind(**settings).to(self.device)

    def _part(self, name: str, dtype: torch.dtype) -> Any:
        """A part of the folder, of the class that model_index.json names."""
        kind = part_class(self.path, name, self.index[name])
        options = arguments(kind, self.path, name, dtype) if issubclass(kind, nn.Module) else {}
        return load_part(kind, self.path, name, **options)

    def _has(self, part: str) -> bool:
        return (Path(self.path) / part).is_dir()


def pixels(frames: Tensor, *, size: int, stride: int = 1) -> Tensor:
    """Frames `uint8 [F, H, W, 3]` -> float32 `[1, 3, F, H, W]` in [-1, 1].

    Raises:
        ValueError: H or W not divisible by `size`, or F not k * `stride` + 1.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != torch.uint8:
        raise ValueError(
            "encode_media: frames expected uint8 [F, H, W, 3], got "
            f"{str(frames.dtype).removeprefix('torch.')} {list(frames.shape)}"
        )
    count, height, width, _ = frames.shape
    if height % size or width % size:
        near = f"--height {max(height // size, 1) * size} --width {max(width // size, 1) * size}"
        raise ValueError(
            f"encode_media: height and width expected divisible by {size}, got {height}x{width}: "
            f"pass {near} or other multiples"
        )
    if (count - 1) % stride:
        near = (count - 1) // stride * stride + 1
        raise ValueError(
            f"encode_media: frames expected {stride}k+1, got {count}: pass --num_frames {near} "
            f"or {near + stride}"
        )
    return 2 * (frames.permute(3, 0, 1, 2)[None].float() / 255) - 1


def drawn(posterior: Any, normal: Normal | None) -> Tensor:
    """A VAE posterior's mode or, with `normal`, mean + std eps, as its `sample` computes it."""
    if normal is None:
        return posterior.mode()
    return posterior.mean + posterior.std * normal(posterior.mean.shape).to(posterior.mean)


def to_frames(decoded: Tensor) -> Tensor:
    """Pixels `[3, F, H, W]` in [-1, 1] -> `uint8 [F, H, W, 3]`, rounded as diffusers rounds."""
    scaled = (decoded.float() / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
