"""The folder of a run: whose it is, what it goes on from, what it says of itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml

from .. import ranks
from ..files import differences, locked, mark
from ..progress import printable, warn
from . import artifact, checkpoint
from .options import Options
from .parsing import safe_load

# What is read of a result.json.
RESULT: dict[str, type] = {"global_step": int, "seconds_per_pair": float, "metrics": dict}


def claim(folder: Path, kind: str = "train") -> Path:
    """Makes `folder` the output of `fastpref KIND` (by its .fastpref); ValueError where another
    command's or something else is in it.
    """
    if folder.is_dir() and not (folder / ".fastpref").exists() and any(folder.iterdir()):
        raise ValueError(f"output_dir {folder} holds something else: choose another one")
    return mark(folder, kind)


@contextmanager
def alone(folder: Path, kind: str = "train") -> Iterator[None]:
    """No other process writes into `folder`, the output of `fastpref KIND`, meanwhile, but those
    of the same run.
    """
    with locked(claim(folder, kind)) if ranks.main() else nullcontext():
        yield


def open_run(config: Options, kind: str = "train") -> tuple[Path | None, dict[str, Any] | None]:
    """(checkpoint to go on from, or None to start at 0; the result if there is nothing left to do,
    which is said), after a check that the folder is this run's.
    """
    folder = claim(Path(config.output_dir), kind).parent
    checkpoint.clean(folder)
    record, done = folder / "config.yaml", folder / "result.json"
    started = done.exists() or any(folder.glob(f"{checkpoint.PREFIX}*"))
    if started and record.exists():
        # A version before a field did what its default does.
        before = config.defaults() | read_record(record)
        now = config.to_dict()
        # A decaying schedule is a function of the last step: another one is another run.
        free = {name for name, of in config.described().items() if of["free"]}
        free -= {"max_train_steps"} if config.lr_scheduler != "constant" else set()
        listed = differences(before, now, free)
        if listed:
            raise ValueError(
                f"{folder} holds another run: {listed}. "
                "Choose another output_dir, or the same values"
            )
    elif started:
        raise ValueError(
            f"{folder} holds another run (its config.yaml is missing): choose another output_dir"
        )
    result = read_record(done, RESULT) if done.exists() else None
    if result is not None:
        exported = folder / Path(str(result.get("artifact"))).name  # the folder may have been moved
        if result["global_step"] >= config.max_train_steps:
            if artifact.whole(exported):
                print(printable(f"{folder} is already trained to step {result['global_step']}"))
                return None, result | {"output_dir": str(folder), "artifact": str(exported)}
            warn(f"{exported} is missing or damaged: writing it again from the last checkpoint")
    wanted = config.resume_from_checkpoint
    if wanted not in (None, "latest"):
        own = [path.resolve() for path in checkpoint.folders(folder)]
        if Path(wanted).resolve() not in own:
            raise ValueError(
                f"resume_from_checkpoint: expected latest or a checkpoint in {folder}, got {wanted}"
            )
        if Path(wanted).resolve() != own[0]:
            raise ValueError(
                f"resume_from_checkpoint: {own[0].name} is newer than {wanted}: to go back, move "
                "the newer ones away first"
            )
        return Path(wanted), None
    found, broken = checkpoint.newest(folder)
    for line in broken:
        warn(f"{line}; falling back to {found or 'the start'}")
    if found is None and result is not None:
        raise ValueError(
            f"{folder} is trained to step {result['global_step']}, and no checkpoint is left "
            "to go on from: choose another output_dir"
        )
    if found is None and (wanted == "latest" or (folder / "metrics.jsonl").exists()):
        print(printable(f"no checkpoint in {folder} yet: starting at step 0"), file=sys.stderr)
    return found, None


def read_record(path: Path, wanted: Mapping[str, type] | None = None) -> dict[str, Any]:
    """A file that a run wrote about itself, YAML or JSON, with at least what is wanted in it."""
    read = json.loads if path.suffix == ".json" else safe_load
    try:
        found = read(path.read_text())
    except (ValueError, yaml.YAMLError, RecursionError):
        found = None
    whole = isinstance(found, dict) and all(
        isinstance(found.get(k), v) for k, v in (wanted or {}).items()
    )
    if not whole:
        raise ValueError(f"{path} is not readable: restore it, or choose another output_dir")
    return found
