"""Whether a run fits a card: what `fastpref doctor` says, checkpointing auto, out of memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..files import write_atomic
from ..models import published
from ..models.folder import shapes_alone
from ..pairs.dataset import PairDataset
from ..progress import printable, stage
from ..step import memory, simulate
from . import belong, checkpoint
from .config import Config
from .folder import read_record
from .guard import OutOfMemory
from .parts import add_lora, device_of, frozen_copy, predictor, weights_dtype

META = torch.device("meta")

# Of a run's options those that decide what it needs, and those that its step is made of.
DECIDES = (
    *("model", "pair_mode", "compile", "train_batch_size", "mixed_precision", "tuning"),
    *("reference", "lora_rank", "lora_targets"),
)
STEP = ("train_batch_size", "reference", "tuning", "cuda_graphs")
# Those that out of memory asks to change.
MENDS = ("checkpointing", "pair_mode", "reference")


def memory_step(
    family: Any,
    model: torch.nn.Module,
    sample: tuple[Tensor, dict[str, Tensor]],
    dtype: torch.dtype,
    *,
    online: bool,
    train_batch_size: int,
    reference: str,
    tuning: str,
    cuda_graphs: bool,
) -> memory.Step:
    """A run's step for `memory` to look at; sample: latents and cond of one, their values do not
    matter. online: the reference's errors are not all known.
    """
    latents, cond = sample
    return memory.Step(
        model,
        predictor(family, torch.device("cpu"), dtype),  # where shapes are run through it
        family.BLOCKS,
        (latents.to(dtype), torch.empty(1, device=latents.device), cond),
        pairs=train_batch_size,
        online=online,
        copies=2 if online and frozen_copy(reference, tuning) else 1,
        shared=reference != "cached",
        graphs=cuda_graphs,
    )


def pick_checkpointing(
    step: memory.Step, on: memory.Card, record: Path, decides: dict[str, Any]
) -> memory.Mode:
    """The least recomputation that is predicted to fit the card; a run that goes on keeps to what
    its memory.json, the record, says of the same options (`DECIDES`), shapes and card.
    """
    latents, _, cond = step.inputs
    shapes = [list(v.shape) for v in (latents, *cond.values())]
    basis = {**decides, "card": on.name, "gib": on.gib, "shapes": shapes, "online": step.online}
    known = remembered(record)
    if known.get("basis") == basis:
        said = f"checkpointing {known['checkpointing']}: as {record} says ({known.get('why')})"
        print(printable(said))
        return known["checkpointing"]
    with stage("checkpointing: memory, predicted from shapes"):
        found, why = memory.least(step, on, decides["pair_mode"], decides["compile"])
    print(f"checkpointing {found}: {why}")
    note(record, {"checkpointing": found, "why": why, "basis": basis})
    return found


def remembered(record: Path) -> dict[str, Any]:
    """What memory.json says; nothing where it cannot be read, as it can be made again."""
    try:
        known = read_record(record)
    except (ValueError, OSError):
        return {}
    return known if known.get("checkpointing") in memory.MODES else {}


def note(record: Path, values: dict[str, Any]) -> None:
    write_atomic(record, (json.dumps(values, indent=1) + "\n").encode())


def exhausted(
    error: Exception,
    folder: Path,
    *,
    checkpointing: str,
    pair_mode: str | None,
    reference: str | None,
) -> ValueError:
    """Out of memory in a training step, in a line that names the next choice. With checkpointing
    auto the memory.json of the run's folder is told too, so that the same command goes on with it.
    """
    if isinstance(error, OutOfMemory):
        return error
    record, auto = folder / "memory.json", checkpointing == "auto"
    known = remembered(record) if auto else {}
    used = known.get("checkpointing", "none") if auto else checkpointing
    more = memory.MODES[memory.MODES.index(used) + 1 :]
    if more and known:
        note(record, known | {"checkpointing": more[0], "why": f"{used} ran out of memory"})
        advice = f"run the same command again: it goes on with checkpointing {more[0]}"
    elif more:
        advice = f"run it again with --checkpointing {more[0]}"
    elif pair_mode is None:
        advice = "run it again with a smaller --train_batch_size, --sample_rows or --decode_batch"
    elif pair_mode == "joint":
        advice = "run it again with --pair_mode deferred"
        if reference == "cached":
            advice += " and another --reference_cache"
    else:
        advice = "encode fewer or smaller frames, or take a larger card"
    last, _ = checkpoint.newest(folder)
    kept = f"{last.name} is kept" if last else "no step was done yet"
    reason = " ".join(str(error).split())
    how = f", pair_mode {pair_mode}" if pair_mode else ""
    return OutOfMemory(f"out of memory with checkpointing {used}{how}; {kept}; {advice} ({reason})")


def card_for(name: str | None, device: str | None) -> memory.Card:
    """The card that is named, or the one that is here. ValueError: neither is."""
    if name:
        return memory.card(name)
    if not torch.cuda.is_available():
        raise ValueError(f"--card: no GPU is here: name one, {', '.join(memory.CARDS)} or its GiB")
    here = device_of(device or "cuda")
    if here.type != "cuda":
        raise ValueError("--device: expected cuda or cuda:N, or a --card instead")
    return memory.card_of(here)


@dataclass(frozen=True)
class Needs:
    """The choices of a family's run with clips of this shape on a card, and the flags of the best.
    alike: the model's blocks are; else compiled ones are predicted like those that are not.
    """

    family: str
    shape: str
    on: memory.Card
    rows: list[memory.Prediction]
    flags: str | None
    alike: bool

    def __str__(self) -> str:
        on = self.on
        lines = [
            f"{self.family} {self.shape} on {on.name}, {on.gib:.1f} GiB: predicted, not measured;"
            f" fits: in {on.room / 1e9:.1f} GB, which leaves 8 % to spare",
            memory.table(self.rows, on),
        ]
        if not self.alike and any(row.compile for row in self.rows):
            lines.append(
                "blocks that differ from each other: compiled ones keep and take less than is said"
            )
        if self.flags is None:
            lines.append(
                "nothing fits: fewer frames, a smaller --train_batch_size or size, or a larger card"
            )
        else:
            lines.append(f"use, as predicted: {self.flags}")
        return "\n".join(lines)


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
    # A Config asks for these; no prediction hangs on them, nor on beta's value.
    given = {"model": "-", "data": "-", "output_dir": "-", "mixed_precision": "bf16", **given}
    if given.get("objective", "dpo") != "sft":
        given.setdefault("beta", 1.0)
    config = Config(**given)
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    kept = weights_dtype(config.tuning, dtype)
    name = family.__name__.rpartition(".")[2]
    if values["model"]:
        with shapes_alone():
            model = family.load(config.model, kept)
        known = published.nearest(name, dict(getattr(model, "config", {})))
    elif known := published.nearest(name):
        model = known.make(META, kept)
    else:
        raise ValueError(f"--model: needed, as no published model of family {name} is known here")
    model.requires_grad_(config.tuning == "full")
    if config.tuning == "lora":
        targets = config.lora_targets or family.LORA_TARGETS
        add_lora(model, targets, config.lora_rank, config.lora_alpha)
    encoded = bool(values["data"]) and (Path(values["data"]) / "index.parquet").exists()
    if values["data"] and not encoded:
        raise ValueError(f"--data {values['data']}: expected a set made by fastpref encode here")
    sizes = [values.get(name) for name in ("num_frames", "height", "width")]
    if encoded and (shape or any(sizes)):
        raise ValueError(f"the clips are those of {values['data']}: remove their sizes")
    if any(sizes):
        if shape or None in sizes:
            raise ValueError("expected --shape, or all of --num_frames --height --width")
        shape = "x".join(map(str, sizes))
    if encoded:
        dataset = PairDataset(values["data"])
        belong.check(family, values["model"] or None, dataset)
        latents, cond = dataset.largest()
        shape = "x".join(map(str, latents.shape[1:])) + " latents"
    elif known:
        shape = shape or known.shape
        both, cond = known.inputs(shape, 1, META, dtype)
        latents, cond = both[:1], {n: v[:1] for n, v in cond.items()}
    else:
        raise ValueError(f"--data: an encoded set is needed, family {name} tells no latents' shape")
    how = {"online": config.reference != "cached", **config.only(*STEP)}
    step = memory_step(family, model, (latents, cond), dtype, **how)
    every = {"pair_mode": ("joint", "deferred"), "checkpointing": memory.MODES}
    every["compile"] = (False, True)
    open_ = {n: v if wanted[n] in (None, "auto") else (wanted[n],) for n, v in every.items()}
    open_["pair_modes"] = open_.pop("pair_mode")
    try:
        rows = list(memory.predictions(step, on, **open_))
    except Exception as error:  # whatever a model does that shapes alone cannot decide
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"shapes alone do not run through this model ({reason})") from error
    best = memory.best(rows, on)
    alike = simulate.like_each_other(model, family.BLOCKS) > 0
    flags = best and best.flags(config.mixed_precision, graphs=not config.skip_zeros)
    return Needs(values["family"], shape, on, rows, flags, alike)
