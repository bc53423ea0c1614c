"""A part's files of weights: variants, several files and their index, quantised ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

SHARD = r"(?:-\d+-of-\d+)?"
WEIGHTS = re.compile(rf"\w*model{SHARD}(?:\.(\w+))?{SHARD}\.safetensors")


def variant(path: str | Path, part: str) -> str | None:
    """The file variant to load a part of a folder with: none unless only variants are there.

    `fp16` for a folder whose transformer is diffusion_pytorch_model.fp16.safetensors alone; of
    several the first by name, so bf16 before fp16. A hub id is asked for its plain files.
    """
    names = [file.name for file in (Path(path) / part).glob("*.safetensors")]
    found = {match[1] for name in names if (match := WEIGHTS.fullmatch(name))}
    return min(found) if found and None not in found else None


def check_shards(folder: Path) -> None:
    """ValueError: an index of weights in several files names one that is not of safetensors, or not
    beside it: a pickle is never opened.
    """
    for index in folder.glob("*.index*.json"):
        if ".safetensors." not in index.name:
            continue  # that of a pickle, which nobody asks
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
            wrong = [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                f"model {folder}: {index.name} is damaged, expected a weight_map from tensors to "
                "files; copy the folder again"
            ) from None
        if wrong:
            raise ValueError(
                f"model {folder}: {index.name} names {min(wrong)!r:.80}, expected a .safetensors "
                "file beside it; copy the folder again"
            )


# What to install for weights that are quantised, where it is not called as they are.
PACKAGES = {"bitsandbytes": "bitsandbytes accelerate", "quanto": "optimum-quanto accelerate"}


def quantised(kind: type, path: str | Path, part: str) -> str | None:
    """How the weights of a part are quantised, by its config.json (bitsandbytes, torchao, ...);
    None: they are not, or nothing can be read there. ValueError: in no way that is known.
    """
    from diffusers import ModelMixin
    from transformers.quantizers import AutoHfQuantizer

    ours = issubclass(kind, ModelMixin)
    try:
        config = (kind.load_config if ours else kind.config_class.get_config_dict)(
            str(path), subfolder=part
        )
    except (OSError, ValueError, RecursionError):
        return None
    found = (config if ours else config[0]).get("quantization_config")
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if isinstance(found, dict) and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        method = "bitsandbytes"
    # transformers only warns of a method that it does not know, and takes the numbers as they are.
    if not isinstance(method, str) or not (ours or AutoHfQuantizer.supports_quant_method(found)):
        raise ValueError(
            f"model {path}/{part}: its weights are quantised ({found!r:.60}) in a way that is not "
            "known: take the folder of unquantised weights"
        )
    return method


POINTER = b"version https://git-lfs.github.com/spec/"  # how git-lfs's stand-in of a file begins


def pointer(folder: Path) -> str:
    """What to do where git-lfs has left its pointers in place of a part's files; else nothing."""
    files = (file for file in folder.glob("*") if file.is_file())
    left = [file.name for file in files if file.open("rb").read(len(POINTER)) == POINTER]
    return f": {min(left)} is a git-lfs pointer, run git lfs pull there" if left else ""


def remedy(error: Exception, method: str | None) -> str:
    """What to do about a part that does not load, if that is known; method: of `quantised`."""
    absent = isinstance(error, ImportError)
    if method is None:
        return ": install that package" if absent else ""
    install = f"pip install {PACKAGES.get(method, method)}, or " if absent else ""
    return f": it is quantised ({method}): {install}take the folder of unquantised weights"
