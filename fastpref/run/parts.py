"""What a run is made of, each part from values: data, noising, model, adapters, cache."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .. import models, ranks
from ..loss.functional import Draws
from ..loss.oracle import PROMPT_DROPOUT, uniform
from ..pairs import encode
from ..pairs.dataset import Batch, PairDataset
from ..process import Diffusion, FlowMatching
from ..progress import stage
from ..step import attention, backends, cache, compiling
from ..step.filling import Prepare
from ..step.reference import PairMode, Predict, passes
from . import belong, checkpoint


def place(device: str | None, mixed_precision: str = "no") -> tuple[torch.device, torch.dtype]:
    """Where a run computes, and in which precision."""
    if device and ":" in device and ranks.world() > 1:
        raise ValueError(
            f"device {device}: is one of several processes' alone; expected cuda or cpu"
        )
    own = device if device == "cpu" else ranks.local_device()
    found = device_of(own or device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return found, torch.bfloat16 if mixed_precision == "bf16" else torch.float32


def device_of(name: str) -> torch.device:
    """A device this process can use; ValueError says why not."""
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d?))?", name, re.ASCII):  # torch takes cpu:7 too
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name}: {torch.cuda.device_count()} CUDA devices are there")
    return device


def open_data(
    path: str,
    folder: Path,
    *,
    family: str,
    model: str,
    dtype: torch.dtype,
    device: str | None,
    ties: bool = False,
    **sampling: float | None,
) -> PairDataset:
    """The encoded pairs: `path` itself, or what encoding its media gives, kept in the run's folder.

    ties: pairs without a winner are kept. sampling: num_frames, height, width and fps of the clips,
    where media are encoded.
    """
    data, module = Path(path), models.family(family)
    if (data / "index.parquet").exists():
        for name, value in sampling.items():
            if value is not None:
                raise ValueError(f"{name} has no effect: data {data} is already encoded; remove it")
    else:
        belong.check(module, model)  # before hours of encoding
        how = {"dtype": str(dtype).removeprefix("torch."), "device": device}
        how |= {"ties": "keep"} if ties else {}
        data = encode.encode(family, model, path, str(folder / "encoded"), **sampling, **how)
    with stage("reading the data, and whether the model is one for it"):
        dataset = PairDataset(data)
        belong.check(module, model, dataset, ties=ties)
    return dataset


def load_model(
    family: ModuleType, path: str, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """The family's model on the device, its weights in `dtype`; frozen."""
    with stage("loading the model"):
        return family.load(path, dtype).to(device).requires_grad_(False)


def tune_whole(model: nn.Module, path: str) -> None:
    """Makes every weight train. ValueError: some are quantised."""
    if not all(p.is_floating_point() for p in model.parameters()):
        raise ValueError(
            f"tuning full: weights of {path} are quantised and cannot be trained: use tuning lora, "
            "or take the model's folder of unquantised weights"
        )
    model.requires_grad_(True)


def weights_dtype(tuning: str, dtype: torch.dtype) -> torch.dtype:
    """What the model is kept in. Fully tuned weights in float32, since bfloat16 would lose most
    updates; autocast makes their products `dtype`.
    """
    return torch.float32 if tuning == "full" else dtype


def make_process(
    family: ModuleType, model: str, *, masked: bool = False, **options: Any
) -> FlowMatching | Diffusion:
    """The family's noising, by the model's scheduler.

    options: of the process; None: its own. masked: times at which the importance weight is 0
    whatever the model says are not drawn (`Process.unmasked`).
    """
    process = belong.process_of(family, model)
    changes = {name: value for name, value in options.items() if value is not None}
    for name in ("time_sampling", "shift"):  # flow matching alone has them
        if name in changes and not hasattr(process, name):
            raise ValueError(f"{name} has no effect on {type(process).__name__}: remove it")
    process = process.replace(**changes)
    return process.unmasked() if masked else process


def elements(dataset: PairDataset, convention: str) -> int:
    """Of a sample: what a sum convention of beta is a sum over. ValueError: samples differ."""
    texts = {text for shapes in set(dataset.shapes) for text in shapes.split()}
    latents = [text.partition(":")[2] for text in texts if text.startswith("latents_w:")]
    counts = {math.prod(map(int, shape.split("x"))) for shape in latents}
    if len(counts) > 1 and convention in ("half_sum", "sum"):
        raise ValueError(
            f"beta_convention {convention}: one beta cannot fit latents of "
            f"{min(counts)} and of {max(counts)} elements; use half_mean or mean"
        )
    return dataset[0].latents_w.numel()


