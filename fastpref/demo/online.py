"""The demo's SPO: a preference model learns from the ranked candidates, then judges a sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import ranks
from ..loss.functional import Draws
from ..pairs.dataset import PairDataset, collate
from ..process import estimates
from ..spo import spm
from ..spo.config import SPOConfig
from ..spo.loop import spo
from ..spo.preference_model import StepAwarePreferenceModel
from ..spo.prompts import read_prompts
from ..spo.spm_config import SPMConfig
from . import clips
from .pairs import Sampler

CLIP = Path(__file__).parent / "clip"
QUARTERS = 4
PAIRS_PER_STEP = 32
LEARNED_PER_STEP = 48


def shared(pairs: int) -> dict[str, int]:
    """The batches of a step of so many pairs: as many as there are processes."""
    count = ranks.world()
    return {"train_batch_size": pairs // count, "gradient_accumulation_steps": count}


def learn_preferences(base: Path, data: Path, folder: Path, steps: int) -> dict[str, Any]:
    """`fastpref spm` on the encoded pairs of `data`, every candidate against every other."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of half a megabyte
    return spm.train(
        SPMConfig(
            family="toy",
            model=str(base),
            data=str(data),
            output_dir=str(folder),
            clip=str(CLIP),
            frames="tile",  # motion shows in no frame alone
            guidance_scale=1.0,
            held_out=0.0,
            learning_rate=7e-4,
            lr_scheduler="cosine",
            lr_warmup_steps=min(10, steps),
            weight_decay=0.01,
            adam_beta2=0.98,
            **shared(LEARNED_PER_STEP),
            max_train_steps=steps,
            checkpointing_steps=steps,
            logging_steps=min(10, steps),
        )
    )


def train(
    base: Path,
    prompts: Path,
    scorer: str,
    folder: Path,
    seed: int,
    steps: int,
    beta: float = 10.0,
) -> dict[str, Any]:
    """`fastpref spo` on the `prompts` of the pairs, with a checkpoint after every quarter."""
    count = len(read_prompts(prompts))
    return spo(
        SPOConfig(
            family="toy",
            model=str(base),
            data=str(prompts),
            output_dir=str(folder),
            num_frames=clips.FRAMES,
            height=clips.SIZE,
            width=clips.SIZE,
            scorer=scorer,
            beta=beta,
            guidance_scale=1.0,
            sampling_steps=10,
            # The last steps change too little to be judged, and weigh the most: k grows as r falls.
            sde_window=(0, 7),
            first_step=1,
            threshold=0.1,
            prompts_per_round=count,
            sample_batch_size=count,
            sample_rows=48,  # more do not fit a laptop's cache
            decode_batch=144,
            win_rate_prompts=0,  # the judge says who wins
            lora_rank=8,
            learning_rate=5e-4,
            **shared(PAIRS_PER_STEP),
            max_train_steps=steps,
            checkpointing_steps=max(1, steps // QUARTERS),
            checkpoints_total_limit=2 * QUARTERS,
            logging_steps=max(1, steps // QUARTERS),
            seed=seed,
        )
    )


@torch.no_grad()
def accuracy(base: Sampler, scorer: str, pairs: PairDataset, seed: int) -> list[float]:
    """Share of pairs whose chosen clip scores higher, by quarter of the noise level: of the base's
    x0-hat, as `spm` shows it.
    """
    model = StepAwarePreferenceModel.from_pretrained(scorer)
    process = base.process.replace(strata=QUARTERS)
    batch = collate([pairs[i] for i in range(len(pairs))])
    right = [[] for _ in range(QUARTERS)]
    for index in range(QUARTERS):
        draws = Draws(seed, batch.pair_id, torch.full_like(batch.pair_id, index))
        times = process.times(draws)
        noisy, t, _ = process.noise(batch.latents, draws, times)
        pred = base.family.predict(base.model, noisy, t, batch.cond)
        mix = torch.stack([times.a, times.s, times.p, times.q]).float().repeat(1, 2)
        clean, _ = estimates(noisy, pred, *mix.view(4, -1, 1, 1, 1, 1))
        frames = [base.family.decode(base.pipe, latents) for latents in clean]
        chosen, rejected = model(frames, batch.prompts * 2, times.t.repeat(2)).chunk(2)
        for level, wins in zip(times.level.tolist(), (chosen > rejected).tolist(), strict=True):
            right[min(int(QUARTERS * level), QUARTERS - 1)].append(wins)
    return [sum(wins) / len(wins) for wins in right]
