"""What a run is made of: its folder, data, noising, adapters, precision, cached reference."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from .. import models
from ..files import differences, locked, mark, model_identity
from ..loss.functional import Draws
from ..loss.oracle import PROMPT_DROPOUT, uniform
from ..models.folder import encoders_of, scheduler_config
from ..pairs import dataset as data
from ..pairs import encode
from ..progress import stage
from ..step import attention, cache, compiling, filling, reference
from ..step.graphs import StepGraph
from . import checkpoint
from .config import FREE_FIELDS, Config


def claim(folder: Path, kind: str = "train") -> Path:
    """Makes `folder` the output of `fastpref KIND` (by its .fastpref); ValueError where another
    command's or something else is in it.
    """
    if folder.is_dir() and not (folder / ".fastpref").exists() and any(folder.iterdir()):
        raise ValueError(f"output_dir {folder} holds something else: choose another one")
    return mark(folder, kind)


@contextmanager
def alone(folder: Path, kind: str = "train") -> Iterator[None]:
    """No other process writes into `folder`, the output of `fastpref KIND`, meanwhile."""
    with locked(claim(folder, kind)):
        yield


def open_run(config: Config, folder: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """(checkpoint to go on from, or None to start at 0; the result if there is nothing left to do),
    after a check that the folder is this run's.
    """
    claim(folder)
    record, done = folder / "config.yaml", folder / "result.json"
    started = done.exists() or any(folder.glob(f"{checkpoint.PREFIX}*"))
    if started and record.exists():
        before, now = read_record(record), config.to_dict()
        # A decaying schedule is a function of the last step: another one is another run.
        free = FREE_FIELDS - ({"max_train_steps"} if config.lr_scheduler != "constant" else set())
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
    checkpoint.clean(folder)
    result = read_record(done) if done.exists() else None
    if result is not None:
        artifact = folder / Path(str(result.get("artifact"))).name  # the folder may have been moved
        if result.get("global_step", 0) >= config.max_train_steps:
            if checkpoint.whole(artifact):
                return None, result | {"output_dir": str(folder), "artifact": str(artifact)}
            print(
                f"warning: {artifact} is missing or damaged: writing it again from the last "
                "checkpoint",
                file=sys.stderr,
            )
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
        print(f"warning: {line}; falling back to {found or 'the start'}", file=sys.stderr)
    if found is None and result is not None:
        raise ValueError(
            f"{folder} is trained to step {result.get('global_step')}, and no checkpoint is left "
            "to go on from: choose another output_dir"
        )
    if found is None and (wanted == "latest" or (folder / "metrics.jsonl").exists()):
        print(f"no checkpoint in {folder} yet: starting at step 0", file=sys.stderr)
    return found, None


def read_record(path: Path) -> dict[str, Any]:
    """A file that a run wrote about itself, YAML or JSON."""
    read = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        found = read(path.read_text())
    except (ValueError, yaml.YAMLError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not readable: restore it, or choose another output_dir")
    return found


def open_data(config: Config, folder: Path) -> data.PairDataset:
    """The encoded pairs: `config.data` itself, or what encoding its media gives (kept in the
    run's folder).
    """
    path = Path(config.data)
    if (path / "index.parquet").exists():
        for name in ("num_frames", "height", "width", "fps"):
            if getattr(config, name) is not None:
                raise ValueError(f"{name} has no effect: data {path} is already encoded; remove it")
    else:
        path = encode.encode(
            config.family,
            config.model,
            config.data,
            str(folder / "encoded"),
            num_frames=config.num_frames,
            height=config.height,
            width=config.width,
            fps=config.fps,
            dtype="bfloat16" if config.mixed_precision == "bf16" else "float32",
            device=config.device,
        )
    with stage("reading the data, and which encoders the model has"):
        dataset = data.PairDataset(path)
        before = dataset.fingerprint.get("encoders", {})
        own = encoders_of(config.model) if before else {}
    family, now = dataset.fingerprint["family"], models.family(config.family).__name__
    if family != now:
        raise ValueError(f"data {path}: encoded with family {family}, got family {now}")
    listed = differences(before, own, before.keys() ^ own.keys())
    if listed:
        raise ValueError(
            f"data {path}: encoded with another base than {config.model}: {listed}; encode it "
            "again with this model, or train the one it was encoded with"
        )
    return dataset


def warn_of_another_model(config: Config) -> None:
    """Of a set that was encoded with another model, whose encoders may be the same nonetheless.

    Families without encoders have none to be different.
    """
    path = Path(config.data)
    if not (path / "index.parquet").exists():
        return  # media, encoded with the run's own model
    before = data.read_fingerprint(path)
    if before.get("encoders") and before["model"] != model_identity(config.model):
        print(
            f"warning: data {path} was encoded with another model than {config.model}: its VAE "
            "and text encoders must be the same",
            file=sys.stderr,
        )


def predictor(family: Any, device: torch.device, dtype: torch.dtype) -> reference.Predict:
    """The family's prediction in the run's precision."""

    def predict(
        model: torch.nn.Module, noisy: Tensor, t: Tensor, cond: dict[str, Tensor]
    ) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return family.predict(model, noisy, t, cond)

    return predict


def preparer(
    config: Config, dataset: data.PairDataset, device: torch.device, dtype: torch.dtype
) -> filling.Prepare:
    """A batch on the device, and the draws of its pairs in an epoch."""
    empty = dataset.empty_cond if config.prompt_dropout else None
    if empty is not None:
        got, like = ({k: list(v.shape) for k, v in c.items()} for c in (empty, dataset[0].cond))
        if got != like:
            raise ValueError(
                f"{dataset.folder / 'empty.safetensors'}: the empty prompt's embeddings expected "
                f"{like}, got {got}; delete it and run the same fastpref encode again"
            )

    def prepare(epoch: int, batch: data.Batch) -> tuple[data.Batch, Draws]:
        index = epoch % config.draws_per_pair if config.draws_per_pair else epoch
        draws = Draws(config.seed, batch.pair_id, torch.full_like(batch.pair_id, index))
        if empty is not None:
            dropped = (
                uniform(draws.seed, draws.pair_id, draws.index, PROMPT_DROPOUT)
                < config.prompt_dropout
            )
            dropped = dropped.repeat(2)
            for name, value in batch.cond.items():
                where = dropped.view(-1, *[1] * (value.dim() - 1))
                batch.cond[name] = torch.where(where, empty[name].to(value.dtype), value)
        return batch.to(device, dtype), draws  # the draws' few numbers are turned into times here

    return prepare


def pick_attention(
    config: Config,
    model: torch.nn.Module,
    probe: Callable[[], object],
    device: torch.device,
    earlier: dict[str, Any],
) -> attention.Choice:
    """The run's attention backend; auto keeps to what was picked earlier."""
    wanted = config.attention
    if wanted == "auto" and earlier.get("attention") in attention.BACKENDS:
        wanted = earlier["attention"]
    if device.type != "cuda":  # nothing is timed
        return attention.choose(wanted, model, probe, device)
    with stage("attention: what is installed, on the first batch"):
        return attention.choose(wanted, model, probe, device)


def wait_for(path: Path, seconds: float = 600) -> None:
    """Until another rank has written `path`; ValueError: it has not."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise ValueError(f"{path}: rank 0 has not written it in {seconds:g} s; look at its log")
        time.sleep(0.2)


def cache_folder(config: Config, dataset: data.PairDataset) -> Path:
    """Where the run's cached reference errors are."""
    return Path(config.reference_cache or dataset.folder / "reference")


def cache_mark(
    config: Config,
    dataset: data.PairDataset,
    process: Any,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
) -> dict[str, Any]:
    """The fingerprint of the run's cached reference errors."""
    rounding = [f"{name}={value}" for name, value in compiling.AS_EAGER.items()]
    return cache.fingerprint(
        model=config.model,
        data=dataset.folder,
        process=process,
        seed=config.seed,
        draws_per_pair=config.draws_per_pair,
        batch_size=config.train_batch_size,
        pair_mode=config.pair_mode,
        compile=" ".join(["blocks", *rounding]) if config.compile else "none",
        attention=backend,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        weights_dtype=str(weights_dtype(config, dtype)).removeprefix("torch."),
        prompt_dropout=config.prompt_dropout,
    )


def open_cache(
    config: Config, dataset: data.PairDataset, mark: dict[str, Any], device: torch.device
) -> tuple[cache.ErrorCache, bool]:
    """The run's cached reference errors, and whether it will ask for some that are not there.
    mark: their `cache_mark`.

    Raises:
        ValueError: they do not fit, or some are lacking and nothing can be written there.
    """
    folder = cache_folder(config, dataset).resolve()
    if Path(config.model).is_dir() and folder.is_relative_to(Path(config.model).resolve()):
        raise ValueError(f"reference_cache {folder}: is in the model's folder, choose another one")
    errors = cache.ErrorCache(cache_folder(config, dataset), mark, dataset, device)
    lacks = not errors.covers(config.max_train_steps * config.gradient_accumulation_steps)
    if lacks and not os.access(errors.folder, os.W_OK):
        raise ValueError(
            f"reference cache {errors}, and nothing can be written there: make the folder "
            "writable, or name another reference_cache"
        )
    return errors, lacks


def cache_reference(config: Config, rank: int = 0, world: int = 1) -> tuple[Path, int]:
    """Fills the reference cache of the run that `config` says; returns (folder, errors computed).

    A run fills what it needs itself: this is to be ahead of it, or on more devices. Killed and
    called again it goes on. Each rank of world fills its share, on its own device.

    Raises:
        ValueError: as `train`, a reference other than cached, or several ranks and no encoded set.
    """
    if config.reference != "cached":
        raise ValueError(
            f"cache-reference fills what reference cached reads, got reference {config.reference}: "
            "set reference: cached, here and in training"
        )
    out, own = Path(config.output_dir), Path(config.reference_cache or ".").resolve()
    encoded = (Path(config.data) / "index.parquet").exists()
    if not encoded and world > 1:
        raise ValueError(
            f"data {config.data}: several ranks need a set made by fastpref encode; run it first"
        )
    if not encoded or (config.reference_cache and own.is_relative_to(out.resolve())):
        claim(out)  # the run's folder, where its encoded set, or the cache, will be
    device, dtype = place(config)
    family = models.family(config.family)
    dataset = open_data(config, Path(config.output_dir))
    process = make_process(config, family)
    model = load_model(config, family, device, dtype).requires_grad_(False)
    where, prepare = cache_folder(config, dataset), preparer(config, dataset, device, dtype)
    says = reference.base(model, predictor(family, device, dtype))

    def probe() -> None:
        batch, draws = prepare(0, data.collate([dataset[0]] * config.train_batch_size))
        reference.errors(says, process, batch, draws, config.pair_mode)

    if rank and config.attention == "auto" and device.type == "cuda":
        wait_for(where / "fingerprint.json")  # rank 0 picks for all
    backend = pick_attention(config, model, probe, device, cache.recorded(where))
    if rank == 0:
        print(f"attention  {backend}")
    with attention.use(model, backend.name):
        if config.compile:
            compiling.compile_blocks(model, family.BLOCKS)
        mark = cache_mark(config, dataset, process, device, dtype, backend.name)
        errors, _ = open_cache(config, dataset, mark, device)
        says = recorded_pass(says, device) if config.cuda_graphs else says
        ahead = {"num_workers": config.num_workers}
        count = filling.fill(errors, says, process, prepare, rank=rank, world=world, **ahead)
    return where, count


def recorded_pass(says: reference.Reference, device: torch.device) -> reference.Reference:
    """A reference pass as a CUDA graph; what it says is overwritten by the next pass."""

    def whole(noisy: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return says(noisy, t, cond)

    graph = StepGraph(whole, device, name="reference pass")
    return lambda noisy, t, cond: graph(noisy=noisy, t=t, **cond)


def weights_dtype(config: Config, dtype: torch.dtype) -> torch.dtype:
    """What the model is kept in. Fully tuned weights in float32, since bfloat16 would lose most
    updates; autocast makes their products `dtype`.
    """
    return torch.float32 if config.tuning == "full" else dtype


def load_model(config: Config, family: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The family's model on the device, its weights in what the run keeps them in."""
    with stage("loading the model"):
        model = family.load(config.model, weights_dtype(config, dtype)).to(device)
    warn_of_another_model(config)  # not earlier: a model that cannot be loaded is the real mistake
    return model


def device_of(name: str) -> torch.device:
    """A device this process can use; ValueError says why not."""
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d?))?", name, re.ASCII):  # torch takes cpu:7 too
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name}: {torch.cuda.device_count()} CUDA devices are there")
    return device


