"""Options of a run: fields with default, rules and help, in the groups that runs are made of."""

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

# Rules of a field's value: what is expected, and whether a value is so.
Rule = tuple[str, Callable[[Any], bool]]
POSITIVE: Rule = ("a positive number", lambda x: 0 < x < math.inf)
ZERO_OR_MORE: Rule = ("a finite number of 0 or more", lambda x: 0 <= x < math.inf)
FINITE: Rule = ("a finite number", math.isfinite)
SHARE: Rule = ("0 <= value < 1", lambda x: 0 <= x < 1)
WINDOW: Rule = ("0 <= low < high <= 1", lambda x: len(x) == 2 and 0 <= x[0] < x[1] <= 1)
NOT_EMPTY: Rule = ("a value", bool)
AT_LEAST_ONE: Rule = ("at least one", bool)
TRACKERS: Rule = (
    "tensorboard, wandb, trackio or none",
    lambda x: {*x.split(",")} <= {"tensorboard", "wandb", "trackio", "none", ""},
)


def at_most(most: int) -> Rule:
    return f"at most {most}", lambda x: x <= most


# Needs of a field: what to say where it is set and its need is not met by the other fields.
Need = tuple[str, Callable[[Any], Any]]
LORA: Need = ("has no effect with tuning {tuning}: remove it", lambda c: c.tuning == "lora")
PROMPTS: Need = ("has no effect without validation_prompts", lambda c: c.validation_prompts)


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
class Options:
    """What every kind of run's options can do; the fields stand in groups below."""

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
            for expected, holds in of["rules"]:
                if value is not None and not holds(value):
                    raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
            setattr(self, name, tuple(value) if isinstance(field.default, tuple) else value)

    @classmethod
    def described(cls) -> dict[str, Any]:
        """Each field's rules, needs and help by its name."""
        return {field.name: field.metadata for field in dataclasses.fields(cls)}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Of the fields that have one, as in `to_dict`."""
        found = {f.name: f.default for f in dataclasses.fields(cls)}
        return _plain({k: v for k, v in found.items() if v is not dataclasses.MISSING})

    @property
    def trackers(self) -> list[str]:
        return [name for name in self.report_to.split(",") if name not in ("", "none")]

    def only(self, *names: str) -> dict[str, Any]:
        """Some fields by name: the options of what is built from them."""
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to config.yaml."""
        return _plain(dataclasses.asdict(self))

    def save(self, path: Path) -> None:
        """Writes config.yaml: every field, defaults too."""
        write_atomic(path, yaml.safe_dump(self.to_dict(), sort_keys=False).encode())


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def documented(cls: type[Options]) -> type[Options]:
    """The class, its fields in its docstring, where the parser of flags reads their help."""
    lines = [f"    {name}: {of['help']}." for name, of in cls.described().items()]
    cls.__doc__ = "\n".join([f"{cls.__doc__}\n\nArgs:", *lines])
    return cls


@dataclass(kw_only=True)
class Subject(Options):
    """Which model, and where the run is written."""

    # fmt: off
    family: str = option(REQUIRED, NOT_EMPTY,
        help="model family: a module of `fastpref.models` or any importable module with its nine "
        "names")
    model: str = option(REQUIRED, NOT_EMPTY,
        help="diffusers model folder (transformer/, scheduler/, ...) or hub id")
    output_dir: str = option(REQUIRED, NOT_EMPTY, free=True,
        help="where the run is written; the same command run again goes on from its last "
        "checkpoint")
    # fmt: on


@dataclass(kw_only=True)
class Media(Options):
    """How clips are encoded."""

    # fmt: off
    num_frames: int | None = option(None, POSITIVE, help="clips are encoded at this many frames")
    height: int | None = option(None, POSITIVE, help="clips are resized and cropped to this height")
    width: int | None = option(None, POSITIVE, help="clips are resized and cropped to this width")
    fps: float | None = option(None, POSITIVE, help="clips are sampled at this rate")
    # fmt: on


@dataclass(kw_only=True)
class Adapters(Options):
    """What trains."""

    # fmt: off
    tuning: Literal["lora", "full"] = option("lora",
        help="lora trains adapters; full trains every parameter of the model")
    lora_rank: int | None = option(None, POSITIVE, at_most(8192), needs=[LORA],
        help="rank of the adapters; default: 16")
    lora_alpha: float | None = option(None, POSITIVE, needs=[LORA],
        help="scale numerator of the adapters; default: the rank")
    lora_targets: list[str] | None = option(None, AT_LEAST_ONE, needs=[LORA],
        help="names of the layers to adapt; default: the family's")
    # fmt: on


