"""The training loop, read top to bottom. To change it: `cp train.py mine.py`."""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any

import torch

from fastpref import ranks
from fastpref.loss.functional import Draws
from fastpref.process import Times
from fastpref.run import bookkeeping as book
from fastpref.run.announce import announce
from fastpref.run.assemble import assemble
from fastpref.run.config import Config
from fastpref.run.folder import open_run
from fastpref.run.parts import place
from fastpref.step.pair import backward, deferred, split, training_loss


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
    device, dtype = place(config.device, config.mixed_precision)
    start, result = ranks.by_main(partial(open_run, config))
    if result is not None:
        return result
    run = assemble(config, device, dtype, start)  # with start's state in it
    how = {"parameters": run.parameters, "skip_zeros": config.skip_zeros}
    how["scale"] = 1 / config.gradient_accumulation_steps  # of all processes together
    here = partial(split, member_of=run.mesh.member, exchange=run.exchange)
    apart = {"deferred": deferred, "split": here}.get(config.pair_mode)

    def one_batch(latents, weight, pair_id, index, times, known, **cond):
        draws, at = Draws(config.seed, pair_id, index), Times(*times)
        noisy, t, target = run.process.noise(latents, draws, at)
        pair = {"objective": run.objective, "gain": at.gain, "weight": weight}
        if apart:  # member by member, or one here and the other by a neighbour
            return apart(run.policy, run.reference, noisy, t, target, cond, known, **pair, **how)
        ref = run.reference(noisy, t, cond) if known is None else known
        pred = run.policy(noisy, t, cond)
        out = training_loss(pred, target, ref, **pair)
        backward(out, **how)
        return out

    one_batch = book.recorded(run, one_batch)  # with cuda_graphs as one graph: of tensors alone
    book.check(run)
    announce(run)
    book.validate(run)

    with book.at_work(run):
        while not run.done:
            for epoch, batch, draws in islice(run.batches, run.batches_per_step):
                times = torch.stack(run.process.times(draws)).to(device, non_blocking=True)
                out, values = one_batch(
                    latents=batch.latents,
                    weight=batch.weight,
                    pair_id=draws.pair_id,
                    index=draws.index,
                    times=times,
                    known=run.known(epoch, batch, draws),
                    **batch.cond,
                )
                if run.mesh.counts:  # of those that share a batch
                    run.meter.add(values, Times(*times).level)
            grad_norm = book.update(run)
            book.self_check(run, out)
            if run.due(config.logging_steps):
                book.log(run, epoch, grad_norm)
            with run.clock.paused():  # no part of a pair's seconds
                if run.due(config.checkpointing_steps) or run.stop:
                    book.save(run)
                book.validate(run)
            book.leave_if_asked(run)
    return book.finish(run)
