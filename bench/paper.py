"""Many GPUs on paper: what a step moves between them, and pairs a second, predicted from what one
GPU was measured at. The tables of bench/SCALE.md: `python -m bench.scale --paper`
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.architectures import ARCHITECTURES, Architecture, _counted
from fastpref import models
from fastpref.models import published

NVLINK, NETWORK = 450e9, 50e9  # bytes/s of a GPU in one direction: in its node, between nodes
# Exchanges of objects in a step, each two rings of gloo; one more where passes exchange tensors.
EXCHANGES, HOP = 2, 50e-6  # seconds from one process to the next, assumed
NODE = 8
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
SHAPE, RANK, BATCH = "81x480x832", 64, 128
FLOAT32, BFLOAT16 = 4, 2
ROWS = Path(__file__).parent / "results" / "step.jsonl"
WAN = {
    "1.3B": ARCHITECTURES["wan"],
    "14B": _counted(published._wan(40, 128, 13824, 40, (512, 4096))),
}


def measured(variant: str) -> float:
    """Seconds a pair of Wan 1.3B on an H100, of bench.step's rows."""
    rows = map(json.loads, ROWS.read_text().splitlines())
    return next(
        row["s_per_pair"]
        for row in rows
        if (row["family"], row["shape"], row["variant"]) == ("wan", SHAPE, variant)
        and "H100" in row["device"]
    )


@dataclass(frozen=True)
class Case:
    """A run: bytes that each GPU's part of a step stands for, and seconds a pair on one GPU.

    summed: of gradients, once a step. gathered: of weights, each batch. overlaps: with the passes.
    states: of weights, gradients and Adam, shared by all GPUs where they are in shards.
    """

    name: str
    arch: Architecture
    seconds: float
    how: str
    summed: float
    gathered: float
    overlaps: bool
    states: float

    def moved(self, gpus: int) -> float:
        """Seconds of a step's exchange, of one batch a GPU, by rings: 2 (n-1)/n of what is summed
        where it stays whole, (n-1)/n of what is gathered, or summed into shards.
        """
        ring, link = (gpus - 1) / gpus, NVLINK if gpus <= NODE else NETWORK
        times = 1 if self.gathered else 2
        return ring * (times * self.summed + self.gathered) / link

    def step(self, gpus: int) -> float:
        """Seconds of a step of one batch a GPU, of one pair."""
        if self.overlaps:
            return max(self.seconds, self.moved(gpus)) + told(gpus, True)
        return self.seconds + self.moved(gpus) + told(gpus, False)


def told(gpus: int, together: bool) -> float:
    """Seconds of what processes tell each other in a step."""
    return 2 * (EXCHANGES + together) * (gpus - 1) * HOP


def cases() -> list[Case]:
    """1.3B as measured; others by their FLOPs at the rate of 1.3B with every block recomputed."""
    small = WAN["1.3B"]
    products, attention = small.forward_flops(SHAPE)
    again = 2 * (products + attention)  # of both members
    rate = (small.pair_flops(SHAPE, online=True) + again) / measured("B4")
    found = []
    for name, arch in WAN.items():
        model = arch.make(torch.device("meta"), torch.bfloat16)
        weights = sum(p.numel() for p in model.parameters())
        targets = tuple(models.family("wan").LORA_TARGETS)
        layers = [m for n, m in model.named_modules() if n.endswith(targets)]
        adapters = sum(RANK * (m.in_features + m.out_features) for m in layers)
        products, attention = arch.forward_flops(SHAPE)
        flops = arch.pair_flops(SHAPE, online=True)
        again = 2 * (products + attention)
        one, how = measured("deferred/none+compile"), "measured"
        if name != "1.3B":
            one, how = (flops + again) / rate, "predicted"
        states = BFLOAT16 * weights + 4 * FLOAT32 * adapters
        summed = FLOAT32 * adapters
        found.append(Case(f"{name}, adapters", arch, one, how, summed, 0.0, False, states))
        # Each weight's gradient is a product more; forward, backward and the reference's forward
        # gather weights, of its own or the reference's.
        one = (flops + again + 2 * products) / rate
        whole = FLOAT32 * weights
        found.append(
            Case(f"{name}, full", arch, one, "predicted", whole, 3 * whole, True, 5 * whole)
        )
    return found


def shared(case: Case, contexts: int) -> float:
    """Seconds of one member of a pair by so many GPUs of a node: Ulysses sends q, k, v and what
    attention gives, in the policy's forward and backward and the reference's forward.
    """
    tokens, part = case.arch.tokens(SHAPE), (contexts - 1) / contexts**2
    sent = 3 * 4 * case.arch.layers * tokens * case.arch.dim * BFLOAT16 * part
    return case.seconds / 2 / contexts + sent / NVLINK


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def head(*cells: object) -> list[str]:
    return [row(*cells), "|" + "---|" * len(cells)]


def table() -> str:
    """The tables, as Markdown."""
    every = cases()
    lines = head("Wan, predicted but where it says measured", *(case.name for case in every))
    lines += [
        row("s/pair on one GPU", *(f"{c.seconds:.3g} ({c.how})" for c in every)),
        row("GB summed a step", *(f"{c.summed / 1e9:.3g}" for c in every)),
        row("GB gathered a batch", *(f"{c.gathered / 1e9:.3g}" for c in every)),
        row("s of it, 8 GPUs", *(f"{c.moved(8):.3g}" for c in every)),
        row("s of it, 64 GPUs", *(f"{c.moved(64):.3g}" for c in every)),
        row("s of talk, 1024 GPUs", *(f"{told(1024, c.overlaps):.2g}" for c in every)),
        row("beside the passes", *("yes" if c.overlaps else "no" for c in every)),
        row("GB of weights and states on each of 8", *(_states(c, 8) for c in every)),
        "",
        *head("GPUs", "pairs a step", *(f"{c.name}: pairs/s" for c in every)),
    ]
    for n in GPUS:
        lines.append(row(n, n, *(f"{n / c.step(n):.3g} ({_share(c, n)})" for c in every)))
    lines += ["", *head("GPUs", f"{BATCH} pairs a step: by", *(c.name for c in every[::2]))]
    for n in GPUS[1:]:
        spread = max(1, n // BATCH)
        how = {1: "data", 2: "data, pair_mode split"}
        by = how.get(spread, f"data, pair_mode split, ulysses_degree {spread // 2}")
        cells = []
        for case in every[::2]:
            passes = BATCH / n * case.seconds if spread == 1 else shared(case, spread // 2)
            cells.append(f"{BATCH / (passes + case.moved(n) + told(n, spread > 1)):.3g} pairs/s")
        lines.append(row(n, by, *cells))
    read = 2 * BFLOAT16 * torch.Size(WAN["1.3B"].latent(SHAPE)).numel() + BFLOAT16 * 512 * 4096
    fastest = GPUS[-1] / every[0].step(GPUS[-1])
    lines += [
        "",
        f"A pair's file has {read / 1e6:.3g} MB (bfloat16): {GPUS[-1]} GPUs of the first column "
        f"read {read * fastest / 1e9:.2g} GB/s.",
    ]
    return "\n".join(lines)


def _states(case: Case, gpus: int) -> str:
    return f"{case.states / 1e9 / (gpus if case.overlaps else 1):.3g}"


def _share(case: Case, gpus: int) -> str:
    """Of one GPU's speed."""
    return f"{100 * case.seconds / case.step(gpus):.3g} %"
