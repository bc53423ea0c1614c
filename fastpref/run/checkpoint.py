"""Checkpoints that survive kill -9 and resume bit for bit.

A checkpoint is a folder `checkpoint-N` of safetensors and JSON (never pickle), written under
another name, flushed to disk and renamed: it exists whole or not at all. `manifest.json` lists each
file's size and digest, so that a truncated one is noticed and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..files import flush, share, tidy, writing

PREFIX = "checkpoint-"
TENSORS = ("parameters", "optimizer", "generators")
STATE = ("step", "margin_noise", "made_of", "meter", "metrics")  # what a run goes on from
FILES = {"state.json", *(f"{name}.safetensors" for name in TENSORS)}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Writes checkpoint-`step` with parameters, optimiser, generators and `state`; then deletes
    older ones beyond `keep`. (Newer ones are damaged: the run has fallen back from them.)
    """
    parameters = trainable(model)
    # By name: torch's own state_dict knows a parameter by its place alone.
    moments = {
        f"{name}/{key}": value.detach().contiguous()  # safetensors refuses other strides
        for name, p in parameters.items()
        for key, value in optimizer.state[p].items()
    }
    # Draws need none, a model's dropout does. To ask CUDA for its state would initialise it.
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        generators["cuda"] = torch.cuda.get_rng_state()
    final = folder / f"{PREFIX}{step}"
    temporary = folder / f".{PREFIX}{step}.tmp"
    with writing(final):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(
            {k: p.detach().contiguous() for k, p in parameters.items()},
            temporary / "parameters.safetensors",
        )
        save_file(moments, temporary / "optimizer.safetensors")
        save_file(generators, temporary / "generators.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        manifest = {p.name: [p.stat().st_size, _digest(p)] for p in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        # Before the rename, or after a power cut the name could stand for empty files.
        for path in sorted(temporary.iterdir()):
            share(path)
            flush(path)
        flush(temporary)
        if final.exists():  # nothing is renamed over a folder that holds files
            shutil.rmtree(final)
        temporary.rename(final)
        flush(folder)  # the new name is a part of it
    saved = folders(folder)
    for old in saved[saved.index(final) + keep :]:
        shutil.rmtree(old)
    return final


def folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=lambda p: -int(p.name[len(PREFIX) :]))


def clean(folder: Path) -> None:
    """Removes what a killed process had not finished; a checkpoint that lacked its name alone gets
    it, as the one that it replaces may be gone. No other process may be writing checkpoints.
    """
    for unfinished in folder.glob(f".{PREFIX}[0-9]*.tmp"):
        final = folder / unfinished.stem[1:]
        if fault(unfinished) is None and fault(final) is not None:
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
        else:
            shutil.rmtree(unfinished)
    tidy(folder / "validation")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        for name in sorted(FILES - manifest.keys()):
            return f"manifest.json does not list {name}"
        for name, (size, digest) in manifest.items():
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, expected {size}"
            if _digest(checkpoint / name) != digest:
                return f"{name} was changed after it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{error.strerror.lower()}: {error.filename}"
    except (ValueError, AttributeError, TypeError, RecursionError):  # not JSON, or of another form
        return "manifest.json is not readable"
    return None


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint (None if there is none) and a line on each broken one passed
    over.
    """
    passed_over = []
    for checkpoint in folders(folder):
        problem = fault(checkpoint)
        if problem is None:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint} is damaged ({problem})")
    return None, passed_over


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restores parameters, optimiser and generators in place; returns the saved state (with
    `step`).
    """
    problem = fault(checkpoint)
    if problem is not None:
        raise ValueError(f"{checkpoint} is damaged ({problem}): resume from another checkpoint")
    try:
        values, moments, generators = (load_file(checkpoint / f"{n}.safetensors") for n in TENSORS)
    except SafetensorError as error:
        raise ValueError(
            f"{checkpoint} cannot be read ({error}): resume from another checkpoint"
        ) from None
    state = json.loads((checkpoint / "state.json").read_text())
    lacking = [name for name in STATE if name not in state]
    if lacking:
        raise ValueError(
            f"{checkpoint}: state.json expected {', '.join(STATE)}, got no {', '.join(lacking)}: "
            "it is another version's; go on with that version, or choose another output_dir"
        )
    parameters = trainable(model)
    if parameters.keys() != values.keys():
        odd = sorted(parameters.keys() ^ values.keys())[0]
        raise ValueError(
            f"{checkpoint} belongs to another model or adapter: parameter {odd} is on one side only"
        )
    for name, p in parameters.items():
        if p.shape != values[name].shape:
            raise ValueError(
                f"{checkpoint} belongs to another adapter: {name} is {list(values[name].shape)} "
                f"there, {list(p.shape)} here"
            )
        with torch.no_grad():
            p.copy_(values[name])  # in place: the optimiser and a recorded step hold it
    saved = optimizer.state_dict()
    order = [p for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in parameters.items()}
    saved["state"] = {
        i: {
            k.rsplit("/", 1)[1]: v
            for k, v in moments.items()
            if k.rsplit("/", 1)[0] == names[id(p)]
        }
        for i, p in enumerate(order)
    }
    # AdamW has no entry for a parameter that never had a gradient.
    saved["state"] = {i: entry for i, entry in saved["state"].items() if entry}
    optimizer.load_state_dict(saved)
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"])
    return state
