"""What a run says before its first step: what was picked, a line each."""

from __future__ import annotations

import torch

from .. import ranks
from ..pairs import order
from ..progress import printable, warn
from ..step.pair import in_shards
from .assemble import Run
from .config import Config


def announce(run: Run) -> None:
    """Says what was picked, a line each."""
    config = run.config
    warn_of_repeats(config, run.dataset.shapes)
    auto = "adapters_off" if config.tuning == "lora" else "frozen_copy"
    mode = auto if config.reference == "auto" else config.reference
    noise = "" if run.margin_noise is None else f", margin noise {run.margin_noise:.2g}"
    announce_model(run)
    print(f"data       {len(run.dataset)} pairs, {run.pairs_per_step} per step")
    if lost := order.left_out(run.dataset.shapes, config.train_batch_size):
        warn(lost)
    print(f"objective  {run.objective or 'sft on the chosen clips'}")
    print(f"reference  {mode}{noise}")
    announce_running(run, config.pair_mode + (", CUDA graphs" if config.cuda_graphs else ""))
    if run.cache:
        print(printable(f"cache      {run.cache}"))


def announce_model(run: Run) -> None:
    trained = sum(p.numel() for p in run.parameters)
    total = sum(p.numel() for p in run.model.parameters())
    model = printable(f"{run.config.family} {run.config.model}")
    print(f"model      {model}: {trained:,} of {total:,} parameters train")


def announce_running(run: Run, mode: str) -> None:
    where = (
        torch.cuda.get_device_name(run.device)
        if run.device.type == "cuda"
        else f"{torch.get_num_threads()} CPU thread{'s' * (torch.get_num_threads() > 1)}"
    )
    precision = str(run.dtype).removeprefix("torch.")
    if ranks.world() > 1:
        mesh = run.mesh
        apart = ", winners and losers apart" if mesh.members == 2 else ""
        apart += f", {mesh.contexts} share a clip" if mesh.contexts > 1 else ""
        apart += ", the model in shards" if in_shards(list(run.model.parameters())) else ""
        where = f"{ranks.world()} processes{apart}, each on {where}"
    print(
        f"running    {where}, {precision}, {mode}, checkpointing {run.checkpointing}"
        + (", compiled blocks" if run.config.compile else "")
    )
    print(f"attention  {run.attention}")


def warn_of_repeats(config: Config, shapes: list[str]) -> None:
    """With K draws per pair, epochs beyond K repeat earlier draws. An epoch is as many batches as
    its pairs fill: those left over wait for another one.
    """
    count = config.max_train_steps * config.gradient_accumulation_steps
    per_epoch = order.batches_per_epoch(shapes, config.train_batch_size)
    if config.draws_per_pair and count > config.draws_per_pair * per_epoch:
        warn(
            f"{count / per_epoch:.1f} epochs with draws_per_pair {config.draws_per_pair}: later "
            "epochs repeat the same timesteps and noise"
        )
