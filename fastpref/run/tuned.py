"""A base and what a run made of it, an adapter or a whole model: for eval and sample."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..pairs.dataset import PairDataset
from . import adapters, artifact, belong

WEIGHTS = "diffusion_pytorch_model.safetensors"


def opened(
    family: ModuleType,
    path: str,
    device: torch.device,
    lora: str | None,
    tuned: str | None,
    data: str | None = None,
) -> tuple[nn.Module, Callable[[], None] | None, PairDataset | None]:
    """(the base in float32, with the adapter in it where there is one; what makes it the tuned
    model in place, where that is a whole one; the encoded set), if they belong together.

    Raises:
        ValueError: they do not.
    """
    if lora and tuned:
        raise ValueError("--lora and --tuned: expected one of them")
    if tuned and Path(tuned).resolve() == Path(path).resolve():
        raise ValueError(f"--tuned {tuned}: is the base itself, expected the folder of a run")
    if lora:
        adapters.find(Path(lora))  # before weights are loaded
    dataset = PairDataset(data) if data else None
    belong.check(family, path, dataset)
    model = family.load(path, torch.float32)
    if lora:
        adapters.load_lora(lora, model)
    model.to(device).eval()
    found = files(Path(tuned), model) if tuned else None
    belong.warn_of_another_model(path, dataset, lora or tuned)
    return model, found and partial(load, found, model), dataset


def files(run: Path, model: nn.Module) -> dict[str, Path]:
    """Where each tensor of the model stands in what a run with tuning full wrote.

    Raises:
        ValueError: there is none, it is not whole, or another model's.
    """
    component = adapters.component_of(model)
    folder = run / component
    if not folder.is_dir():
        said = "pass --lora in place of --tuned" if any(run.glob("*.safetensors")) else "see --lora"
        raise ValueError(
            f"--tuned {run}: has no {component}; expected the folder of a run with tuning full "
            f"that is done (one with an adapter: {said})"
        )
    if not artifact.whole(folder):
        raise ValueError(f"{folder} is not whole: run the same fastpref train again")
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    found: dict[str, Path] = {}
    index = folder / f"{WEIGHTS}.index.json"  # as diffusers: of a model in several files
    names = json.loads(index.read_text())["weight_map"].values() if index.exists() else [WEIGHTS]
    for file in sorted(folder / name for name in set(names)):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    shape = opened.get_slice(name).get_shape()
                    if shape != shapes.get(name):
                        raise ValueError(
                            f"{file}: {name} expected {shapes.get(name, 'not there')}, got {shape}:"
                            " was it trained from another model?"
                        )
                    found[name] = file
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: cannot be read ({error})") from None
    lacking = sorted(shapes.keys() - found.keys())
    if lacking:
        raise ValueError(f"{folder} lacks {lacking[0]}: was it trained from another model?")
    return found


@torch.no_grad()
def load(where: dict[str, Path], model: nn.Module) -> None:
    """Puts the tensors that `files` found into the model, in place."""
    own = model.state_dict()  # of the same memory
    for file in sorted(set(where.values())):
        with safe_open(file, "pt") as opened:
            for name in (name for name, there in where.items() if there == file):
                value = opened.get_tensor(name)
                if not value.isfinite().all():
                    raise ValueError(f"{file}: {name} is not finite: this run has diverged")
                own[name].copy_(value)
