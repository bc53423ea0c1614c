"""The training loop, read top to bottom. To change it: `cp train.py mine.py`."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from . import checkpoint, data, encode, models, reference
from .config import FREE_FIELDS, Config
from .files import identity, write_atomic
from .functional import Draws, PairLoss, loss_from_errors, pair_error, preference_loss
from .guard import Guard, Interrupted, Signals
from .models.folder import scheduler_config
from .objectives import DPO
from .oracle import PROMPT_DROPOUT, uniform
from .telemetry import Log, Meter, pair_values
from .validation import Prompts, write_sheet


def train(config: Config) -> dict[str, Any]:
    """Trains a policy on preference pairs as `config` says; returns the final metrics.

    Written to config.output_dir: config.yaml, metrics.jsonl, checkpoint-N, result.json and the
    adapter
    (pytorch_lora_weights.safetensors) or the whole model. Called again with the same config it goes
    on
    from the last checkpoint, with the same pairs and draws, to bit-equal parameters on a CPU.

    Raises:
        ValueError: a mistake in the config or the data, in one line.
        Interrupted: a signal stopped the run after a save.
        Diverged: too many steps in a row were not finite.
    """
    folder = Path(config.output_dir)
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    start = open_run(config, folder)
    if (folder / "result.json").exists():
        result = json.loads((folder / "result.json").read_text())
        print(f"{folder} is already trained to step {result['global_step']}")
        return result
    if config.deterministic:
        torch.use_deterministic_algorithms(True)

    # ---- data, model, reference, objective
    family = models.family(config.family)
    dataset = open_data(config, folder)
    torch.manual_seed(config.seed)
    process = make_process(config, family)
    objective = config.make_objective(dataset[0].latents_w.numel())
    model = family.load(config.model, dtype).to(device).requires_grad_(config.tuning == "full")
    empty = dataset.empty_cond if config.prompt_dropout else None

    def prepare(epoch: int, batch: data.Batch) -> tuple[data.Batch, Draws]:
        """A batch on the device, and the draws of its pairs in this epoch."""
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

    @torch.no_grad()
    def probe() -> Tensor:
        """What the policy says of the first batch."""
        batch, draws = prepare(*next(data.batches(dataset, config.train_batch_size, config.seed)))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return family.predict(model, *process.noise(batch.latents, draws)[:2], batch.cond)

    if config.tuning == "lora":
        base_says = probe()
        add_lora(model, config, family.LORA_TARGETS)
        policy_reference = reference.adapters_off(model, family.predict)
        reference.check_off(model, probe, base_says)
    else:
        policy_reference = reference.frozen_copy(model, family.predict)
    if config.checkpointing == "full":
        model.enable_gradient_checkpointing()
    parameters = list(checkpoint.trainable(model).values())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )

    def forward(batch: data.Batch, draws: Draws) -> PairLoss:
        """Noise, reference, policy, loss of one batch: the pair step."""
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            x_t, t, target = process.noise(batch.latents, draws)
            ref = policy_reference(x_t, t, batch.cond)
            pred = family.predict(model, x_t, t, batch.cond)
        if objective is None:  # sft: the chosen clips' error alone
            err, ref_err = pair_error(pred, target), pair_error(ref, target)
            out = loss_from_errors(err.detach(), ref_err, DPO(beta=1.0), weight=batch.weight)
            return out._replace(loss=err[: len(batch.weight)].mul(batch.weight).mean())
        gain = process.gain(draws).to(device) if objective.needs_gain else None
        return preference_loss(pred, target, ref, objective, gain=gain, weight=batch.weight)

    # ---- where to begin
    begin, noise = 0, None
    if start is not None:
        state = checkpoint.load(start, model, optimizer)
        begin, noise = state["step"], state["margin_noise"]
        print(f"resumed from {start}")
    elif objective is not None:
        noise = margin_noise(config, dataset, prepare, forward)
    config.save(folder / "config.yaml")
    warn_of_repeats(config, len(dataset))
    announce(config, model, dataset, objective, device, dtype, noise)

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
        if prompts and step % config.validation_steps == 0:
            seeds = range(len(prompts.prompts))
            shape = dataset[0].latents_w.shape
            clips = prompts.clips(model, shape, config.validation_sampling_steps, seeds)
            write_sheet(folder / "validation", step, prompts.prompts, clips)

    if begin == 0:
        validate(0)

    # ---- the loop
    meter, guard = Meter(device), Guard(device)
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
    progress = tqdm(
        total=config.max_train_steps, initial=begin, unit="step", disable=None, file=sys.stderr
    )
    interrupted = Signals()
    metrics: dict[str, Any] = {}
    waited, since, step = 0.0, time.perf_counter(), begin
    clock = time.perf_counter()
    try:
        while step < config.max_train_steps:
            for _ in range(accumulate):
                fetched = time.perf_counter()
                epoch, batch = next(batches)
                waited += time.perf_counter() - fetched
                batch, draws = prepare(epoch, batch)
                out = forward(batch, draws)
                (out.loss / accumulate).backward()
                meter.add(pair_values(out, objective), process.level(draws).to(device))
            grad_norm = clip_gradients(parameters, config.max_grad_norm)
            lr = config.learning_rate * schedule(config, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            guard.watch(optimizer, grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            progress.update()
            if step == 1 and config.tuning == "lora":
                reference.check_on(model, probe)

            if step % config.logging_steps == 0 or step == config.max_train_steps:
                metrics = meter.flush(by_level=("rewards/margins", "importance/weight"))
                now = time.perf_counter()
                steps = step % config.logging_steps or min(config.logging_steps, step - begin)
                metrics |= {
                    "grad_norm": grad_norm.item(),
                    "learning_rate": lr,
                    "perf/seconds_per_pair": (now - since) / (steps * per_step),
                    "perf/data_wait_fraction": waited / (now - since),
                }
                if device.type == "cuda":
                    metrics["perf/peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
                waited, since = 0.0, now
                log.write({"global_step": step, "epoch": epoch, **metrics})
                progress.set_postfix_str(postfix(metrics))
                warning = guard.judge(metrics, step)
                if warning:
                    progress.write(f"warning: {warning}", file=sys.stderr)
            if (
                step % config.checkpointing_steps == 0
                or step == config.max_train_steps
                or interrupted
            ):
                state = {"margin_noise": noise, "objective": config.objective, "beta": config.beta}
                checkpoint.save(
                    folder, step, model, optimizer, state, config.checkpoints_total_limit
                )
                since = time.perf_counter() if step % config.logging_steps == 0 else since
            validate(step)
            if interrupted and step < config.max_train_steps:
                raise Interrupted(
                    f"saved at step {step} in {folder}; run the same command to go on"
                )
    finally:
        progress.close()
        log.close()
        interrupted.restore()

    artifact = checkpoint.export(folder, model)
    card = checkpoint.model_card(
        config.to_dict(), artifact.name, identity(dataset.folder / "index.parquet"), len(dataset)
    )
    write_atomic(folder / "README.md", card.encode())
    pairs = max(1, (step - begin) * per_step)
    result = {
        "global_step": step,
        "seconds_per_pair": (time.perf_counter() - clock) / pairs,
        "margin_noise": noise,
        "artifact": str(artifact),
        "output_dir": str(folder),
        "metrics": metrics,
    }
    write_atomic(folder / "result.json", json.dumps(result, indent=1).encode())
    return result


def open_run(config: Config, folder: Path) -> Path | None:
    """The checkpoint to go on from (None: start at 0), after a check that the folder is this
    run's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record, done = folder / "config.yaml", folder / "result.json"
    started = done.exists() or any(folder.glob(f"{checkpoint.PREFIX}*"))
    if started and record.exists():
        before, now = yaml.safe_load(record.read_text()) or {}, config.to_dict()
        differs = [k for k in now if k not in FREE_FIELDS and before.get(k) != now[k]]
        if differs:
            listed = ", ".join(f"{k} ({before.get(k)} there, {now[k]} here)" for k in differs)
            raise ValueError(
                f"{folder} holds another run: {listed}. "
                "Choose another output_dir, or the same values"
            )
    elif started:
        raise ValueError(
            f"{folder} holds another run (its config.yaml is missing): choose another output_dir"
        )
    if done.exists() and json.loads(done.read_text())["global_step"] < config.max_train_steps:
        done.unlink()
    wanted = config.resume_from_checkpoint
    if wanted not in (None, "latest"):
        if not Path(wanted).is_dir():
            raise ValueError(
                f"resume_from_checkpoint: expected latest or a checkpoint folder, got {wanted}"
            )
        return Path(wanted)
    found, broken = checkpoint.newest(folder)
    for line in broken:
        print(f"warning: {line}; falling back to {found or 'the start'}", file=sys.stderr)
    if found is None and wanted == "latest":
        print(f"no checkpoint in {folder} yet: starting at step 0", file=sys.stderr)
    return found


