"""Metrics: gathered on the device, written once per log interval to metrics.jsonl and the
trackers; and what a run says on the screen.
"""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..files import write_atomic, writing
from ..look.report import metric_lines
from ..loss.functional import PairLoss
from ..loss.objectives import SDPO, Objective

BINS = 10


class Meter:
    """Per-pair values summed on the device by noise level; `flush` reads them with one
    synchronisation.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.names = device, []

    def add(self, values: dict[str, Tensor], level: Tensor) -> None:
        """Adds values, each [B], of pairs at noise level [B] in [0, 1]; the names must not
        change between flushes.
        """
        stacked = torch.stack([v.detach().double() for v in values.values()], dim=1)  # [B, K]
        if self.names and self.names != list(values):  # restored
            raise ValueError(
                f"the checkpoint's meter holds {', '.join(self.names)}, expected "
                f"{', '.join(values)}: resume from another checkpoint"
            )
        if not self.names:
            self.sums = torch.zeros(BINS, len(values), dtype=torch.float64, device=self.device)
            self.counts = torch.zeros(BINS, 1, dtype=torch.float64, device=self.device)
            self.names = list(values)
        bins = (level * BINS).long().clamp(0, BINS - 1)
        self.sums.index_add_(0, bins, stacked)
        self.counts.index_add_(0, bins, torch.ones_like(stacked[:, :1]))

    def begin(self) -> None:
        """What is added from here on `forget` takes back."""
        # Clones: values are added in place.
        self.before = (self.names, self.sums.clone(), self.counts.clone()) if self.names else ([],)

    def forget(self) -> None:
        self.names, *sums = self.before
        if sums:
            self.sums, self.counts = sums

    def totals(self) -> tuple[list[str], Tensor, Tensor] | None:
        """(names, sums, counts) of all processes, on the CPU; None: none has added anything."""
        own = (self.names, self.sums.cpu(), self.counts.cpu()) if self.names else None
        every = [said for said in ranks.gathered(own) if said is not None]
        if not every:
            return None
        names, *_ = every[0]
        sums, counts = (torch.stack([said[i] for said in every]).sum(0) for i in (1, 2))
        return names, sums, counts

    def state(self) -> dict[str, Any]:
        """What was added since the last flush, for a checkpoint; `restore` takes it back."""
        totals = self.totals()
        if totals is None:
            return {}
        names, sums, counts = totals
        # Lists of floats: JSON gives a float64 back to the bit.
        return {"names": names, "sums": sums.tolist(), "counts": counts.tolist()}

    def restore(self, state: Any, checkpoint: Path) -> None:
        """ValueError: not what `state` gave; checkpoint: where it was read. Rank 0 takes it."""
        if state == {}:
            self.names = []
            return
        try:
            names, *sums = (state[name] for name in ("names", "sums", "counts"))
            sums, counts = (
                torch.tensor(rows, dtype=torch.float64, device=self.device) for rows in sums
            )
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, RecursionError):
            names = None
        texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not (texts and names and sums.shape == (BINS, len(names)) and counts.shape == (BINS, 1)):
            raise ValueError(
                f"{checkpoint}: state.json's meter expected names, sums [{BINS}, names] and counts "
                f"[{BINS}, 1]: resume from another checkpoint"
            )
        self.names, self.sums, self.counts = names, sums, counts
        if not ranks.main():
            self.names = []

    def flush(self, by_level: tuple[str, ...] = ()) -> dict[str, Any]:
        """Means since the last flush, and for `by_level` names a list of BINS means (null where
        empty).
        """
        totals = self.totals()
        if totals is None:
            return {}
        names, sums, counts = totals
        means = (sums.sum(0) / counts.sum()).tolist()
        result: dict[str, Any] = dict(zip(names, means, strict=True))
        for name in by_level:
            if name in names:
                column = sums[:, names.index(name)] / counts[:, 0]
                filled = counts[:, 0] > 0
                result[f"{name}/by_level"] = [
                    v if ok and math.isfinite(v) else None
                    for v, ok in zip(column.tolist(), filled.tolist(), strict=True)
                ]
        self.names = []
        return result


class Clock:
    """The seconds of a loop: in all, and since the last lap; of those, what it waited for data."""

    def __init__(self, step: int) -> None:
        self.first, self.step = step, step
        self.began = self.since = time.perf_counter()
        self.waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No part of the lap: it is of training alone."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def lap(self, step: int, pairs: int) -> dict[str, float]:
        """Since the last lap, with `pairs` a step."""
        now = time.perf_counter()
        spent, steps = now - self.since, step - self.step
        found = {
            "perf/seconds_per_pair": spent / (steps * pairs),
            "perf/data_wait_fraction": self.waited / spent,
        }
        self.since, self.step, self.waited = now, step, 0.0
        return found

    def seconds_per_pair(self, step: int, pairs: int) -> float | None:
        """In all, saves and validation too; None: no step was done."""
        spent, steps = time.perf_counter() - self.began, step - self.first
        return spent / (steps * pairs) if steps else None


def extremes(metrics: dict[str, Any]) -> dict[str, Any]:
    """Of what is each process's own the least and the most, and whose that is."""
    found: dict[str, Any] = {}
    own = ("perf/data_wait_fraction", "perf/peak_memory_gb")
    every = ranks.gathered({name: metrics[name] for name in own if name in metrics})
    for name in every[0]:
        values = [said[name] for said in every]
        found |= {f"{name}_min": min(values), f"{name}_max": max(values)}
        found[f"{name}_max_rank"] = values.index(max(values))
    return found


