"""What a user takes away from a run, the adapter or the model, and its card; other forms of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from .. import models
from ..files import share, writing
from ..models.folder import shapes_alone
from . import adapters


def export(folder: Path, model: nn.Module) -> Path:
    """What a user takes away: the adapter, or the whole model by `save_pretrained`.

    The adapter has diffusers' keys: a pipeline's `load_lora_weights` reads it.
    """
    component = adapters.component_of(model)
    if getattr(model, "peft_config", None):
        path = folder / adapters.FILES[0]
        adapters.write(path, model, adapters.of(model))
        return path
    path = folder / component
    with writing(path):
        model.save_pretrained(path)
        for file in path.glob("*.safetensors"):
            share(file)
    return path


def whole(artifact: Path) -> bool:
    """Whether the files of what `export` wrote are there and as long as they say of themselves."""
    files = list(artifact.glob("*.safetensors")) if artifact.is_dir() else [artifact]
    try:
        for index in artifact.glob("*.safetensors.index.json"):  # of a model in several files
            files += [artifact / n for n in json.loads(index.read_text())["weight_map"].values()]
        known = artifact.is_file() or (artifact / "config.json").exists()
        return known and bool(files) and all(map(_whole, set(files)))
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
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


def model_card(
    config: dict[str, Any], artifact: str, data: str, count: int, unit: str = "pairs"
) -> str:
    """README.md of what `export` wrote: base model, data, objective, beta with its convention."""
    lora = config["tuning"] == "lora"
    convention = config.get("beta_convention", "its own scale")
    beta = f"{config['beta']:g} ({convention})" if config["beta"] else "none"
    rows = {
        "base model": config["model"],
        "objective": config["objective"],
        "beta (convention)": beta,
        "data": f"{config['data']} ({count} {unit}, fingerprint {data})",
        "timestep range": config.get("timestep_range", "the sampler's"),
        "steps": config["max_train_steps"],
        "pairs per step": config["train_batch_size"] * config["gradient_accumulation_steps"],
        "learning rate": config["learning_rate"],
        "seed": config["seed"],
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    own = " of the model's own steps" if unit == "prompts" else ""
    kind = "A LoRA adapter" if lora else "A fully fine-tuned model"
    # On the hub only another model of the hub can be linked to.
    linked = "" if Path(config["model"]).exists() else f"base_model: {config['model']}\n"
    use = f'pipeline.load_lora_weights("{artifact}")' if lora else f'from_pretrained("{artifact}")'
    return (
        f"---\n{linked}library_name: diffusers\n"
        f"tags: [fastpref, preference-optimization, {config['objective']}"
        f"{', lora' if lora else ''}]\n---\n\n"
        f"{kind} trained on preference pairs{own} with fastpref. Every setting is in "
        "config.yaml.\n\n"
        f"| | |\n|---|---|\n{table}\n```python\n{use}\n```\n"
    )


def convert(lora: str | None, family: str, model: str, format: str, output: str) -> Path:
    """`fastpref export`: an adapter file of any form, or a folder's, in one of adapters' FORMATS.

    Raises:
        ValueError: as adapters' `read` and `write`, or `output` is there already.
    """
    path = Path(output)
    if not lora:
        raise ValueError("--lora is required: the run's folder, or its adapter file")
    if path.suffix != ".safetensors":
        raise ValueError(f"--output {path}: expected a name that ends in .safetensors")
    if path.exists():
        raise ValueError(f"--output {path}: is there already; choose another name")
    with shapes_alone():  # the model's config says what layers there are
        made = models.family(family).load(model)
    adapters.write(path, made, adapters.read(lora, made), format)
    return path
