"""A larger world: two objects that cross, and a model of ten million parameters.

Its base is pretrained once (`mid_pretrain`), unless one is there. All else is in float32, on a GPU
too, so that the rows of both are of the same thing.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.evidence import mid_prompts
from bench.evidence.mid_pretrain import Options, judge_all, pretrain, sampled
from bench.evidence.world import Asked, World, asked, once
from fastpref.demo.pairs import CANDIDATES, JUDGE_NOISE, shuffle_labels, write_rows
from fastpref.look import evaluate
from fastpref.models import toy
from fastpref.pairs.dataset import PairDataset
from fastpref.pairs.encode import encode
from fastpref.pairs.media import write_clip
from fastpref.process import FlowMatching
from fastpref.run import adapters

PAIRS, STEPS, CLIPS = 256, 100, 96
BETAS = (200.0, 600.0, 2000.0, 6000.0, 20000.0)
OWN = {"ipo": (2.0, 6.0, 20.0, 60.0, 200.0)}  # its target is 1 / (2 beta), in errors
PAIRS_PER_STEP = 8
VALIDATION = 32
VALIDATION_SEED = 7
AT_ONCE = 8  # pairs that are made together, and not again

# Of every sample: its block plus its number, as in the demo.
SEEDS = {"pairs": 1_000_000, "validation": 2_000_000, "report": 3_000_000, "choice": 4_000_000}


def prepare(folder: Path, pairs: int, clips: int) -> World:
    """The base, pairs, the same with shuffled labels, and held-out pairs of other prompts."""
    base = folder / "base"
    if not base.exists():
        pretrain(base, Options())
    load = partial(_load, base)
    made = make_pairs(load(None), folder / "pairs", pairs, "pairs", mid_prompts.PAIR_PROMPTS)
    make_pairs(
        load(None),
        folder / "validation",
        min(VALIDATION, pairs),
        "validation",
        mid_prompts.VALIDATION_PROMPTS,
    )
    shuffle = partial(shuffle_labels, folder / "pairs", folder / "pairs-shuffled")
    once(folder / "shuffled.json", lambda: {"swapped": shuffle()})
    for name in ("pairs", "pairs-shuffled", "validation"):
        encode("toy", base, folder / name, folder / "encoded" / name, progress=False)
    validation = PairDataset(folder / "encoded" / "validation")
    return World(
        family="toy",
        model=base,
        data=folder / "encoded" / "pairs",
        shuffled=folder / "encoded" / "pairs-shuffled",
        settings={
            "lora_rank": 16,
            "learning_rate": 5e-4,
            "train_batch_size": PAIRS_PER_STEP,
        },
        # Times are unshifted, as in the demo: this grid decides what is masked, roughly s < 0.4.
        hyper={
            "dpo_cm": {"importance_steps": 5},
            "sdpo": {"importance_steps": 5},
            "dpo_windowed": {"timestep_range": (0.35, 1.0)},
        },
        choice=asked(mid_prompts.CHOICE, SEEDS["choice"], clips),
        report=asked(mid_prompts.REPORT, SEEDS["report"], clips),
        load=load,
        clips=_clips,
        judge=judge_all,
        errors=partial(_errors, validation),
        before=made["seconds"],
    )


def _load(base: Path, adapter: Path | None) -> nn.Module:
    model = toy.load(base)
    model = model if adapter is None else adapters.load_lora(adapter, model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _clips(model: nn.Module, asked: Asked) -> list[Tensor]:
    return sampled(model, *asked)


def _errors(validation: PairDataset, model: nn.Module) -> Tensor:
    process = FlowMatching()
    return evaluate.errors(model, toy, process, validation, seed=VALIDATION_SEED, draws_per_pair=4)


def make_pairs(
    model: nn.Module, folder: Path, count: int, block: str, prompts: list[str]
) -> dict[str, Any]:
    """Writes `count` pairs as the demo's: clips/*.mp4, and metadata.jsonl with prompt, chosen and
    rejected, the best and the worst of CANDIDATES by the noisy judge.

    Returns the share of pairs whose chosen clip is really the better one (`right`), the `gaps` of
    their scores and the `seconds` it took. What an interrupted call has made is not made again.
    """
    noise = torch.randn(
        count,
        CANDIDATES,
        generator=torch.Generator().manual_seed(SEEDS[block]),
        dtype=torch.float64,
    )
    texts, _ = asked(prompts, 0, count)
    parts = []
    for start in range(0, count, AT_ONCE):
        some = range(start, min(start + AT_ONCE, count))
        make = partial(_rank, model, folder, SEEDS[block], texts, JUDGE_NOISE * noise, some)
        parts.append(once(folder / "parts" / f"{start:05d}.json", make))
    write_rows(folder / "metadata.jsonl", [row for part in parts for row in part["rows"]])
    gaps = [gap for part in parts for gap in part["gaps"]]
    return {
        "gaps": gaps,
        "right": sum(gap > 0 for gap in gaps) / count,
        "seconds": sum(part["seconds"] for part in parts),
    }


def _rank(
    model: nn.Module, folder: Path, seed: int, texts: list[str], noise: Tensor, which: range
) -> dict[str, Any]:
    """Clips of some pairs: their `rows`, and the `gaps` of the scores without the noise."""
    prompts = [texts[i] for i in which for _ in range(CANDIDATES)]
    first = seed + CANDIDATES * which.start
    videos = sampled(model, prompts, list(range(first, first + len(prompts))))
    scores = judge_all(prompts, videos)["score"].view(-1, CANDIDATES)
    seen = scores + noise[which.start : which.stop]
    rows, gaps = [], []
    for k, i in enumerate(which):
        best, worst = seen[k].argmax().item(), seen[k].argmin().item()
        row = {"prompt": texts[i]}
        for kind, member in (("chosen", best), ("rejected", worst)):
            row[kind] = f"clips/{i:05d}-{kind}.mp4"
            write_clip(folder / row[kind], videos[k * CANDIDATES + member])
        rows.append(row)
        gaps.append((scores[k, best] - scores[k, worst]).item())
    return {"rows": rows, "gaps": gaps}
