"""Flags and run files of `fastpref train`: each mistake is one line, and both say the same run."""

import dataclasses
import json
import signal
from dataclasses import MISSING
from functools import partial

import pytest
import torch
import yaml
from commands import BASE, arguments, command, fails, options

from fastpref.cli import main
from fastpref.pairs.media import Sampling, decode, write_clip
from fastpref.run.config import Config
from fastpref.run.parsing import parse


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"beta": -1}, "beta must be finite and > 0, got -1"),
        ({"objective": "dmpo", "alpha": 0.5}, "alpha must be finite and > 0 and < 0.5, got 0.5"),
        ({"alpha": 0.1}, "dpo has no option 'alpha'"),
        ({"importance_steps": 5}, "importance_steps has no effect with objective dpo"),
        ({"objective": "best"}, "objective"),
        ({"bta": 3}, "bta"),
        ({"learning_rate": "fast"}, "learning_rate: expected a number, got fast\n"),
        ({"beta": "nan"}, "beta: expected a number, got nan\n"),
        ({"beta": "inf"}, "beta: expected a number, got inf\n"),
        ({"lora_rank": 1.5}, "lora_rank: expected a whole number, got 1.5\n"),
        ({"inverse_weight": 3}, "inverse_weight: expected true or false, got 3\n"),
        ({"combine": "sum"}, "combine: expected one of max, min, mean, got sum\n"),
        ({"lora_targets": "to_q"}, "lora_targets: expected a list of texts such as [a, b]"),
        ({"timestep_range": "[1]"}, "timestep_range: expected two numbers such as [0.0, 0.5], got"),
        ({"family": "nope"}, "nope"),
        ({"model": "/nowhere"}, "/nowhere"),
        ({"data": "/nowhere"}, "/nowhere"),
        ({"lora_targets": "['nothing']"}, "nothing"),
        ({"tuning": "full"}, "lora_rank has no effect with tuning full"),
        ({"train_batch_size": 11}, "10"),
        ({"resume_from_checkpoint": "/nowhere"}, "resume_from_checkpoint"),
        ({"report_to": "paper"}, "report_to"),
        ({"report_to": "trackio"}, "pip install fastpref[trackio]"),
        ({"device": "gpu"}, "device: expected cpu, cuda or cuda:N, got gpu"),
        ({"device": "cpu:7"}, "device: expected cpu, cuda or cuda:N, got cpu:7"),
        ({"device": "cuda:01"}, "device: expected cpu, cuda or cuda:N, got cuda:01"),
        ({"device": "cuda:7"}, "device cuda:7"),
        ({"output_dir": ""}, "output_dir: expected a value"),
        ({"adam_beta1": 1.5}, "adam_beta1"),
        ({"seed": 2**70}, "seed: expected 0 <= seed < 2^63"),
        ({"lora_targets": "[]"}, "lora_targets: expected at least one"),
        ({"validation_guidance_scale": 2.0}, "validation_guidance_scale has no effect"),
        ({"timestep_range": "[0.9, 0.1]"}, "timestep_range"),
    ],
)
def test_mistakes_are_one_line(change, says, pairs, tmp_path, capsys):
    assert says in fails(capsys, "train", *arguments(options(pairs, tmp_path) | change))


@pytest.mark.parametrize("command", ["encode", "sample", "eval"])
def test_no_device_of_the_cpu_but_itself(command, pairs, tmp_path, capsys):
    size = ["--num_frames", "8", "--height", "12", "--width", "12", "--prompts", "a disc"]
    own = {
        "encode": ["--data", str(pairs), "--output_dir", str(tmp_path / "set")],
        "sample": ["--output_dir", str(tmp_path / "clips"), *size],
        "eval": ["--data", str(pairs), "--lora", str(tmp_path)],
    }
    where = ["--family", "toy", "--model", str(BASE), "--device", "cpu:7", *own[command]]
    assert "device: expected cpu, cuda or cuda:N, got cpu:7" in fails(capsys, command, *where)


def test_unknown_field_in_yaml(pairs, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("famly: toy\n")
    assert "famly" in fails(
        capsys, "train", "--config", str(file), *arguments(options(pairs, tmp_path))
    )


def test_a_field_said_twice_in_yaml(pairs, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("beta: 1\nbeta: 2\n")
    said = fails(capsys, "train", "--config", str(file), *arguments(options(pairs, tmp_path / "r")))
    assert "line 2: beta stands there twice" in said


@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(Config) if f.default not in (None, MISSING)]
)
def test_a_field_left_blank_in_yaml(field, tmp_path):
    file = tmp_path / "run.yaml"
    values = Config(**options(tmp_path, tmp_path)).to_dict()
    del values[field]
    file.write_text(f"{yaml.safe_dump(values)}{field}:\n")
    with pytest.raises(ValueError, match=f"^{field}: expected a value, got null: set or remove it"):
        parse(["--config", str(file)])


def test_yaml_and_flags_agree(pairs, tmp_path):
    file = tmp_path / "run.yaml"
    Config(**options(pairs, tmp_path, objective="sdpo", importance_steps=5)).save(file)
    assert parse(["--config", str(file)]) == Config(
        **options(pairs, tmp_path, objective="sdpo", importance_steps=5)
    )
    assert parse(["--config", str(file), "--beta", "3"]).beta == 3.0


def test_one_beta_of_a_sum_does_not_fit_latents_of_two_sizes(tmp_path, capsys):
    rows = []
    for i, size in enumerate((12, 12, 16, 16)):
        for name in "wl":
            frames = torch.randint(0, 256, (8, size, size, 3), dtype=torch.uint8)
            write_clip(tmp_path / "media" / f"{i}_{name}.mp4", frames)
        rows.append({"prompt": f"p{i}", "chosen": f"{i}_w.mp4", "rejected": f"{i}_l.mp4"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "media" / "metadata.jsonl").write_text(lines)
    changes = options(tmp_path / "media", tmp_path / "run", beta_convention="sum")
    said = fails(capsys, "train", *arguments(changes))
    assert "beta_convention sum: one beta cannot fit latents of 3456 and of 6144 elements" in said


def test_sample_finds_its_device(tmp_path, capsys):
    """The README's own line, without --device."""
    sizes = ["--num_frames", "8", "--height", "12", "--width", "12", "--steps", "2"]
    where = ["--family", "toy", "--model", str(BASE), "--output_dir", str(tmp_path)]
    assert main(["sample", *where, *sizes, "--prompts", "a red disc moving left"]) == 0
    assert f"{tmp_path}/0000.mp4: a red disc" in capsys.readouterr().out
    assert decode((tmp_path / "0000.mp4").read_bytes(), Sampling()).frames.shape == (8, 12, 12, 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_while_torch_is_imported(number, tmp_path):
    """What a signal raises there is lost at times: numpy's import within torch's swallows it."""
    kill = f"os.kill(os.getpid(), {number:d})"
    lost = f"import os\ntry: {kill}\nexcept KeyboardInterrupt: pass\n"
    (tmp_path / "torch.py").write_text(lost)
    # Not ignored, as it is where these tests run in the background.
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = command("train", cwd=tmp_path, preexec_fn=heeded)
    said = "fastpref train: interrupted; run the same command to go on\n"
    assert process.communicate() == ("", said) and process.returncode == 75


@pytest.mark.parametrize("name", ["sample", "eval", "export", "report", "doctor"])
def test_what_runs_in_one_process(name, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([name]) == 1
    said = f"fastpref {name}: runs in one process: start it without torchrun\n"
    assert capsys.readouterr().err == said
