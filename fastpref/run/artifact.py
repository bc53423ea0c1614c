"""What a user takes away from a run, the adapter or the model and its card; and the way back."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import flush, writing

# What an adapter file says of itself, written and read.
LORA_SETTINGS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "lora_bias")


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
        flush(temporary)
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


def opened(
    family: ModuleType, path: str | Path, lora: str | None, device: torch.device
) -> nn.Module:
    """The model of a folder in float32, with an exported adapter in it where one is named."""
    model = family.load(path, torch.float32)
    if lora:
        load_lora(lora, model)
    return model.to(device).eval()


def component_of(model: nn.Module) -> str:
    """The model's folder in a diffusers pipeline, which is also the prefix of its LoRA keys."""
    return "unet" if "UNet" in type(model).__name__ else "transformer"
