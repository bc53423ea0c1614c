"""A run's options: each one's rule, and that a line of the table is all that an option needs."""

import math
from typing import get_args, get_type_hints

import pytest
from commands import options

from fastpref.run.config import FIELDS, OFFLINE, OPTIONS, Config
from fastpref.run.parsing import config_values

POSITIVE = "expected a positive number, got"
SFT = {"objective": "sft", "beta": None}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        *(
            ({name: value}, f"{name}: {POSITIVE} {value}")
            for name in ("max_train_steps", "learning_rate", "lora_alpha", "shift", "fps")
            for value in (0, -1, math.nan, math.inf)
        ),
        *(
            ({name: value}, f"{name}: expected a finite number of 0 or more, got {value}")
            for name in ("lr_warmup_steps", "weight_decay", "max_grad_norm", "num_workers")
            for value in (-1, math.nan, math.inf)
        ),
        ({"draws_per_pair": 0, "reference": "cached"}, f"draws_per_pair: {POSITIVE} 0"),
        ({"validation_steps": 0, "validation_prompts": ["a"]}, f"validation_steps: {POSITIVE} 0"),
        ({"importance_steps": 0, "objective": "sdpo"}, f"importance_steps: {POSITIVE} 0"),
        ({"lora_rank": 8193}, "lora_rank: expected at most 8192, got 8193"),
        ({"num_workers": 257}, "num_workers: expected at most 256, got 257"),
        (
            {"draws_per_pair": 2**28 + 1},
            "draws_per_pair: expected at most 268435456, got 268435457",
        ),
        ({"adam_beta2": 1}, "adam_beta2: expected 0 <= value < 1, got 1"),
        ({"adam_beta1": math.nan}, "adam_beta1: expected 0 <= value < 1, got nan"),
        ({"prompt_dropout": 1.0}, "prompt_dropout: expected 0 <= p < 1, got 1.0"),
        ({"seed": -1}, "seed: expected 0 <= seed < 2^63, got -1"),
        (
            {"timestep_range": (0.9, 0.1)},
            "timestep_range: expected 0 <= low < high <= 1, got [0.9, 0.1]",
        ),
        ({"timestep_range": [0.5]}, "timestep_range: expected 0 <= low < high <= 1, got [0.5]"),
        ({"model": ""}, "model: expected a value, got an empty one"),
        (
            {"validation_prompts": []},
            "validation_prompts: expected at least one, got an empty list",
        ),
        (
            {"validation_prompts": ["a"], "validation_guidance_scale": math.inf},
            "validation_guidance_scale: expected a finite number, got inf",
        ),
        (
            {"report_to": "wandb,paper"},
            "report_to: expected tensorboard, wandb, trackio or none, got wandb,paper",
        ),
        (
            {"objective": "best", "importance_steps": 5},
            f"objective: expected one of {', '.join(OFFLINE)} or sft, got best",
        ),
        ({"objective": "spo"}, "objective spo trains on its own samples, whose online sampler is"),
        ({"beta": None}, "beta is required with objective dpo (published: SD1.5 2000, SDXL 5000;"),
        ({"objective": "sft"}, "beta has no effect with objective sft: remove it"),
        (SFT | {"clip": 0.1}, "clip has no effect with objective sft: remove it"),
        (SFT | {"sft_weight": 0.1}, "sft_weight has no effect with objective sft: remove it"),
        (SFT | {"beta_convention": "sum"}, "beta_convention has no effect with objective sft: "),
        (
            SFT | {"importance_steps": 5},
            "importance_steps has no effect with objective sft (it belongs to dpo_cm and sdpo): ",
        ),
        (
            {"tuning": "full", "lora_rank": None, "lora_targets": ["to_q"]},
            "lora_targets has no effect with tuning full: remove it",
        ),
        (
            {"tuning": "full", "lora_rank": None, "reference": "adapters_off"},
            "reference adapters_off needs tuning lora: with tuning full use frozen_copy",
        ),
        (
            {"reference_cache": "x"},
            "reference_cache has no effect with reference auto: remove it, or set reference cached",
        ),
        ({"validation_steps": 5}, "validation_steps has no effect without validation_prompts"),
    ],
)
def test_rules(change, says, tmp_path):
    with pytest.raises(ValueError) as error:
        Config(**options(tmp_path, tmp_path, **change))
    assert str(error.value).startswith(says)


def test_defaults_that_another_option_gives(tmp_path):
    names = ("draws_per_pair", "validation_steps", "validation_sampling_steps")
    names += ("validation_guidance_scale",)

    def found(**changes):
        return [getattr(Config(**options(tmp_path, tmp_path, **changes)), n) for n in names]

    assert found() == [None] * 4
    assert found(reference="cached", validation_prompts=["a"]) == [8, 100, 20, 1.0]
    assert found(reference="cached", draws_per_pair=2)[0] == 2


def test_every_option_has_its_help(capsys):
    with pytest.raises(SystemExit):
        config_values(["--help"], "fastpref train")
    said = " ".join(capsys.readouterr().out.split())
    for name, of in FIELDS.items():
        assert f"--{name} " in said and of["help"] and f" {of['help']}. (" in said


@pytest.mark.parametrize("name", FIELDS)
def test_every_number_has_a_range(name):
    """An option of an objective has its own where the objective is, beside the loss."""
    kind = get_type_hints(Config)[name]
    if {int, float} & {kind, *get_args(kind)} and name not in OPTIONS:
        assert FIELDS[name]["rules"]
