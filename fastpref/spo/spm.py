"""`fastpref spm`: trains the step-aware preference model, in a loop read top to bottom.

Both members of a pair get the same noise at a uniform t; the frozen base predicts under guidance,
x0-hat is decoded, and the model learns from a picture like those that it will judge while a sampler
is on its way which of the two people preferred (arXiv 2406.04314).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from .. import ranks
from ..files import identity, model_identity, write_atomic
from ..loss.functional import Draws
from ..models.encoders import open_pipeline
from ..pairs.dataset import Batch, Pair, collate
from ..pairs.order import epoch_batches, left_out
from ..process import Diffusion, FlowMatching, Times, estimates
from ..progress import printable, stage, warn
from ..run import belong, sharding
from ..run import bookkeeping as book
from ..run.assemble import DATA, Loop, begun
from ..run.folder import open_run
from ..run.guard import Diverged, within_memory
from ..run.parts import load_model, make_process, open_data, place, predictor, preparer
from ..run.policy import begin, trained
from ..run.telemetry import BINS, Meter
from ..step.guidance import guided
from .decoding import Decode, decoder
from .labels import Subset, example_weights, given, relabelled, split
from .preference_model import StepAwarePreferenceModel, check_folder
from .spm_config import SPMConfig

ARTIFACT = "preference_model"
# What a label by the plain model hangs on, beside data, model and CLIP.
JUDGED = ("frames", "frames_scored", "decoder", "decode_frames", "mixed_precision")
MEMORY = (
    "a step: run it again with a smaller --train_batch_size (and more "
    "--gradient_accumulation_steps), or --tune modulation"
)


@dataclass(kw_only=True)
class Run(Loop):
    """What the loop needs beside what any does."""

    config: SPMConfig
    model: StepAwarePreferenceModel
    dataset: Subset
    held: Subset  # pairs with a winner that accuracy is measured on
    process: FlowMatching | Diffusion
    predict: Callable[..., Tensor]  # the frozen base's, guided
    decode: Decode
    labels: dict[int, float]  # pair id -> probability that the first is preferred
    weights: dict[int, float]  # pair id -> how much it counts


def train(config: SPMConfig) -> dict[str, Any]:
    """Trains a preference model as `config` says; returns the final metrics.

    Written to config.output_dir: config.yaml, metrics.jsonl, checkpoint-N, result.json and
    preference_model/ (`StepAwarePreferenceModel.from_pretrained` reads it). Called again with the
    same config it goes on from the last checkpoint to bit-equal parameters on a CPU.

    Raises:
        ValueError: a mistake in the config or the data, in one line.
        Interrupted: a signal stopped the run after a save.
        Diverged: too many steps in a row were not finite, or a parameter is not in the end.
    """
    device, dtype = place(config.device, config.mixed_precision)
    start, result = ranks.by_main(partial(open_run, config, "spm"))
    if result is not None:
        return result
    run = assemble(config, device, dtype, start)
    announce(run)
    with book.at_work(run), within_memory(MEMORY):
        if run.step == 0:
            evaluate(run)
        while not run.done:
            for _ in range(run.batches_per_step):
                epoch, batch, draws = next(run.batches)
                times = run.process.times(draws)
                clips = decoded_estimates(run, batch, draws, times)
                scores = scored(run, clips, batch.prompts, times.t)
                loss, right = preference_loss(scores, run.labels, draws.pair_id)
                weight = by_pair(run.weights, draws.pair_id, device)
                ((weight * loss).mean() / config.gradient_accumulation_steps).backward()
                run.meter.add({"loss": weight * loss, "accuracy": right}, times.level.to(device))
            grad_norm = book.update(run)
            if run.due(config.logging_steps):
                book.log(run, epoch, grad_norm)
            with run.clock.paused():  # no part of a pair's seconds
                if run.due(config.eval_steps):
                    evaluate(run)
                if run.due(config.checkpointing_steps) or run.stop:
                    book.save(run)
            book.leave_if_asked(run)
    return finish(run)


# ---- The step


@torch.no_grad()
def decoded_estimates(run: Run, batch: Batch, draws: Draws, times: Times) -> list[Tensor]:
    """Each member's x0-hat, decoded: 2B clips uint8 [F, H, W, 3], winners first. Both members of a
    pair have the same noise; all are predicted in one call.
    """
    noisy, t, _ = run.process.noise(batch.latents, draws, times)
    pred = run.predict(noisy, t, batch.cond)
    mix = torch.stack([times.a, times.s, times.p, times.q]).float().to(noisy.device).repeat(1, 2)
    a, s, p, q = mix.view(4, -1, *[1] * (noisy.dim() - 1))
    clean, _ = estimates(noisy.float(), pred.float(), a, s, p, q)
    return run.decode(clean)


def scored(run: Run, clips: list[Tensor], prompts: list[str], t: Tensor) -> Tensor:
    """Scores [2B] of both members at their pair's t [B], in the run's precision."""
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
        return run.model(clips, prompts * 2, t.repeat(2))


def preference_loss(
    scores: Tensor, labels: dict[int, float], pair_id: Tensor
) -> tuple[Tensor, Tensor]:
    """(cross-entropy [B] of the softmax over a pair's two scores [2B]; whether it was right [B],
    of a tie and of equal scores a half).
    """
    margin = scores.view(2, -1)[0] - scores.view(2, -1)[1]
    label = by_pair(labels, pair_id, margin.device)
    loss = -(label * logsigmoid(margin) + (1 - label) * logsigmoid(-margin))
    return loss, 0.5 + 0.5 * (margin.detach() * (label - 0.5)).sign()


def by_pair(values: dict[int, float], pair_id: Tensor, device: torch.device) -> Tensor:
    """What is known of pairs, [B] float64."""
    return torch.tensor([values[i] for i in pair_id.tolist()], dtype=torch.float64, device=device)


# ---- Around it


def assemble(
    config: SPMConfig, device: torch.device, dtype: torch.dtype, start: Path | None = None
) -> Run:
    """Reads the data, loads base and CLIP, labels the pairs, and makes all else.

    Raises:
        ValueError: a mistake in the config or the data, in one line.
    """
    folder = Path(config.output_dir)
    family = begin(config)
    check_folder(config.clip)  # before hours of encoding
    whole = open_data(config.data, folder, dtype=dtype, ties=True, **config.only(*DATA))
    rows, held = split(whole, config.held_out)
    torch.manual_seed(config.seed)
    with stage("loading the preference model"):
        model = StepAwarePreferenceModel.from_pretrained(
            config.clip, device=device, frames=config.frames, num_frames=config.frames_scored
        )
    tunes(model, config.tune)
    process = make_process(family, config.model)
    if isinstance(process, FlowMatching):
        process = process.replace(shift=1.0)  # t is uniform
    base = load_model(family, config.model, device, dtype)
    belong.warn_of_another_model(config.model, whole)
    decode = decoder(config, family, open_pipeline(family, config.model, dtype, device))
    made_of = {"data": identity(whole.folder / "index.parquet")}
    made_of |= {"model": model_identity(config.model), "clip": model_identity(config.clip)}
    labels = given(whole)
    if config.relabel == "clip":
        mark = made_of | config.only(*JUDGED)
        judge = partial(clean_margin, model, decode, dtype)
        labels = relabelled(whole, folder, mark, config.tie_margin, judge)
    won = [i for i in held if labels[whole.pair_ids[i]] != 0.5]
    run = Run(
        config=config,
        folder=folder,
        device=device,
        dtype=dtype,
        dataset=Subset(whole, rows),
        held=Subset(whole, won[: config.eval_pairs]),
        process=process,
        model=model.train(),
        predict=predicting(family, base, whole.empty_cond, config.guidance_scale, dtype, device),
        decode=decode,
        labels=labels,
        weights=example_weights(whole, rows),
        prepare=preparer(
            whole, device, dtype, seed=config.seed, draws_per_pair=None, prompt_dropout=0.0
        ),
        meter=Meter(device),
        made_of=made_of,
        settings=ExitStack(),
        **trained(config, model, device),
    )
    begun(run, start)
    return run


def tunes(model: StepAwarePreferenceModel, what: str) -> None:
    """Makes train what `tune` says."""
    fixed = {"all": (), "vision": ("clip.text", "clip.logit_scale"), "modulation": ("clip.",)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(fixed[what]))


def predicting(
    family: ModuleType,
    base: nn.Module,
    empty: dict[str, Tensor],
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]:
    """The frozen base's guided prediction."""
    empty = {name: value.to(device) for name, value in empty.items()}
    return partial(guided(predictor(family, device, dtype), empty, scale), base)


