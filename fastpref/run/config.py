"""Every option of a run with its rules: one dataclass for YAML file, flags and record."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING as REQUIRED
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ..files import write_atomic
from ..loss.objectives import OBJECTIVES, objective

OFFLINE = [name for name in OBJECTIVES if name != "spo"]  # spo's pairs come from its own sampler
IMPORTANCE = [name for name, cls in OBJECTIVES.items() if cls.has_importance]
ZEROS = [name for name, cls in OBJECTIVES.items() if cls.has_zeros]
OPTIONS = {f.name for cls in OBJECTIVES.values() for f in dataclasses.fields(cls)}

# Rules of a field's value: what is expected, and whether a value is so.
Rule = tuple[str, Callable[[Any], bool]]
POSITIVE: Rule = ("a positive number", lambda x: 0 < x < math.inf)
ZERO_OR_MORE: Rule = ("a finite number of 0 or more", lambda x: 0 <= x < math.inf)
FINITE: Rule = ("a finite number", math.isfinite)
DECAY: Rule = ("0 <= value < 1", lambda x: 0 <= x < 1)
WINDOW: Rule = ("0 <= low < high <= 1", lambda x: len(x) == 2 and 0 <= x[0] < x[1] <= 1)
TRAINED: Rule = (f"one of {', '.join(OFFLINE)} or sft", lambda x: x in (*OBJECTIVES, "sft"))
NOT_EMPTY: Rule = ("a value", bool)
AT_LEAST_ONE: Rule = ("at least one", bool)
TRACKERS: Rule = (
    "tensorboard, wandb, trackio or none",
    lambda x: {*x.split(",")} <= {"tensorboard", "wandb", "trackio", "none", ""},
)


def at_most(most: int) -> Rule:
    return f"at most {most}", lambda x: x <= most


# Needs of a field: what to say where it is set and its need is not met by the other fields.
Need = tuple[str, Callable[["Config"], Any]]
LORA: Need = ("has no effect with tuning {tuning}: remove it", lambda c: c.tuning == "lora")
CACHED: Need = (
    "has no effect with reference {reference}: remove it, or set reference cached",
    lambda c: c.reference == "cached",
)
PROMPTS: Need = ("has no effect without validation_prompts", lambda c: c.validation_prompts)
NO_SFT_WEIGHT: Need = (
    "has no effect with sft_weight: no gradient is zero; remove it",
    lambda c: not c.sft_weight,
)
ZERO_GRADIENTS: Need = (
    "has no effect with objective {objective}: no gradient is zero; remove it",
    lambda c: c.objective in ZEROS,
)
NO_GRAPHS: Need = (
    "waits for the device, which a recorded step cannot: remove cuda_graphs",
    lambda c: not c.cuda_graphs,
)
ADAPTERS: Need = (
    "adapters_off needs tuning lora: with tuning full use frozen_copy",
    lambda c: c.reference != "adapters_off" or c.tuning == "lora",
)


def option(
    default: Any,
    *rules: Rule,
    help: str,
    needs: Sequence[Need] = (),
    objectives: Sequence[str] = (),
    default_with: tuple[Need, Any] | None = None,
    free: bool = False,
) -> Any:
    """A field of Config, with all that is said of it and checked.

    Args:
        rules: of its value, where that is not null.
        needs: without these it has no effect, and is refused.
        objectives: it belongs to these alone. Options of the objectives' own dataclasses belong to
            those that have them, without being told here.
        default_with: a need, and the default where it is met.
        free: a resumed run may change it: it does not change what a step computes (max_train_steps
            does under a decaying schedule, see open_run), but for the rounding of compiled blocks
            (checkpointing) and of batches of another size (pair_mode): a run that was out of memory
            goes on with others.
    """
    said = {"help": help, "rules": rules, "needs": needs, "objectives": objectives}
    said |= {"default_with": default_with, "free": free}
    return dataclasses.field(default=default, metadata=said)


@dataclass(kw_only=True)
class Config:
    """Every option of `fastpref train`; each is a YAML key and a flag of the same name."""

    # A table: each option with its default and rules, then its help.
    # fmt: off
    family: str = option(REQUIRED, NOT_EMPTY,
        help="model family: a module of `fastpref.models` or any importable module with its nine "
        "names")
    model: str = option(REQUIRED, NOT_EMPTY,
        help="diffusers model folder (transformer/, scheduler/, ...) or hub id")
    data: str = option(REQUIRED, NOT_EMPTY,
        help="folder or metadata file of pairs (prompt, chosen, rejected), or a set made by "
        "`fastpref encode`")
    output_dir: str = option(REQUIRED, NOT_EMPTY, free=True,
        help="where the run is written; the same command run again goes on from its last "
        "checkpoint")
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
    shift: float | None = option(None, POSITIVE,
        help="flow: overrides the timestep shift of the model's scheduler")
    draws_per_pair: int | None = option(None, POSITIVE, at_most(2**28), default_with=(CACHED, 8),
        help="K: a pair sees K different (timestep, noise) draws, then the first again (default "
        "with a cached reference: 8)")
    prompt_dropout: float = option(0.0, ("0 <= p < 1", lambda p: 0 <= p < 1),
        help="probability that a pair is trained with the empty prompt")
    tuning: Literal["lora", "full"] = option("lora",
        help="lora trains adapters; full trains every parameter of the model")
    reference: Literal["auto", "adapters_off", "frozen_copy", "cached"] = option(
        "auto", needs=[ADAPTERS],
        help="adapters_off (one copy of the model; lora), frozen_copy (full) or cached: errors "
        "are computed as they are needed, kept on disk, and read from then on (with full tuning a "
        "run that begins while it lacks some holds a copy of the model); auto picks one of the "
        "first two by tuning")
    reference_cache: str | None = option(None, needs=[CACHED], free=True,
        help="folder of the cached reference errors, for any number of runs; default: reference/ "
        "in the encoded set")
    pair_mode: Literal["joint", "deferred"] = option("joint", free=True,
        help="joint runs all members of a batch at once; deferred one after the other, with half "
        "the activation memory of one pair and the same gradient")
    skip_zeros: bool = option(False, needs=[NO_SFT_WEIGHT, ZERO_GRADIENTS, NO_GRAPHS],
        help="pairs whose gradient is exactly zero (masked, beyond hinge's margin) skip their "
        "backward (joint: where that is every pair of the batch); the host waits for the device "
        "once a batch (deferred: once a pair)")
    lora_rank: int | None = option(None, POSITIVE, at_most(8192), needs=[LORA],
        help="rank of the adapters")
    lora_alpha: float | None = option(None, POSITIVE, needs=[LORA],
        help="scale numerator of the adapters; default: the rank")
    lora_targets: list[str] | None = option(None, AT_LEAST_ONE, needs=[LORA],
        help="names of the layers to adapt; default: the family's")
    learning_rate: float = option(1e-5, POSITIVE, help="peak learning rate of AdamW")
    lr_scheduler: Literal["constant", "linear", "cosine"] = option("constant",
        help="constant, linear or cosine, after the warm-up")
    lr_warmup_steps: int = option(0, ZERO_OR_MORE, help="optimiser steps of linear warm-up")
    adam_beta1: float = option(0.9, DECAY, help="AdamW's first beta")
    adam_beta2: float = option(0.999, DECAY, help="AdamW's second beta")
    adam_epsilon: float = option(1e-8, POSITIVE, help="AdamW's epsilon")
    weight_decay: float = option(1e-2, ZERO_OR_MORE, help="AdamW's weight decay")
    max_grad_norm: float = option(1.0, ZERO_OR_MORE,
        help="gradients are clipped to this norm; 0 turns clipping off")
    max_train_steps: int = option(1000, POSITIVE, free=True, help="optimiser steps")
    train_batch_size: int = option(1, POSITIVE, help="pairs per forward and backward")
    gradient_accumulation_steps: int = option(1, POSITIVE, help="batches per optimiser step")
    mixed_precision: Literal["no", "bf16"] = option("no",
        help="no (fp32) or bf16 (weights and activations; adapters and optimiser stay fp32)")
    checkpointing: Literal["auto", "none", "attention", "full"] = option("auto", free=True,
        help="none; full computes every block's activations again in the backward; attention "
        "keeps what attention gave and computes the rest again; auto: on a GPU the first of none, "
        "attention, full that is predicted to fit in its memory (fastpref doctor), else none")
    attention: Literal[
        "auto", "native", "cudnn", "flash", "flash3", "flash_attn", "xformers"] = option("auto",
        help="backend of the attention: native is PyTorch's choice; flash is the FlashAttention-2 "
        "inside PyTorch, flash_attn that of the package flash-attn; auto times what is installed "
        "on the run's shape and keeps to its pick when the run goes on")
    compile: bool = option(False,
        help="compile every block with its adapters (torch.compile): three compilations per shape "
        "of batch (four where some blocks have no adapter), in the first step")
    cuda_graphs: bool = option(False,
        help="record a batch's whole step, and the optimiser's (cache-reference: the reference "
        "pass), as CUDA graphs and replay them: for small shapes, where launching takes longer "
        "than computing")
    seed: int = option(0, ("0 <= seed < 2^63", lambda seed: 0 <= seed < 2**63),
        help="of the draws, the data order and the adapters' initialisation")
    deterministic: bool = option(False,
        help="ask torch for deterministic kernels (bit-equal resume on a GPU, slower)")
    device: str | None = option(None, help="cpu, cuda or cuda:N; default: cuda where there is one")
    num_frames: int | None = option(None, POSITIVE, help="clips are encoded at this many frames")
    height: int | None = option(None, POSITIVE, help="clips are resized and cropped to this height")
    width: int | None = option(None, POSITIVE, help="clips are resized and cropped to this width")
    fps: float | None = option(None, POSITIVE, help="clips are sampled at this rate")
    num_workers: int = option(1, ZERO_OR_MORE, at_most(256), free=True,
        help="threads that read batches ahead")
    logging_steps: int = option(10, POSITIVE, free=True,
        help="optimiser steps between log lines (and host synchronisations)")
    checkpointing_steps: int = option(100, POSITIVE, free=True,
        help="optimiser steps between checkpoints")
    checkpoints_total_limit: int = option(3, POSITIVE, free=True,
        help="older checkpoints beyond this many are deleted")
    resume_from_checkpoint: str | None = option(None, free=True,
        help="latest, or a checkpoint folder of this run")
    validation_prompts: list[str] | None = option(None, AT_LEAST_ONE,
        help="prompts sampled before step 0 and every validation_steps, base beside tuned")
    validation_steps: int | None = option(None, POSITIVE,
        needs=[PROMPTS], default_with=(PROMPTS, 100), free=True,
        help="optimiser steps between validation samples")
    validation_sampling_steps: int | None = option(None, POSITIVE,
        needs=[PROMPTS], default_with=(PROMPTS, 20),
        help="sampler steps of the validation clips")
    validation_guidance_scale: float | None = option(None, FINITE,
        needs=[PROMPTS], default_with=(PROMPTS, 1.0),
        help="guidance of the validation clips; 1: none")
    report_to: str = option("tensorboard", TRACKERS, free=True,
        help="comma-separated trackers beside metrics.jsonl: tensorboard, wandb, trackio, or none")
    # fmt: on

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value, of = field.name, getattr(self, field.name), field.metadata
            # A YAML field left blank is None, which the parser takes for every type.
            if value is None and field.default is not None:
                raise ValueError(f"{name}: expected a value, got null: set or remove it")
            if value != field.default:
                for says, met in of["needs"]:
                    if not met(self):
                        raise ValueError(f"{name} {says.format(**vars(self))}")
                if of["objectives"] and self.objective not in of["objectives"]:
                    raise ValueError(
                        f"{name} has no effect with objective {self.objective} (it belongs to "
                        f"{' and '.join(of['objectives'])}): remove it"
                    )
            if value is None and of["default_with"]:
                (_, met), default = of["default_with"]
                value = default if met(self) else None
                setattr(self, name, value)
            for expected, holds in of["rules"]:
                if value is not None and not holds(value):
                    raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
        self.timestep_range = tuple(self.timestep_range)
        self.make_objective(elements=1)

    @property
    def trackers(self) -> list[str]:
        return [name for name in self.report_to.split(",") if name not in ("", "none")]

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
            raise ValueError(
                "objective spo trains on its own samples, whose online sampler is not built yet; "
                "fastpref.preference_loss computes it"
            )
        if self.beta is None:
            raise ValueError(
                f"beta is required with objective {self.objective} "
                "(published: SD1.5 2000, SDXL 5000; video 500 is a start)"
            )
        return objective(self.objective, elements=elements, **hyper)

    def only(self, *names: str) -> dict[str, Any]:
        """Some fields by name: the options of what is built from them."""
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to config.yaml."""
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()
        }

    def save(self, path: Path) -> None:
        """Writes config.yaml: every field, defaults too."""
        write_atomic(path, yaml.safe_dump(self.to_dict(), sort_keys=False).encode())


FIELDS = {field.name: field.metadata for field in dataclasses.fields(Config)}
FREE_FIELDS = {name for name, of in FIELDS.items() if of["free"]}
# The parser of flags reads what a field's help is from here.
Config.__doc__ = f"{Config.__doc__}\n\nArgs:\n" + "\n".join(
    f"    {name}: {of['help']}." for name, of in FIELDS.items()
)


def belongs(field: str, objective: str) -> bool:
    """Whether a field has an effect with an objective; sft has no options."""
    having = [name for name, cls in OBJECTIVES.items() if field in cls.__dataclass_fields__]
    only = FIELDS[field]["objectives"] or having
    return not only or objective in only


def shown(value: Any) -> Any:
    """A value as errors say it."""
    if value in ("", []):
        return "an empty list" if value == [] else "an empty one"
    return list(value) if isinstance(value, tuple) else value
