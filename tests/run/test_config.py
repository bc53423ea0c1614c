"""A run's options: each one's rule, that a line of the table is all that an option needs, and what
a file of them may do and cost.
"""

import math
import time
from itertools import pairwise
from typing import get_args, get_type_hints

import pytest
from commands import arguments, options

from fastpref.run.config import FIELDS, OFFLINE, OPTIONS, Config
from fastpref.run.folder import read_record
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
        ({"objective": "spo"}, "objective spo trains on the model's own samples: use fastpref spo"),
        ({"beta": None}, "beta is required with objective dpo (published: SD1.5 2000, SDXL 5000;"),
        ({"objective": "sft"}, "beta has no effect with objective sft: remove it"),
        (SFT | {"clip": 0.1}, "clip has no effect with objective sft: remove it"),
        (SFT | {"sft_weight": 0.1}, "sft_weight has no effect with objective sft: remove it"),
        (SFT | {"safeguard": 0.5}, "safeguard has no effect with objective sft: remove it"),
        ({"safeguard": 1.0}, "dpo: safeguard must be finite and >= 0 and < 1, got 1.0"),
        (
            {"logit_mean": 0.5},
            "logit_mean has no effect with time_sampling None: remove it, or take ",
        ),
        (
            {"logit_std": 0.5, "time_sampling": "uniform"},
            "logit_std has no effect with time_sampling uniform: remove it, or take ",
        ),
        ({"logit_std": 0.0, "time_sampling": "logit_normal"}, f"logit_std: {POSITIVE} 0.0"),
        (
            {"logit_mean": 1e6, "time_sampling": "logit_normal"},
            "logit_mean: expected a number from -20 to 20, got 1000000",
        ),
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


