"""Mistakes in the files and folders a command is given: each is one line, and nothing is lost."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from commands import BASE, arguments, encoded, fails, options
from safetensors.torch import load_file, save_file

from fastpref.pairs.encode import encode
from fastpref.pairs.shards import pair_file
from fastpref.process import Diffusion, from_config
from fastpref.run.folder import alone, claim
from fastpref.run.parsing import config_values
from fastpref.run.parts import tune_whole


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("beta: 1\nbeta: 2\n", "line 2: beta stands there twice"),
        ("beta: " + "[" * 5000, "maximum recursion depth exceeded"),
        (None, "run.yaml: no such file or directory\n"),
        ("alpha: 1\n? [beta,\n   clip]\n: 3", "line 2: expected the name of a field before the "),
        ("? [beta,\n   clip]\n: 3", "before the colon, got [beta, clip]\n"),
        ("{a: 1}: 3", "line 1: expected the name of a field before the colon, got {a: 1}\n"),
        ("3: 4", "line 1: expected the name of a field before the colon, got 3\n"),
        ("no: 4", "line 1: expected the name of a field before the colon, got no\n"),
    ],
)
def test_config_files(text, says, joined, pairs, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    config = [f"--config={file}"] if joined else ["--config", str(file)]
    said = fails(capsys, "train", *config, *arguments(options(pairs, tmp_path / "r")))
    assert said.startswith(f"fastpref train: --config {file}") and says in said


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "mixed_precision: no",
            "mixed_precision: expected one of no, bf16, got False; YAML reads yes, on, no and off "
            "so: put quotes around the word\n",
        ),
        ("reference_cache: on", "reference_cache: expected text (a number in quotes), got True; "),
        ("reference_cache: 7", "reference_cache: expected text (a number in quotes), got 7\n"),
        ("lora_targets: [[to_q],\n  to_v]", "lora_targets: expected a list of texts such as "),
        ("alpha: [a,\n  b]", "alpha: expected a number, got ['a', 'b']\n"),
    ],
)
def test_types_in_config_files(line, says, pairs, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(line)
    given = arguments(options(pairs, tmp_path / "run"))
    assert f"fastpref train: {says}" in fails(capsys, "train", "--config", str(file), *given)


def test_the_shared_lines_of_a_config_file(pairs, tmp_path):
    """YAML's merge key is no field."""
    file = tmp_path / "run.yaml"
    file.write_text("<<: {alpha: 0.1}\nclip: 0.2\n")
    given = arguments(options(pairs, tmp_path / "run"))
    values = config_values(["--config", str(file), *given], "fastpref train")
    assert (values["alpha"], values["clip"]) == (0.1, 0.2)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps must be an integer from 1 to"),
        ({"num_train_timesteps": -1}, "got -1"),
        ({"num_train_timesteps": 1e3}, r"got 1000\.0"),
        ({"num_train_timesteps": 10**12}, "got 10{12}$"),
        ({"num_train_timesteps": -5, "_class_name": "FlowMatchEulerDiscreteScheduler"}, "got -5"),
        ({"trained_betas": []}, r"trained_betas must be from 0 to 1, got \[\]"),
        ({"trained_betas": [0.1, "a"]}, "trained_betas must be from 0 to 1"),
        ({"beta_start": -1e-4, "beta_schedule": "scaled_linear"}, "beta_start, beta_end must be"),
        ({"beta_end": None}, r"beta_start, beta_end must be from 0 to 1, got \(0.0001, None\)"),
    ],
)
def test_scheduler_configs(config, says):
    with pytest.raises(ValueError, match=says) as error:
        from_config(config)
    assert str(error.value).startswith("scheduler config: ")


def test_a_table_of_no_timesteps():
    with pytest.raises(ValueError, match=r"alphas_cumprod must be \[T\] .* got \[0\]$"):
        Diffusion(alphas_cumprod=torch.empty(0))


def test_a_shard_without_its_prompt(pairs, tmp_path, capsys):
    dataset = encoded(pairs, tmp_path / "set")
    for pair_id in dataset.pair_ids:
        path = pair_file(dataset.folder, pair_id)
        tensors = load_file(path)
        save_file({n: v for n, v in tensors.items() if n != "cond.text"}, path)
    said = fails(capsys, "train", *arguments(options(dataset.folder, tmp_path / "run")))
    assert "expected cond.text:8x32 latents_l:" in said and "as the index says, got" in said
    assert said.endswith("delete it and run the same fastpref encode again\n")


@pytest.mark.parametrize("family", ["toy", "stable_diffusion"])
def test_a_model_that_is_not_there_leaves_nothing(family, pairs, tmp_path):
    with pytest.raises(ValueError, match=r"model .*nope: no such folder; expected a diffusers"):
        encode(family, tmp_path / "nope", pairs, tmp_path / "set", progress=False)
    assert not (tmp_path / "set").exists()


