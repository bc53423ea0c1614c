"""Every option of `fastpref spo`: one dataclass for YAML file, flags and record."""

from __future__ import annotations

from dataclasses import MISSING as REQUIRED
from dataclasses import dataclass
from typing import Literal

from ..loss.objectives import SPO
from ..run.options import (
    FINITE,
    NOT_EMPTY,
    POSITIVE,
    SHARE,
    ZERO_OR_MORE,
    Adapters,
    Looking,
    Optimiser,
    Options,
    Processes,
    Rule,
    Saving,
    Speed,
    Subject,
    at_most,
    documented,
    option,
)

UNIT: Rule = ("0 < value <= 1", lambda x: 0 < x <= 1)
STEPS: Rule = ("two steps, first < end", lambda x: len(x) == 2 and 0 <= x[0] < x[1])


@dataclass(kw_only=True)
class Estimates(Options):
    """How x0-hat is predicted and decoded for what judges it: alike in `spm` and in `spo`."""

    # fmt: off
    guidance_scale: float = option(5.0, FINITE,
        help="guidance of every prediction, in sampling and in training; 1: none, and half the "
        "rows of the network")
    decoder: str | None = option(None,
        help="folder or hub id of a VAE that decodes what is judged in place of the model's: a "
        "cheap one (AutoencoderTiny)")
    decode_batch: int = option(8, POSITIVE, free=True, help="samples decoded at once")
    decode_frames: int | None = option(None, POSITIVE,
        help="latent frames, from the first on, that are decoded and judged; default: all")
    # fmt: on


@dataclass(kw_only=True)
class Sampling(Options):
    """What is sampled, how it is judged, and the loss of it."""

    # A table: each option with its default and rules, then its help.
    # fmt: off
    data: str = option(REQUIRED, NOT_EMPTY,
        help="prompts: a .txt of one a line, or anything that fastpref encode reads, whose prompts "
        "are taken")
    num_frames: int = option(1, POSITIVE, help="frames of a sample; images have 1")
    height: int = option(REQUIRED, POSITIVE, help="of a sample, in pixels")
    width: int = option(REQUIRED, POSITIVE, help="of a sample, in pixels")
    scorer: str = option(REQUIRED, NOT_EMPTY,
        help="what judges x0-hat: the folder of a preference model of fastpref spm, or of a plain "
        "CLIP or PickScore (or its hub id), my_pkg.mine:function, or http://host:port")
    scorer_timeout: float = option(120.0, POSITIVE, at_most(86400), free=True,
        help="seconds that an http scorer may take")
    beta: float = option(10.0, POSITIVE, help="strength of the preference, on SPO's own scale")
    clip: float = option(0.1, SHARE, POSITIVE,
        help="log-ratios to the reference are clamped to log(1 - clip), log(1 + clip)")
    sampling_steps: int = option(20, POSITIVE, help="of the trajectory that pairs are made on")
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = option(None,
        help="diffusion: how its timesteps are spaced; default: as the model's scheduler says")
    eta: float = option(1.0, UNIT,
        help="noise of a step; 1: DDPM's (flow: the posterior's)")
    sde_window: tuple[int, int] | None = option(None, STEPS,
        help="first and end of the steps that are stochastic and make pairs; the others are "
        "deterministic; default: all are stochastic")
    first_step: int = option(4, ZERO_OR_MORE, help="earlier steps make no pairs")
    candidates: int = option(4, ("at least 2", lambda x: x >= 2), at_most(64),
        help="of a step, from one prediction")
    rollout_steps: int = option(1, POSITIVE,
        help="steps that a candidate is rolled before it is judged; each of them trains (SDXL: 4)")
    threshold: float = option(0.3, SHARE,
        help="a pair is kept where softmax of its two scores differs by more (SDXL: 0.4); 0.3: "
        "where they are 0.62 apart, so a scorer in [0, 1] needs less, or its scores multiplied")
    prompts_per_round: int = option(8, POSITIVE,
        help="prompts whose pairs are sampled, shuffled and trained on once, before the next")
    sample_batch_size: int = option(8, POSITIVE, help="prompts whose trajectories run together")
    sample_rows: int | None = option(None, POSITIVE, free=True,
        help="samples that the network is asked for at once; default: all candidates of a batch")
    win_rate_prompts: int = option(8, ZERO_OR_MORE,
        help="prompts that are kept from training for the win rate over the base; 0: none")
    win_rate_rounds: int = option(10, POSITIVE, free=True, help="rounds between two win rates")
    # fmt: on


@documented
@dataclass(kw_only=True)
class SPOConfig(
    Looking, Saving, Processes, Speed, Optimiser, Adapters, Estimates, Sampling, Subject
):
    """Every option of `fastpref spo`; each is a YAML key and a flag of the same name."""

    @property
    def objective(self) -> SPO:
        return SPO(beta=self.beta, clip=self.clip)
