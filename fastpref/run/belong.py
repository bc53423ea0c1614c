"""Whether data, model and adapter belong together: asked by every command that takes them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from .. import models
from ..files import differences, model_identity
from ..models.folder import encoders_of, scheduler_config, shapes_alone
from ..pairs.dataset import PairDataset
from ..process import Diffusion, FlowMatching
from ..progress import warn
from . import checkpoint


def check(
    family: ModuleType,
    model: str | None,
    dataset: PairDataset | None = None,
    *,
    ties: bool = False,
) -> None:
    """Refuses what no run could be made of. Read are configs and shapes alone, so this comes before
    weights are loaded and media encoded. model: a folder or hub id; None: not known yet. ties: the
    set's pairs may be without a winner.

    Raises:
        ValueError: a model of another family, or one that takes more than text; its scheduler is
            missing or noises otherwise than the family; its VAE makes latents that it does not
            take; a set of another family, of another VAE or other text encoders, or of sizes that
            do not go through the model.
    """
    if dataset:
        made = dataset.fingerprint.get("family")
        if made != family.__name__:
            raise ValueError(
                f"data {dataset.folder}: encoded with family {made}, got family {family.__name__}"
            )
        if any(dataset.ties) and not ties:
            raise ValueError(
                f"data {dataset.folder}: {sum(dataset.ties)} of its pairs are ties, which fastpref "
                "spm alone trains on: encode the data without --ties keep"
            )
    if model is None:
        return
    ours = family.__name__.startswith(f"{models.__name__}.")
    # A family of one's own may read its model in any way: it is asked where it is loaded.
    shaped = shapes_of(family, model) if ours else None
    encoders = encoders_of(model)
    if shaped is not None:
        makes = encoders.get("vae.z_dim") or encoders.get("vae.latent_channels")
        takes = shaped.config.out_channels
        if makes not in (None, takes):
            raise ValueError(
                f"model {model}: its VAE makes latents of {makes} channels, and its "
                f"{type(shaped).__name__} takes {takes}: copy the parts of one model"
            )
    if dataset:
        before = dataset.fingerprint.get("encoders") or {}
        listed = differences(before, encoders, before.keys() ^ encoders.keys())
        if listed:
            raise ValueError(
                f"data {dataset.folder}: encoded with another base than {model}: {listed}; encode "
                "it again with this model, or take the one it was encoded with"
            )
    if dataset and shaped is not None:
        check_sizes(family, shaped, model, dataset)


def shapes_of(family: ModuleType, model: str) -> nn.Module:
    """The model of one of our families without its weights, once its scheduler fits too."""
    with shapes_alone():
        shaped = family.load(model, torch.float32)
    process_of(family, model)
    return shaped


def process_of(family: ModuleType, model: str) -> FlowMatching | Diffusion:
    """The family's noising, by the model's scheduler."""
    try:
        return family.process(scheduler_config(model))
    except ValueError as error:
        file = f"model {model}/scheduler"
        raise ValueError(error if file in str(error) else f"{file}: {error}") from None


@torch.no_grad()
def check_sizes(family: ModuleType, shaped: nn.Module, model: str, dataset: PairDataset) -> None:
    """ValueError: the set's largest pair does not go through the model."""
    latents, cond = dataset.largest()
    channels, takes = latents.shape[1], shaped.config.out_channels
    reason = f"of {channels} channels, the model takes {takes}" if channels != takes else None
    try:
        if reason is None:
            said = family.predict(shaped, latents, torch.empty(1, device="meta"), cond)
            if said.shape != latents.shape:
                reason = f"it predicts {'x'.join(map(str, said.shape[1:]))}"
    except NotImplementedError:  # a shape that follows from values (nonzero): a batch will tell
        return
    except ValueError as error:  # in the family's own words
        raise ValueError(f"data {dataset.folder}: {' '.join(str(error).split())}") from None
    except ImportError:
        raise
    except Exception as error:  # whatever a model does with a size that it does not take
        reason = " ".join(str(error).split()) or type(error).__name__
    if reason:
        named = {"latents": latents, **{f"cond.{name}": value for name, value in cond.items()}}
        sizes = ", ".join(f"{n} {'x'.join(map(str, v.shape[1:]))}" for n, v in named.items())
        raise ValueError(
            f"data {dataset.folder}: its {sizes} do not go through {model} ({reason:.300}): encode "
            "it again with this model, or take the one it was encoded with"
        )


def warn_of_another_model(
    model: str, dataset: PairDataset | None = None, run: str | Path | None = None
) -> None:
    """Of a set that was encoded, or a run that was trained, with another model, which may be as
    good nonetheless. Called once the model is loaded: one that cannot be is the real mistake.

    Families without encoders have none to be different.
    """
    made = dataset.fingerprint if dataset else {}
    if made.get("encoders") and made.get("model") != model_identity(model):
        warn(
            f"data {dataset.folder} was encoded with another model than {model}: its VAE and text "
            "encoders must be the same"
        )
    base = base_of(Path(run)) if run else None
    if base and base != model_identity(model):
        warn(
            f"{run} was trained on another model than {model}: what it learned is a change of that "
            "one"
        )


def base_of(run: Path) -> str | None:
    """The identity of the base that a run (or the adapter in its folder) was trained on, if a
    checkpoint is left that says it.
    """
    folder = run if run.is_dir() else run.parent
    for saved in checkpoint.folders(folder):
        try:
            return str(json.loads((saved / "state.json").read_bytes())["made_of"]["model"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
    return None
