"""The table of bench.step as it is measured: variants are prepared, then take turns.

A row is written as soon as nothing in it can change.
"""

import argparse
import gc
import math
import signal
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from itertools import count

import torch
from torch import Tensor

from bench import timing
from bench.baselines import BASELINES
from bench.forecast import Beside
from bench.inductor import Carried
from bench.meters import Power, SavedBytes, attention_kernel
from bench.rows import describe, energy
from bench.variants import (
    DRAWS,
    FEW_TOKENS,
    Ours,
    Setting,
    Usual,
    default_variants,
    rungs,
    tensors,
)
from fastpref.step import memory

# Of the gradient's norm, to B1's. In bf16 the baselines round their noising and loss as well: 1 %
# on four blocks, more on many; a wrong sign is 200 %. Small factors show with --dtype float32.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
NO_MEMORY, NO_TIME = "out of memory", "no time left"  # what leaves a variant out and is no mistake


def prepare(name: str, setting: Setting, expected: list[Tensor] | None) -> tuple[object, dict]:
    """(the variant, what is known of it before it is timed): its gradient and its peak memory."""
    variant = (Usual if name in BASELINES else Ours)(name, setting)
    gpu = setting.device.type == "cuda"
    # A graph is recorded in the fourth call, and its replay is what must be right.
    for call in range(5 if variant.graphs else 2):
        for p in setting.parameters:
            p.grad = None
        if gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        if gpu and call == 1:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        variant.gradient(0, same_noise=True)
        if gpu:
            torch.cuda.synchronize()
        if gpu and call == 1:
            step_bytes = torch.cuda.max_memory_allocated() - before
        seconds = time.perf_counter() - begin
    facts: dict[str, object] = {"peak_gb": None, "gradient_off": 0.0, "s_first": seconds}
    if gpu:
        own = sum(t.nbytes for t in tensors(setting.base)) * variant.models
        adapters = sum(p.nbytes for p in setting.parameters)
        facts["peak_gb"] = round((step_bytes + own + 3 * adapters) / 1e9, 2)
    if expected is not None:
        off = sum(
            (p.grad - g).double().square().sum()
            for p, g in zip(setting.parameters, expected, strict=True)
        )
        all_of_it = sum(g.double().square().sum() for g in expected)
        facts["gradient_off"] = math.sqrt(off / all_of_it)
    return variant, facts


def activation_bytes(variant: Ours, setting: Setting) -> int:
    """What the recorded graphs of a step hold at most, without parameters and buffers."""
    saved = SavedBytes(variant.model)
    with saved.count():
        variant.gradient(0)
    return saved.most


class Ended(BaseException):
    """SIGTERM came: no error that leaves out one variant."""


