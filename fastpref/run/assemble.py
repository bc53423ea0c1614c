"""A Run from a config: what a loop needs, made once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import ranks
from ..files import differences, identity, model_identity
from ..look.validation import Prompts
from ..loss.functional import Draws
from ..loss.objectives import Objective
from ..mesh import Mesh
from ..pairs.dataset import Batch, PairDataset, batches
from ..process import Diffusion, FlowMatching
from ..progress import printable
from ..step import attention, cache, compiling, filling, reference
from ..step.graphs import recorded_pass
from ..step.pair import in_shards
from . import belong, checkpoint
from .config import Config
from .guard import Guard, Signals
from .options import Options
from .parts import (
    elements,
    first_words,
    frozen_copy,
    make_process,
    open_cache,
    open_data,
    predictor,
    preparer,
    weights_dtype,
)
from .policy import (
    adapt,
    attention_of,
    base_copy,
    base_model,
    begin,
    mesh_of,
    recomputation,
    settle,
    share_out,
    trained,
    wants_shards,
)
from .telemetry import Clock, Log, Meter

# Fields of a config that are options of what is built from them.
DATA = ("family", "model", "device", "num_frames", "height", "width", "fps")
NOISE = (
    "timestep_range",
    "time_sampling",
    "logit_mean",
    "logit_std",
    "shift",
    "importance_steps",
)
DRAWS = ("seed", "draws_per_pair", "prompt_dropout")

# (epoch, batch, its draws) -> the reference's errors [2B] float64, or None: the reference is asked
Known = Callable[[int, Batch, Draws], Tensor | None]


def nothing_known(epoch: int, batch: Batch, draws: Draws) -> None:
    """Without a cache."""


@dataclass(kw_only=True)
class Loop:
    """What any loop needs of what `bookkeeping` does with it beside its own step."""

    config: Options
    folder: Path
    device: torch.device
    dtype: torch.dtype
    dataset: PairDataset
    model: nn.Module  # what trains
    parameters: list[Tensor]
    optimizer: torch.optim.Optimizer
    take_step: Callable[[], Tensor]  # clip, guard, optimiser; the gradients' norm
    guard: Guard
    meter: Meter
    made_of: dict[str, str]  # identities of data and model
    settings: ExitStack  # of the process, as long as the loop lasts
    cache: cache.ErrorCache | None = None
    prepare: filling.Prepare | None = None  # None: its batches are the loop's own

    mesh: Mesh = field(default_factory=Mesh)  # how several processes share a step
    lockstep: bool = False  # whether they exchange tensors within it
    saving: Callable[[], Path] | None = None  # waits for a save that is under way
    saves_by: Any = None  # the process group of such saves
    start: Path | None = None  # the checkpoint that it goes on from
    begin: int = 0  # its step
    step: int = 0  # optimiser steps that are done
    saved: int = 0
    margin_noise: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)  # of the last line of the log
    own: dict[str, Any] = field(default_factory=dict)  # what a loop keeps in checkpoints for itself

    # As long as a loop is at work (`bookkeeping.at_work`).
    batches: Iterator[tuple[int, Batch, Draws]] = field(init=False)  # (epoch, batch, draws)
    journal: Log = field(init=False)
    bar: tqdm = field(init=False)
    clock: Clock = field(init=False)
    learning_rate: float = field(init=False)  # of the last step
    stop: Signals = field(init=False)  # true: it was asked to

    @property
    def pairs_per_step(self) -> int:
        """Of all processes together."""
        return self.config.train_batch_size * self.config.gradient_accumulation_steps

    @property
    def batches_per_step(self) -> int:
        """Of this process."""
        return self.mesh.batches(self.config.gradient_accumulation_steps)

    @property
    def done(self) -> bool:
        return self.step >= self.config.max_train_steps

    def due(self, every: int) -> bool:
        """Each so many steps, and after the last one."""
        return self.step % every == 0 or self.done


@dataclass(kw_only=True)
class Run(Loop):
    """What a loop needs that trains a policy."""

    config: Config
    family: ModuleType
    process: FlowMatching | Diffusion
    objective: Objective | None  # None: sft
    predict: reference.Predict
    policy: reference.Policy
    reference: reference.Reference | None  # None: the cache knows all that it would say
    sample_shape: Callable[[], torch.Size]  # of the latents of validation clips
    probe: Callable[[], Tensor]  # what the policy says of the first batch
    attention: attention.Choice
    checkpointing: str
    known: Known = nothing_known
    exchange: Callable[[Tensor], Tensor] | None = None  # with whom has a pair's other member
    prompts: Prompts | None = None  # to validate with


def assemble(
    config: Config, device: torch.device, dtype: torch.dtype, start: Path | None = None
) -> Run:
    """Reads the data, loads the model, puts in adapters, and makes all else that `config` says.

    start: a checkpoint to go on from.

    Raises:
        ValueError: a mistake in the config or the data, in one line.
    """
    folder = Path(config.output_dir)
    family = begin(config)
    mesh, shards = mesh_of(config), wants_shards(config)
    dataset = open_data(config.data, folder, dtype=dtype, **config.only(*DATA))
    torch.manual_seed(config.seed)
    objective = config.make_objective(elements(dataset, config.beta_convention))
    process = make_process(family, config.model, **noising(config))
    model = base_model(config, family, device, dtype)
    belong.warn_of_another_model(config.model, dataset)
    predict = predictor(family, device, dtype)
    prepare = preparer(dataset, device, dtype, **config.only(*DRAWS))
    first = next(batches(dataset, config.train_batch_size, config.seed))
    probe = partial(first_words, model, predict, process, prepare, first, config.pair_mode)

    kept = None  # attention of the cached errors that a new run begins with
    if config.reference == "cached" and start is None:
        kept = cache.recorded(cache_folder(config.reference_cache, dataset))
    backend = attention_of(config, model, probe, device, kept, contexts=mesh.contexts)
    settings = ExitStack()
    settings.enter_context(attention.use(model, backend.name))

    store, asked = None, True  # of the reference's errors; whether it has to say more
    if config.reference == "cached":
        store, asked = cached(config, dataset, process, device, dtype, backend.name)
    frozen = None
    if asked and frozen_copy(config.reference, config.tuning):
        # Of one in shards from disk again: two whole ones may not fit a card.
        frozen = base_copy(config, family, dtype) if shards else copy.deepcopy(model)
        frozen = frozen.eval().requires_grad_(False)
        settings.enter_context(attention.use(frozen, backend.name))
    adapt(config, family, model, probe)
    needs = {"online": asked, "pairs": config.train_batch_size}
    recomputed = recomputation(config, family, model, dataset.largest(), device, dtype, **needs)
    settle(config, family, model, frozen, recomputed)
    share_out(config, family, model, frozen, dataset, settings, device, backend.name, recomputed)
    policy, says = reference.of_run(model, frozen, predict, shared=store is None)
    known: Known = nothing_known
    if store:
        one = recorded_pass(says, device) if config.cuda_graphs and says else says
        together = shards or mesh.contexts > 1
        known = partial(filling.look_up, store, one, process, prepare, together=together)

    recorded = device if config.cuda_graphs and device.type == "cuda" else None
    made_of = {"data": identity(dataset.folder / "index.parquet")}
    made_of["model"] = model_identity(config.model)
    run = Run(
        config=config,
        folder=folder,
        device=device,
        dtype=dtype,
        family=family,
        dataset=dataset,
        process=process,
        objective=objective,
        model=model,
        predict=predict,
        policy=policy,
        reference=says,
        cache=store,
        known=known,
        prepare=prepare,
        sample_shape=lambda: dataset[0].latents_w.shape,
        probe=probe,
        meter=Meter(device),
        made_of=made_of,
        attention=backend,
        checkpointing=recomputed,
        settings=settings,
        mesh=mesh,
        lockstep=shards or mesh.shares < ranks.world(),
        exchange=mesh.exchange() if mesh.members == 2 else None,
        **trained(config, model, device, recorded),
    )
    begun(run, start)
    return run


def begun(run: Loop, start: Path | None) -> None:
    """A look at whether all processes are of one run, and the state of the checkpoint that it goes
    on from.
    """
    ranks.check_same("what the run is made of", run.made_of)
    if in_shards(run.parameters):
        run.saves_by = torch.distributed.new_group(backend="gloo")
    if start is not None:
        restore(run, start)


def restore(run: Loop, start: Path) -> None:
    """Takes over the state of the checkpoint that the run goes on from."""
    state = checkpoint.load(start, run.model, run.optimizer)
    changed = differences(state["made_of"], run.made_of)
    if changed:
        raise ValueError(
            f"{start} was trained on another {changed}: put it back, or choose another output_dir"
        )
    run.begin = run.step = run.saved = state["step"]
    run.margin_noise, run.metrics = state["margin_noise"], state["metrics"]
    run.own = state.get("own", {})
    run.meter.restore(state["meter"], start)
    if ranks.main():
        (run.folder / "result.json").unlink(missing_ok=True)  # of fewer steps
    run.start = start
    print(printable(f"resumed from {start}"))


def cached(
    config: Config,
    dataset: PairDataset,
    process: FlowMatching | Diffusion,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
) -> tuple[cache.ErrorCache, bool]:
    """The reference's errors that the run keeps, and whether it will ask for some that are not
    there; backend: of the attention.
    """
    mark = cache_mark(config, dataset, process, device, dtype, backend)
    folder = cache_folder(config.reference_cache, dataset)
    count = config.max_train_steps * config.gradient_accumulation_steps
    store, asked = open_cache(folder, mark, dataset, device, model=config.model, batches=count)
    return store, any(ranks.gathered(asked))


def cache_folder(reference_cache: str | None, dataset: PairDataset) -> Path:
    """Where a run's cached reference errors are."""
    return Path(reference_cache or dataset.folder / "reference")


def cache_mark(
    config: Config,
    dataset: PairDataset,
    process: Any,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
) -> dict[str, Any]:
    """The fingerprint of the run's cached reference errors; backend: of the attention."""
    rounding = [f"{name}={value}" for name, value in compiling.AS_EAGER.items()]
    kept = weights_dtype(config.tuning, dtype)
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
        weights_dtype=str(kept).removeprefix("torch."),
        prompt_dropout=config.prompt_dropout,
    )


def noising(config: Config) -> dict[str, Any]:
    """The options of the run's process.

    dpo_cm and sdpo draw no times at which their weight is 0 whatever the model says
    (`Process.unmasked`), except with sft_weight, as a mask removes no SFT term, and with a cached
    reference: its errors belong to the draws, and one cache serves every objective.
    """
    rule = config.make_objective(elements=1)
    masked = rule is not None and rule.has_importance and not rule.sft_weight
    masked = masked and config.reference != "cached"
    return {**config.only(*NOISE), "strata": config.draws_per_pair, "masked": masked}