def open_data(config: Config, folder: Path) -> data.PairDataset:
    """The encoded pairs: `config.data` itself, or what encoding its media gives (kept in the
    run's folder).
    """
    path = Path(config.data)
    if not (path / "index.parquet").exists():
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
    return data.PairDataset(path)


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
    """The family's noising with the run's window, sampling and importance grid."""
    process = family.process(scheduler_config(config.model))
    changes: dict[str, Any] = {"timestep_range": config.timestep_range}
    for field, name in (("importance_steps", "importance_steps"), ("draws_per_pair", "strata")):
        if getattr(config, field) is not None:
            changes[name] = getattr(config, field)
    for name in ("time_sampling", "shift"):
        if getattr(config, name) is not None:
            if not hasattr(process, name):
                raise ValueError(f"{name} has no effect on {type(process).__name__}: remove it")
            changes[name] = getattr(config, name)
    return process.replace(**changes)


def schedule(config: Config, step: int) -> float:
    """The learning rate's factor at a step: linear warm-up, then constant, linear or cosine to
    0.
    """
    if step < config.lr_warmup_steps:
        return (step + 1) / config.lr_warmup_steps
    if config.lr_scheduler == "constant":
        return 1.0
    done = (step - config.lr_warmup_steps) / max(1, config.max_train_steps - config.lr_warmup_steps)
    return 1 - done if config.lr_scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def clip_gradients(parameters: list[Tensor], max_norm: float) -> Tensor:
    """The gradients' total norm before clipping, left on the device."""
    if max_norm:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


