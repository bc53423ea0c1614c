"""The online loop, read top to bottom: sample a round, train once on its pairs, the next round."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from fastpref import ranks
from fastpref.run import bookkeeping as book
from fastpref.run.assemble import Run
from fastpref.run.folder import open_run
from fastpref.run.guard import Diverged, within_memory
from fastpref.run.parts import place
from fastpref.spo import rounds, telemetry
from fastpref.spo.assemble import Online, assemble
from fastpref.spo.config import SPOConfig
from fastpref.spo.resampler import Rolled, Transition
from fastpref.spo.step import collate, step_loss
from fastpref.spo.win_rate import forget_later, win_rate

MEMORY = "sampling: run it again with a smaller --sample_rows or --decode_batch"
MOST_EMPTY = 20  # rounds in a row that keep no pair


def spo(config: SPOConfig) -> dict[str, Any]:
    """Trains a policy on pairs of its own steps as `config` says; returns the final metrics.

    Step-aware preference optimisation, arXiv 2406.04314. Written to config.output_dir: what `train`
    writes, the prompts' embeddings and the pairs of the rounds that it may go on from. Called again
    with the same config it goes on from the last checkpoint, sampling or training, with the same
    draws, to bit-equal parameters on a CPU.

    Raises:
        ValueError: a mistake in the config or the data, in one line.
        Interrupted: a signal stopped the run after a save.
        Diverged: too many steps in a row were not finite, or a sample or parameter is not.
    """
    device, dtype = place(config.device, config.mixed_precision)
    start, result = ranks.by_main(partial(open_run, config, "spo"))
    if result is not None:
        return result
    run, online = assemble(config, device, dtype, start)  # with start's state in it
    own = run.own = run.own or {"round": 0, "since": 0, "updates": 0, "empty": 0, "counted": -1}
    forget_later(run, online)
    telemetry.announce(run, online)
    book.validate(run)

    with book.working(run):
        while not run.done:
            prune = partial(rounds.prune, run.folder / "rounds", run.folder, own["round"])
            ranks.by_main(prune)
            with sampling(run):
                if own["updates"] == 0 and own["round"] % config.win_rate_rounds == 0:
                    with run.clock.paused():
                        win_rate(run, online)
                number, pairs = own["round"], sampled_pairs(run, online)
                size, accumulate = config.train_batch_size, config.gradient_accumulation_steps
                updates = rounds.updates_of(pairs, size, accumulate, config.seed, number)
                if not updates:
                    next_round(run, empty=own["empty"] + 1)
            for batches in updates[own["updates"] :]:
                total, margins = sum(map(len, batches)), []
                # Of several processes one that has no batch of these adds zeros to their sum.
                mine = run.mesh.dealt(batches)
                for some in mine or batches[:1]:
                    cond = online.prompts.cond([pair.row for pair in some], device)
                    batch = collate(some, online.resampler.steps, cond, device, dtype)
                    out = step_loss(run.policy, run.reference, batch, run.objective)
                    (out.loss * (len(some) / total if mine else 0)).backward()
                    margins.append(out.margin)
                    if mine:
                        run.meter.add(telemetry.values(out, batch, run.objective), batch.level)
                telemetry.note_margin_noise(run, margins)
                grad_norm = book.update(run)
                own["updates"] += 1
                if own["updates"] == len(updates):
                    next_round(run)
                book.self_check(run, out)
                if run.due(config.logging_steps):
                    book.log(run, number, grad_norm, **telemetry.online(run))
                with run.clock.paused():
                    if run.due(config.checkpointing_steps) or run.stop:
                        book.save(run)
                    book.validate(run)
                book.leave_if_asked(run)
                if run.done:
                    break
        with sampling(run):
            win_rate(run, online)
    return book.finish(run, online=telemetry.spent(run))


@contextmanager
def sampling(run: Run) -> Iterator[None]:
    """Around what samples, which may take long and asks a scorer: a signal ends it before the
    network's next call, and whatever ends it, what was trained before is saved.
    """

    def leave(*_: Any) -> None:
        if run.stop:
            raise KeyboardInterrupt

    hook = run.model.register_forward_pre_hook(leave)
    try:
        with within_memory(MEMORY):
            yield
    except (ValueError, KeyboardInterrupt, ranks.Elsewhere) as error:
        if ranks.fail(error, saves=True) and (run.stop or run.step > run.saved):
            book.save(run)
        book.leave_if_asked(run, left=True)
        raise
    finally:
        hook.remove()


def next_round(run: Run, empty: int = 0) -> None:
    """empty: rounds in a row that kept no pair."""
    if empty:
        run.bar.write(
            f"round {run.own['round']}: no pair is kept (threshold {run.config.threshold})"
        )
    run.own |= {"round": run.own["round"] + 1, "since": run.step, "updates": 0, "empty": empty}
    if empty == MOST_EMPTY:
        run.own["empty"] = 0  # started again it tries as many
        raise ValueError(
            f"{empty} rounds in a row kept no pair: the scorer tells no candidates apart by more "
            f"than threshold {run.config.threshold}: lower it in another output_dir (of scores, "
            "which are logits, 0.3 is a difference of 0.62), or look at the scorer"
        )


def sampled_pairs(run: Run, online: Online) -> list[Transition]:
    """The transitions of the round that the run is in: those on the disk, and those that are
    lacking sampled by the policy as it is, by several processes a part each. Once the round trains
    all must be there.
    """
    config, own, folder, mark = run.config, run.own, run.folder / "rounds", rounds.mark(run)
    size, seed = config.prompts_per_round, config.seed
    chosen = rounds.prompts_of(own["round"], size, online.rows, seed)
    parts = list(rounds.batches_of(chosen, config.sample_batch_size))
    paths = [rounds.part_file(folder, own["round"], part) for part in range(len(parts))]

    def lacking() -> list[int]:
        gone = [i for i, path in enumerate(paths) if rounds.read_part(path, mark) is None]
        if gone and own["updates"]:
            raise ValueError(
                f"{paths[gone[0]]}: is missing or damaged, and its round has begun to train: put "
                "it back, or move the newest checkpoint away to go on from an older one"
            )
        return gone

    gone = ranks.by_main(lacking)
    for first in range(0, len(gone), run.mesh.shares):  # a part each
        for part in run.mesh.dealt(gone[first : first + run.mesh.shares]):
            epochs, rows = parts[part]
            began = time.perf_counter()
            rolled = roll(run, online, rows, epochs)
            rolled.seconds = time.perf_counter() - began
            rounds.write_part(paths[part], mark, rows, rolled)
        run.stop.agree()
        if run.stop:
            raise KeyboardInterrupt
    found: list[Transition] = []
    counts: dict[str, Any] = {}
    for path in paths:
        rolled = rounds.read_part(path, mark)  # as a run that goes on reads it
        if rolled is None:
            raise ValueError(f"{path}: is not as it was written; run the same command to go on")
        found += rolled.transitions
        rounds.add(counts, rolled)
    if own["counted"] < own["round"]:  # once, wherever the round is gone on with
        own["counted"] = own["round"]
        for name in ("counts", "total"):  # since the last line of the log, and in all
            rounds.merge(own.setdefault(name, {}), counts)
    return found


def roll(run: Run, online: Online, rows: list[int], epochs: Tensor) -> Rolled:
    """One batch of prompts through the sampler."""

    def score(clean: Tensor, every: list[int], t: float) -> Tensor:
        return online.score(clean, [rows[i] for i in every], t)

    def predict(x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return run.policy(x.to(run.dtype), t, cond)

    ids, cond = online.prompts.ids[rows], online.prompts.cond(rows, run.device)
    try:
        return online.resampler.roll(predict, score, online.shape, ids, cond, epochs)
    except FloatingPointError as error:
        raise Diverged(f"round {run.own['round']}: {error}: try a lower learning_rate") from None
