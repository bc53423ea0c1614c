"""One dataclass that says everything about a run: YAML file, command-line flags and record in
one.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ..files import write_atomic
from ..loss.objectives import OBJECTIVES, objective

OFFLINE = [name for name in OBJECTIVES if name != "spo"]  # spo's pairs come from its own sampler

OPTIONS = {f.name for cls in OBJECTIVES.values() for f in dataclasses.fields(cls)}

# A resumed run may change these: none of them changes what a step computes (max_train_steps does
# under a decaying schedule, see open_run), but for the rounding of compiled blocks (checkpointing)
# and of batches of another size (pair_mode): a run that was out of memory goes on with others.
FREE_FIELDS = {
    "checkpointing",
    "pair_mode",
    "output_dir",
    "reference_cache",
    "max_train_steps",
    "logging_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "report_to",
    "validation_steps",
    "num_workers",
}


def belongs(field: str, objective: str) -> bool:
    """Whether a field has an effect with an objective; sft has no options."""
    if field == "importance_steps":
        return objective in OBJECTIVES and OBJECTIVES[objective].has_importance
    if field not in OPTIONS:
        return True
    return objective in OBJECTIVES and field in {
        f.name for f in dataclasses.fields(OBJECTIVES[objective])
    }


@dataclass(kw_only=True)
class Config:
    """Every option of `fastpref train`; each is a YAML key and a flag of the same name.

    Args:
        family: model family: a module of `fastpref.models` or any importable module with its nine
            names.
        model: diffusers model folder (transformer/, scheduler/, ...) or hub id.
        data: folder or metadata file of pairs (prompt, chosen, rejected), or a set made by
            `fastpref encode`.
        output_dir: where the run is written; the same command run again goes on from its last
            checkpoint.
        objective: dpo, ipo, hinge, dmpo, dpo_cm or sdpo; sft is the plain error of the chosen clips
            (a control).
        beta: strength of the preference against the reference (required except for sft);
            published: SD1.5 2000, SDXL 5000, video 500.
        beta_convention: what beta multiplies (README, "Objectives"): half_mean, mean, half_sum or
            sum.
        alpha: dmpo: probability that a label is wrong.
        clip: dpo_cm, sdpo: importance weights are clipped to [1 - clip, 1 + clip].
        mask_threshold: dpo_cm, sdpo: members with an importance weight below it are dropped.
        combine: sdpo: max, min or mean of the two members' importance weights.
        inverse_weight: sdpo: divide by the clipped weight instead of multiplying.
        label_smoothing: dpo, dpo_cm, sdpo: probability that a label is flipped.
        sft_weight: adds sft_weight times the chosen clip's error to any objective.
        importance_steps: dpo_cm, sdpo: steps of the sampler's grid on which the weight is defined
            (default 50). Times with no step left, where the weight is always 0, are drawn only with
            sft_weight or a cached reference (which all objectives share).
        timestep_range: window on the noise level (flow: sigma; DDPM: t / T) that draws are
            restricted to.
        time_sampling: flow: uniform or logit_normal draws of the time before the shift.
        shift: flow: overrides the timestep shift of the model's scheduler.
        draws_per_pair: K: a pair sees K different (timestep, noise) draws, then the first again
            (default with a cached reference: 8).
        prompt_dropout: probability that a pair is trained with the empty prompt.
        tuning: lora trains adapters; full trains every parameter of the model.
        reference: adapters_off (one copy of the model; lora), frozen_copy (full) or cached: errors
            are computed as they are needed, kept on disk, and read from then on (with full tuning a
            run that begins while it lacks some holds a copy of the model); auto picks one of the
            first two by tuning.
        reference_cache: folder of the cached reference errors, for any number of runs; default:
            reference/ in the encoded set.
        pair_mode: joint runs all members of a batch at once; deferred one after the other, with
            half the activation memory of one pair and the same gradient.
        skip_zeros: pairs whose gradient is exactly zero (masked, beyond hinge's margin) skip their
            backward (joint: where that is every pair of the batch); the host waits for the device
            once a batch (deferred: once a pair).
        lora_rank: rank of the adapters.
        lora_alpha: scale numerator of the adapters; default: the rank.
        lora_targets: names of the layers to adapt; default: the family's.
        learning_rate: peak learning rate of AdamW.
        lr_scheduler: constant, linear or cosine, after the warm-up.
        lr_warmup_steps: optimiser steps of linear warm-up.
        adam_beta1: AdamW's first beta.
        adam_beta2: AdamW's second beta.
        adam_epsilon: AdamW's epsilon.
        weight_decay: AdamW's weight decay.
        max_grad_norm: gradients are clipped to this norm; 0 turns clipping off.
        max_train_steps: optimiser steps.
        train_batch_size: pairs per forward and backward.
        gradient_accumulation_steps: batches per optimiser step.
        mixed_precision: no (fp32) or bf16 (weights and activations; adapters and optimiser stay
            fp32).
        checkpointing: none; full computes every block's activations again in the backward;
            attention keeps what attention gave and computes the rest again; auto: on a GPU the
            first of none, attention, full that is predicted to fit in its memory (fastpref doctor),
            else none.
        attention: backend of the attention: native is PyTorch's choice; flash is the
            FlashAttention-2 inside PyTorch, flash_attn that of the package flash-attn; auto times
            what is installed on the run's shape and keeps to its pick when the run goes on.
        compile: compile every block with its adapters (torch.compile): three compilations per shape
            of batch (four where some blocks have no adapter), in the first step.
        cuda_graphs: record a batch's whole step, and the optimiser's (cache-reference: the
            reference pass), as CUDA graphs and replay them: for small shapes, where launching takes
            longer than computing.
        seed: of the draws, the data order and the adapters' initialisation.
        deterministic: ask torch for deterministic kernels (bit-equal resume on a GPU, slower).
        device: cpu, cuda or cuda:N; default: cuda where there is one.
        num_frames: clips are encoded at this many frames.
        height: clips are resized and cropped to this height.
        width: clips are resized and cropped to this width.
        fps: clips are sampled at this rate.
        num_workers: threads that read batches ahead.
        logging_steps: optimiser steps between log lines (and host synchronisations).
        checkpointing_steps: optimiser steps between checkpoints.
        checkpoints_total_limit: older checkpoints beyond this many are deleted.
        resume_from_checkpoint: latest, or a checkpoint folder of this run.
        validation_prompts: prompts sampled before step 0 and every validation_steps, base beside
            tuned.
        validation_steps: optimiser steps between validation samples.
        validation_sampling_steps: sampler steps of the validation clips.
        validation_guidance_scale: guidance of the validation clips; 1: none.
        report_to: comma-separated trackers beside metrics.jsonl: tensorboard, wandb, trackio, or
            none.
    """

    family: str
    model: str
    data: str
    output_dir: str
    objective: str = "dpo"
    beta: float | None = None
    beta_convention: Literal["half_mean", "mean", "half_sum", "sum"] = "half_mean"
    alpha: float | None = None
    clip: float | None = None
    mask_threshold: float | None = None
    combine: Literal["max", "min", "mean"] | None = None
    inverse_weight: bool | None = None
    label_smoothing: float | None = None
    sft_weight: float | None = None
    importance_steps: int | None = None
    timestep_range: tuple[float, float] = (0.0, 1.0)
    time_sampling: Literal["uniform", "logit_normal"] | None = None
    shift: float | None = None
    draws_per_pair: int | None = None
    prompt_dropout: float = 0.0
    tuning: Literal["lora", "full"] = "lora"
    reference: Literal["auto", "adapters_off", "frozen_copy", "cached"] = "auto"
    reference_cache: str | None = None
    pair_mode: Literal["joint", "deferred"] = "joint"
    skip_zeros: bool = False
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: list[str] | None = None
    learning_rate: float = 1e-5
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    max_train_steps: int = 1000
    train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    mixed_precision: Literal["no", "bf16"] = "no"
    checkpointing: Literal["auto", "none", "attention", "full"] = "auto"
    attention: Literal["auto", "native", "cudnn", "flash", "flash3", "flash_attn", "xformers"] = (
        "auto"
    )
    compile: bool = False
    cuda_graphs: bool = False
    seed: int = 0
    deterministic: bool = False
    device: str | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    num_workers: int = 1
    logging_steps: int = 10
    checkpointing_steps: int = 100
    checkpoints_total_limit: int = 3
    resume_from_checkpoint: str | None = None
    validation_prompts: list[str] | None = None
    validation_steps: int | None = None
    validation_sampling_steps: int | None = None
    validation_guidance_scale: float | None = None
    report_to: str = "tensorboard"

    def __post_init__(self) -> None:
        # A YAML field left blank is None, which the parser takes for every type.
        for field in dataclasses.fields(self):
            if field.default is not None and getattr(self, field.name) is None:
                raise ValueError(f"{field.name}: expected a value, got null: set or remove it")
        self.timestep_range = tuple(self.timestep_range)
        for name in ("family", "model", "data", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected a value, got an empty one")
        for name in ("lora_targets", "validation_prompts"):
            if getattr(self, name) == []:
                raise ValueError(f"{name}: expected at least one, got an empty list")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= value < 1, got {getattr(self, name)}")
        self.make_objective(elements=1)
        if self.objective == "sft":
            for name in ("beta", "sft_weight", "beta_convention"):
                if getattr(self, name) not in (None, "half_mean"):
                    raise ValueError(f"{name} has no effect with objective sft: remove it")
        if self.importance_steps is not None and not belongs("importance_steps", self.objective):
            raise ValueError(
                f"importance_steps has no effect with objective {self.objective} "
                "(it belongs to dpo_cm and sdpo): remove it"
            )
        for name in ("lora_rank", "lora_alpha", "lora_targets"):
            if self.tuning == "full" and getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect with tuning full: remove it")
        if self.tuning == "full" and self.reference == "adapters_off":
            raise ValueError(
                "reference adapters_off needs tuning lora: with tuning full use frozen_copy"
            )
        if self.reference == "cached" and self.draws_per_pair is None:
            self.draws_per_pair = 8
        if self.reference_cache is not None and self.reference != "cached":
            raise ValueError(
                f"reference_cache has no effect with reference {self.reference}: remove it, or set "
                "reference cached"
            )
        rule = OBJECTIVES.get(self.objective)  # None: sft
        if self.skip_zeros and (rule is None or not rule.has_zeros or self.sft_weight):
            why = "sft_weight" if self.sft_weight else f"objective {self.objective}"
            raise ValueError(f"skip_zeros has no effect with {why}: no gradient is zero; remove it")
        defaults = {"steps": 100, "sampling_steps": 20, "guidance_scale": 1.0}
        for name, default in defaults.items():
            if getattr(self, f"validation_{name}") is None:
                if self.validation_prompts:
                    setattr(self, f"validation_{name}", default)
            elif not self.validation_prompts:
                raise ValueError(f"validation_{name} has no effect without validation_prompts")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 <= seed < 2^63, got {self.seed}")
        for name, most in (("num_workers", 256), ("lora_rank", 8192), ("draws_per_pair", 2**28)):
            if (getattr(self, name) or 0) > most:
                raise ValueError(f"{name}: expected at most {most}, got {getattr(self, name)}")
        if self.skip_zeros and self.cuda_graphs:
            raise ValueError(
                "skip_zeros waits for the device, which a recorded step cannot: remove cuda_graphs"
            )
        low, high = self.timestep_range
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"timestep_range: expected 0 <= low < high <= 1, got {list(self.timestep_range)}"
            )
        if not 0 <= self.prompt_dropout < 1:
            raise ValueError(f"prompt_dropout: expected 0 <= p < 1, got {self.prompt_dropout}")
        positive = (
            "max_train_steps train_batch_size gradient_accumulation_steps logging_steps "
            "checkpointing_steps checkpoints_total_limit learning_rate adam_epsilon lora_rank "
            "lora_alpha draws_per_pair importance_steps validation_steps "
            "validation_sampling_steps shift num_frames height width fps"
        )
        for name in positive.split():
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a positive number, got {value}")
        for name in ("lr_warmup_steps", "weight_decay", "max_grad_norm", "num_workers"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}: expected a finite number of 0 or more, got {getattr(self, name)}"
                )
        for tracker in self.trackers:
            if tracker not in ("tensorboard", "wandb", "trackio"):
                raise ValueError(
                    f"report_to: expected tensorboard, wandb, trackio or none, got {tracker}"
                )

    @property
    def trackers(self) -> list[str]:
        return [name for name in self.report_to.split(",") if name not in ("", "none")]

    def make_objective(self, elements: int) -> Any:
        """The objective with its hyper-parameters; None for sft. `elements`: per sample, for the
        sum conventions.
        """
        options = sorted(OPTIONS - {"beta", "sft_weight"})
        hyper = {n: v for n in options if (v := getattr(self, n, None)) is not None}
        if self.objective == "sft":
            if hyper:
                raise ValueError(f"{', '.join(hyper)} has no effect with objective sft: remove it")
            return None
        if self.objective == "spo":
            raise ValueError(
                "objective spo trains on its own samples, whose online sampler is not built yet; "
                "fastpref.preference_loss computes it"
            )
        if self.objective not in OFFLINE:
            raise ValueError(
                f"objective: expected one of {', '.join(OFFLINE)} or sft, got {self.objective}"
            )
        if self.beta is None:
            raise ValueError(
                f"beta is required with objective {self.objective} "
                "(published: SD1.5 2000, SDXL 5000; video 500 is a start)"
            )
        if self.sft_weight is not None:
            hyper["sft_weight"] = self.sft_weight
        if self.beta_convention != "half_mean":
            hyper |= {"beta_convention": self.beta_convention, "elements": elements}
        return objective(self.objective, beta=self.beta, **hyper)

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
