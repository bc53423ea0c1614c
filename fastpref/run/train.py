"""The training loop, read top to bottom. To change it: `cp train.py mine.py`."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..files import differences, identity, model_identity, write_atomic
from ..look.validation import Prompts, draw_sheet
from ..loss.functional import Draws, PairLoss
from ..pairs import dataset as data
from ..process import Times
from ..progress import announced, stage, steps_bar
from ..step import attention, cache, checkpointing, compiling, filling, reference
from ..step.graphs import StepGraph
from ..step.pair import deferred, joint
from . import checkpoint, checks, optimisation
from .assemble import (
    add_lora,
    cache_folder,
    cache_mark,
    frozen_copy,
    load_model,
    make_process,
    open_cache,
    open_data,
    open_run,
    pick_attention,
    place,
    predictor,
    preparer,
    read_record,
    recorded_pass,
)
from .config import Config
from .fitting import exhausted, pick_checkpointing
from .guard import Diverged, Guard, Interrupted, OutOfMemory, Signals, within_memory
from .telemetry import (
    Log,
    Meter,
    announce,
    check_trackers,
    pair_values,
    postfix,
)


def train(config: Config) -> dict[str, Any]:
    """Trains a policy on preference pairs as `config` says; returns the final metrics.

    Written to config.output_dir: config.yaml, metrics.jsonl, checkpoint-N, result.json, a model
    card and the adapter (pytorch_lora_weights.safetensors) or the whole model. Called again with
    the same config it goes on from the last checkpoint, with the same pairs and draws, to bit-equal
    parameters on a CPU.

    Raises:
        ValueError: a mistake in the config or the data, in one line.
        Interrupted: a signal stopped the run after a save.
        Diverged: too many steps in a row were not finite, or a parameter is not in the end.
    """
    folder = Path(config.output_dir)
    device, dtype = place(config)
    start, result = open_run(config, folder)
    if result is not None:
        print(f"{folder} is already trained to step {result['global_step']}")
        return result
    check_trackers(config.trackers)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True)

    # ---- data, model, reference, objective
    family = models.family(config.family)
    dataset = open_data(config, folder)
    torch.manual_seed(config.seed)
    process = make_process(config, family)
    objective = config.make_objective(elements(config, dataset))
    model = load_model(config, family, device, dtype).requires_grad_(config.tuning == "full")
    predict, prepare = predictor(family, device, dtype), preparer(config, dataset, device, dtype)
    first = next(data.batches(dataset, config.train_batch_size, config.seed))

    @torch.no_grad()
    def probe() -> Tensor:
        """What the policy says of the first batch (deferred: of its first member), uncompiled."""
        batch, draws = prepare(*first)
        noisy, t, target = process.noise(batch.latents, draws)
        inputs = (noisy, t, batch.cond)
        if config.pair_mode == "deferred":
            inputs, _ = reference.member(noisy, t, target, batch.cond, 0, len(draws.pair_id))
        with compiling.eagerly():
            return predict(model, *inputs)

    record = folder / "attention.json"
    earlier = read_record(record) if record.exists() and config.attention == "auto" else {}
    if config.reference == "cached" and start is None:
        earlier = cache.recorded(cache_folder(config, dataset))
    backend = pick_attention(config, model, probe, device, earlier)
    write_atomic(record, json.dumps({"attention": backend.name, **asdict(backend)}).encode())
    settings = ExitStack()  # of the process, as long as the run lasts
    settings.enter_context(attention.use(model, backend.name))

    store, asked = None, True  # of the reference's errors; whether it has to say more
    if config.reference == "cached":
        mark = cache_mark(config, dataset, process, device, dtype, backend.name)
        store, asked = open_cache(config, dataset, mark, device)
    frozen = None
    if asked and frozen_copy(config):
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
    if config.tuning == "lora":
        with stage("self-check: forwards of the first batch without adapters, with idle ones"):
            base_says = probe()
            add_lora(model, config, family.LORA_TARGETS)
            checks.check_off(model, probe, base_says)
    kept = pick_checkpointing(config, family, model, dataset, device, dtype, folder, asked)
    checkpointing.apply(model, family.BLOCKS, kept)
    if config.compile:
        print("compiling: each kind of block in the first forward and backward that reach it")
        compiling.compile_blocks(model, family.BLOCKS)
        if frozen is not None:
            compiling.compile_blocks(frozen, family.BLOCKS)
    policy, says = reference.of_run(model, frozen, predict, shared=store is None)
    look_up = None
    if store:
        one = recorded_pass(says, device) if config.cuda_graphs and says else says
        look_up = partial(filling.look_up, store, one, process, prepare)
    parameters = list(checkpoint.trainable(model).values())
    graphs = config.cuda_graphs and device.type == "cuda"
    rate = torch.tensor(config.learning_rate, device=device)  # what a recorded step reads
    optimizer = optimisation.adamw(config, parameters, rate if graphs else None)

    take = {"joint": joint, "deferred": deferred}[config.pair_mode]

    def whole_step(
        latents: Tensor,
        weight: Tensor,
        pair_id: Tensor,
        index: Tensor,
        times: Tensor,
        ref_err: Tensor | None,
        **cond: Tensor,
    ) -> tuple[PairLoss, dict[str, Tensor]]:
        """Noise, reference, policy, loss and backward of one batch, and what the metrics want of
        it, from tensors alone: what a graph records. Gradients add up in `.grad`.
        """
        draws, at = Draws(config.seed, pair_id, index), Times(*times)
        noisy, t, target = process.noise(latents, draws, at)
        out = take(
            policy,
            says if ref_err is None else ref_err,
            noisy,
            t,
            target,
            cond,
            objective,
            gain=at.gain if objective is not None and objective.needs_gain else None,
            weight=weight,
            scale=1 / config.gradient_accumulation_steps,
            parameters=parameters,
            skip_zeros=config.skip_zeros,
        )
        return out, pair_values(out, objective)

    if config.cuda_graphs:
        whole_step = StepGraph(whole_step, device, parameters=parameters)
    whole_step = announced("first batch, forward and backward", whole_step)
    guard = Guard(device, patience=min(20, config.max_train_steps))

    def update() -> Tensor:
        """Clip, look and step; the gradients' norm."""
        grad_norm = optimisation.clip_gradients(parameters, config.max_grad_norm)
        guard.watch(optimizer, grad_norm)
        optimizer.step()
        return grad_norm

    if graphs:
        update = StepGraph(update, device, name="optimiser")

    # ---- where to begin
    begin, noise, metrics, meter = 0, None, {}, Meter(device)
    made_of = {"data": identity(dataset.folder / "index.parquet")}
    made_of["model"] = model_identity(config.model)
    if start is not None:
        state = checkpoint.load(start, model, optimizer)
        changed = differences(state["made_of"], made_of)
        if changed:
            raise ValueError(
                f"{start} was trained on another {changed}: put it back, or choose another "
                "output_dir"
            )
        begin, noise, metrics = state["step"], state["margin_noise"], state["metrics"]
        meter.restore(state["meter"])
        (folder / "result.json").unlink(missing_ok=True)  # of fewer steps
        print(f"resumed from {start}")
    few = partial(checks.first_pairs, dataset, config.train_batch_size, config.seed, prepare)
    # Fully tuned, its errors all there: until its first step the model is its own reference.
    now = says if says or start else reference.base(model, predict)
    try:
        if start is None and objective is not None:
            how = {"pair_mode": config.pair_mode, "beta": objective.beta}
            noise = checks.margin_noise(policy, now, process, few(), **how)
        if store and now and noise is not None:
            how = {"beta": objective.beta, "margin_noise": noise}
            checks.drift(store, now, process, few(), **how)
    except torch.OutOfMemoryError as error:
        raise exhausted(config, error) from None
    config.save(folder / "config.yaml")
    warn_of_repeats(config, dataset.shapes)
    announce(config, model, dataset, objective, device, dtype, noise, kept)
    print(f"attention  {backend}")
    if store:
        print(f"cache      {store}")

    prompts = None
    if config.validation_prompts:
        prompts = Prompts(
            family,
            process,
            config.model,
            config.validation_prompts,
            device,
            dtype,
            config.validation_guidance_scale,
        )

    def validate(step: int) -> None:
        """Clips of the validation prompts, base beside tuned at the same seeds, as pictures."""
        there = (folder / "validation" / f"step-{begin:06d}.png").exists() and step == begin
        if prompts and step % config.validation_steps == 0 and not there:
            shape, steps = dataset[0].latents_w.shape, config.validation_sampling_steps
            advice = (
                "another run may have fewer validation_prompts, this one later validation_steps"
            )
            with within_memory(f"the validation clips: {advice}"):
                draw_sheet(folder / "validation", step, prompts, model, shape, steps)

    validate(begin)

    def save(step: int) -> None:
        """A checkpoint that the run goes on from."""
        if store:
            store.flush()
        state = {"margin_noise": noise, "made_of": made_of}
        state |= {"meter": meter.state(), "metrics": metrics}
        checkpoint.save(folder, step, model, optimizer, state, config.checkpoints_total_limit)

    # ---- the loop
    log = Log(folder, config.trackers, config.to_dict(), begin)
    accumulate = config.gradient_accumulation_steps
    per_step = config.train_batch_size * accumulate
    batches = data.batches(
        dataset,
        config.train_batch_size,
        config.seed,
        start=begin * accumulate,
        num_workers=config.num_workers,
        pin_memory=device.type == "cuda",
    )
    progress = steps_bar(config.max_train_steps, begin)
    interrupted = Signals()
    waited, since, step, logged, saved = 0.0, time.perf_counter(), begin, begin, begin
    clock = time.perf_counter()
    meter.begin()
    try:
        while step < config.max_train_steps:
            for _ in range(accumulate):
                fetched = time.perf_counter()
                epoch, batch = next(batches)
                waited += time.perf_counter() - fetched
                batch, draws = prepare(epoch, batch)
                times = torch.stack(process.times(draws)).to(device, non_blocking=True)
                ref_err = look_up(epoch, batch, draws) if look_up else None
                out, values = whole_step(
                    latents=batch.latents,
                    weight=batch.weight,
                    pair_id=draws.pair_id,
                    index=draws.index,
                    times=times,
                    ref_err=ref_err,
                    **batch.cond,
                )
                meter.add(values, Times(*times).level)
            lr = config.learning_rate * optimisation.schedule(config, step)
            for group in optimizer.param_groups:
                group["lr"] = rate.fill_(lr) if graphs else lr
            grad_norm = update()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            meter.begin()
            progress.update()
            if step == 1 and config.tuning == "lora":
                checks.check_on(model, probe)
            if step == max(begin, 1) + 1 and config.tuning == "lora":  # began with adapters
                checks.check_step(out.err, out.ref_err)

            if step % config.logging_steps == 0 or step == config.max_train_steps:
                metrics = meter.flush(by_level=("rewards/margins", "importance/weight"))
                meter.begin()
                now = time.perf_counter()
                metrics |= {
                    "grad_norm": grad_norm.item(),
                    "learning_rate": lr,
                    "perf/seconds_per_pair": (now - since) / ((step - logged) * per_step),
                    "perf/data_wait_fraction": waited / (now - since),
                }
                if store:
                    metrics["perf/reference_cached"] = store.share()
                if device.type == "cuda":
                    metrics["perf/peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
                waited, since, logged = 0.0, now, step
                log.write({"global_step": step, "epoch": epoch, **metrics})
                progress.set_postfix_str(postfix(metrics))
                if progress.disable:  # no terminal
                    line = f"step {step} of {config.max_train_steps}: {postfix(metrics)}"
                    print(line, file=sys.stderr)
                warning = guard.judge(metrics, step)
                if warning:
                    progress.write(f"warning: {warning}", file=sys.stderr)
            last, stop = step == config.max_train_steps, bool(interrupted)
            if step % config.checkpointing_steps == 0 or last or stop:
                began = time.perf_counter()
                save(step)
                saved = step
                since += time.perf_counter() - began  # training's time alone
            began = time.perf_counter()
            validate(step)
            since += time.perf_counter() - began
            if stop and not last:
                raise Interrupted(
                    f"saved at step {step} in {folder}; run the same command to go on"
                )
    except (torch.OutOfMemoryError, OutOfMemory) as error:
        meter.forget()
        if step > saved:
            save(step)
        raise exhausted(config, error) from None
    finally:
        if store:
            store.flush()
        interrupted.restore()
        settings.close()
        progress.close()
        log.close()

    if not all(p.isfinite().all() for p in parameters):
        raise Diverged(f"{folder}: a trained parameter is not finite: try a lower learning_rate")
    artifact = checkpoint.export(folder, model)
    card = checkpoint.model_card(config.to_dict(), artifact.name, made_of["data"], len(dataset))
    write_atomic(folder / "README.md", card.encode())
    spent, pairs = time.perf_counter() - clock, (step - begin) * per_step
    result = {
        "global_step": step,
        "seconds_per_pair": spent / pairs if pairs else metrics["perf/seconds_per_pair"],
        "margin_noise": noise,
        "artifact": str(artifact),
        "output_dir": str(folder),
        "metrics": metrics,
    }
    write_atomic(folder / "result.json", json.dumps(result, indent=1).encode())
    return result


def elements(config: Config, dataset: data.PairDataset) -> int:
    """Of a sample: what a sum convention of beta is a sum over. ValueError: samples differ."""
    texts = {text for shapes in set(dataset.shapes) for text in shapes.split()}
    latents = [text.partition(":")[2] for text in texts if text.startswith("latents_w:")]
    counts = {math.prod(map(int, shape.split("x"))) for shape in latents}
    if len(counts) > 1 and config.beta_convention in ("half_sum", "sum"):
        raise ValueError(
            f"beta_convention {config.beta_convention}: one beta cannot fit latents of "
            f"{min(counts)} and of {max(counts)} elements; use half_mean or mean"
        )
    return dataset[0].latents_w.numel()


def warn_of_repeats(config: Config, shapes: list[str]) -> None:
    """With K draws per pair, epochs beyond K repeat earlier draws. An epoch is as many batches as
    its pairs fill: those left over wait for another one.
    """
    batches = config.max_train_steps * config.gradient_accumulation_steps
    epochs = batches / data.batches_per_epoch(shapes, config.train_batch_size)
    if config.draws_per_pair and epochs > config.draws_per_pair:
        print(
            f"warning: {epochs:.1f} epochs with draws_per_pair {config.draws_per_pair}: "
            "later epochs repeat the same timesteps and noise",
            file=sys.stderr,
        )
