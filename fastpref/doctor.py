"""What a run would need of a card, before it starts, and the flags that fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import data, memory, models
from .assemble import add_lora, memory_step, weights_dtype
from .config import Config
from .models import folder, published

META = torch.device("meta")


@dataclass(frozen=True)
class Needs:
    """The choices of a run with clips of this shape on this card, and the flags of the best."""

    shape: str
    card: memory.Card
    rows: list[memory.Prediction]
    flags: str | None


def needs(values: dict[str, Any], shape: str | None, on: memory.Card) -> Needs:
    """Predicts every pair_mode, checkpointing and compile that `values` leave open (None).

    values: fields of a Config; without a model the family's published one. shape: of the clips,
    FRAMESxHEIGHTxWIDTH; None: the largest of the encoded set in `data`, else the published one's.

    Raises:
        ValueError: no such family or model, a shape that it does not take, or nothing that says
            what model or shape there is.
    """
    family = models.family(values["family"])
    wanted = {name: values[name] for name in ("pair_mode", "checkpointing", "compile")}
    given = {k: v for k, v in values.items() if v not in (None, "")}
    given = {"model": "-", "data": "-", "output_dir": "-", "mixed_precision": "bf16", **given}
    if given.get("objective", "dpo") != "sft":
        given.setdefault("beta", 1.0)
    config = Config(**given)
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    kept = weights_dtype(config, dtype)
    name = family.__name__.rpartition(".")[2]
    if values["model"]:
        with folder.shapes_alone():
            model = family.load(config.model, kept)
        known = published.nearest(name, dict(getattr(model, "config", {})))
    elif known := published.nearest(name):
        model = known.make(META, kept)
    else:
        raise ValueError(f"--model: needed, as no published model of family {name} is known here")
    model.requires_grad_(config.tuning == "full")
    if config.tuning == "lora":
        add_lora(model, config, family.LORA_TARGETS)
    encoded = values["data"] and (Path(values["data"]) / "index.parquet").exists()
    if shape is None and encoded:
        latents, cond = data.PairDataset(values["data"]).largest()
        shape = "x".join(map(str, latents.shape[1:])) + " latents"
    elif known:
        shape = shape or known.shape
        both, cond = known.inputs(shape, 1, META, dtype)
        latents, cond = both[:1], {n: v[:1] for n, v in cond.items()}
    else:
        raise ValueError(f"--data: an encoded set is needed, family {name} tells no latents' shape")
    step = memory_step(config, family, model, latents, cond, dtype)
    every = {"pair_mode": ("joint", "deferred"), "checkpointing": memory.MODES}
    every["compile"] = (False, True)
    open_ = {n: v if wanted[n] in (None, "auto") else (wanted[n],) for n, v in every.items()}
    open_["pair_modes"] = open_.pop("pair_mode")
    rows = list(memory.predictions(step, on, **open_))
    best = memory.best(rows, on)
    return Needs(shape, on, rows, best and best.flags(config.mixed_precision))
