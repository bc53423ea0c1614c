"""The files of an encoded set, each with a digest of what was written: pairs, the empty prompt, the
index. The index holds the digests of all others, so that its own stands for the whole set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OF_ROWS = (
    "data",
    "data_version",
    "split",
    "ranked",
    "ties",
)  # of a fingerprint: which pairs there are


class Changed(ValueError):
    """A file of a set is not as it was written, or gone: nothing that a run has done is wrong by
    it.
    """


def pair_file(folder: Path, pair_id: int) -> Path:
    """Where a pair's tensors stand in an encoded set: 256 folders, named by the id in hex."""
    # One folder of a million files would be slow to list.
    name = f"{pair_id:016x}"
    return folder / "pairs" / name[-2:] / f"{name}.safetensors"


def encoding_of(fingerprint: dict[str, Any]) -> str:
    """Digest of what a set was encoded with: of all that decides a pair's tensors."""
    with_ = {name: value for name, value in fingerprint.items() if name not in OF_ROWS}
    text = json.dumps(with_, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def digest(path: Path, tensors: dict[str, Tensor], encoding: str) -> str:
    """Of a file's tensors, and of whose they are: the file of another pair, or of the same pair
    encoded otherwise, is as foreign as one with a flipped bit.
    """
    found = hashlib.blake2b(f"{encoding} {path.stem}".encode(), digest_size=16)
    for name, value in sorted(tensors.items()):
        found.update(f" {name} {value.dtype} {list(value.shape)} ".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def index_digest(columns: Iterable[tuple[str, Iterable[list[Any]]]]) -> str:
    """Of the rows of an index, whose columns come in parts: of JSON as of whole columns."""
    found = hashlib.blake2b(digest_size=16)
    for name, parts in columns:
        found.update(json.dumps([name, []])[:-2].encode())
        between = ""
        for part in filter(None, parts):
            found.update(f"{between}{json.dumps(part, default=str)[1:-1]}".encode())
            between = ", "
        found.update(b"]]")
    return found.hexdigest()


def stored_shapes(path: Path) -> str | None:
    """The shapes of a file's tensors in one line, from its header; None: no such file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
    except (OSError, SafetensorError):
        return None
    return " ".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def written(path: Path) -> dict[str, Any] | None:
    """What the header of a file says of it: its `digest` and a pair's `notes`; nothing in sets from
    before them; None: no such file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads((file.metadata() or {}).get("fastpref", "{}")))
    except (OSError, SafetensorError, ValueError, TypeError, RecursionError):
        return None


def written_digest(path: Path) -> str:
    """The digest that a file was written with; ValueError: it has none, or cannot be read."""
    found = (written(path) or {}).get("digest")
    if not isinstance(found, str):
        raise ValueError(
            f"{path}: is not as fastpref encode wrote it; delete it and run the same fastpref "
            "encode again"
        )
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, memory-mapped; Changed: missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise Changed(
            f"{path}: cannot be read ({error}); delete it and run the same fastpref encode again"
        ) from None


def conditions(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors stored as `cond.NAME`, by name."""
    return {name[5:]: value for name, value in tensors.items() if name.startswith("cond.")}


def read_fingerprint(folder: Path) -> dict[str, Any]:
    """What an encoded set was encoded with; ValueError: its fingerprint.json is damaged."""
    path = folder / "fingerprint.json"
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # the last: JSON nested too deeply
        found = None
    wanted = {"family": str, "model": str, "encoders": dict}
    values = {"encoders": {}} | found if isinstance(found, dict) else {}  # not every model has them
    if not all(isinstance(values.get(name), kind) for name, kind in wanted.items()):
        raise ValueError(
            f"{path}: is damaged, expected the JSON object that fastpref encode wrote; "
            "encode into another output_dir"
        )
    return found