def test_flags_win_over_a_file_wherever_it_stands(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("beta: 5\nseed: 3\nlearning_rate: 0.1\n")
    for words in (
        ["--beta", "9", "--config", str(file), "--seed=7"],
        [f"--config={file}", "--seed", "7", "--beta=9"],
        ["--seed", "7", "--beta", "9", f"--config={file}"],
    ):
        required = ["--family", "toy", "--model", "m", "--data", "d", "--output_dir", "o"]
        found = config_values([*required, *words], "fastpref train")
        assert (found["beta"], found["seed"], found["learning_rate"]) == (9, 7, 0.1)
    with pytest.raises(ValueError, match=r"^--config: expected a file$"):
        config_values(["--beta", "9", "--config"], "fastpref train")


def config_file(tmp_path, text):
    """The values of a YAML file, with the flags that are required."""
    file = tmp_path / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    required = ("family", "model", "data", "output_dir")
    given = [f"--{name}={tmp_path}" for name in required]
    return config_values(["--config", str(file), *given], "fastpref train")


SECRET = "the secret's words"


@pytest.mark.parametrize(
    "line",
    [
        *(
            f"{key}: {{}}"
            for key in ("config", "'config'", '"con\\x66ig"', "? config\n", "config+")
        ),
        "<<: {{config: {}}}",
        "<<: {{<<: {{config: {}}}}}",
        *(
            f"{key}: {{}}"
            for key in ("print_config", "help", "__path__", "__dict__", "model.config")
        ),
        "model: {{config: {}}}",
        "model: {{__path__: {}}}",
        "validation_prompts: {}",
        "validation_prompts+: {}",
        "timestep_range: {}",
        "lora_rank: {}",
        "model: !!python/object/apply:builtins.open [{}]",
    ],
)
def test_a_config_file_opens_no_other(line, tmp_path):
    secret = tmp_path / "secret.yaml"
    secret.write_text(SECRET)
    with pytest.raises(ValueError) as error:
        config_file(tmp_path, line.format(secret))
    assert SECRET not in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_text_that_is_a_files_name_stays_one(tmp_path):
    secret = tmp_path / "secret.yaml"
    secret.write_text(SECRET)
    assert config_file(tmp_path, f"reference_cache: {secret}")["reference_cache"] == str(secret)


BOMB = "[&a [x,x,x,x,x,x,x,x,x,x]" + "".join(
    f",&{name} [{','.join([f'*{before}'] * 10)}]" for before, name in pairwise("abcdefghi")
)
BOMB = f"{BOMB}, *i]"  # 10^9 times x


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"validation_prompts: {BOMB}", "an alias is not read"),
        (f"validation_prompts: '{BOMB}'", "an alias is not read"),
        (f"beta: '{BOMB}'", "an alias is not read"),
        (f"timestep_range: ['{BOMB}', 1]", "an alias is not read"),
        (f"timestep_range: \"['{BOMB}', 1]\"", "an alias is not read"),
        ("seed: &a 1\nlora_rank: *a", "an alias is not read"),
        ("a: &a [*a]", "an alias is not read"),
        ("validation_prompts: [" + "a," * 100_000 + "]", "expected a list of at most 1000"),
        ("validation_prompts: '[" + "a," * 4000 + "]'", "expected a list of at most 1000"),
        *(
            (f"max_train_steps: {number}", "expected a number of at most 40 digits")
            for number in (
                "1" * 41,
                "1" * 5000,
                "-" + "1" * 50,
                "0x" + "f" * 200_000,
                "1:1" * 20_000,
            )
        ),
        ("beta: '" + "1" * 5000 + "'", "expected a number of at most 40 digits"),
        ("[" * 200_000, "is nested too deeply"),
        ("beta: '" + "[" * 200_000 + "'", "is nested too deeply"),
        ("# " + "x" * 300_000, "more than 262144 bytes; expected lines of `field: value`"),
        ("model: caf\u00e9".encode("cp1252"), "is not UTF-8 (as Windows-1252 it reads 'model: caf"),
        ("beta: 1".encode("utf-16")[:-1], "truncated data"),
    ],
)
def test_what_a_config_file_may_cost(text, says, tmp_path):
    begin = time.perf_counter()
    with pytest.raises(ValueError) as error:
        config_file(tmp_path, text)
    assert says in str(error.value) and len(str(error.value)) < 1000
    assert time.perf_counter() - begin < 5


def test_what_a_runs_own_record_may_cost(tmp_path):
    (tmp_path / "config.yaml").write_text(f"beta: {BOMB}")
    with pytest.raises(ValueError, match=r"config.yaml is not readable: restore it"):
        read_record(tmp_path / "config.yaml")


@pytest.mark.parametrize("value", [BOMB, "[" + "a," * 4000 + "]", "[" * 50_000, "1" * 5000])
def test_flags_may_cost_no_more(value, tmp_path):
    given = arguments(options(tmp_path, tmp_path))
    for words in (["--validation_prompts", value], [f"--validation_prompts={value}"]):
        with pytest.raises(ValueError, match=r"^--validation_prompts: (line|is nested)") as error:
            config_values([*given, *words], "fastpref train")
        assert len(str(error.value)) < 200


@pytest.mark.parametrize("prompt", ["*a cat*", "a & b, *c", "[a", "{a: b", "&a", "- a", "a: b: c"])
def test_prompts_that_are_no_yaml(prompt, tmp_path):
    found = config_file(tmp_path, f"validation_prompts: ['{prompt}']")
    assert found["validation_prompts"] == [prompt]


def test_a_config_that_never_ends(tmp_path):
    with pytest.raises(ValueError, match="--config /dev/zero: more than 262144 bytes"):
        config_values(["--config", "/dev/zero"], "fastpref train")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings_of_a_config_file(encoding, tmp_path):
    text = "# of a run\n---\nbeta: 1e3\nvalidation_prompts: [ein grüner Kreis]\n"
    found = config_file(tmp_path, text.encode(encoding))
    assert (found["beta"], found["validation_prompts"]) == (1000, ["ein grüner Kreis"])
