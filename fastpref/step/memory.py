"""What a run needs of a card, predicted before it starts: its memory, and seconds a pair."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import torch
from torch import Tensor, nn

from . import simulate
from .checkpointing import Mode
from .fusion import Work
from .reference import PairMode, Predict, adapter_layers
from .simulate import Passes

MODES: tuple[Mode, ...] = get_args(Mode)
GIB = 2**30
SPARE = 0.08  # of a card's memory: fragments of the allocator, and what the prediction lacks
CONTEXT = 0.6e9  # bytes of CUDA's context and libraries, which PyTorch does not count


@dataclass(frozen=True)
class Card:
    """A GPU's memory in GiB, and the rates that kernels reach on it.

    product: FLOP/s of bf16 products. traffic: bytes/s. attention: FLOP/s of forward and backward by
    the heads' dim. None: not known. operator: seconds the host takes for an operator of an eager
    model, with autocast's and adapters' Python; launch: for a kernel of a compiled block. least:
    seconds of the smallest kernel of a recorded step.
    """

    name: str
    gib: float
    product: float | None = None
    traffic: float | None = None
    attention: dict[int, tuple[float, float]] = field(default_factory=dict)
    operator: float = 30e-6
    launch: float = 6e-6
    least: float = 5e-6

    @property
    def room(self) -> float:
        """Bytes that a run may plan with."""
        return (1 - SPARE) * (self.gib * GIB - CONTEXT)


# Rates: of cuDNN's attention at 16k tokens (FlashAttention-3, arXiv 2407.08608, its figures), of
# products with the models' widths, and of a copy. An H100's attention was within 8 % of them
# (bench.attention); the seconds of the host and of the smallest kernel are those of its steps of
# 256 tokens (bench.step --shape 1x256x256), but for `launch`, which is expected.
_HOPPER = {64: (413e12, 433e12), 128: (595e12, 516e12)}
CARDS = {
    "h100-80": Card("h100-80", 79.6, 650e12, 3.0e12, _HOPPER),
    "h200": Card("h200", 140.4, 650e12, 4.0e12, _HOPPER),
}


def card(name: str) -> Card:
    """A card by its name, or any card by its memory in GiB: its seconds are not known, but for one
    of a known card's size.
    """
    if name in CARDS:
        return CARDS[name]
    if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]+)?", name) or float(name) * GIB < 2 * CONTEXT:
        raise ValueError(f"--card: expected {', '.join(CARDS)} or its memory in GiB, got {name}")
    near = [c for c in CARDS.values() if abs(c.gib - float(name)) < 1]
    return near[0] if near else Card(f"{name} GiB", float(name))


def card_of(device: torch.device) -> Card:
    """The card that is here: its memory, and the rates of a known one that it is named after."""
    found = torch.cuda.get_device_properties(device)
    gib = found.total_memory / GIB
    for known in CARDS.values():
        if known.name.partition("-")[0].upper() in found.name.upper():
            return replace(known, name=found.name, gib=gib)
    return Card(found.name, gib)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of one choice; bytes at the peak of a step, and seconds a pair.

    weights: of the model, and of a frozen copy. trained: parameters that train, their gradients,
    the side buffer of a deferred step, and the optimiser's moments. kept: what the recorded graphs
    hold. transients: the rest. seconds: None where the card's rates are not known. launch_bound:
    the host needs longer to launch the kernels than the card to run them.
    """

    pair_mode: PairMode
    checkpointing: Mode
    compile: bool
    weights: int
    trained: int
    kept: int
    transients: int
    seconds: float | None
    launch_bound: bool = False

    @property
    def name(self) -> str:
        name = f"{self.pair_mode}/{self.checkpointing}"
        return f"{name}+compile" if self.compile else name

    @property
    def peak(self) -> int:
        return self.weights + self.trained + self.kept + self.transients

    def flags(self, mixed_precision: str, *, graphs: bool = True) -> str:
        """Of `fastpref train`; graphs: a step can be recorded."""
        compiled = str(self.compile).lower()
        flags = (
            f"--mixed_precision {mixed_precision} --pair_mode {self.pair_mode} --checkpointing "
            f"{self.checkpointing} --compile {compiled}"
        )
        return f"{flags} --cuda_graphs true" if self.launch_bound and graphs else flags

    def fits(self, on: Card) -> bool:
        """With 8 % to spare."""
        return self.peak <= on.room


@dataclass(frozen=True)
class Step:
    """What a pair step is made of, so that `predict` can run it over shapes.

    model: with its adapters, before checkpointing and compiling. blocks: the family's BLOCKS.
    inputs: (noisy, t, cond) of one sample. pairs: of a batch. online: the reference is a pass, not
    cached. copies: of the frozen weights. shared: policy and reference share what stands below the
    first adapter. graphs: the step is recorded: launches take no time.
    """

    model: nn.Module
    predict: Predict
    blocks: str
    inputs: tuple[Tensor, Tensor, dict[str, Tensor]]
    pairs: int = 1
    online: bool = True
    copies: int = 1
    shared: bool = True
    graphs: bool = False