@torch.no_grad()
def margin_noise(config: Config, dataset: data.PairDataset, prepare: Any, forward: Any) -> float:
    """max |m| over the first 8 pairs while policy and reference are the same model: what rounding
    alone
    makes of the margin in this run's shape, dtype and backend."""
    worst, batches = 0.0, data.batches(dataset, config.train_batch_size, config.seed)
    for _ in range(math.ceil(8 / config.train_batch_size)):
        out = forward(*prepare(*next(batches)))
        difference = (out.err - out.ref_err).view(2, -1)
        worst = max(worst, (0.5 * config.beta * (difference[0] - difference[1])).abs().max().item())
    if worst > 0.05:
        print(
            f"warning: margin noise {worst:.3g} is above 0.05: rounding moves the loss",
            file=sys.stderr,
        )
    return worst


def warn_of_repeats(config: Config, pairs: int) -> None:
    """With K draws per pair, epochs beyond K repeat earlier draws."""
    seen = config.max_train_steps * config.train_batch_size * config.gradient_accumulation_steps
    if config.draws_per_pair and seen > config.draws_per_pair * pairs:
        print(
            f"warning: {seen / pairs:.1f} epochs with draws_per_pair {config.draws_per_pair}: "
            "later epochs repeat the same timesteps and noise",
            file=sys.stderr,
        )


def announce(config, model, dataset, objective, device, dtype, noise) -> None:
    """Five lines on what was picked."""
    trained = sum(p.numel() for p in checkpoint.trainable(model).values())
    total = sum(p.numel() for p in model.parameters())
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    mode = (
        "adapters_off (one copy of the weights)"
        if config.tuning == "lora"
        else "frozen_copy (two copies)"
    )
    print(f"model      {config.family} {config.model}: {trained:,} of {total:,} parameters train")
    per_step = config.train_batch_size * config.gradient_accumulation_steps
    print(f"data       {len(dataset)} pairs, {per_step} per step")
    print(f"objective  {objective or 'sft on the chosen clips'}")
    print(f"reference  {mode}" + (f", margin noise {noise:.2g}" if noise is not None else ""))
    precision = str(dtype).removeprefix("torch.")
    print(f"running    {where}, {precision}, checkpointing {config.checkpointing}")


def postfix(metrics: dict[str, Any]) -> str:
    parts = [f"loss {metrics['loss']:.4g}"]
    if "rewards/margins" in metrics:
        parts += [f"acc {metrics['implicit_acc']:.2f}", f"margin {metrics['rewards/margins']:.3g}"]
    return ", ".join([*parts, f"{metrics['perf/seconds_per_pair']:.3g} s/pair"])
