"""Parts of a pipe (VAE, text encoder) as they are loaded and at work, which takes minutes: said."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from tqdm import tqdm

from ..models.encoders import Encoders
from ..progress import stage

PARTS = {"media": "VAE", "text": "text encoder"}  # of a model, by the pipe's names


def loaded(pipe: Any, part: str) -> bool:
    """Whether a part that is loaded when it is first used has been; or there is no such part."""
    return not hasattr(type(pipe), part) or part in vars(pipe)


def load(pipe: Any, parts: Iterable[str], progress: bool) -> None:
    """Loads parts before they are asked, since a fault of theirs is not the rows'; a line each."""
    for part in parts:
        if not loaded(pipe, part):
            said = stage(f"loading the {PARTS[part]}") if progress else nullcontext()
            with tqdm.external_write_mode(file=sys.stdout), said:
                getattr(pipe, part)


@contextmanager
def text_progress(pipe: Any, what: str, progress: bool) -> Iterator[None]:
    """How far text encoders are, which take minutes on a CPU: a bar over their layers; without a
    terminal a line. Nothing of a pipe that is no `Encoders`.
    """
    if not (progress and isinstance(pipe, Encoders)):
        yield
        return
    layers: list[nn.Module] = []
    for part in pipe.text.components.values():
        modules = part.modules() if isinstance(part, nn.Module) else ()
        layers += next((m for m in modules if isinstance(m, nn.ModuleList)), [])
    how = {"desc": f"text encoder, {what}", "unit": "layer", "leave": False, "disable": None}
    with tqdm(total=len(layers), **how) as bar:

        def tick(*_: Any) -> None:
            bar.update()

        hooks = [layer.register_forward_hook(tick) for layer in layers]
        try:
            with stage(f"text encoder, {what}") if bar.disable else nullcontext():
                yield
        finally:
            for hook in hooks:
                hook.remove()
