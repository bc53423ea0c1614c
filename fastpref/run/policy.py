"""What trains: the model with its adapters, made ready, and its optimiser; of any kind of run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .. import models, ranks
from ..files import write_atomic
from ..mesh import Mesh
from ..pairs.dataset import PairDataset
from ..progress import stage
from ..step import attention, checkpointing, compiling, context, memory
from . import checkpoint, checks, optimisation, sharding
from .config import Config
from .fitting import DECIDES, STEP, memory_step, pick_checkpointing
from .folder import read_record
from .guard import Guard
from .options import Adapters, Optimiser, Options, Speed
from .parts import add_lora, load_model, pick_attention, tune_whole, weights_dtype
from .telemetry import check_trackers

ADAM = ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
# What a run's step is where its options do not say.
STEP_ALONE = {"pair_mode": "joint", "reference": "auto", "cuda_graphs": False}
STEP_ALONE |= {"ulysses_degree": 1, "ring_degree": 1}


def begin(config: Options) -> ModuleType:
    """What a process of any run begins with; the family."""
    check_trackers(config.trackers)
    ranks.check_same("the config", config.to_dict())
    mesh_of(config)  # before hours of encoding
    found = {"torch": torch.__version__, "GPU": torch.cuda.is_available()}
    ranks.check_same("what is there", found)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True)
    return models.family(config.family)


def base_model(
    config: Adapters, family: ModuleType, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    model = load_model(family, config.model, device, weights_dtype(config.tuning, dtype))
    if config.tuning == "full":
        tune_whole(model, config.model)
    return model


def attention_of(
    config: Speed,
    model: nn.Module,
    probe: Callable[[], Tensor],
    device: torch.device,
    earlier: dict[str, Any] | None = None,
    contexts: int = 1,
) -> attention.Choice:
    """The run's attention backend, written to attention.json; auto keeps to what it was, or to
    `earlier`, where that is given. contexts: processes that share a clip's tokens.
    """
    record = Path(config.output_dir) / "attention.json"

    def pick() -> attention.Choice:
        before = earlier
        if before is None:
            before = read_record(record) if record.exists() and config.attention == "auto" else {}
        found = pick_attention(config.attention, model, probe, device, before)
        found = context.settled(found) if contexts > 1 else found
        write_atomic(record, json.dumps({"attention": found.name, **asdict(found)}).encode())
        return found

    return ranks.by_main(pick)


def adapt(
    config: Adapters, family: ModuleType, model: nn.Module, probe: Callable[[], Tensor]
) -> None:
    """Puts the adapters in, if it is they that train; what the model says is checked."""
    if config.tuning == "full":
        checks.check_finite(probe())
        return
    targets = config.lora_targets or family.LORA_TARGETS
    with stage("self-check: forwards of the first batch without adapters, with idle ones"):
        base_says = probe()
        checks.check_finite(base_says)
        add_lora(model, targets, config.lora_rank, config.lora_alpha)
        checks.check_off(model, probe, base_says)


def recomputation(
    config: Speed,
    family: ModuleType,
    model: nn.Module,
    largest: tuple[Tensor, dict[str, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    online: bool,
    pairs: int,
) -> memory.Mode:
    """The run's checkpointing: the one that is asked for; auto: on a GPU what it needs to fit.
    pairs: of a batch, two rows of the network each.
    """
    if config.checkpointing != "auto":
        return config.checkpointing
    if device.type != "cuda":
        return "none"
    asked = STEP_ALONE | config.to_dict()
    step = {name: asked[name] for name in STEP} | {"train_batch_size": pairs}
    step = memory_step(family, model, largest, dtype, online=online, **step)
    record, on = Path(config.output_dir) / "memory.json", memory.card_of(device)
    decides = {name: asked[name] for name in DECIDES}
    return ranks.by_main(partial(pick_checkpointing, step, on, record, decides))


def settle(
    config: Speed, family: ModuleType, model: nn.Module, frozen: nn.Module | None, mode: memory.Mode
) -> None:
    """Blocks checkpointed in `mode`, and compiled where that is asked for."""
    checkpointing.apply(model, family.BLOCKS, mode)
    if config.compile:
        print("compiling: each kind of block in the first forward and backward that reach it")
        compiling.compile_blocks(model, family.BLOCKS)
        if frozen is not None:
            compiling.compile_blocks(frozen, family.BLOCKS)


def mesh_of(config: Options) -> Mesh:
    """How the processes share a step. ValueError: they cannot."""
    asked = STEP_ALONE | config.to_dict()
    members = 2 if asked["pair_mode"] == "split" else 1
    mesh = Mesh(members, asked["ulysses_degree"] * asked["ring_degree"])
    mesh.batches(config.gradient_accumulation_steps)
    return mesh


def wants_shards(config: Config) -> bool:
    """Whether each process holds a part of the model. ValueError: what cannot be with it."""
    found = config.sharding
    if found == "auto":
        found = "full" if config.tuning == "full" else "none"
    if found == "none" or ranks.world() == 1:
        return False
    remedy = {
        "cuda_graphs": "its exchanges are not recorded: remove cuda_graphs",
        "skip_zeros": "all processes go through a backward together: remove skip_zeros",
    }
    for name, why in remedy.items():
        if getattr(config, name):
            raise ValueError(f"{name} with a sharded model: {why}, or set sharding none")
    return True


def base_copy(config: Config, family: ModuleType, dtype: torch.dtype) -> nn.Module:
    """The base once more, on the CPU, from where it is sharded."""
    kept = weights_dtype(config.tuning, dtype)
    return load_model(family, config.model, torch.device("cpu"), kept)


def share_out(
    config: Config,
    family: ModuleType,
    model: nn.Module,
    frozen: nn.Module | None,
    dataset: PairDataset,
    settings: ExitStack,
    device: torch.device,
    backend: str,
    mode: memory.Mode,
) -> None:
    """The model, and a frozen copy, in shards, and a clip's tokens over processes, as asked for."""
    both = [part for part in (model, frozen) if part is not None]
    degrees = {"ulysses": config.ulysses_degree, "ring": config.ring_degree}
    contexts = mesh_of(config).contexts
    if contexts > 1:
        how = {"backend": backend, "checkpointing": mode, "compiled": config.compile}
        context.check(model, **degrees, **how)
        for latents, cond in dataset.every_shape():
            text = max((value.shape[1] for value in cond.values() if value.dim() > 2), default=0)
            context.check_shape(model, latents.shape[1:], text, contexts=contexts)
    if wants_shards(config):
        with stage("sharding the model"):
            for part in both:
                how = {"device": device, "offload": config.cpu_offload}
                reduced = optimisation.REDUCED[config.reduce_dtype]
                sharding.shard(part, family.BLOCKS, **how, reduced=reduced)
    if contexts > 1:
        settings.enter_context(context.use(both, **degrees, device=device))


def trained(
    config: Optimiser, model: nn.Module, device: torch.device, recorded: torch.device | None = None
) -> dict[str, Any]:
    """The fields of a Run that take its optimiser's steps. recorded: the device of a CUDA graph."""
    parameters = list(checkpoint.trainable(model).values())
    optimizer = optimisation.adamw(parameters, recorded=recorded, **config.only(*ADAM))
    guard = Guard(device, patience=min(20, config.max_train_steps))
    update = partial(optimisation.update, optimizer, parameters, guard, config.max_grad_norm)
    return {
        "parameters": parameters,
        "optimizer": optimizer,
        "guard": guard,
        "take_step": update,
    }
