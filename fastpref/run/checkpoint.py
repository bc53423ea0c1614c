"""Checkpoints that survive kill -9 and resume bit for bit.

A checkpoint is a folder `checkpoint-N` of safetensors and JSON (never pickle), written under
another name, flushed to disk and renamed: it exists whole or not at all. `manifest.json` lists each
file's size and digest, so that a truncated one is noticed and the one before it is used.

Of a model in shards each process writes its own, beside the loop (torch.distributed.checkpoint).
Either form is read by any number of processes, into a whole model or shards.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import ranks
from ..files import flush, share, tidy, writing
from ..step.pair import in_shards

PREFIX = "checkpoint-"
STATE = ("step", "margin_noise", "made_of", "meter", "metrics")  # what a run goes on from
WHOLE = {"parameters.safetensors", "optimizer.safetensors"}
FILES = {"state.json", "generators.safetensors"}  # and those, or shards in their place
GENERATORS = ("cpu", "cuda")
SHARD = "shard-"  # how DCP begins their names


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimiser keeps, as NAME/exp_avg and so on: torch's own state_dict knows a parameter
    by its place alone.
    """
    return {
        f"{name}/{key}": value.detach()
        for name, p in trainable(model).items()
        for key, value in optimizer.state[p].items()
    }


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
    parts = {"parameters": trainable(model), "optimizer": moments(model, optimizer)}
    final = folder / f"{PREFIX}{step}"
    with writing(final):
        temporary = _begin(final, {"step": step, **state})
        for name, tensors in parts.items():
            # safetensors refuses other strides
            tensors = {k: v.detach().contiguous() for k, v in tensors.items()}
            save_file(tensors, temporary / f"{name}.safetensors")
        _seal(temporary, final, keep)
    return final


def save_shards(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
    group: Any,
) -> Callable[[], Path]:
    """As `save`, of a model in shards: all processes call it, and go on as soon as theirs are
    copied. What it returns waits for the rest, and is to be called before the next save.

    group: of all processes, gloo, for nothing else.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save
    from torch.distributed.checkpoint.api import CheckpointException

    final = folder / f"{PREFIX}{step}"

    class Writer(HuggingFaceStorageWriter):
        def finish(self, metadata: Any, results: Any) -> None:  # rank 0, when all is on disk
            _seal(temporary, final, keep)

    def begin() -> Path:
        with writing(final):
            return _begin(final, {"step": step, **state})

    temporary = ranks.by_main(begin)
    tensors = {name: p.detach() for name, p in trainable(model).items()}
    saved = async_save(
        tensors | moments(model, optimizer),
        storage_writer=Writer(str(temporary), save_distributed=True),
        process_group=group,
    )

    def wait() -> Path:
        with writing(final):
            try:
                saved.result()
            except CheckpointException as error:  # the same on all
                raise next(iter(error.failures.values()))[0] from None
            except RuntimeError as error:  # gloo's
                said = " ".join(str(error).split())
                raise ranks.Lost(
                    f"{final} is not written, another process is gone ({said})"
                ) from None
        return final

    return wait


def _begin(final: Path, state: dict[str, Any]) -> Path:
    """The folder that will be `final`, with all that is small in it."""
    # Draws need no generator, a model's dropout does. To ask CUDA for its state would initialise it
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        generators["cuda"] = torch.cuda.get_rng_state()
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(generators, temporary / "generators.safetensors")
    (temporary / "state.json").write_text(json.dumps(state, indent=1))
    return temporary


def _seal(temporary: Path, final: Path, keep: int) -> None:
    """Lists the files, sees them to the disk and gives the folder its name."""
    files = sorted(temporary.iterdir())
    listed = zip(files, _digests(files), strict=True)
    manifest = {path.name: [path.stat().st_size, digest] for path, digest in listed}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    # Before the rename, or after a power cut the name could stand for empty files.
    for path in sorted(temporary.iterdir()):
        share(path)
        flush(path)
    flush(temporary)
    if final.exists():  # nothing is renamed over a folder that holds files
        shutil.rmtree(final)
    temporary.rename(final)
    flush(final.parent)  # the new name is a part of it
    saved = folders(final.parent)
    for old in saved[saved.index(final) + keep :]:
        shutil.rmtree(old)


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


def _digests(paths: list[Path]) -> list[str]:
    def one(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]

    with ThreadPoolExecutor(8) as pool:  # 0.5 GB/s each; 14B fully tuned are 168 GB
        return list(pool.map(one, paths))


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        needed = FILES | (set() if any(n.startswith(SHARD) for n in manifest) else WHOLE)
        for name in sorted(needed - manifest.keys()):
            return f"manifest.json does not list {name}"
        for name, (size, _) in manifest.items():
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, expected {size}"
        digests = _digests([checkpoint / name for name in manifest])
        for (name, (_, digest)), found in zip(manifest.items(), digests, strict=True):
            if found != digest:
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
    `step`). All processes call it.
    """
    problem = ranks.by_main(lambda: fault(checkpoint))
    if problem is not None:
        raise ValueError(f"{checkpoint} is damaged ({problem}): resume from another checkpoint")
    parameters = trainable(model)
    try:
        generators = load_file(checkpoint / "generators.safetensors")
        sizes, read = _opened(checkpoint, in_shards(list(parameters.values())))
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
    stored = {name for name in sizes if "/" not in name}
    if parameters.keys() != stored:
        odd = sorted(parameters.keys() ^ stored)[0]
        raise ValueError(
            f"{checkpoint} belongs to another model or adapter: parameter {odd} is on one side only"
        )
    for name, p in parameters.items():
        if p.shape != sizes[name]:
            raise ValueError(
                f"{checkpoint} belongs to another adapter: {name} is {list(sizes[name])} "
                f"there, {list(p.shape)} here"
            )
    # Parameters in place: the optimiser and a recorded step hold them.
    wanted = {name: p.detach() for name, p in parameters.items()}
    entries: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for path in sorted(sizes.keys() - parameters.keys()):  # in one order on all processes
        name, key = path.rsplit("/", 1)
        like = wanted[name]
        value = torch.empty_like(like) if sizes[path] == like.shape else torch.empty(sizes[path])
        wanted[path] = entries[name][key] = value
    read(wanted)
    saved = optimizer.state_dict()
    order = [p for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in parameters.items()}
    saved["state"] = {i: entries[names[id(p)]] for i, p in enumerate(order)}
    # AdamW has no entry for a parameter that never had a gradient.
    saved["state"] = {i: entry for i, entry in saved["state"].items() if entry}
    optimizer.load_state_dict(saved)
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"])
    return state


def _opened(
    checkpoint: Path, shards: bool
) -> tuple[dict[str, torch.Size], Callable[[dict[str, Tensor]], None]]:
    """(The sizes of the tensors that a checkpoint holds, what reads some into tensors like them.)
    shards: of a model in shards.
    """
    if not shards and not any(checkpoint.glob(f"{SHARD}*")):
        held = {k: v for name in WHOLE for k, v in load_file(checkpoint / name).items()}

        def read(wanted: dict[str, Tensor]) -> None:
            for name, tensor in wanted.items():
                tensor.copy_(held[name])

        return {name: value.shape for name, value in held.items()}, read

    # Whole ones too: it reads any safetensors. A second to import.
    from torch.distributed import checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(checkpoint))
    listed = reader.read_metadata().state_dict_metadata
    sizes = {name: of.size for name, of in listed.items() if name not in GENERATORS}

    def read_shards(wanted: dict[str, Tensor]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is meant: each process reads for itself
            dcp.load(wanted, storage_reader=reader, no_dist=True)

    return sizes, read_shards
