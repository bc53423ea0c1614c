"""What families load: models, schedulers and configs out of a diffusers folder or hub id.

Everything is loaded by the `from_pretrained` of diffusers' and transformers' own classes, from
safetensors alone; Python code in a folder is never run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .weights import check_shards, pointer, quantised, remedy, variant

# What of a VAE's and a text encoder's config tells two bases apart, however they were saved.
VAE_FACTS = (
    *("latent_channels", "z_dim", "scaling_factor", "shift_factor"),
    *("latents_mean", "latents_std"),
)
TEXT_FACTS = ("hidden_size", "num_hidden_layers", "vocab_size")


def check_path(path: str | Path) -> None:
    """ValueError: neither a folder nor a hub id, which is owner/name: not worth a download."""
    if not Path(path).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)):
        raise ValueError(f"model {path}: no such folder; expected a diffusers folder or a hub id")


def read_config(
    kind: type, path: str | Path, subfolder: str | None = None, *, any_class: bool = False
) -> dict[str, Any]:
    """The JSON config of `path` (its model_index.json) or of one of its subfolders.

    Raises:
        ValueError: it cannot be read, or a subfolder's is not of class `kind`.
    """
    where = f"{path}/{subfolder}" if subfolder else str(path)
    check_path(path)
    try:
        config = kind.load_config(str(path), subfolder=subfolder)
        if not isinstance(config, dict):
            raise ValueError(f"expected a JSON object, got {type(config).__name__}")
        config = dict(config)
    except (OSError, ValueError, RecursionError) as error:  # the last: JSON nested too deeply
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model {where}: {kind.config_name} cannot be read; expected a diffusers folder or a "
            f"hub id ({reason})"
        ) from None
    if subfolder and not any_class and config.get("_class_name") != kind.__name__:
        raise ValueError(
            f"model {where}: expected a {kind.__name__}, got {config.get('_class_name')}: "
            "is this another family's model?"
        )
    return config


def config_of(kind: type, path: str | Path, part: str) -> dict[str, Any]:
    """A part's config with the defaults of its class, which old folders leave out; ValueError as
    `read_config`.
    """
    defaults = {name: p.default for name, p in signature(kind.__init__).parameters.items()}
    return defaults | read_config(kind, path, part)


def scheduler_config(path: str | Path) -> dict[str, Any]:
    """The scheduler_config.json of a folder or hub id, of whatever class of diffusers.

    Raises:
        ValueError: there is none, its class is unknown, or its timestep shift no number above 0.
    """
    import diffusers

    config = read_config(diffusers.DDPMScheduler, path, "scheduler", any_class=True)
    name = str(config.get("_class_name"))
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ValueError(
            f"model {path}/scheduler: _class_name expected a scheduler of diffusers, got {name}; "
            "copy the scheduler folder of the original model"
        )
    for key in ("shift", "flow_shift"):
        value = config.get(key, 1.0)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(
                f"model {path}/scheduler: {key} in scheduler_config.json expected a number above "
                f"0, got {value!r:.80}; copy the scheduler folder of the original model"
            )
    return config


def scheduler_of(pipe: Any, path: str | Path) -> Any:
    """What samples are drawn with: `pipe.scheduler`, where what a family's `pipeline` gave has one;
    else the folder's or hub id's, of the class that its config names.
    """
    import diffusers

    own = getattr(pipe, "scheduler", None)
    if own is not None:
        return own
    kind = getattr(diffusers, scheduler_config(path)["_class_name"])
    return load_part(kind, path, "scheduler")


def arguments(kind: type, path: str | Path, part: str, dtype: torch.dtype) -> dict[str, Any]:
    """What every model's `from_pretrained` is called with."""
    from diffusers import ModelMixin, utils

    # diffusers renamed torch_dtype; the old name warns where the new one is known.
    renamed = not issubclass(kind, ModelMixin) or hasattr(utils, "_resolve_dtype")
    name = "dtype" if renamed else "torch_dtype"
    return {name: dtype, "variant": variant(path, part), "use_safetensors": True}


def load_model(kind: type, path: str | Path, subfolder: str, dtype: torch.dtype) -> nn.Module:
    """The model in `path/subfolder`, in `dtype`.

    Raises:
        ValueError: none there, of another class, or weights that do not fill its config.
    """
    config = read_config(kind, path, subfolder)
    if _shapes_alone:
        try:
            return shaped(kind, config, torch.device("meta"), dtype)
        except ValueError as error:
            raise ValueError(f"model {path}/{subfolder}: {error}") from None
    return load_part(kind, path, subfolder, **arguments(kind, path, subfolder, dtype))


_shapes_alone = False


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Inside, `load_model` reads a model's config alone: its tensors have shapes and no values."""
    global _shapes_alone
    _shapes_alone = True
    try:
        yield
    finally:
        _shapes_alone = False