class Table:
    """The rows of one call: variants are prepared one after the other, then take turns."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        for name in args.variants or ():
            if name not in BASELINES:
                rungs(name)  # so that a mistake is told before anything is made
        self.minutes, self.rounds, self.output = args.minutes, args.rounds, args.output
        self.deadline = time.perf_counter() + 60 * args.minutes
        self.late = f"{NO_TIME} of --minutes {args.minutes:g}"
        self.setting, self.power, self.device = Setting(args, device), Power(device), device
        setting, arch = self.setting, self.setting.arch
        facts = {
            "bench": "step",
            "family": args.family,
            "shape": setting.shape,
            "adapters": args.adapters,
            "tokens": arch.tokens(setting.shape),
            "pairs": setting.pairs,
            "dtype": str(setting.dtype).removeprefix("torch."),
            "attention": str(setting.attention),
            "driver": self.power.driver,
            **timing.environment(device),
        }
        if device.type == "cuda":
            facts["attention_kernel"] = attention_kernel(setting.calls[0], setting.attention.name)
        names = dict.fromkeys(["B1", *(args.variants or default_variants(setting))])
        self.rows = {name: {**facts, "variant": name} for name in names}
        self.inductor: Carried | None = None
        if args.inductor:
            told = [args.family, setting.shape, setting.pairs, facts["dtype"], args.adapters]
            told = "-".join(map(str, [*told, setting.attention.name, *names]))
            self.inductor = Carried(args.inductor, device, told)
            print(f"{self.inductor.load() / 1e6:.1f} MB of compiled code from {args.inductor}")
        self.forecast: Beside | None = None
        large = arch.tokens(setting.shape) > FEW_TOKENS and setting.dtype == torch.bfloat16
        if device.type == "cuda" and large:
            told = (args.family, setting.shape, setting.pairs, args.adapters, list(names))
            self.forecast = Beside(memory.card_of(device), *told)
        self.open = list(names)  # whose rows are not written yet
        self.variants: dict[str, Usual | Ours] = {}
        self.samples: dict[str, list[float]] = {}

    def leave_out(self, name: str, why: str) -> None:
        self.rows[name]["left_out"] = why
        self.variants.pop(name, None)
        print(f"{name}: {why}", flush=True)
        self.write(name)

    def write(self, name: str) -> None:
        with redirect_stdout(None):  # that rows are appended is said once, below the table
            timing.append(self.output, [self.rows[name]])
        self.open.remove(name)

    def prepare(self) -> None:
        """Makes the variants, B1's gradient before anything else."""
        expected = None
        for name in self.rows:
            begin = time.perf_counter()
            if name != "B1" and expected is None:
                self.leave_out(name, "nothing to compare with: B1 is left out")
                continue
            if name != "B1" and self.forecast and (why := self.forecast.why_not(name, self.rows)):
                self.leave_out(name, f"{NO_MEMORY}, as predicted: {why}")
                continue
            if self.variants and self.deadline - begin < self.kept_for_timing():
                self.leave_out(name, self.late)
                continue
            try:
                variant, known = prepare(name, self.setting, expected)
            except Exception as error:  # out of memory, a compiler's: the others go on
                self.leave_out(name, failure(error))
            else:
                self.rows[name] |= known
                if name == "B1":
                    expected = [p.grad.clone() for p in self.setting.parameters]
                if self.device.type == "cpu" and name in ("joint/none", "deferred/none"):
                    self.rows[name]["activation_bytes"] = activation_bytes(variant, self.setting)
                if not known["gradient_off"] <= TOLERANCE[self.setting.dtype]:
                    self.leave_out(name, f"gradient is off B1's by {known['gradient_off']:.2%}")
                elif why := not_recorded(variant, self.device):
                    self.leave_out(name, why)
                else:
                    self.variants[name] = variant
            print(f"{name}: prepared in {time.perf_counter() - begin:.1f} s", flush=True)
            self.keep_compiled()  # at once: the process may be killed at any time
            variant = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def keep_compiled(self) -> None:
        if self.inductor:
            self.inductor.save()

    def kept_for_timing(self) -> float:
        """Seconds that no variant is prepared in: the optimisers' states, three rounds and the
        energy of those that are ready and of one more, and a fifth to spare.
        """
        taken = [self.rows[name]["s_first"] for name in self.variants]
        return max(6 * (sum(taken) + max(taken)), 6 * self.minutes)

    def time(self) -> None:
        """The rounds, as many as there is time for; what is left out of them is written."""
        for name, variant in list(self.variants.items()):  # the optimisers' states and graphs
            try:
                for _ in range(5 if variant.graphs else 1):
                    variant.gradient(0)
                    variant.update()
                if why := not_recorded(variant, self.device):
                    self.leave_out(name, why)
            except Exception as error:
                self.leave_out(name, failure(error))
        left = 0.8 * (self.deadline - time.perf_counter())
        while len(self.variants) > 1 and 2 * self.seconds() > left:  # two rounds are the least
            self.leave_out(list(self.variants)[-1], self.late)
        if not self.variants:
            return
        rounds = max(2, min(self.rounds, int(left / self.seconds())))
        self.samples = {name: [] for name in self.variants}
        orders = timing.orders(list(self.variants))
        turns = {name: self.turn(name) for name in self.variants}
        for _ in range(rounds):
            taken = {name: timing.once(turns[name], self.device) for name in next(orders)}
            for name, seconds in taken.items():  # a round that is broken off adds nothing
                self.samples[name].append(seconds)
        for name in list(self.variants):
            spent = None
            if self.power.joules() is not None and time.perf_counter() < self.deadline:
                median = timing.Timing(tuple(self.samples[name])).median
                spent = energy(turns[name], median, self.setting, self.power)
            if name in self.variants:
                self.describe(name, spent)

    def seconds(self) -> float:
        """Of one round."""
        return sum(self.rows[name]["s_first"] for name in self.variants)

    def turn(self, name: str) -> Callable[[], None]:
        counter = count()

        def call() -> None:
            if name not in self.variants:  # since it failed: the others go on
                return
            variant = self.variants[name]
            if not variant.graphs:  # one launch has no parts
                variant.clock.begin()
            try:
                variant.gradient(next(counter) % DRAWS)
                variant.update()
            except Exception as error:
                self.leave_out(name, failure(error))

        return call

    def describe(self, name: str, spent: float | None = None) -> None:
        """Writes the row of a variant that was timed; spent: its pairs per kWh."""
        first = self.samples["B1"] if "B1" in self.variants else None
        taken = timing.Timing(tuple(self.samples[name]))
        against = first and timing.Timing(tuple(first))
        self.rows[name] |= describe(self.variants[name], taken, against, self.setting)
        self.rows[name] |= {"rounds": len(taken.samples), "pairs_per_kwh": spent}
        self.write(name)

    def end(self) -> None:
        """After SIGTERM: the complete rounds are a time, two at the least; the rest had no time."""
        whole = min(map(len, self.samples.values()), default=0)
        self.samples = {name: taken[:whole] for name, taken in self.samples.items()}
        for name in list(self.open):
            if name in self.variants and len(self.samples.get(name, ())) > 1:
                self.describe(name)
            else:
                self.leave_out(name, f"{NO_TIME}: ended by SIGTERM")


def measure(args: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    """Rows of the table, in the order of names: baselines, then ours, each before what adds to it.

    Meanwhile SIGTERM ends the measuring alone.
    """

    def ended(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is known is written first
        raise Ended

    table = Table(args, device)
    before = signal.signal(signal.SIGTERM, ended)
    try:
        table.prepare()
        table.time()
    except Ended:
        table.end()
        table.keep_compiled()  # of the variant that was being prepared
    finally:
        signal.signal(signal.SIGTERM, before)
        if table.forecast:
            table.forecast.leave()
    return [table.rows[name] for name in sorted(table.rows)]


def not_recorded(variant: Usual | Ours, device: torch.device) -> str | None:
    """Which graph of a variant's, if any, a GPU runs without: its time is not what its name says.

    On a CPU there are none, and all such variants run without.
    """
    if device.type == "cuda":
        for graph in variant.graphs:
            if graph.why_not is not None:
                return f"the {graph.name} was not recorded: {graph.why_not}"
    return None


def failure(error: Exception) -> str:
    """Why a variant has no time, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return NO_MEMORY
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
