"""Checkpoints that survive kill -9 and resume bit for bit, and the adapter file other tools load.

A checkpoint is a folder `checkpoint-N` of safetensors and JSON (never pickle), written under
another name, flushed to disk and renamed: it exists whole or not at all. `manifest.json` lists each
file's size and digest, so that a truncated one is noticed and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..files import writing

PREFIX = "checkpoint-"
TENSORS = ("parameters", "optimizer", "generators")
STATE = ("step", "margin_noise", "made_of", "meter", "metrics")  # what a run goes on from
FILES = {"state.json", *(f"{name}.safetensors" for name in TENSORS)}
# What an adapter file says of itself, written and read.
LORA_SETTINGS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "lora_bias")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


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
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        if final.exists():  # nothing is renamed over a folder that holds files
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(folder)  # the new name is a part of it
    saved = folders(folder)
    for old in saved[saved.index(final) + keep :]:
        shutil.rmtree(old)
    return final


def folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=lambda p: -int(p.name[len(PREFIX) :]))


def clean(folder: Path) -> None:
    """Removes checkpoints that a killed process had not finished; no other one may be writing."""
    for unfinished in folder.glob(f".{PREFIX}[0-9]*.tmp"):
        shutil.rmtree(unfinished)


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
    except (ValueError, AttributeError, TypeError):  # not JSON, or of another form
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


def export(folder: Path, model: nn.Module) -> Path:
    """What a user takes away: the adapter, or the whole model by `save_pretrained`.

    `pytorch_lora_weights.safetensors` has diffusers' keys, rank and alpha in its metadata: a
    pipeline's `load_lora_weights` reads it.
    """
    component = component_of(model)
    if not getattr(model, "peft_config", None):
        with writing(folder / component):
            model.save_pretrained(folder / component)
        return folder / component
    import peft

    config = model.peft_config["default"].to_dict()
    # save_embedding_layers: by default peft may ask the hub for the base model's config.
    values = peft.get_peft_model_state_dict(
        model, adapter_name="default", save_embedding_layers=False
    )
    metadata = {
        f"{component}.{k}": sorted(v) if isinstance(v, set) else v  # JSON has no sets
        for k, v in config.items()
        if k in LORA_SETTINGS
    }
    said = json.dumps(metadata, sort_keys=True)
    path = folder / "pytorch_lora_weights.safetensors"
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        save_file(
            {f"{component}.{k}": v.detach().contiguous() for k, v in values.items()},
            temporary,
            metadata={"format": "pt", "lora_adapter_metadata": said},
        )
        temporary.chmod(0o644)  # safetensors makes files that only their owner reads
        _flush(temporary)
        temporary.replace(path)
    return path


def whole(artifact: Path) -> bool:
    """Whether the files of what `export` wrote are there and as long as they say of themselves."""
    files = list(artifact.glob("*.safetensors")) if artifact.is_dir() else [artifact]
    try:
        for index in artifact.glob("*.safetensors.index.json"):  # of a model in several files
            files += [artifact / n for n in json.loads(index.read_text())["weight_map"].values()]
        known = artifact.is_file() or (artifact / "config.json").exists()
        return known and bool(files) and all(map(_whole, set(files)))
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return False


def _whole(file: Path) -> bool:
    """Of one safetensors file: 8 bytes with the length of a JSON header, which has offsets, data.

    Read here, as safetensors' own reader takes no path that is not UTF-8.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(min(length, size)))  # min: a damaged one may be 2^64
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends)


def model_card(config: dict[str, Any], artifact: str, data: str, pairs: int) -> str:
    """README.md of what `export` wrote: base model, data, objective, beta with its convention."""
    lora = config["tuning"] == "lora"
    beta = f"{config['beta']:g} ({config['beta_convention']})" if config["beta"] else "none"
    rows = {
        "base model": config["model"],
        "objective": config["objective"],
        "beta (convention)": beta,
        "data": f"{config['data']} ({pairs} pairs, fingerprint {data})",
        "timestep range": config["timestep_range"],
        "steps": config["max_train_steps"],
        "pairs per step": config["train_batch_size"] * config["gradient_accumulation_steps"],
        "learning rate": config["learning_rate"],
        "seed": config["seed"],
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    kind = "A LoRA adapter" if lora else "A fully fine-tuned model"
    # On the hub only another model of the hub can be linked to.
    linked = "" if Path(config["model"]).exists() else f"base_model: {config['model']}\n"
    use = f'pipeline.load_lora_weights("{artifact}")' if lora else f'from_pretrained("{artifact}")'
    return (
        f"---\n{linked}library_name: diffusers\n"
        f"tags: [fastpref, preference-optimization, {config['objective']}"
        f"{', lora' if lora else ''}]\n---\n\n"
        f"{kind} trained on preference pairs with fastpref. Every setting is in config.yaml.\n\n"
        f"| | |\n|---|---|\n{table}\n```python\n{use}\n```\n"
    )


def load_lora(path: str | Path, model: nn.Module) -> nn.Module:
    """Puts an exported adapter file (or the folder that holds it) into a base model, in place."""
    import peft
    from safetensors import safe_open

    path = Path(path)
    path = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a run's folder, or its adapter file")
    component = component_of(model)
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()["lora_adapter_metadata"])
            values: dict[str, Tensor] = {
                k.removeprefix(f"{component}."): file.get_tensor(k)
                for k in file.keys()  # noqa: SIM118
            }
        settings = {k.removeprefix(f"{component}."): v for k, v in metadata.items()}
        if settings.get("use_dora"):
            raise ValueError("use_dora: only plain LoRA is supported")
        settings = {k: v for k, v in settings.items() if k in (*LORA_SETTINGS, "use_rslora")}
        for alpha in (
            settings.get("lora_alpha", 0),
            *(settings.get("alpha_pattern") or {}).values(),
        ):
            if not math.isfinite(alpha):
                raise ValueError(f"expected finite alphas, got {alpha}")
        rank = settings["r"]
        stored = {len(value) for name, value in values.items() if ".lora_A." in name}
        # Before anything is made of that size.
        for named in (rank, *(settings.get("rank_pattern") or {}).values()):
            if named not in stored:
                raise ValueError(f"rank {named}, but lora_A of rank {sorted(stored)}")
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), model)
    except (
        *(OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError),
        *(OverflowError, RecursionError, re.error),  # re's: peft reads the file's names as patterns
    ) as error:
        raise ValueError(
            f"{path}: expected a LoRA file of {type(model).__name__} with its rank in the metadata "
            f"({' '.join(str(error).split())})"
        ) from None
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in sorted(own.keys() ^ values.keys()):
        where = "the file" if name in own else type(model).__name__
        raise ValueError(f"{path}: {where} has no {name}: is it another model's adapter?")
    for name, value in values.items():
        if value.shape != own[name].shape or not value.isfinite().all():
            raise ValueError(
                f"{path}: {name} expected {list(own[name].shape)} finite values for rank {rank}, "
                f"got {list(value.shape)}"
            )
    peft.set_peft_model_state_dict(model, values)
    return model


def component_of(model: nn.Module) -> str:
    """The model's folder in a diffusers pipeline, which is also the prefix of its LoRA keys."""
    return "unet" if "UNet" in type(model).__name__ else "transformer"