def with_values() -> AbstractContextManager:
    """Inside, tensors are real ones also where shapes alone are run: what a cache keeps outlives
    that.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def shaped(
    kind: type, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A model that is not loaded but made, frozen, in the dtypes that loading would give it."""
    try:
        with device:
            model = kind.from_config(config).requires_grad_(False)
    except (AssertionError, ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"config.json makes no {kind.__name__} ({reason:.200})") from None
    kept = kind._keep_in_fp32_modules
    if kept is None:
        return nn.Module.to(model, dtype)  # diffusers' own warns of what is not the case here
    for name, p in model.named_parameters():
        if not set(kept) & set(name.split(".")):
            p.data = p.data.to(dtype)
    return model


def load_part(kind: type, path: str | Path, part: str, **options: Any) -> Any:
    """`path/part` by the `from_pretrained` of `kind`, a class of diffusers or transformers.

    Raises:
        ValueError: it cannot be read, or weights that do not fill its config.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would tear the line that says what is loaded
    is_model, where = issubclass(kind, nn.Module), f"model {path}/{part}".rstrip("/")
    method = None
    if is_model:
        check_shards(Path(path) / part)
        method = quantised(kind, path, part)
        options["output_loading_info"] = True
    what = "weights" if is_model else kind.__name__
    try:
        loaded = kind.from_pretrained(str(path), subfolder=part, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a library does with a part that is damaged
        reason = " ".join(str(error).split()) or type(error).__name__
        if "allocate memory" in reason:  # as a CPU's allocator says it
            raise
        mend = remedy(error, method) or pointer(Path(path) / part)
        raise ValueError(f"{where}: {what} cannot be read ({reason}){mend}") from None
    if not is_model:
        return loaded
    model, info = loaded
    # Both libraries only warn of a tensor that no file holds, and leave it random or without
    # memory. One that is tied to a tensor that a file holds is there.
    named = dict(model.named_parameters(remove_duplicate=False))
    absent = set(info["missing_keys"]) | {name for name, value in named.items() if value.is_meta}
    filled = {id(value) for name, value in named.items() if name not in absent}
    lacking = [name for name in named if name in absent and id(named[name]) not in filled]
    if lacking:
        raise ValueError(
            f"{where}: weights lack {lacking[0]}; expected every tensor of its "
            "config.json, copy the folder again"
        )
    return model


def part_class(path: str | Path, part: str, entry: Sequence[Any]) -> type:
    """The class of a part by its entry in model_index.json: of diffusers or transformers alone.

    diffusers also runs Python files that lie in a folder, which this never does.
    """
    import diffusers
    import transformers

    library, name = entry if len(entry) == 2 else (None, None)
    found = {"diffusers": diffusers, "transformers": transformers}.get(str(library))
    kind = getattr(found, str(name), None)
    kinds = (
        *(diffusers.ModelMixin, diffusers.SchedulerMixin),
        *(transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase),
    )
    if not (isinstance(kind, type) and issubclass(kind, kinds)):
        raise ValueError(
            f"model {path}: model_index.json: {part} expected a class of diffusers or "
            f"transformers, got {json.dumps(entry)}; code that comes with a model is not run"
        )
    return kind


def encoders_of(path: str | Path) -> dict[str, Any]:
    """What decides the latents and embeddings of a folder or hub id, wherever it lies.

    `{"vae.scaling_factor": 0.13025, "text_encoder.hidden_size": 768, ...}` from the parts' configs
    with their classes' defaults; a part that cannot be read is left out.
    """
    from diffusers import DiffusionPipeline, ModelMixin

    found = {}
    try:
        index = read_config(DiffusionPipeline, path)
    except ValueError:
        return found
    for part, entry in index.items():
        if not part.startswith(("vae", "text_encoder")) or not isinstance(entry, list | tuple):
            continue
        # transformers gives its defaults for a folder that is not there.
        if Path(path).is_dir() and not (Path(path) / part / "config.json").is_file():
            continue
        try:
            kind = part_class(path, part, entry)
            if issubclass(kind, ModelMixin):
                config = config_of(kind, path, part)
            else:
                config = kind.config_class.from_pretrained(str(path), subfolder=part)
                config = {name: getattr(config, name) for name in TEXT_FACTS}
        except (OSError, ValueError, TypeError, AttributeError):
            continue
        for name in (name for name in VAE_FACTS + TEXT_FACTS if name in config):
            value = config[name]
            found[f"{part}.{name}"] = list(value) if isinstance(value, tuple) else value
    return found


def check_rotary(model: nn.Module, latents: Tensor) -> None:
    """ValueError: latents `[N, C, F, h, w]` beyond the rotary table of a Wan transformer."""
    limit = model.config.rope_max_seq_len
    sizes = [n * limit for n in model.config.patch_size]
    if any(n > most for n, most in zip(latents.shape[2:], sizes, strict=True)):
        got, most = ("x".join(map(str, of)) for of in (latents.shape[2:], sizes))
        raise ValueError(
            f"latents of {got} (frames x height x width) exceed the {most} that the model has "
            f"places for (rope_max_seq_len {limit}): take fewer frames or smaller ones"
        )
