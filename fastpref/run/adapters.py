"""LoRA files: read in the key forms that trainers write, and written in diffusers' and ComfyUI's.

The rank is in the shape of A; alpha is a layer's `.alpha`, else what the metadata say, else the
rank. What is written has alpha = rank, with the scale in B: ComfyUI and others read tensors alone.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..files import write_atomic
from ..models import names
from ..pairs.text import check_pointer

FORMATS = ("diffusers", "comfyui")
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers', PEFT's
COMPONENTS = ("transformer", "unet")
METADATA = "lora_adapter_metadata"  # where diffusers keeps a LoraConfig
LARGEST = 1 << 20  # characters of one


class Lora(NamedTuple):
    """Of one layer: W x + alpha / rank (B (A x) + bias)."""

    a: Tensor  # [rank, in, ...], a convolution's kernel behind
    b: Tensor  # [out, rank, ...]
    alpha: float
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.a)

    def folded(self) -> Lora:
        """The same with alpha = rank; in float32 where its own dtype would round it."""
        scale = self.alpha / self.rank
        if scale == 1:
            return self

        def scaled(value: Tensor) -> Tensor:
            wide = torch.float64 if value.dtype == torch.float64 else torch.float32
            exact = value.to(wide) * scale
            same = exact.to(value.dtype)
            return same if torch.equal(same.to(wide), exact) else exact

        bias = None if self.bias is None else scaled(self.bias)
        return Lora(self.a, scaled(self.b), float(self.rank), bias)


def find(path: Path) -> Path:
    """The adapter file of a folder, or the file itself; ValueError: there is none, or it is of a
    whole model.
    """
    if (path / "model_index.json").is_file():
        raise ValueError(f"{path}: is a model's folder, not an adapter")
    for run in (path, path.parent, path.parent.parent):
        whole = [run / name for name in COMPONENTS if (run / name / "config.json").is_file()]
        inside = path == run or path in whole or path.parent in whole
        if whole and inside and not any(run.glob("*.safetensors")):
            raise ValueError(
                f"{path}: has a whole model and no adapter, as a run with tuning full writes it: "
                f"eval and sample take it as --tuned {run}"
            )
    if path.is_dir():
        files = [path / name for name in FILES if (path / name).is_file()]
        path = files[0] if files else path / FILES[0]
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a run's folder, or its adapter file")
    return path


def read(path: str | Path, model: nn.Module) -> dict[str, Lora]:
    """`{layer: Lora}` of an adapter file, or the folder that holds it; the model's values are not
    read.

    Raises:
        ValueError: no such file, a key that names no layer of the model, no plain LoRA, or tensors
            that are not finite or do not fit each other, the layer or the metadata.
    """
    path = find(Path(path))
    check_pointer(path)
    try:
        with safe_open(path, "pt") as file:
            said = _settings(path, file.metadata() or {}, component_of(model))
            return _read(file, model, said)
    except (
        *(OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError),
        *(OverflowError, RecursionError),
    ) as error:
        raise ValueError(
            f"{path}: expected a LoRA file of {type(model).__name__} "
            f"({' '.join(str(error).split())})"
        ) from None


def _settings(path: Path, metadata: dict[str, str], component: str) -> dict[str, Any]:
    """What the file, or PEFT's adapter_config.json beside it, says of a LoraConfig; {}: nothing."""
    config = path.with_name("adapter_config.json")
    if METADATA in metadata:
        text = metadata[METADATA]
    elif path.name == FILES[1] and config.is_file():
        with config.open() as file:
            text = file.read(LARGEST + 1)
    else:  # sd-scripts' ss_network_alpha stands beside .alpha tensors, and is read by nobody
        return {}
    if len(text) > LARGEST:
        raise ValueError(f"settings of more than {LARGEST} characters")
    said = _entries(json.loads(text), "settings")
    said = {name.removeprefix(f"{component}."): value for name, value in said.items()}
    if said.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"peft_type {said['peft_type']!r:.40}: only plain LoRA is read")
    for name, value in said.items():
        if name.startswith("use_") and value and name != "use_rslora":
            raise ValueError(f"{name}: only plain LoRA is supported")
    start = said.get("init_lora_weights")
    if str(start).lower() not in ("none", "true", "false", "gaussian", "eva", "orthogonal"):
        raise ValueError(f"init_lora_weights {start!r:.40}: fits a base whose weights it changed")
    return said