@torch.no_grad()
def clean_margin(
    model: StepAwarePreferenceModel,
    decode: Decode,
    dtype: torch.dtype,
    pair: Pair,
) -> float:
    """What an untrained model says of a pair's clean latents: the logit of the first."""
    clips = decode(torch.stack([pair.latents_w, pair.latents_l]))
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        first, second = model(clips, [pair.prompt] * 2, torch.zeros(2)).tolist()
    return first - second


def announce(run: Run) -> None:
    """Says what was picked, a line each."""
    config, pairs = run.config, run.dataset
    count = sum(p.numel() for p in run.parameters)
    total = sum(p.numel() for p in run.model.parameters())
    ties = sum(run.labels[pairs.whole.pair_ids[i]] == 0.5 for i in pairs.rows)
    print(printable(f"model      {config.clip}: {count:,} of {total:,} parameters train"))
    guidance = f"guidance {config.guidance_scale:g}"
    print(printable(f"base       {config.family} {config.model}, {guidance}"))
    print(f"data       {len(pairs)} pairs ({ties} ties), {run.pairs_per_step} per step")
    if lost := left_out(pairs.shapes, config.train_batch_size):
        warn(lost)
    print(f"accuracy   on {len(run.held)} pairs of other prompts, each at {BINS} timesteps")
    if not len(run.held):
        warn("no pair is held out, so no accuracy is measured: raise held_out, or add prompts")


