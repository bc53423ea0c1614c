"""The Run of `fastpref spo`, and what it samples with, from its config."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import model_identity
from ..models.encoders import check_size, open_pipeline
from ..models.folder import scheduler_config, scheduler_of
from ..process import Diffusion, FlowMatching
from ..progress import stage
from ..run import belong
from ..run.assemble import Run, begun
from ..run.parts import frozen_copy, make_process, predictor
from ..run.policy import adapt, attention_of, base_model, begin, recomputation, settle, trained
from ..run.telemetry import Meter
from ..step import attention, compiling, reference
from ..step.guidance import guided
from .config import SPOConfig
from .decoding import Decode, decoder
from .grid import network_times, steps
from .prompts import PromptSet, read_prompts
from .resampler import Resampler
from .scorers import Scorer, open_scorer


@dataclass(kw_only=True)
class Online:
    """What a run samples with, beside its policy.

    rows: of the prompts that train; held_out: of those that the win rate is of.
    """

    prompts: PromptSet
    rows: list[int]
    held_out: list[int]
    resampler: Resampler
    scorer: Scorer
    decode: Decode
    decode_batch: int
    scheduler: Any  # what the win rate's samples are drawn with
    shape: torch.Size

    def score(self, clean: Tensor, rows: list[int], t: float) -> Tensor:
        """Scores [N] of samples or their x0-hat [N, ...], decoded a few at once."""
        texts, found = [self.prompts.prompts[row] for row in rows], []
        for i in range(0, len(rows), self.decode_batch):
            some = slice(i, i + self.decode_batch)
            frames = self.decode(clean[some])
            times = torch.full((len(frames),), t, dtype=torch.float64)
            found.append(self.scorer(frames, texts[some], times))
        return torch.cat(found)


def split(prompts: PromptSet, held_out: int) -> tuple[list[int], list[int]]:
    """(rows that train, rows that are held out): those of the least ids are held out."""
    order = sorted(range(len(prompts)), key=lambda row: int(prompts.ids[row]))
    if held_out >= len(prompts):
        raise ValueError(
            f"win_rate_prompts {held_out} leaves none of {len(prompts)} prompts to train on: "
            "lower it, or give more prompts"
        )
    return sorted(order[held_out:]), order[:held_out]


def rows_per_pair(config: SPOConfig) -> int:
    """Of the network in training: with guidance the empty prompt's too, with roll-outs those of
    both members, whose x_t differ from the second step on.
    """
    return (1 if config.guidance_scale == 1 else 2) * (1 if config.rollout_steps == 1 else 2)


def resampler_of(config: SPOConfig, process: FlowMatching | Diffusion) -> Resampler:
    """On the steps of a sampler over the model's noising, spaced as its scheduler says."""
    count, spacing = config.sampling_steps, config.timestep_spacing
    times = network_times(process, scheduler_config(config.model), count, spacing)
    return Resampler(
        steps=steps(process, times, eta=config.eta, window=config.sde_window),
        rows=config.sample_rows,
        **config.only("candidates", "first_step", "rollout_steps", "threshold", "seed"),
    )


def assemble(
    config: SPOConfig, device: torch.device, dtype: torch.dtype, start: Path | None = None
) -> tuple[Run, Online]:
    """Reads and embeds the prompts, opens the scorer, loads the model, puts in adapters.

    start: a checkpoint to go on from.

    Raises:
        ValueError: a mistake in the config or the data, in one line.
    """
    folder = Path(config.output_dir)
    family = begin(config)
    size = (config.num_frames, config.height, config.width)
    check_size(family, config.model, *size)
    belong.check(family, config.model)
    process = make_process(family, config.model)
    resampler = resampler_of(config, process)
    run: Run | None = None  # made below

    def stopping() -> bool:
        return bool(getattr(run, "stop", False))

    # In float32: half a digit of a logit in bfloat16 is a good part of a threshold.
    how = {"device": device, "dtype": torch.float32, "timeout": config.scorer_timeout}
    with stage("opening the scorer"):
        scorer = open_scorer(config.scorer, **how, stopping=stopping)
    texts = read_prompts(config.data)
    prompts = PromptSet(texts, folder / "prompts", family, config.model, dtype, device)
    rows, held_out = split(prompts, config.win_rate_prompts)
    pipe = open_pipeline(family, config.model, dtype, device)
    with stage("the decoder, and the shape of its latents"):
        shape = family.encode_media(pipe, torch.zeros(*size, 3, dtype=torch.uint8)).shape
        decode = decoder(config, family, pipe)

    torch.manual_seed(config.seed)
    model = base_model(config, family, device, dtype)
    empty = {name: value.to(device) for name, value in prompts.empty_cond.items()}
    predict = guided(predictor(family, device, dtype), empty, config.guidance_scale)
    some = rows[: config.train_batch_size]
    first = prompts.cond(some, device)
    start_at = torch.full((len(some),), resampler.steps[0].t, device=device)
    generator = torch.Generator().manual_seed(config.seed)
    noisy = torch.randn(len(some), *shape, generator=generator).to(device, dtype)

    @torch.no_grad()
    def probe() -> Tensor:
        with compiling.eagerly():
            return predict(model, noisy, start_at, first)

    backend = attention_of(config, model, probe, device)
    settings = ExitStack()
    settings.enter_context(attention.use(model, backend.name))
    frozen = None
    if frozen_copy("auto", config.tuning):
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
    adapt(config, family, model, probe)
    cond = {name: value[:1].to("meta") for name, value in first.items()}
    largest = (torch.empty(1, *shape, device="meta"), cond)
    needs = {"online": True, "pairs": (config.train_batch_size * rows_per_pair(config) + 1) // 2}
    mode = recomputation(config, family, model, largest, device, dtype, **needs)
    settle(config, family, model, frozen, mode)
    policy, says = reference.of_run(model, frozen, predict, shared=True)
    made_of = {"data": prompts.identity, "model": model_identity(config.model)}
    made_of["scorer"] = model_identity(config.scorer)
    run = Run(
        config=config,
        folder=folder,
        device=device,
        dtype=dtype,
        family=family,
        dataset=prompts,
        process=process,
        objective=config.objective,
        model=model,
        predict=predict,
        policy=policy,
        reference=says,
        sample_shape=lambda: shape,
        probe=probe,
        meter=Meter(device),
        made_of=made_of,
        attention=backend,
        checkpointing=mode,
        settings=settings,
        **trained(config, model, device),
    )
    begun(run, start)
    online = Online(
        prompts=prompts,
        rows=rows,
        held_out=held_out,
        resampler=resampler,
        scorer=scorer,
        decode=decode,
        decode_batch=config.decode_batch,
        scheduler=scheduler_of(pipe, config.model),
        shape=shape,
    )
    return run, online