def _read(file: Any, model: nn.Module, said: dict[str, Any]) -> dict[str, Lora]:
    words, layers, original = names.spellings(model), names.layers(model), names.originals(model)
    found: dict[str, dict[str, str]] = {}
    for key in file.keys():  # noqa: SIM118
        layer, part = names.place(key, words, type(model).__name__)
        if found.setdefault(layer, {}).setdefault(part, key) != key:
            raise ValueError(f"{key!r:.100} is there twice, as {found[layer][part]!r:.100}")
    if not found:
        raise ValueError("it has no tensors")
    ranks, alphas = (_pattern(said, name) for name in ("rank_pattern", "alpha_pattern"))
    if None in alphas:  # ranks are known without
        raise ValueError(f"alpha_pattern {alphas[None]!r:.60}: expected names of layers")
    result = {}
    for layer, keys in found.items():
        for part in "AB":
            if part not in keys:
                raise ValueError(f"{next(iter(keys.values()))!r:.100} has no lora_{part} beside it")
        a, b = _tensors(file, keys["A"], keys["B"], layers[layer])
        known = [layer, *([original[layer]] if layer in original else [])]
        rank = None if None in ranks else _entry(ranks, known, said.get("r"))
        if rank not in (None, len(a)):
            raise ValueError(f"rank {rank!r:.40}, but lora_A of rank {len(a)}: {layer}")
        alpha = _entry(alphas, known, said.get("lora_alpha"))
        if "alpha" in keys:
            (alpha,) = file.get_tensor(keys["alpha"]).flatten().tolist()
        elif alpha is None:
            alpha = len(a)
        elif said.get("use_rslora"):
            alpha = alpha * math.sqrt(len(a))
        if not math.isfinite(alpha):
            raise ValueError(f"expected finite alphas, got {alpha}")
        bias = _value(file, keys["bias"]) if "bias" in keys else None
        wanted = layers[layer].bias
        if bias is not None and (wanted is None or bias.shape != wanted.shape):
            raise ValueError(f"{keys['bias']!r:.100} does not fit the layer's bias")
        result[layer] = Lora(a, b, float(alpha), bias)
    return result


def _value(file: Any, key: str) -> Tensor:
    value = file.get_tensor(key)
    if not value.is_floating_point() or not value.float().isfinite().all():
        raise ValueError(f"{key!r:.100}: expected finite floating-point values")
    return value