def check_trackers(names: list[str]) -> None:
    """ValueError names a tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"report_to {name}: install it with pip install fastpref[{name}]")


class Log:
    """metrics.jsonl always; TensorBoard, wandb and trackio on request. A resumed run drops later
    lines. Of several processes rank 0 writes it.
    """

    def __init__(
        self, folder: Path, trackers: list[str], config: dict[str, Any], step: int
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self.writers: list[Any] = []
        self.file: Any = None
        if not ranks.main():
            return
        kept = b""
        if step and self.path.exists():  # from the start: another attempt's
            lines = metric_lines(self.path)  # none that a kill has cut
            kept = b"".join(line for line, row in lines if row["global_step"] <= step)
        write_atomic(self.path, kept)
        self.file = self.path.open("a")
        for tracker in trackers:
            if tracker == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
            else:
                module = importlib.import_module(tracker)
                module.init(project="fastpref", name=folder.name, config=config)
                self.writers.append(module)

    def write(self, row: dict[str, Any]) -> None:
        if self.file is None:
            return
        # JSON has no NaN: a value that is not finite is written as null and named in "not_finite".
        finite, bad = {}, []
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                bad.append(key)
                value = None
            finite[key] = value
        if bad:
            finite["not_finite"] = bad
        with writing(self.path):
            self.file.write(json.dumps(finite) + "\n")
            self.file.flush()
        scalars = {k: v for k, v in row.items() if isinstance(v, (int, float))}
        if hasattr(self, "tensorboard"):
            for key, value in scalars.items():
                self.tensorboard.add_scalar(key, value, row["global_step"])
        for writer in self.writers:
            writer.log(scalars, step=row["global_step"])

    def close(self) -> None:
        if self.file is None:
            return
        try:
            with writing(self.path):  # it tries once more to write what did not fit
                self.file.close()
        finally:
            if hasattr(self, "tensorboard"):
                self.tensorboard.close()
            for writer in self.writers:
                writer.finish()


def pair_values(
    out: PairLoss, objective: Objective | None, gain: Tensor | float = 1.0
) -> dict[str, Tensor]:
    """What one batch adds to the metrics, each [B] (rewards in the plain form, ties half right).
    gain: [B], SPO's k, which its rewards are scaled by.
    """
    (err_w, err_l), (ref_w, ref_l) = out.err.chunk(2), out.ref_err.chunk(2)
    values = {
        "loss": out.loss.expand_as(err_w),
        "errors/policy_w": err_w,
        "errors/policy_l": err_l,
        "errors/reference_w": ref_w,
        "errors/reference_l": ref_l,
    }
    if objective is None:
        return values
    values["zero_gradient"] = (out.coef.view(2, -1) == 0).all(0).double()
    scale = -0.5 * objective.beta * gain
    margin = scale * ((err_w - ref_w) - (err_l - ref_l))
    right = (margin > 0).double() + 0.5 * (margin == 0).double()
    right = right.masked_fill(margin.isnan(), math.nan)  # neither right nor wrong
    values |= {
        "rewards/chosen": scale * (err_w - ref_w),
        "rewards/rejected": scale * (err_l - ref_l),
        "rewards/margins": margin,
        "rewards/accuracies": right,
        "implicit_acc": right,  # diffusers' name of the same; the one above is TRL's
    }
    if out.safeguard is not None:
        values["safeguard/lambda"] = out.safeguard
    if out.importance is not None:
        weights = out.importance.view(2, -1)
        values["importance/weight"] = weights.mean(0)
        if isinstance(objective, SDPO):  # one weight for the pair
            how = {"max": weights.amax(0), "min": weights.amin(0), "mean": weights.mean(0)}
            weights = how[objective.combine].unsqueeze(0)
        kept = weights >= objective.mask_threshold
        values["importance/masked"] = (~kept).double().mean(0)
        values["importance/kept_clipped"] = (
            (kept & ((weights - 1).abs() > objective.clip)).double().mean(0)
        )
    return values


def postfix(metrics: dict[str, Any]) -> str:
    parts = [f"loss {metrics['loss']:.4g}"]
    if "rewards/margins" in metrics:
        parts += [f"acc {metrics['implicit_acc']:.2f}", f"margin {metrics['rewards/margins']:.3g}"]
    return ", ".join([*parts, f"{metrics['perf/seconds_per_pair']:.3g} s/pair"])
