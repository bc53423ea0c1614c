"""The demo's pairs: candidates from the base model, ranked by a noisy judge, written as mp4."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..files import write_atomic
from ..look.sample import sample
from ..pairs.media import write_clip
from . import clips

CANDIDATES = 6
JUDGE_NOISE = 0.05  # standard deviation, on scores between 0 and 1
SAMPLING_STEPS = 20
SHAPE = (3, clips.FRAMES, clips.SIZE, clips.SIZE)
CHUNK = 96  # clips sampled at once: what fits a laptop's cache best

# Fixed before anything was tuned. A sample's seed is its block plus its number: no clip of one
# block shares its starting noise with another's.
SEEDS = {"pairs": 1_000_000, "validation": 2_000_000, "evaluation": 3_000_000, "ranked": 4_000_000}


@dataclass
class Sampler:
    """A model with what turns prompts and seeds into clips."""

    model: nn.Module
    family: ModuleType
    process: Any
    pipe: Any

    def clips(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Tensor]:
        """One clip `uint8 [F, H, W, 3]` per prompt and seed."""
        result = []
        for start in range(0, len(prompts), CHUNK):
            some = slice(start, start + CHUNK)
            rows = self.family.encode_text(self.pipe, list(prompts[some]))
            cond = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            latents = sample(
                self.model,
                self.family,
                self.pipe.scheduler,
                cond,
                SHAPE,
                steps=SAMPLING_STEPS,
                seeds=seeds[some],
            )
            result += [self.family.decode(self.pipe, latent) for latent in latents]
        return result


def judge_all(prompts: Sequence[str], videos: Sequence[Tensor]) -> dict[str, Tensor]:
    """Noise-free scores `[N]` float64: the whole `score` and each of its parts."""
    each = [clips.judge(p, v) for p, v in zip(prompts, videos, strict=True)]
    return {k: torch.tensor([e[k] for e in each], dtype=torch.float64) for k in each[0]}


def make_pairs(sampler: Sampler, folder: Path, count: int, block: str) -> dict[str, Any]:
    """Writes `count` pairs: clips/*.mp4, metadata.jsonl with prompt, chosen, rejected, and
    ranked.jsonl with prompt, candidates.

    For each pair the base model draws CANDIDATES clips of one prompt; the judge's scores get normal
    noise; the best becomes `chosen`, the worst `rejected`, and all of them, best first, are the
    candidates. Returns what is known of the labels: `right` is the share of pairs whose chosen clip
    is really the better one.
    """
    prompts = [clips.PAIR_PROMPTS[i % len(clips.PAIR_PROMPTS)] for i in range(count)]
    asked = [p for p in prompts for _ in range(CANDIDATES)]
    seeds = [SEEDS[block] + i for i in range(len(asked))]
    videos = sampler.clips(asked, seeds)
    scores = judge_all(asked, videos)["score"]
    generator = torch.Generator().manual_seed(SEEDS[block])
    noise = torch.randn(len(scores), generator=generator, dtype=torch.float64)
    seen = (scores + JUDGE_NOISE * noise).view(count, CANDIDATES)
    order = seen.argsort(dim=1, descending=True)
    kinds = ["chosen", *map(str, range(2, CANDIDATES)), "rejected"]
    pairs, ranked = [], []
    for i, prompt in enumerate(prompts):
        names = [f"clips/{i:03d}-{kind}.mp4" for kind in kinds]
        for name, member in zip(names, order[i].tolist(), strict=True):
            write_clip(folder / name, videos[i * CANDIDATES + member])
        pairs.append({"prompt": prompt, "chosen": names[0], "rejected": names[-1]})
        ranked.append({"prompt": prompt, "candidates": names})
    write_rows(folder / "metadata.jsonl", pairs)
    write_rows(folder / "ranked.jsonl", ranked)
    table = scores.view(count, CANDIDATES).gather(1, order)
    gap = table[:, 0] - table[:, -1]
    return {
        "candidates": len(scores),
        "mean_score": scores.mean().item(),
        "gaps": gap.tolist(),
        "right": (gap > 0).double().mean().item(),
    }


def shuffle_labels(folder: Path, target: Path) -> list[int]:
    """Writes the same pairs with chosen and rejected swapped in a random half of them.

    Returns which rows were swapped. Exactly half, so that chance leaves no net preference.
    """
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEEDS["pairs"]))
    swapped = sorted(order[: len(rows) // 2].tolist())
    for i in swapped:
        rows[i]["chosen"], rows[i]["rejected"] = rows[i]["rejected"], rows[i]["chosen"]
    for row in rows:
        for kind in ("chosen", "rejected"):
            copy = target / row[kind]
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((folder / row[kind]).read_bytes())
    write_rows(target / "metadata.jsonl", rows)
    return swapped


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