@dataclass(kw_only=True)
class Optimiser(Options):
    """AdamW, its schedule and its batches."""

    # fmt: off
    learning_rate: float = option(1e-5, POSITIVE, help="peak learning rate of AdamW")
    lr_scheduler: Literal["constant", "linear", "cosine"] = option("constant",
        help="constant, linear or cosine, after the warm-up")
    lr_warmup_steps: int = option(0, ZERO_OR_MORE, help="optimiser steps of linear warm-up")
    adam_beta1: float = option(0.9, SHARE, help="AdamW's first beta")
    adam_beta2: float = option(0.999, SHARE, help="AdamW's second beta")
    adam_epsilon: float = option(1e-8, POSITIVE, help="AdamW's epsilon")
    weight_decay: float = option(1e-2, ZERO_OR_MORE, help="AdamW's weight decay")
    max_grad_norm: float = option(1.0, ZERO_OR_MORE,
        help="gradients are clipped to this norm; 0 turns clipping off")
    max_train_steps: int = option(1000, POSITIVE, free=True, help="optimiser steps")
    train_batch_size: int = option(1, POSITIVE, help="pairs per forward and backward")
    gradient_accumulation_steps: int = option(1, POSITIVE,
        help="batches per optimiser step; of all processes together, which share them, so "
        "the same command is the same run on any number that divides it")
    # fmt: on


@dataclass(kw_only=True)
class Speed(Options):
    """Memory and speed of the model's passes."""

    # fmt: off
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
    # fmt: on


@dataclass(kw_only=True)
class Processes(Options):
    """Several processes, as torchrun starts them."""

    # fmt: off
    reduce_dtype: Literal["fp32", "bf16"] = option("fp32",
        help="fp32 or bf16: what gradients are summed in over several processes")
    timeout: float = option(1800.0, POSITIVE, free=True,
        help="seconds that a process waits for the others; who is later is named")
    # fmt: on


@dataclass(kw_only=True)
class Saving(Options):
    """Device, precision, seed, log and checkpoints."""

    # fmt: off
    mixed_precision: Literal["no", "bf16"] = option("no",
        help="no (fp32) or bf16 (weights and activations; adapters and optimiser stay fp32)")
    seed: int = option(0, ("0 <= seed < 2^63", lambda seed: 0 <= seed < 2**63),
        help="of the draws, the data order and the adapters' initialisation")
    deterministic: bool = option(False,
        help="ask torch for deterministic kernels (bit-equal resume on a GPU, slower)")
    device: str | None = option(None, help="cpu, cuda or cuda:N; default: cuda where there is one")
    logging_steps: int = option(10, POSITIVE, free=True,
        help="optimiser steps between log lines (and host synchronisations)")
    checkpointing_steps: int = option(100, POSITIVE, free=True,
        help="optimiser steps between checkpoints")
    checkpoints_total_limit: int = option(3, POSITIVE, free=True,
        help="older checkpoints beyond this many are deleted")
    resume_from_checkpoint: str | None = option(None, free=True,
        help="latest, or a checkpoint folder of this run")
    report_to: str = option("tensorboard", TRACKERS, free=True,
        help="comma-separated trackers beside metrics.jsonl: tensorboard, wandb, trackio, or none")
    # fmt: on


@dataclass(kw_only=True)
class Looking(Options):
    """Clips while it trains."""

    # fmt: off
    validation_prompts: list[str] | None = option(None, AT_LEAST_ONE,
        help="prompts sampled before step 0 and every validation_steps, base beside tuned")
    validation_steps: int | None = option(None, POSITIVE,
        needs=[PROMPTS], default_with=(PROMPTS, 100), free=True,
        help="optimiser steps between validation samples; default: 100")
    validation_sampling_steps: int | None = option(None, POSITIVE,
        needs=[PROMPTS], default_with=(PROMPTS, 20),
        help="sampler steps of the validation clips; default: 20")
    validation_guidance_scale: float | None = option(None, FINITE,
        needs=[PROMPTS], default_with=(PROMPTS, 1.0),
        help="guidance of the validation clips; default: 1, none")
    # fmt: on


def shown(value: Any) -> Any:
    """A value as errors say it."""
    if value in ("", []):
        return "an empty list" if value == [] else "an empty one"
    return list(value) if isinstance(value, tuple) else value
