"""The demo's world: its base model, pairs and judge, with prompts and seeds of the bench's own."""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bench.evidence.world import Asked, World, asked, once
from fastpref.demo import clips, online
from fastpref.demo.pairs import SEEDS, Sampler, judge_all, make_pairs, shuffle_labels
from fastpref.demo.run import BASE, HYPER, PAIRS_PER_STEP, VALIDATION_SEED, base_sampler
from fastpref.look import evaluate
from fastpref.models import toy
from fastpref.pairs.dataset import PairDataset
from fastpref.pairs.encode import encode
from fastpref.run import adapters

PAIRS, STEPS, CLIPS = 96, 80, 96
BETAS = (200.0, 600.0, 2000.0, 6000.0, 20000.0)
# ipo's target is 1 / (2 beta), in errors; spo's margin is of clamped ratios.
OWN = {"ipo": (2.0, 6.0, 20.0, 60.0, 200.0), "spo": (3.0, 10.0, 30.0)}
VALIDATION = len(clips.PAIR_PROMPTS)  # a held-out pair of each prompt
RANKED = 3  # times as many prompts as pairs are ranked for the preference model
CHOICE_SEED = 5_000_000  # a block of its own beside the demo's
AT_ONCE = 48  # clips, which is faster than the demo's 96


def prepare(folder: Path, pairs: int, clips_each: int) -> World:
    """Pairs, the same with shuffled labels, held-out pairs, and ranked clips for SPO; each once."""
    base = base_sampler()
    made = once(folder / "pairs.json", partial(make_pairs, base, folder / "pairs", pairs, "pairs"))
    held_out = partial(make_pairs, base, folder / "validation", VALIDATION, "validation")
    once(folder / "validation.json", held_out)
    shuffle = partial(shuffle_labels, folder / "pairs", folder / "pairs-shuffled")
    once(folder / "shuffled.json", lambda: {"swapped": shuffle()})
    for name in ("pairs", "pairs-shuffled", "validation"):
        encode("toy", BASE, folder / name, folder / "encoded" / name, progress=False)
    validation = PairDataset(folder / "encoded" / "validation")
    return World(
        family="toy",
        model=BASE,
        data=folder / "encoded" / "pairs",
        shuffled=folder / "encoded" / "pairs-shuffled",
        settings={
            "lora_rank": 8,
            "learning_rate": 5e-4,
            "train_batch_size": PAIRS_PER_STEP,
        },
        hyper={name: _beside_beta(name) for name in HYPER},
        # Of prompts that were trained on, so that all others are left to report on.
        choice=asked(clips.PAIR_PROMPTS, CHOICE_SEED, clips_each),
        report=asked(clips.HELD_OUT, SEEDS["evaluation"], clips_each),
        load=_load,
        clips=partial(_clips, base),
        judge=judge_all,
        errors=lambda model: evaluate.errors(
            model, toy, base.process, validation, seed=VALIDATION_SEED, draws_per_pair=4
        ),
        before=made["seconds"],
        spo=partial(_spo, base, folder, pairs),
    )


def _beside_beta(name: str) -> dict[str, Any]:
    """The demo's options of an objective; of the grid are its objective, beta and alpha."""
    return {k: v for k, v in HYPER[name].items() if k not in ("objective", "beta", "alpha")}


def _load(adapter: Path | None) -> nn.Module:
    model = toy.load(BASE)
    return (model if adapter is None else adapters.load_lora(adapter, model)).eval()


def _clips(base: Sampler, model: nn.Module, wanted: Asked) -> list[Tensor]:
    sampler, (prompts, seeds) = Sampler(model, toy, base.process, base.pipe), wanted
    found = []
    for start in range(0, len(prompts), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        found += sampler.clips(prompts[some], seeds[some])
    return found


def _spo(
    base: Sampler, world: Path, pairs: int, folder: Path, seed: int, beta: float, steps: int
) -> dict[str, Any]:
    """The demo's: a preference model, the same for all runs, of three times the prompts; a fifth of
    the steps, each of four times the pairs.
    """
    data, ranked = world / "encoded" / "ranked", world / "ranked"
    made = once(world / "ranked.json", partial(make_pairs, base, ranked, RANKED * pairs, "ranked"))
    with contextlib.redirect_stderr(sys.stdout):  # into the log
        encode("toy", BASE, ranked / "ranked.jsonl", data, progress=False)
    learn = partial(online.learn_preferences, BASE, data, world / "spm", 2 * steps)
    taught = once(world / "spm.json", learn)
    trained = online.train(
        BASE, world / "pairs", taught["artifact"], folder, seed, max(1, steps // 5), beta
    )
    before = made["seconds"] + taught["seconds"]
    return trained | {"before": before, "pairs_per_step": online.PAIRS_PER_STEP}
