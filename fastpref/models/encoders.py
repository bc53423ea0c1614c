"""What families share of media and prompts: their encoders, the sizes and the prompts that a model
takes, frames to pixels and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .folder import VAE_FACTS, arguments, config_of, load_part, part_class, read_config

# Beginnings of the names of the parts that encoders have.
PARTS = ("tokenizer", "text_encoder", "vae", "scheduler")

# shape -> standard normals of that shape, float32: the noise of a posterior's sample.
Normal = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Which clips a model takes, by the configs of its VAE and its transformer.

    time, space: pixels per latent: F = time (f - 1) + 1 and H = space h. patch: latents per token
    in time, height and width, which divide f, h and w. most: latents in time, height and width that
    the transformer has places for. fixed: height and width in latents, where it has learned the
    places of these alone.
    """

    time: int = 1
    space: int = 1
    patch: tuple[int, int, int] = (1, 1, 1)
    most: tuple[float, float, float] = (math.inf, math.inf, math.inf)
    fixed: tuple[int, int] | None = None

    def check(self, frames: int | None, height: int | None, width: int | None) -> None:
        """ValueError: a clip that is not taken, and what would be. None: not known yet."""
        if frames is not None:
            self._check_frames(frames)
        if height is not None and width is not None:
            self._check_size(height, width)

    def _check_frames(self, frames: int) -> None:
        most = (self.most[0] - 1) * self.time + 1
        if most == 1 < frames:
            raise ValueError(f"the model takes images, got {frames} frames: pass --num_frames 1")
        # Taken are first, first + period, ...
        period, first = self.time * self.patch[0], self.time * (self.patch[0] - 1) + 1
        below = (frames - first) // period * period + first
        near = [str(n) for n in (below, below + period) if 0 < n <= most]
        advice = f"pass --num_frames {' or '.join(near or [f'{most:g}'])}"
        count = (frames - 1) // self.time + 1
        if (frames - 1) % self.time:
            raise ValueError(f"frames expected {self.time}k+1, got {frames}: {advice}")
        if count % self.patch[0]:
            raise ValueError(
                f"latent frames expected divisible by {self.patch[0]}, got {count} from {frames} "
                f"frames: {advice}"
            )
        if frames > most:
            raise ValueError(
                f"frames expected at most {most:g}, for which the transformer has places, "
                f"got {frames}: pass --num_frames {most:g}"
            )

    def _check_size(self, height: int, width: int) -> None:
        units = [self.space * n for n in self.patch[1:]]
        most = [self.space * n for n in self.most[1:]]
        got, found = (height, width), f"got {height}x{width}"
        if self.fixed is not None:
            fixed = [self.space * n for n in self.fixed]
            if list(got) != fixed:
                raise ValueError(
                    f"height and width expected {fixed[0]}x{fixed[1]}, whose places the "
                    f"transformer has learned, {found}: {_flags(fixed)}"
                )
        near = [
            min(max(n // unit, 1) * unit, limit)
            for n, unit, limit in zip(got, units, most, strict=True)
        ]
        if any(n % unit for n, unit in zip(got, units, strict=True)):
            by = " and ".join(map(str, dict.fromkeys(units)))
            raise ValueError(
                f"height and width expected divisible by {by}, {found}: {_flags(near)} "
                "or other multiples"
            )
        if any(n > limit for n, limit in zip(got, most, strict=True)):
            raise ValueError(
                f"height and width expected at most {most[0]:g}x{most[1]:g}, for which the "
                f"transformer has places, {found}: {_flags(near)}"
            )


def _flags(size: Sequence[float]) -> str:
    return f"pass --height {size[0]:g} --width {size[1]:g}"


class Encoders:
    """VAE and text encoders of a diffusers folder, each loaded when first used.

    `media` and `text` are the family's own pipeline holding the VAE alone, and the tokenizers and
    text encoders alone: a run that only embeds prompts never loads a VAE, and neither ever loads
    the transformer. ValueError: a part that is of no class of diffusers or transformers.

    Attributes:
        index: the folder's model_index.json.
        device: where `to` moved what is loaded, and where the rest will be.
        sizes: of the clips that the model takes.
        given: parts that stand in place of the folder's.
        tokens: of a prompt that the text encoders read; None: as many as each tokenizer says.
        clean: what the pipeline does to a prompt before its tokenizer sees it.
    """

    sizes = Sizes()
    tokens: int | None = None

    def __init__(
        self,
        kind: type,
        path: str | Path,
        dtype: torch.dtype,
        *,
        vae_dtype: torch.dtype | None = None,
        clean: Callable[[str], str] = str,
        **extra: Any,
    ) -> None:
        self.kind, self.path, self.extra, self.clean = kind, path, extra, clean
        self.dtype, self.vae_dtype = dtype, vae_dtype or dtype
        self.index = read_config(kind, path)
        for part, entry in self.index.items():
            if part.startswith(PARTS) and isinstance(entry, list | tuple) and any(entry):
                part_class(path, part, entry)
        self.device = torch.device("cpu")
        self.given: dict[str, Any] = {}

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

    def embed(self, prompts: list[str], **options: Any) -> Any:
        """What the pipeline's `encode_prompt` gives, which stays silent on prompts that it cuts: it
        would print all that is cut off. Who embeds prompts of users asks `cut`.
        """
        options |= {"device": self.device, "do_classifier_free_guidance": False}
        with _quiet():
            return self.text.encode_prompt(prompts, **options)

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """Of each prompt that is longer than a text encoder reads how long; of the others ""."""
        found = []
        tokenizers = [t for name, t in self.text.components.items() if name.startswith("tokenizer")]
        for prompt in prompts:
            said = ""
            for tokenizer in filter(None, tokenizers):
                most = self.tokens or tokenizer.model_max_length
                count = len(tokenizer(self.clean(prompt), verbose=False).input_ids)
                if count > most:
                    said = f"{count} tokens, of which {most} are read"
            found.append(said)
        return found

    def _load(self, wanted: tuple[str, ...], dtype: torch.dtype) -> Any:
        parts = [name for name, value in self.index.items() if isinstance(value, list | tuple)]
        kept = [name for name in parts if name.startswith(wanted) and self.index[name][0]]
        missing = [name for name in kept if name not in self.given and not self._has(name)]
        if missing or not kept:
            raise ValueError(
                f"model {self.path}: expected {' and '.join(missing or wanted)} beside "
                "model_index.json; media and prompts need the whole diffusers folder"
            )
        # The scheduler is a small JSON file, and constructors look into it.
        kept += [name for name in parts if name == "scheduler"]
        settings = {n: v for n, v in self.index.items() if n in signature(self.kind).parameters}
        loaded = {n: self.given[n] if n in self.given else self._part(n, dtype) for n in kept}
        settings |= {**dict.fromkeys(parts), **loaded, **self.extra}
        return self.kind(**settings).to(self.device)

    def _part(self, name: str, dtype: torch.dtype) -> Any:
        """A part of the folder, of the class that model_index.json names."""
        kind = part_class(self.path, name, self.index[name])
        options = arguments(kind, self.path, name, dtype) if issubclass(kind, nn.Module) else {}
        return load_part(kind, self.path, name, **options)

    def _has(self, part: str) -> bool:
        """A hub id: not known before it is asked for."""
        return (Path(self.path) / part).is_dir() or not Path(self.path).is_dir()


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, diffusers and transformers say errors alone."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    libraries = (diffusers, transformers)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip(libraries, before, strict=True):
            library.set_verbosity(level)


def open_pipeline(
    family: ModuleType, path: str | Path, dtype: torch.dtype, device: str | torch.device
) -> Any:
    """What the family's `pipeline` gives, on the device where it can be moved."""
    pipe = family.pipeline(path, dtype)
    return pipe.to(device) if hasattr(pipe, "to") else pipe


def check_size(
    family: ModuleType,
    path: str | Path,
    num_frames: int | None,
    height: int | None,
    width: int | None,
) -> None:
    """ValueError: the model takes no such clips, by its configs; nothing is loaded."""
    sizes = getattr(family.pipeline(path, torch.float32), "sizes", Sizes())
    sizes.check(num_frames, height, width)


def pixels(frames: Tensor, sizes: Sizes) -> Tensor:
    """Frames `uint8 [F, H, W, 3]` -> float32 `[1, 3, F, H, W]` in [-1, 1]; ValueError as
    `check_frames`.
    """
    check_frames(frames, sizes)
    return 2 * (frames.permute(3, 0, 1, 2)[None].float() / 255) - 1


def check_frames(frames: Tensor, sizes: Sizes) -> None:
    """ValueError: not `uint8 [F, H, W, 3]`, or none of `sizes`."""
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != torch.uint8:
        raise ValueError(
            "encode_media: frames expected uint8 [F, H, W, 3], got "
            f"{str(frames.dtype).removeprefix('torch.')} {list(frames.shape)}"
        )
    sizes.check(*frames.shape[:3])


def drawn(posterior: Any, normal: Normal | None) -> Tensor:
    """A VAE posterior's mode or, with `normal`, mean + std eps, as its `sample` computes it."""
    if normal is None:
        return posterior.mode()
    return posterior.mean + posterior.std * normal(posterior.mean.shape).to(posterior.mean)


def decoded(family: ModuleType, pipe: Any, latents: Tensor, batch_size: int) -> list[Tensor]:
    """Latents `[N, C, f, h, w]` -> N clips `uint8 [F, H, W, 3]` on the CPU; `batch_size` in one
    call where the family has `decode_many(pipe, latents [n, ...]) -> n clips`.
    """
    many = getattr(family, "decode_many", None)
    if many is None:
        return [family.decode(pipe, row).cpu() for row in latents]
    return [clip.cpu() for rows in latents.split(batch_size) for clip in many(pipe, rows)]


def with_decoder(pipe: Any, path: str | Path) -> Any:
    """A pipe that decodes with the VAE of another folder or hub id, and encodes prompts as before;
    no media.

    It is of the class of the model's own VAE (a pruned one, say) or, for images, an AutoencoderTiny
    (TAESD), which takes latents as the model makes them, over its own scaling_factor, mostly 1.

    Raises:
        ValueError: another class, or latents that are not the model's as far as configs say.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny

    if not isinstance(pipe, Encoders):
        raise ValueError(f"decoder {path}: the model's family decodes with no VAE of diffusers")
    own = part_class(pipe.path, "vae", pipe.index.get("vae", ()))
    kinds = {k.__name__: k for k in ([own, AutoencoderTiny] if own is AutoencoderKL else [own])}
    name = read_config(own, path, any_class=True).get("_class_name")
    if name not in kinds:
        raise ValueError(
            f"decoder {path}: config.json expected _class_name {' or '.join(kinds)}, got {name}"
        )
    config, known = config_of(kinds[name], path, ""), config_of(own, pipe.path, "vae")
    for fact in VAE_FACTS:
        want, got = (c.get(fact) or None for c in (known, config))
        if want != got and (fact, name) != ("scaling_factor", AutoencoderTiny.__name__):
            raise ValueError(
                f"decoder {path}: {fact} expected {want}, as of the VAE of {pipe.path}, got {got}: "
                "it is made for other latents"
            )
    dtype = pipe.dtype if config.get("force_upcast") is False else pipe.vae_dtype
    vae = load_part(kinds[name], path, "", **arguments(kinds[name], path, "", dtype))
    result = copy(pipe)
    result.given = {"vae": vae}
    result.__dict__.pop("media", None)
    return result


def to_frames(decoded: Tensor) -> Tensor:
    """Pixels `[3, F, H, W]` in [-1, 1] -> `uint8 [F, H, W, 3]`, rounded as diffusers rounds.

    Raises:
        ValueError: one that is not finite; it would be black.
    """
    if not decoded.isfinite().all():
        raise ValueError("decode: the VAE made NaN or infinity: look at its weights and its dtype")
    scaled = (decoded.float() / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
