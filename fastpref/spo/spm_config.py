"""Every option of `fastpref spm`."""

from __future__ import annotations

from dataclasses import MISSING as REQUIRED
from dataclasses import dataclass
from typing import Literal

from ..run.options import (
    NOT_EMPTY,
    POSITIVE,
    SHARE,
    ZERO_OR_MORE,
    Media,
    Need,
    Optimiser,
    Processes,
    Saving,
    Subject,
    at_most,
    documented,
    option,
)
from .config import Estimates

RELABEL: Need = ("has no effect with relabel {relabel}: remove it", lambda c: c.relabel == "clip")


@documented
@dataclass(kw_only=True)
class SPMConfig(Saving, Media, Processes, Optimiser, Estimates, Subject):
    """Every option of `fastpref spm`; each is a YAML key and a flag of the same name."""

    # fmt: off
    data: str = option(REQUIRED, NOT_EMPTY,
        help="folder or metadata file of pairs (prompt, chosen, rejected; ties are kept), or a set "
        "made by `fastpref encode --ties keep`")
    clip: str = option(REQUIRED, NOT_EMPTY,
        help="folder or hub id of a CLIP or PickScore (yuvalkirstain/PickScore_v1), or a trained "
        "preference model, to begin with")
    frames: Literal["mean", "tile"] = option("mean",
        help="a clip's score: mean of its frames' scores, or of one picture with its frames side "
        "by side (tile), which shows motion")
    frames_scored: int = option(8, POSITIVE, at_most(1024),
        help="frames of a clip that are scored, evenly spaced")
    tune: Literal["all", "vision", "modulation"] = option("all",
        help="what trains: all, the vision tower with the step's parts, or those alone")
    relabel: Literal["none", "clip"] = option("none",
        help="clip: who wins is what the model says of the clean clips before it is trained, in "
        "place of the set's own labels")
    tie_margin: float | None = option(None, SHARE, needs=[RELABEL], default_with=(RELABEL, 0.1),
        help="relabel clip: a smaller difference of the two probabilities is a tie; default: 0.1")
    held_out: float = option(0.05, SHARE,
        help="share of the prompts whose pairs do not train but measure accuracy")
    eval_pairs: int = option(100, POSITIVE, help="at most so many held-out pairs are measured")
    eval_steps: int = option(500, POSITIVE, free=True,
        help="optimiser steps between measurements of accuracy on the held-out pairs")
    learning_rate: float = option(3e-6, POSITIVE, help="peak learning rate of AdamW")
    weight_decay: float = option(0.3, ZERO_OR_MORE, help="AdamW's weight decay")
    num_workers: int = option(1, ZERO_OR_MORE, at_most(256), free=True,
        help="threads that read batches ahead")
    # fmt: on
