"""Every option of `fastpref train`: one dataclass for YAML file, flags and record."""

from __future__ import annotations

import dataclasses
from dataclasses import MISSING as REQUIRED
from dataclasses import dataclass
from typing import Any, Literal

from ..loss.objectives import OBJECTIVES, objective
from .options import (
    NOT_EMPTY,
    POSITIVE,
    WINDOW,
    ZERO_OR_MORE,
    Adapters,
    Looking,
    Media,
    Need,
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

OFFLINE = [name for name in OBJECTIVES if name != "spo"]  # spo's pairs come from its own sampler
IMPORTANCE = [name for name, cls in OBJECTIVES.items() if cls.has_importance]
ZEROS = [name for name, cls in OBJECTIVES.items() if cls.has_zeros]
OPTIONS = {f.name for cls in OBJECTIVES.values() for f in dataclasses.fields(cls)}

TRAINED: Rule = (f"one of {', '.join(OFFLINE)} or sft", lambda x: x in (*OBJECTIVES, "sft"))

CACHED: Need = (
    "has no effect with reference {reference}: remove it, or set reference cached",
    lambda c: c.reference == "cached",
)
NO_SFT_WEIGHT: Need = (
    "has no effect with sft_weight: no gradient is zero; remove it",
    lambda c: not c.sft_weight,
)
ZERO_GRADIENTS: Need = (
    "has no effect with objective {objective}: no gradient is zero; remove it",
    lambda c: c.objective in ZEROS,
)
LOGIT: Rule = ("a number from -20 to 20", lambda x: -20 <= x <= 20)  # beyond: one level of noise
LOGIT_NORMAL: Need = (
    "has no effect with time_sampling {time_sampling}: remove it, or take logit_normal",
    lambda c: c.time_sampling == "logit_normal",
)
NO_GRAPHS: Need = (
    "waits for the device, which a recorded step cannot: remove cuda_graphs",
    lambda c: not c.cuda_graphs,
)
NOT_RECORDED: Need = (
    "exchanges tokens in a pass, which is not recorded: remove cuda_graphs",
    lambda c: not c.cuda_graphs,
)
SHARDED: Need = (
    "has no effect with sharding {sharding}: remove it",
    lambda c: c.sharding != "none",
)
SPLIT: Need = (
    "split exchanges errors in the middle of a step, which is not recorded: remove cuda_graphs",
    lambda c: c.pair_mode != "split" or not c.cuda_graphs,
)
ADAPTERS: Need = (
    "adapters_off needs tuning lora: with tuning full use frozen_copy",
    lambda c: c.reference != "adapters_off" or c.tuning == "lora",
)


@dataclass(kw_only=True)
class Pairs(Options):
    """What the loss of offline pairs is made of."""

    # fmt: off
    data: str = option(REQUIRED, NOT_EMPTY,
        help="folder or metadata file of pairs (prompt, chosen, rejected), or a set made by "
        "`fastpref encode`")
    objective: str = option("dpo", TRAINED,
        help="dpo, ipo, hinge, dmpo, dpo_cm or sdpo; sft is the plain error of the chosen clips "
        "(a control)")
    beta: float | None = option(None,
        help="strength of the preference against the reference (required except for sft); "
        "published: SD1.5 2000, SDXL 5000, video 500")
    beta_convention: Literal["half_mean", "mean", "half_sum", "sum"] = option("half_mean",
        help='what beta multiplies (README, "Objectives"): half_mean, mean, half_sum or sum')
    alpha: float | None = option(None, help="dmpo: probability that a label is wrong")
    clip: float | None = option(None,
        help="dpo_cm, sdpo: importance weights are clipped to [1 - clip, 1 + clip]")
    mask_threshold: float | None = option(None,
        help="dpo_cm, sdpo: members with an importance weight below it are dropped")
    combine: Literal["max", "min", "mean"] | None = option(None,
        help="sdpo: max, min or mean of the two members' importance weights")
    inverse_weight: bool | None = option(None,
        help="sdpo: divide by the clipped weight instead of multiplying")
    placement: Literal["ratio", "loss"] | None = option(None,
        help="dpo_cm, sdpo: the importance weight stands on the ratios within the sigmoid "
        "(ratio: dpo_cm's default) or before it (loss: sdpo's)")
    safeguard: float | None = option(None,
        help="mu, 0 <= mu < 1: scales the loser's gradient so that to first order the winner's "
        "error does not rise (published with SD1.5 0.9, SDXL 0.6)")
    label_smoothing: float | None = option(None,
        help="dpo, dpo_cm, sdpo: probability that a label is flipped")
    sft_weight: float | None = option(None,
        help="adds sft_weight times the chosen clip's error to any objective")
    importance_steps: int | None = option(None, POSITIVE, objectives=IMPORTANCE,
        help="dpo_cm, sdpo: steps of the sampler's grid on which the weight is defined (default "
        "50). Times with no step left, where the weight is always 0, are drawn only with "
        "sft_weight or a cached reference (which all objectives share)")
    timestep_range: tuple[float, float] = option((0.0, 1.0), WINDOW,
        help="window on the noise level (flow: sigma; DDPM: t / T) that draws are restricted to")
    time_sampling: Literal["uniform", "logit_normal"] | None = option(None,
        help="flow: uniform or logit_normal draws of the time before the shift")
    logit_mean: float | None = option(None, LOGIT, needs=[LOGIT_NORMAL],
        help="flow: mean of the time's logit (default 0; above it more noise)")
    logit_std: float | None = option(None, POSITIVE, needs=[LOGIT_NORMAL],
        help="flow: standard deviation of the time's logit (default 1)")
    shift: float | None = option(None, POSITIVE,
        help="flow: overrides the timestep shift of the model's scheduler")
    draws_per_pair: int | None = option(None, POSITIVE, at_most(2**28), default_with=(CACHED, 8),
        help="K: a pair sees K different (timestep, noise) draws, then the first again (default "
        "with a cached reference: 8)")
    prompt_dropout: float = option(0.0, ("0 <= p < 1", lambda p: 0 <= p < 1),
        help="probability that a pair is trained with the empty prompt")
    reference: Literal["auto", "adapters_off", "frozen_copy", "cached"] = option(
        "auto", needs=[ADAPTERS],
        help="adapters_off (one copy of the model; lora), frozen_copy (full) or cached: errors "
        "are computed as they are needed, kept on disk, and read from then on (with full tuning a "
        "run that begins while it lacks some holds a copy of the model); auto picks one of the "
        "first two by tuning")
    reference_cache: str | None = option(None, needs=[CACHED], free=True,
        help="folder of the cached reference errors, for any number of runs; default: reference/ "
        "in the encoded set")
    pair_mode: Literal["joint", "deferred", "split"] = option("joint", needs=[SPLIT], free=True,
        help="joint runs all members of a batch at once; deferred one after the other, with half "
        "the activation memory of one pair and the same gradient; split has winners on one process "
        "and losers on its neighbour, which exchange two numbers a pair")
    skip_zeros: bool = option(False, needs=[NO_SFT_WEIGHT, ZERO_GRADIENTS, NO_GRAPHS],
        help="pairs whose gradient is exactly zero (masked, beyond hinge's margin) skip their "
        "backward (joint: where that is every pair of the batch); the host waits for the device "
        "once a batch (deferred: once a pair)")
    cuda_graphs: bool = option(False,
        help="record a batch's whole step, and the optimiser's (cache-reference: the reference "
        "pass), as CUDA graphs and replay them: for small shapes, where launching takes longer "
        "than computing")
    num_workers: int = option(1, ZERO_OR_MORE, at_most(256), free=True,
        help="threads that read batches ahead")
    # fmt: on


@dataclass(kw_only=True)
class Sharing(Options):
    """What several processes share of a model or of a clip."""

    # fmt: off
    sharding: Literal["auto", "none", "full"] = option("auto", free=True,
        help="full: each of several processes holds a part of every weight (FSDP2), and with "
        "tuning full of its gradient and of AdamW's moments; none: all of them; auto: full with "
        "tuning full, else none")
    cpu_offload: bool = option(False, needs=[SHARDED], free=True,
        help="the parts of a sharded model stay in the memory of the CPU, AdamW's too, which steps "
        "there")
    ulysses_degree: int = option(1, POSITIVE, needs=[NOT_RECORDED], free=True,
        help="so many neighbouring processes share a clip's tokens, and in attention its heads "
        "(diffusers' context parallelism, for long clips); times ring_degree, times 2 with split")
    ring_degree: int = option(1, POSITIVE, needs=[NOT_RECORDED], free=True,
        help="as ulysses_degree; in attention keys and values go round")
    # fmt: on


@documented
@dataclass(kw_only=True)
class Config(
    Looking, Saving, Media, Sharing, Processes, Speed, Optimiser, Adapters, Pairs, Subject
):
    """Every option of `fastpref train`; each is a YAML key and a flag of the same name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.make_objective(elements=1)

    def make_objective(self, elements: int) -> Any:
        """The objective with its hyper-parameters; None for sft. `elements`: per sample, for the
        sum conventions.
        """
        hyper = {name: v for name in sorted(OPTIONS) if (v := getattr(self, name)) is not None}
        if self.beta_convention != "half_mean":
            hyper["beta_convention"] = self.beta_convention
        if self.objective == "sft":
            if hyper:
                raise ValueError(f"{', '.join(hyper)} has no effect with objective sft: remove it")
            return None
        if self.objective == "spo":
            raise ValueError("objective spo trains on the model's own samples: use fastpref spo")
        if self.beta is None:
            raise ValueError(
                f"beta is required with objective {self.objective} "
                "(published: SD1.5 2000, SDXL 5000; video 500 is a start)"
            )
        return objective(self.objective, elements=elements, **hyper)


FIELDS = Config.described()


def belongs(field: str, objective: str) -> bool:
    """Whether a field has an effect with an objective; sft has no options."""
    having = [name for name, cls in OBJECTIVES.items() if field in cls.__dataclass_fields__]
    only = FIELDS[field]["objectives"] or having
    return not only or objective in only
