"""What the variants of a table are predicted to take, from shapes alone: no GPU is needed."""

from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from torch import Tensor, nn

from bench.architectures import ARCHITECTURES
from bench.baselines import BASELINES
from bench.variants import adapt, rungs
from fastpref import models
from fastpref.step import memory, simulate

START, COMPILED = 30, 60  # seconds of a table's start; of compiling a variant's blocks, at the most


def forecast(
    family: str, shape: str | None, pairs: int, adapters: str, names: list[str], on: memory.Card
) -> dict[str, memory.Prediction]:
    """A prediction for each variant in bf16, by its name."""
    arch, meta, dtype = ARCHITECTURES[family], torch.device("meta"), torch.bfloat16
    model, rules = arch.make(meta, dtype), models.family(arch.family)
    adapt(model, arch, adapters)
    latents, cond = arch.inputs(shape or arch.shape, 1, meta, dtype)
    inputs = (latents[:1], torch.empty(1, device=meta), {k: v[:1] for k, v in cond.items()})

    def predict(model: nn.Module, noisy: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype):  # where shapes are run
            return rules.predict(model, noisy, t, cond)

    step = memory.Step(model, predict, rules.BLOCKS, inputs, pairs=pairs)
    passes: dict[tuple[str, bool, bool], simulate.Passes] = {}
    found = {}
    for name in names:
        if name in BASELINES:
            usual = BASELINES[name]
            mode, kept = "joint", "full" if usual.recomputes else "none"
            copies = 2 if usual.two_models else 1
            compiled, own = usual.compiled, replace(step, copies=copies, shared=False)
        else:
            mode, kept, added = rungs(name)
            compiled = "compile" in added
            online = "cached" not in added
            own = replace(step, online=online, shared=online, graphs="graph" in added)
        key = (kept, compiled, own.shared and adapters == "half")
        if key not in passes:
            passes[key] = simulate.passes(
                model, predict, rules.BLOCKS, inputs, checkpoint=kept, compiled=compiled,
                shared=key[2],
            )  # fmt: skip
        found[name] = memory.predict(own, passes[key], on, mode, kept, compiled)
    return found


def plan(found: dict[str, memory.Prediction], pairs: int, rounds: int, on: memory.Card) -> None:
    """Prints a line per variant, and last how long the table takes."""
    seconds, compiled = float(START), set()
    for name, row in found.items():
        fits = row.fits(on)
        taken = "" if row.seconds is None else f" {row.seconds:.3g} s/pair"
        print(
            f"{name:<32} predicted{taken} {row.peak / 1e9:.1f} GB" + "  does not fit" * (not fits)
        )
        if fits:
            # Prepared twice, once more for the optimiser, the rounds, and for the energy.
            seconds += (4 + rounds) * pairs * max(row.seconds or 0.0, 0.2)
            if row.compile and (row.checkpointing, name in BASELINES) not in compiled:
                compiled.add((row.checkpointing, name in BASELINES))
                seconds += COMPILED
    print(f"predicted {seconds:.0f} s")


class Beside:
    """A table's forecast, made by a process of its own while the first variant is prepared."""

    def __init__(self, on: memory.Card, *told: object) -> None:
        self.on, self.found = on, None
        self.pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self.future: Future = self.pool.submit(forecast, *told, on)

    def why_not(self, name: str, rows: dict[str, dict[str, object]]) -> str | None:
        """Why a variant cannot fit, or None; what is predicted goes to all rows, once."""
        if self.found is None:
            try:
                self.found = self.future.result(timeout=90)
            except Exception as error:  # the table goes on without
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                print(f"nothing is predicted: {reason}", flush=True)
                self.found = {}
            for each, row in self.found.items():
                rows[each] |= {"predicted_gb": row.peak / 1e9, "predicted_s": row.seconds}
        row = self.found.get(name)
        if row is None or row.fits(self.on):
            return None
        return f"{row.peak / 1e9:.1f} GB, {self.on.room / 1e9:.1f} are there to plan with"

    def leave(self) -> None:
        """Ends it, done or not: the interpreter would wait for it."""
        for worker in list((self.pool._processes or {}).values()):
            worker.terminate()
        self.pool.shutdown(cancel_futures=True)