def test_a_model_mended_before_the_first_pair_is_taken(pairs, tmp_path):
    """What failed later than its fingerprint was written binds nothing."""
    (tmp_path / "set").mkdir()
    mark = json.dumps({"family": "fastpref.models.toy", "model": "nope"})
    (tmp_path / "set" / "fingerprint.json").write_text(mark)
    assert len(encoded(pairs, tmp_path / "set")) == 10
    assert json.loads((tmp_path / "set" / "fingerprint.json").read_text())["model"] != "nope"


def test_one_demo_at_a_time(tmp_path, capsys):
    with alone(tmp_path, "demo"):
        assert "another fastpref is writing there" in fails(
            capsys, "demo", "--output_dir", str(tmp_path)
        )
    assert [path.name for path in tmp_path.iterdir()] == [".fastpref"]
    (tmp_path / "config.yaml").touch()  # a run's folder is no demo's
    assert "something else" in fails(capsys, "demo", "--output_dir", str(tmp_path))


@pytest.mark.parametrize("kind", ["demo", "sweep", "sample", "encode"])
def test_another_commands_folder_is_refused(kind, pairs, tmp_path, capsys):
    claim(tmp_path / kind, kind)
    said = fails(capsys, "train", *arguments(options(pairs, tmp_path / kind)))
    assert said == (
        f"fastpref train: output_dir {tmp_path / kind} is one of fastpref {kind}, expected one of "
        "fastpref train: choose another one\n"
    )
    assert [path.name for path in (tmp_path / kind).iterdir()] == [".fastpref"]


def test_a_folder_from_before_its_kind_was_written_is_any_commands(tmp_path):
    (tmp_path / ".fastpref").touch()
    for kind in ("train", "sweep"):
        claim(tmp_path, kind)


def test_a_model_that_is_not_there_is_the_one_thing_said(pairs, tmp_path, capsys):
    data = encoded(pairs, tmp_path / "set").folder
    said = fails(capsys, "train", *arguments(options(data, tmp_path / "run", model="nope")))
    assert said.startswith("fastpref train: model nope")


def test_a_link_to_nothing_is_no_folder(pairs, tmp_path, capsys):
    link = tmp_path / "brk"
    link.symlink_to("gone")
    says = f"output_dir {link} is a link to gone, which is not there: make that folder, or choose"
    assert says in fails(capsys, "train", *arguments(options(pairs, link)))
    model = ["--family", "toy", "--model", str(BASE)]
    said = fails(capsys, "encode", *model, "--data", str(pairs), "--output_dir", str(link))
    assert says in said and link.is_symlink()


def test_no_run_goes_into_an_encoded_set(pairs, tmp_path, capsys):
    data = encoded(pairs, tmp_path / "set").folder
    said = fails(capsys, "train", *arguments(options(data, data)))
    assert "is one of fastpref encode, expected one of fastpref train" in said


def test_every_command_says_its_kind(pairs, tmp_path, capsys):
    claim(tmp_path, "train")
    model = ["--family", "toy", "--model", str(BASE)]
    size = ["--num_frames", "8", "--height", "12", "--width", "12"]
    flags = {
        "demo": [],
        "sample": [*model, *size, "--prompts", "a red disc"],
        "sweep": [*model, "--data", str(pairs), "--objectives", "dpo", "--betas", "1"],
    }
    for name, given in flags.items():
        said = fails(capsys, name, *given, "--output_dir", str(tmp_path))
        assert f"is one of fastpref train, expected one of fastpref {name}: choose another" in said


@pytest.mark.parametrize(
    "change",
    [{}, {"tuning": "full", "lora_rank": None}, {"objective": "sft", "beta": None}],
    ids=["lora", "full", "sft"],
)
def test_a_base_that_is_not_finite(change, pairs, tmp_path, capsys):
    """Whatever trains; no step is taken."""
    data = encoded(pairs, tmp_path / "set").folder
    model = shutil.copytree(BASE, tmp_path / "base")
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["proj_out.bias"][0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    given = options(data, tmp_path / "run", model=str(model), **change)
    given = {name: value for name, value in given.items() if value is not None}
    said = fails(capsys, "train", *arguments(given))
    assert "self-check: the base model's prediction of the first batch is not finite: look" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_quantised_weights_do_not_train():
    model = torch.nn.Linear(2, 2)
    model.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="tuning full: weights of my/base are quantised and cann"):
        tune_whole(model, "my/base")
    tune_whole(torch.nn.Linear(2, 2).requires_grad_(False), "my/base")
