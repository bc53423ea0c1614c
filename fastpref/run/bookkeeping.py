"""What a loop does with a Run beside its own step: check, update, log, save, validate, finish."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..faults import out_of_memory
from ..files import write_atomic
from ..look.validation import Prompts, draw_sheet
from ..loss.functional import Draws, PairLoss
from ..mesh import sum_gradients
from ..pairs import dataset
from ..pairs.dataset import Batch
from ..pairs.shards import Changed
from ..progress import announced, steps_bar, warn
from ..step import reference
from ..step.graphs import StepGraph
from ..step.pair import in_shards
from . import artifact, checkpoint, checks, optimisation, sharding
from .assemble import Loop, Run
from .fitting import MENDS, exhausted
from .guard import Diverged, Interrupted, Signals, within_memory
from .options import Options
from .telemetry import Clock, Log, extremes, pair_values, postfix

# ---- Before the first step


def check(run: Run) -> None:
    """The margin's noise at a start, and the cache's errors against the reference of now."""
    config = run.config
    now = run.reference
    if now is None and run.start is None:
        # Fully tuned, its errors all there: until its first step the model is its own reference.
        now = reference.base(run.model, run.predict)
    size, seed = config.train_batch_size, config.seed
    few = partial(checks.first_pairs, run.dataset, size, seed, run.prepare)
    try:
        if run.start is None and run.objective is not None:
            how = {"pair_mode": config.pair_mode, "beta": run.objective.beta}
            run.margin_noise = checks.margin_noise(run.policy, now, run.process, few(), **how)
        if run.cache and now and run.margin_noise is not None:
            how = {"beta": run.objective.beta, "margin_noise": run.margin_noise}
            checks.drift(run.cache, now, run.process, few(), **how)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise exhausted(error, run.folder, **mends(config)) from None


# ---- The loop


@contextmanager
def at_work(run: Loop) -> Iterator[None]:
    """Around a loop over pairs, once: its batches, and all that `working` has."""
    with working(run):
        source = stream(run)
        run.batches = iter(partial(prepared, run, source), None)  # endless: nothing is None
        try:
            yield
        finally:
            source.close()  # its threads


@contextmanager
def working(run: Loop) -> Iterator[None]:
    """Around a loop, once: its config.yaml, log, bar, clock and signals.

    Raises:
        ValueError: out of memory, and the line says what to change.
        OSError: a file that cannot be read or written, or BrokenPipeError: nobody reads any more
            what is printed; Changed: a file of the set. What was done before any of these is saved,
            also where it is another process that failed.
    """
    config = run.config
    ranks.by_main(partial(config.save, run.folder / "config.yaml"))
    run.journal = Log(run.folder, config.trackers, config.to_dict(), run.step)
    run.bar = steps_bar(config.max_train_steps, run.step)
    run.stop = Signals()
    run.clock = Clock(run.step)
    run.meter.begin()
    try:
        yield
    except Exception as error:
        saves = isinstance(error, OSError | Changed) or out_of_memory(error)
        if not ranks.fail(error, saves):
            raise
        run.meter.forget()
        if run.step > run.saved:
            with suppress(OSError, ranks.Elsewhere, ranks.Lost):  # the disk may be what is full
                save(run)
                saved(run)
        if not out_of_memory(error):
            raise
        raise exhausted(error, run.folder, **mends(config)) from None
    finally:
        if run.cache:
            run.cache.flush()
        run.stop.restore()
        run.settings.close()
        run.bar.close()
        run.journal.close()


def mends(config: Options) -> dict[str, Any]:
    """Of a config what out of memory asks to change, as far as it has it."""
    return {name: getattr(config, name, None) for name in MENDS}


def stream(run: Loop) -> Generator[tuple[int, Batch], None, None]:
    """(epoch, batch) from the step that the run is at, those of this process, read ahead until it
    is closed.
    """
    config = run.config
    return dataset.batches(
        run.dataset,
        config.train_batch_size,
        config.seed,
        start=run.step * config.gradient_accumulation_steps,
        share=run.mesh.share,
        shares=run.mesh.shares,
        num_workers=config.num_workers,
        pin_memory=run.device.type == "cuda",
    )


def prepared(run: Loop, source: Iterator[tuple[int, Batch]]) -> tuple[int, Batch, Draws]:
    """(epoch, the next batch on the device, its draws)"""
    with run.clock.waiting():
        epoch, batch = next(source)
        if run.lockstep:  # before they wait for each other in a pass, which nobody could leave
            ranks.barrier()
    return epoch, *run.prepare(epoch, batch)


def recorded(run: Run, step: Callable[..., PairLoss]) -> Callable[..., tuple[PairLoss, dict]]:
    """A loop's step of one batch with what the metrics want of it; where the run asks for it as one
    CUDA graph: then it is a function of tensors alone. The first call says how long it takes.

    The optimiser's step is recorded with it: a graph of that reads the gradients where the step's
    graph keeps them, and nowhere else.
    """

    def whole(**inputs: Tensor | None) -> tuple[PairLoss, dict[str, Tensor]]:
        out = step(**inputs)
        return out, pair_values(out, run.objective)

    if run.config.cuda_graphs:
        whole = StepGraph(whole, run.device, parameters=run.parameters)
    if run.config.cuda_graphs and run.device.type == "cuda":
        run.take_step = StepGraph(run.take_step, run.device, name="optimiser")
    return announced("first batch, forward and backward", whole)


def update(run: Loop) -> Tensor:
    """One step of the optimiser at its learning rate, by the gradients of all processes; their
    norm, left on the device.
    """
    config, plan = run.config, ("lr_scheduler", "lr_warmup_steps", "max_train_steps")
    factor = optimisation.schedule(run.step, **config.only(*plan))
    run.learning_rate = config.learning_rate * factor
    optimisation.set_rate(run.optimizer, run.learning_rate)
    run.stop.agree()
    sum_gradients(run.parameters, optimisation.REDUCED[config.reduce_dtype])
    norm = run.take_step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    run.meter.begin()
    run.bar.update()
    return norm


def self_check(run: Run, out: PairLoss) -> None:
    """Of adapters, in the first steps: they change what the model says, and the reference does not
    see them. out: of the step's last batch.
    """
    if run.config.tuning != "lora":
        return
    if run.step == 1:
        checks.check_on(run.model, run.probe)
    if run.step == max(run.begin, 1) + 1:  # began with adapters that say something
        checks.check_step(out.err, out.ref_err)


def log(run: Loop, epoch: int, grad_norm: Tensor, **more: Any) -> None:
    """A line of metrics: means since the last one, to the log, the bar and the guard. more: a
    loop's own.
    """
    run.metrics = run.meter.flush(by_level=("rewards/margins", "importance/weight"))
    run.meter.begin()
    run.metrics |= {"grad_norm": grad_norm.item(), "learning_rate": run.learning_rate}
    run.metrics |= more
    run.metrics |= run.clock.lap(run.step, run.pairs_per_step)
    if run.cache:
        run.metrics["perf/reference_cached"] = run.cache.share()
    if run.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(run.device)
        run.metrics["perf/peak_memory_gb"] = peak / 1e9
    if ranks.world() > 1:
        run.metrics |= extremes(run.metrics) | {"perf/processes": ranks.world()}
    last = max(ranks.gathered(epoch))  # of the step's batches
    run.journal.write({"global_step": run.step, "epoch": last, **run.metrics})
    said = postfix(run.metrics)
    run.bar.set_postfix_str(said)
    if run.bar.disable and ranks.main():  # no terminal
        print(f"step {run.step} of {run.config.max_train_steps}: {said}", file=sys.stderr)
    warning = run.guard.judge(run.metrics, run.step)
    if warning:
        warn(warning)


def save(run: Loop) -> None:
    """A checkpoint that the run goes on from."""
    if run.cache:
        run.cache.flush()
    state = {"margin_noise": run.margin_noise, "made_of": run.made_of}
    state |= {"meter": run.meter.state(), "metrics": run.metrics, "own": run.own}
    keep = run.config.checkpoints_total_limit
    kept = (run.folder, run.step, run.model, run.optimizer, state, keep)
    saved(run)
    if in_shards(run.parameters):
        run.saving = checkpoint.save_shards(*kept, run.saves_by)
    else:
        ranks.by_main(lambda: checkpoint.save(*kept))
    run.saved = run.step


def saved(run: Loop) -> None:
    """Waits for a save that is under way beside the loop; its errors are raised here."""
    wait, run.saving = run.saving, None
    if wait is not None:
        wait()


def validate(run: Run) -> None:
    """Clips of the validation prompts, base beside tuned at the same seeds, as pictures."""
    config, folder = run.config, run.folder / "validation"
    if config.validation_prompts and not run.prompts:
        names, scale = config.validation_prompts, config.validation_guidance_scale
        run.prompts = Prompts(run.family, config.model, names, run.device, run.dtype, scale)
    if not run.prompts or run.step % config.validation_steps:
        return
    sheet = folder / f"step-{run.step:06d}.png"
    if run.step == run.begin and ranks.by_main(sheet.exists):
        return
    shape, steps = run.sample_shape(), config.validation_sampling_steps
    what = (
        "the validation clips: another run may have fewer validation_prompts, this one later "
        "validation_steps"
    )
    if run.lockstep:  # as in `prepared`
        ranks.barrier()
    with within_memory(what):
        draw_sheet(folder, run.step, run.prompts, run.model, shape, steps, run.mesh)


def leave_if_asked(run: Loop, *, left: bool = False) -> None:
    """Interrupted: a signal has arrived, the step is saved, and there are more, or more is left."""
    if run.stop and run.saved == run.step and (left or not run.done):
        saved(run)
        where = f"saved at step {run.step} in {run.folder}"
        raise Interrupted(f"{where}; run the same command to go on", run.stop.wished)


# ---- After the last step


def finish(run: Run, **more: Any) -> dict[str, Any]:
    """Writes the adapter or the model with its card, and result.json; the final metrics. more: a
    loop's own.

    Raises:
        Diverged: a parameter is not finite.
    """
    folder = run.folder
    saved(run)
    if not sharding.finite(run.parameters):
        raise Diverged(f"{folder}: a trained parameter is not finite: try a lower learning_rate")
    model = sharding.whole(run.model) if in_shards(run.parameters) else run.model
    exported = ranks.by_main(lambda: artifact.export(folder, model))
    name = run.objective.name if run.objective else "sft"
    values, data = {"objective": name} | run.config.to_dict(), run.made_of["data"]
    unit = getattr(run.dataset, "unit", "pairs")
    card = artifact.model_card(values, exported.name, data, len(run.dataset), unit)
    ranks.by_main(partial(write_atomic, folder / "README.md", card.encode()))
    speed = run.clock.seconds_per_pair(run.step, run.pairs_per_step)
    result = {
        "global_step": run.step,
        "seconds_per_pair": speed or run.metrics["perf/seconds_per_pair"],
        "margin_noise": run.margin_noise,
        "artifact": str(exported),
        "output_dir": str(folder),
        "metrics": run.metrics,
        **more,
    }
    text = json.dumps(result, indent=1).encode()
    ranks.by_main(partial(write_atomic, folder / "result.json", text))
    return result