@torch.no_grad()
def evaluate(run: Run) -> None:
    """Accuracy on the held-out pairs, each at one fixed draw in each of BINS parts of t, to the log
    and to what checkpoints keep; beside it that of the plain model, the first that was measured.
    """
    if not len(run.held):
        return
    meter, process = Meter(run.device), run.process.replace(strata=BINS)
    run.model.eval()
    size = run.config.train_batch_size
    rows = list(epoch_batches(run.held.shapes, size, seed=0, epoch=0, rest=True))
    for batch in (collate([run.held[i] for i in some]) for some in run.mesh.dealt(rows)):
        for index in range(BINS):
            on_device, draws = run.prepare(index, batch)
            times = process.times(draws)
            clips = decoded_estimates(run, on_device, draws, times)
            scores = scored(run, clips, batch.prompts, times.t)
            loss, right = preference_loss(scores, run.labels, draws.pair_id)
            meter.add({"eval/loss": loss, "eval/accuracy": right}, times.level.to(run.device))
    run.model.train()
    found = meter.flush(by_level=("eval/accuracy",))
    plain = {name.replace("eval/", "eval/plain_"): value for name, value in found.items()}
    run.own = plain | run.own | found
    run.journal.write({"global_step": run.step, **run.own})
    said = f"accuracy {found['eval/accuracy']:.3f}, plain {run.own['eval/plain_accuracy']:.3f}"
    run.bar.write(f"step {run.step}: {said}")


def finish(run: Run) -> dict[str, Any]:
    """Writes the model and result.json; the final metrics.

    Raises:
        Diverged: a parameter is not finite.
    """
    folder, exported = run.folder, run.folder / ARTIFACT
    if not sharding.finite(run.parameters):
        raise Diverged(f"{folder}: a trained parameter is not finite: try a lower learning_rate")
    ranks.by_main(partial(run.model.save_pretrained, exported))
    speed = run.clock.seconds_per_pair(run.step, run.pairs_per_step)
    result = {
        "global_step": run.step,
        "seconds_per_pair": speed or run.metrics["perf/seconds_per_pair"],
        "artifact": str(exported),
        "output_dir": str(folder),
        "metrics": run.metrics | run.own,
    }
    text = json.dumps(result, indent=1).encode()
    ranks.by_main(partial(write_atomic, folder / "result.json", text))
    return result