def predictions(
    step: Step,
    on: Card,
    *,
    pair_modes: Sequence[PairMode] = ("joint", "deferred"),
    checkpointing: Sequence[Mode] = MODES,
    compile: Sequence[bool] = (False, True),
) -> Iterator[Prediction]:
    """A prediction for every combination, those with the least recomputation first.

    Compiled blocks that differ from each other, as a UNet's do, would take minutes to look at: they
    are predicted like those that are not compiled, which keep more and take longer.
    """
    alike = simulate.like_each_other(step.model, step.blocks) > 0
    for mode in checkpointing:
        found = None
        for compiled in compile:
            if found is None or alike:
                found = simulate.passes(
                    step.model,
                    step.predict,
                    step.blocks,
                    step.inputs,
                    checkpoint=mode,
                    compiled=compiled and alike,
                    shared=step.shared and step.online,
                )
            for pair_mode in pair_modes:
                yield predict(step, found, on, pair_mode, mode, compiled)


def predict(
    step: Step, found: Passes, on: Card, pair_mode: PairMode, checkpointing: Mode, compile: bool
) -> Prediction:
    """From one sample's passes to a step: deferred has one sample's alive at a time, joint all of a
    batch, split (of two processes) half of them.
    """
    tensors = [*step.model.parameters(), *step.model.buffers()]
    trained = [p for p in step.model.parameters() if p.requires_grad]
    values = sum(p.nbytes for p in trained)
    noisy, _, cond = step.inputs
    inputs = 2 * noisy.nbytes + sum(v.nbytes for v in cond.values())  # latents and noisy
    rows = {"joint": 2 * step.pairs, "deferred": 1, "split": step.pairs}[pair_mode]
    most = max(found.peak, found.reference_peak if step.online else 0)
    frozen = sum(t.nbytes for t in tensors) - values
    copied = frozen if adapter_layers(step.model) else frozen + values  # without adapters, or all
    launch = on.launch if compile else on.operator
    recorded = seconds(step, found, on, rows, 0.0)
    taken = recorded if step.graphs else seconds(step, found, on, rows, launch)
    return Prediction(
        pair_mode=pair_mode,
        checkpointing=checkpointing,
        compile=compile,
        weights=frozen + (step.copies - 1) * copied,
        trained=(5 if pair_mode == "deferred" else 4) * values,
        kept=rows * found.kept,
        transients=rows * (most - found.kept) + 2 * step.pairs * inputs,
        seconds=taken,
        launch_bound=taken is not None and taken > 1.2 * recorded,
    )


def seconds(step: Step, found: Passes, on: Card, rows: int, launch: float) -> float | None:
    """A pair: two samples' passes, each kernel by its slower part, arithmetic or traffic, or the
    host's `launch` seconds for each; both are for all rows of a batch.
    """
    if on.product is None:
        return None
    parts = ("reference", "forward", "backward") if step.online else ("forward", "backward")
    return 2 * sum(_seconds(found.work[part], on, rows, launch) for part in parts)


def _seconds(work: Counter[Work], on: Card, rows: int, launch: float) -> float:
    def rate(each: Work) -> float:
        if each.kind in ("product", "traffic"):
            return on.product
        # Rates are known for these two sizes of head alone.
        forward, backward = on.attention[128 if each.dim > 64 else 64]
        return forward if each.kind == "attention" else backward

    busy = sum(
        n * max(w.flops / rate(w), w.bytes / on.traffic, on.least / rows) for w, n in work.items()
    )
    return max(busy, launch * sum(work.values()) / rows)


def least(step: Step, on: Card, pair_mode: PairMode, compile: bool) -> tuple[Mode, str]:
    """(checkpointing with the least recomputation that fits on a card, why); full where none does.

    A model that cannot be run over shapes has full: nothing is known of what it keeps.
    """
    seen: list[str] = []
    try:
        for row in predictions(step, on, pair_modes=[pair_mode], compile=[compile]):
            seen.append(f"{row.checkpointing} {row.peak / 1e9:.1f} GB")
            if row.fits(on):
                break
    except Exception as error:  # whatever a model does that shapes alone cannot decide
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return "full", f"what the others need cannot be predicted ({reason})"
    what = f"predicted {', '.join(seen)}, of {on.room / 1e9:.1f} GB to plan with on {on.name}"
    return row.checkpointing, what


def table(rows: Sequence[Prediction], on: Card) -> str:
    """The predictions in lines, each marked whether it fits."""
    head = f"{'predicted':<28}{'peak GB':>8}{'weights':>9}{'trained':>9}{'kept':>8}{'rest':>7}"
    lines = [head + f"{'s/pair':>8}"]
    for row in rows:
        parts = (row.peak, row.weights, row.trained, row.kept, row.transients)
        sizes = "".join(f"{v / 1e9:>{n}.1f}" for v, n in zip(parts, (8, 9, 9, 8, 7), strict=True))
        taken = "-" if row.seconds is None else f"{row.seconds:.3g}"
        mark = "fits" if row.fits(on) else "does not fit"
        lines.append(f"{row.name:<28}{sizes}{taken:>8}  {mark}")
    return "\n".join(lines)


def best(rows: Sequence[Prediction], on: Card) -> Prediction | None:
    """The fastest that fits, of those within 2 % of it the smallest; where no seconds are known,
    that with the least recomputation, compiled. None: nothing fits.
    """
    fitting = [row for row in rows if row.fits(on)]
    if None in (times := [row.seconds for row in fitting]):
        key = lambda row: (MODES.index(row.checkpointing), not row.compile, row.peak)  # noqa: E731
        return min(fitting, key=key)
    # Predicted seconds were 1 to 5 % off on an H100: 2 % decide nothing, memory does.
    near = [row for row in fitting if row.seconds <= 1.02 * min(times)]
    return min(near, key=lambda row: row.peak, default=None)