def _tensors(file: Any, key_a: str, key_b: str, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A and B in the layer's own shape: 1x1 convolutions are also stored as linear, and back."""
    shapes = [file.get_slice(key).get_shape() for key in (key_a, key_b)]
    (rank, *inside), (out, *inner) = (shape or [0] for shape in shapes)
    weight = layer.weight
    fitting = (weight[0].numel(), len(weight), rank)
    if not rank or (math.prod(inside), out, math.prod(inner)) != fitting:
        raise ValueError(
            f"{key_a!r:.100} and B of {shapes[0]} and {shapes[1]} do not fit weights of "
            f"{list(weight.shape)}: is it another model's adapter?"
        )
    a, b = _value(file, key_a), _value(file, key_b)
    ones = [1] * (weight.dim() - 2)
    return a.reshape(rank, *weight.shape[1:]), b.reshape(out, rank, *ones)


def _entries(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected a JSON object, got {value!r:.40}")
    return value


def _pattern(said: dict[str, Any], name: str) -> dict[str | None, Any]:
    """`{layer's name, or the end of one: (place, value)}` of a rank_pattern or alpha_pattern.

    PEFT reads the keys as regular expressions, one of which may never end: what is no name is kept
    under None.
    """
    entries: dict[str | None, Any] = {}
    for place, (key, value) in enumerate(_entries(said.get(name) or {}, name).items()):
        plain = key.removesuffix("$").replace("\\.", ".")
        if re.fullmatch(r"\^?[\w.-]+", plain):
            entries.setdefault(plain, (place, value))
        else:
            entries[None] = key
    return entries


def _entry(entries: dict[str | None, Any], layer: list[str], default: Any) -> Any:
    """The first entry, as PEFT takes it, that is one of a layer's names or the end of one."""
    ends = [f"^{name}" for name in layer]
    for parts in (name.split(".") for name in layer):
        ends += [".".join(parts[i:]) for i in range(len(parts))]
    return min((entries[end] for end in ends if end in entries), default=(0, default))[1]


def load_lora(path: str | Path, model: nn.Module) -> nn.Module:
    """Puts an adapter file (or the folder that holds it) into a base model, in place.

    Raises:
        ValueError: as `read`.
    """
    import peft

    found = read(path, model)
    rank = Counter(each.rank for each in found.values()).most_common(1)[0][0]
    alpha = Counter(each.alpha for each in found.values()).most_common(1)[0][0]
    # Exactly the layers that the file has, by patterns of our own: none of the file's is matched.
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=_any(found),
        rank_pattern=_grouped({k: v.rank for k, v in found.items() if v.rank != rank}),
        alpha_pattern=_grouped({k: v.alpha for k, v in found.items() if v.alpha != alpha}),
        lora_bias=any(each.bias is not None for each in found.values()),
    )
    try:
        peft.inject_adapter_in_model(config, model)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    peft.set_peft_model_state_dict(model, _peft_keys(found))
    return model


def _any(layers: Iterable[str]) -> str:
    return f"^(?:{'|'.join(map(re.escape, layers))})$"


def _grouped(values: dict[str, float]) -> dict[str, float]:
    """`{pattern: value}` with one pattern for the layers of each value."""
    groups: dict[float, list[str]] = {}
    for layer, value in values.items():
        groups.setdefault(value, []).append(layer)
    return {_any(layers): value for value, layers in groups.items()}


def _peft_keys(found: dict[str, Lora]) -> dict[str, Tensor]:
    values = {}
    for layer, each in found.items():
        values |= {f"{layer}.lora_A.weight": each.a, f"{layer}.lora_B.weight": each.b}
        if each.bias is not None:
            values[f"{layer}.lora_B.bias"] = each.bias
    return values


def of(model: nn.Module) -> dict[str, Lora]:
    """The adapters named default of a model, as they are.

    Raises:
        ValueError: one is no plain LoRA.
    """
    import peft

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and "default" in module.lora_A:
            a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"]
            alpha = module.scaling["default"] * len(a)
            bias = None if b.bias is None else b.bias.detach()
            found[name] = Lora(a, b.weight.detach(), alpha, bias)
    # save_embedding_layers: by default peft may ask the hub for the base model's config.
    whole = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    for key in sorted(whole.keys() - _peft_keys(found).keys()):
        raise ValueError(f"{key}: only plain LoRA is exported")
    return found


def write(path: Path, model: nn.Module, found: dict[str, Lora], form: str = "diffusers") -> None:
    """Writes adapters of `model` (of which only the names are read) in one of FORMATS.

    Raises:
        ValueError: ComfyUI has no such model, or reads no bias; an alpha that makes B infinite.
    """
    found = {layer: each.folded() for layer, each in found.items()}
    for layer, each in found.items():
        if not each.b.float().isfinite().all():
            raise ValueError(f"{layer}: its alpha makes values that are not finite")
    values, metadata = (_diffusers if form == "diffusers" else _comfyui)(model, found)
    values = {key: value.cpu().contiguous() for key, value in values.items()}
    write_atomic(path, save(values, {"format": "pt", **metadata}))


def _diffusers(model: nn.Module, found: dict[str, Lora]) -> tuple[dict, dict[str, str]]:
    """Metadata too: without them diffusers 0.35 takes the first layer's rank for every alpha."""
    component = component_of(model)
    rank = Counter(each.rank for each in found.values()).most_common(1)[0][0]
    others = {layer: each.rank for layer, each in found.items() if each.rank != rank}
    config = {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(found),
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_bias": any(each.bias is not None for each in found.values()),
    }
    said = {f"{component}.{name}": value for name, value in config.items()}
    values = {f"{component}.{key}": value for key, value in _peft_keys(found).items()}
    return values, {METADATA: json.dumps(said, sort_keys=True)}


def _comfyui(model: nn.Module, found: dict[str, Lora]) -> tuple[dict, dict[str, str]]:
    """A UNet's in kohya's form, a transformer's by its original names; without `.alpha`, which
    diffusers loses where a UNet's layers have several.
    """
    values, original = {}, names.originals(model)
    for layer, each in found.items():
        if layer not in original:
            raise ValueError(f"ComfyUI: no form is known for adapters of {type(model).__name__}")
        if each.bias is not None:
            raise ValueError(f"{layer}.lora_B.bias: ComfyUI reads no such tensor")
        if component_of(model) == "unet":
            key = f"lora_unet_{layer.replace('.', '_')}"
            values |= {f"{key}.lora_down.weight": each.a, f"{key}.lora_up.weight": each.b}
        else:
            key = f"diffusion_model.{original[layer]}"
            values |= {f"{key}.lora_A.weight": each.a, f"{key}.lora_B.weight": each.b}
    return values, {}


def component_of(model: nn.Module) -> str:
    """The model's folder in a diffusers pipeline, which is also the prefix of its LoRA keys."""
    return "unet" if "UNet" in type(model).__name__ else "transformer"
