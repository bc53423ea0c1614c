"""Says when a run goes wrong or must stop: not finite, a rising winner's error, memory, signals."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..faults import on_signals, out_of_memory


class Diverged(RuntimeError):
    """The run cannot go on; what was saved before stays."""


class Guard:
    """Skips steps with a non-finite gradient on the device and judges the metrics once per log
    interval.

    A skipped step leaves parameters and moments as they were (the fused optimiser reads `found_inf`
    on the device: no host sync). A bad step raises a debt by one, a good one lowers it by a half;
    at `patience` `Diverged` is raised. A winner's error more than `rise` above the reference's is
    warned of once.
    """

    def __init__(self, device: torch.device, patience: int = 20, rise: float = 0.5) -> None:
        # Steps skipped since the last reading, and the debt.
        self.skipped, self.debt = torch.zeros(2, device=device)
        self.patience, self.rise, self.warned = patience, rise, False

    def watch(self, optimizer: torch.optim.Optimizer, grad_norm: Tensor) -> None:
        """Before optimizer.step(): tells it to skip where the gradient's norm is not finite."""
        bad = (~torch.isfinite(grad_norm)).to(torch.float32)
        # GradScaler's own way in: fused AdamW reads it on the device, as float32 alone.
        optimizer.found_inf = bad
        self.skipped.add_(bad)  # in place: this may be part of a recorded step
        self.debt.add_(1.5 * bad - 0.5).clamp_(min=0)

    def judge(self, metrics: dict[str, float], step: int) -> str | None:
        """At a log step: a warning to print, or None; raises Diverged."""
        skipped, debt = (int(v) for v in torch.stack([self.skipped, self.debt]).tolist())
        self.skipped.zero_()
        if debt >= self.patience:
            raise Diverged(
                f"step {step}: {skipped} of the last steps had a loss or gradient that is not "
                "finite. Try a lower learning_rate, mixed_precision no, or look at the last "
                "batches' pairs"
            )
        if skipped:
            return f"step {step}: {skipped} steps skipped, their loss or gradient was not finite"
        winner, base = metrics.get("errors/policy_w", 0.0), metrics.get("errors/reference_w", 0.0)
        if not self.warned and winner > (1 + self.rise) * base > 0:
            self.warned = True
            rise = f"{100 * (winner / base - 1):.0f} %"
            return (
                f"step {step}: the chosen clips' error is {rise} above the reference's: the policy "
                "is leaving the data. Try a higher beta, sft_weight 0.1, or objective dpo_cm"
            )
        return None


class OutOfMemory(ValueError):
    """What no choice of a step mends: its line says what does."""


@contextlib.contextmanager
def within_memory(what: str) -> Iterator[None]:
    """OutOfMemory where what is made inside runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise OutOfMemory(f"out of memory for {what} ({reason})") from None


class Interrupted(Exception):
    """A signal arrived: the run is saved, the same command goes on. wished: by who asked for that,
    and not by torchrun, which ends processes by SIGTERM to start them again.
    """

    def __init__(self, text: str, wished: bool = True) -> None:
        super().__init__(text)
        self.wished = wished


class Signals:
    """True once one of `faults.STOPS` has arrived, until `restore`; the loop saves and leaves. Of
    several processes: once they have agreed that one has arrived at any, so that all leave at the
    same step.
    """

    def __init__(self) -> None:
        self.arrived = self.asked = self.agreed = self.wished = False
        self.previous = on_signals(self._note)

    def _note(self, number: int, frame: Any) -> None:
        # Who asks a second time does not want to wait for the save. A hangup is no such wish (a
        # terminal and its shell both send it), and SIGTERM after Slurm's SIGUSR1 is the first.
        wish = number in (signal.SIGINT, signal.SIGTERM)
        if wish and self.asked:
            raise KeyboardInterrupt
        self.arrived, self.asked = True, self.asked or wish
        self.wished = self.wished or number != signal.SIGTERM

    def agree(self) -> None:
        every = ranks.gathered((self.arrived, self.wished))
        self.agreed, self.wished = any(said for said, _ in every), any(wish for _, wish in every)

    def __bool__(self) -> bool:
        return self.agreed if ranks.world() > 1 else self.arrived

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