def frozen_copy(config: Config) -> bool:
    """Whether the reference, where it is asked, is a second copy of the model."""
    return config.reference == "frozen_copy" or config.tuning == "full"


def place(config: Config) -> tuple[torch.device, torch.dtype]:
    """Where a run computes, and in which precision."""
    device = device_of(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return device, torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32


def add_lora(model: torch.nn.Module, config: Config, default_targets: list[str]) -> None:
    """Puts fp32 adapters on the family's layers, with a zero B: the policy starts as the
    reference.
    """
    import peft

    rank = config.lora_rank or 16
    lora = peft.LoraConfig(
        r=rank,
        lora_alpha=config.lora_alpha or rank,
        target_modules=config.lora_targets or default_targets,
        init_lora_weights="gaussian",
    )
    try:
        peft.inject_adapter_in_model(lora, model)
    except ValueError as error:
        raise ValueError(
            f"lora_targets {lora.target_modules}: {' '.join(str(error).split())}"
        ) from None
    for parameter in checkpoint.trainable(model).values():
        parameter.data = parameter.data.float()


def make_process(config: Config, family: Any) -> Any:
    """The family's noising with the run's window, sampling and importance grid.

    dpo_cm and sdpo draw no times at which their weight is 0 whatever the model says
    (`Process.unmasked`), except with sft_weight, as a mask removes no SFT term, and with a cached
    reference: its errors belong to the draws, and one cache serves every objective.
    """
    try:
        process = family.process(scheduler_config(config.model))
    except ValueError as error:
        file = f"model {config.model}/scheduler"
        raise ValueError(error if file in str(error) else f"{file}: {error}") from None
    changes: dict[str, Any] = {"timestep_range": config.timestep_range}
    for field, name in (("importance_steps", "importance_steps"), ("draws_per_pair", "strata")):
        if getattr(config, field) is not None:
            changes[name] = getattr(config, field)
    for name in ("time_sampling", "shift"):
        if getattr(config, name) is not None:
            if not hasattr(process, name):
                raise ValueError(f"{name} has no effect on {type(process).__name__}: remove it")
            changes[name] = getattr(config, name)
    process = process.replace(**changes)
    rule = config.make_objective(elements=1)
    masks = rule is not None and rule.has_importance and not rule.sft_weight
    return process.unmasked() if masks and config.reference != "cached" else process