def predictor(family: ModuleType, device: torch.device, dtype: torch.dtype) -> Predict:
    """The family's prediction in the run's precision."""

    def predict(model: nn.Module, noisy: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        # No cache: it would keep every weight's copy until the pass ends.
        how = {"enabled": dtype != torch.float32, "cache_enabled": False}
        with torch.autocast(device.type, dtype, **how):
            return family.predict(model, noisy, t, cond)

    return predict


def preparer(
    dataset: PairDataset,
    device: torch.device,
    dtype: torch.dtype,
    *,
    seed: int,
    draws_per_pair: int | None,
    prompt_dropout: float,
) -> Prepare:
    """A batch on the device, and the draws of its pairs in an epoch."""
    empty = dataset.empty_cond if prompt_dropout else None
    if empty is not None:
        got, like = ({k: list(v.shape) for k, v in c.items()} for c in (empty, dataset[0].cond))
        if got != like:
            raise ValueError(
                f"{dataset.folder / 'empty.safetensors'}: the empty prompt's embeddings expected "
                f"{like}, got {got}; delete it and run the same fastpref encode again"
            )

    def prepare(epoch: int, batch: Batch) -> tuple[Batch, Draws]:
        index = epoch % draws_per_pair if draws_per_pair else epoch
        draws = Draws(seed, batch.pair_id, torch.full_like(batch.pair_id, index))
        if empty is not None:
            chance = uniform(draws.seed, draws.pair_id, draws.index, PROMPT_DROPOUT)
            drop_prompts(batch, chance < prompt_dropout, empty)
        return batch.to(device, dtype), draws  # the draws' few numbers are turned into times here

    return prepare


@torch.no_grad()
def first_words(
    model: nn.Module,
    predict: Predict,
    process: FlowMatching | Diffusion,
    prepare: Prepare,
    first: tuple[int, Batch],
    pair_mode: PairMode,
) -> Tensor:
    """What the model says of the first batch (deferred: of its first member), uncompiled."""
    batch, draws = prepare(*first)
    inputs, _ = next(passes(process, batch, draws, pair_mode))
    with compiling.eagerly():
        return predict(model, *inputs)


def drop_prompts(batch: Batch, dropped: Tensor, empty: dict[str, Tensor]) -> None:
    """Puts the empty prompt's condition in place of the pairs' that are dropped, [B] bool."""
    both = dropped.repeat(2)
    for name, value in batch.cond.items():
        where = both.view(-1, *[1] * (value.dim() - 1))
        batch.cond[name] = torch.where(where, empty[name].to(value.dtype), value)


def add_lora(
    model: nn.Module, targets: list[str], rank: int | None = None, alpha: int | None = None
) -> None:
    """Puts fp32 adapters on the layers named, with a zero B: the policy starts as the reference.

    rank: None is 16. alpha: None is the rank.
    """
    import peft

    rank = rank or 16
    lora = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha or rank,
        target_modules=targets,
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


def pick_attention(
    wanted: str,
    model: nn.Module,
    probe: Callable[[], object],
    device: torch.device,
    earlier: dict[str, Any],
) -> attention.Choice:
    """The run's attention backend; auto keeps to what was picked earlier."""
    if wanted == "auto" and str(earlier.get("attention")) in backends.BACKENDS:
        wanted = earlier["attention"]
    if device.type != "cuda":  # nothing is timed
        return attention.choose(wanted, model, probe, device)
    with stage("attention: what is installed, on the first batch"):
        return attention.choose(wanted, model, probe, device)


def frozen_copy(reference: str, tuning: str) -> bool:
    """Whether the reference, where it is asked, is a second copy of the model."""
    return reference == "frozen_copy" or tuning == "full"


def open_cache(
    folder: Path,
    mark: dict[str, Any],
    dataset: PairDataset,
    device: torch.device,
    *,
    model: str,
    batches: int,
) -> tuple[cache.ErrorCache, bool]:
    """The cached reference errors of a run of so many batches, and whether it will ask for some
    that are not there. mark: their fingerprint.

    Raises:
        ValueError: they do not fit, or some are lacking and nothing can be written there.
    """
    whole = folder.resolve()
    if Path(model).is_dir() and whole.is_relative_to(Path(model).resolve()):
        raise ValueError(f"reference_cache {whole}: is in the model's folder, choose another one")
    errors = cache.ErrorCache(folder, mark, dataset, device)
    lacks = not errors.covers(batches)
    if lacks and not os.access(errors.folder, os.W_OK):
        raise ValueError(
            f"reference cache {errors}, and nothing can be written there: make the folder "
            "writable, or name another reference_cache"
        )
    return errors, lacks
