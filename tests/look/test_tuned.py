"""`fastpref eval` and `sample` of runs that were tuned in full: how to, the right numbers, and what
is not such a run.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from commands import BASE, arguments, fails, options
from families import PROMPTS, generators, run, size_of, tiny
from safetensors.torch import load_file, save_file
from test_sample import read
from tiny import adapt

from fastpref.cli import EVAL_SEED, main
from fastpref.look.evaluate import errors, relative_errors
from fastpref.look.sample import starting_noise
from fastpref.models import toy
from fastpref.pairs.dataset import PairDataset
from fastpref.run import adapters, artifact
from fastpref.run.parts import make_process

MODEL = {"family": "toy", "model": BASE, "device": "cpu"}
SIZE = {"num_frames": 8, "height": 12, "width": 12, "steps": 2}


@pytest.fixture(scope="module")
def full(encoded_pairs, tmp_path_factory):
    """A run with tuning full."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    change = {"tuning": "full", "max_train_steps": 2, "learning_rate": 1e-3}
    values = options(encoded_pairs, folder, **change)
    del values["lora_rank"]
    assert main(["train", *arguments(values)]) == 0
    return folder


def evaluated(encoded_pairs, **flags) -> list[str]:
    return ["eval", *arguments(MODEL | {"data": encoded_pairs} | flags), "--draws_per_pair", "2"]


def sampled(folder, **flags) -> list[str]:
    flags = {**MODEL, **SIZE, "output_dir": folder, **flags}
    return ["sample", *arguments(flags), "--prompts", "a red disc"]


def test_cases_of_a_fully_tuned_run_as_an_adapter(full, encoded_pairs, tmp_path, capsys):
    """It says that it is one, and what to pass: that works."""
    capsys.readouterr()
    file = full / "transformer" / "diffusion_pytorch_model.safetensors"
    for lora in (full, full / "transformer", file):
        flags = {"family": "toy", "model": BASE, "lora": lora, "output": tmp_path / "a.safetensors"}
        for command in (
            evaluated(encoded_pairs, lora=lora),
            sampled(tmp_path / "a", lora=lora),
            ["export", *arguments(flags), "--format", "diffusers"],
        ):
            assert fails(capsys, *command) == (
                f"fastpref {command[0]}: {lora}: has a whole model and no adapter, as a run with "
                f"tuning full writes it: eval and sample take it as --tuned {full}\n"
            )
    assert main(evaluated(encoded_pairs, tuned=full)) == 0
    assert main(sampled(tmp_path / "a", tuned=full)) == 0


def test_eval_compares_a_fully_tuned_model_with_its_base(full, encoded_pairs, tmp_path, capsys):
    capsys.readouterr()
    assert main(evaluated(encoded_pairs, tuned=full)) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    dataset, process = PairDataset(encoded_pairs), make_process(toy, str(BASE))
    how = {"seed": EVAL_SEED, "draws_per_pair": 2}
    policy, base = (errors(toy.load(path), toy, process, dataset, **how) for path in (full, BASE))
    change = policy - base
    assert found["implicit_acc"] == (change[:, 0] < change[:, 1]).double().mean().item()
    changes = found["chosen_error_change"], found["rejected_error_change"]
    assert changes == relative_errors(policy, base) and changes[0] != 0
    # The base itself as the tuned model: nothing has changed.
    same = shutil.copytree(BASE, tmp_path / "base")
    assert main(evaluated(encoded_pairs, tuned=same)) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["implicit_acc"] == 0.5 and found["chosen_error_change"] == 0


@pytest.mark.parametrize("name", ["wan", "sdxl"])
def test_samples_of_a_fully_tuned_model_are_the_pipelines(name, tmp_path):
    """Its transformer or UNet in the base's pipeline; in several files too."""
    case, part = tiny(name), "unet" if name == "sdxl" else "transformer"
    model = case.module.load(case.path)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(i)
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "run" / part, max_shard_size="20KB")
    assert len(list((tmp_path / "run" / part).glob("*.safetensors"))) > 1
    flags = {"family": case.family.name, "model": case.path, "output_dir": tmp_path / "clips"}
    flags |= {"num_frames": 1} | size_of(case) | {"steps": 2, "device": "cpu"}
    command = ["sample", *arguments(flags | {"tuned": tmp_path / "run"})]
    assert main([*command, "--prompts", PROMPTS[0]]) == 0
    pipe = case.pipe()
    clips = {}
    for kind in ("base", "tuned"):
        if kind == "tuned":
            setattr(pipe, part, model)
        noise = starting_noise(case.latents.shape[1:], [0])
        theirs = run(case, pipe, noise, 2, output_type="np", generator=generators([0]))
        clips[kind] = torch.as_tensor(theirs * 255).round().int()
    mine = read(tmp_path / "clips" / "0000.mp4")
    off = (mine.int() - clips["tuned"].view(mine.shape)).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 1e-3
    assert (clips["base"] - clips["tuned"]).abs().max() > 1


def test_what_is_no_fully_tuned_run_of_the_model(full, encoded_pairs, tmp_path, capsys):
    wan = tiny("wan")
    capsys.readouterr()  # what making it says

    def says(what: str, **flags) -> None:
        said = fails(capsys, *evaluated(encoded_pairs, **flags))
        assert what in said, said

    model = toy.load(BASE)
    adapt(model, toy.LORA_TARGETS)
    lora = artifact.export(tmp_path, model)
    says("has no transformer; expected the folder of a run with tuning full", tuned=tmp_path)
    says("pass --lora in place of --tuned", tuned=tmp_path)
    says("--lora and --tuned: expected one of them", tuned=full, lora=lora)
    says("/nowhere: has no transformer", tuned="/nowhere")
    says("was it trained from another model?", tuned=wan.path)
    copy = shutil.copytree(full, tmp_path / "copy")
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    name = sorted(tensors)[3]
    for change, what in (
        ({n: v for n, v in tensors.items() if n != name}, f"/transformer lacks {name}: was it"),
        (tensors | {name: torch.full_like(tensors[name], torch.nan)}, f"{name} is not finite"),
        (tensors | {"more": torch.zeros(2)}, "more expected not there, got [2]: was it trained"),
    ):
        save_file(change, file)
        says(what, tuned=copy)
    file.write_bytes(whole[:-8])
    says(f"{copy}/transformer is not whole: run the same fastpref train again", tuned=copy)
    # A base that holds an adapter too, as a folder of a user's own may, is one of the adapter.
    shutil.copy(lora, copy)
    assert adapters.find(copy) == copy / lora.name


def test_a_run_without_weights_is_neither(tmp_path, encoded_pairs, capsys):
    (tmp_path / "run").mkdir()
    assert "expected a run's folder, or its adapter file" in fails(
        capsys, *evaluated(encoded_pairs, lora=tmp_path / "run")
    )
    said = fails(capsys, *evaluated(encoded_pairs))
    assert "--lora is required: the run's folder, or its adapter file; or --tuned" in said


def test_other_files_beside_the_weights_are_not_read(full, encoded_pairs, tmp_path, capsys):
    """As diffusers does: a copy of an earlier state, or an average, is not the model."""
    run = shutil.copytree(full, tmp_path / "run")
    capsys.readouterr()
    assert main(evaluated(encoded_pairs, tuned=run)) == 0
    before = capsys.readouterr().out
    base = load_file(BASE / "transformer" / "diffusion_pytorch_model.safetensors")
    for name in ("diffusion_pytorch_model_ema.safetensors", "a.safetensors"):
        save_file(base, run / "transformer" / name)
    assert main(evaluated(encoded_pairs, tuned=run)) == 0
    assert capsys.readouterr().out == before


def test_a_base_is_neither_adapter_nor_run(encoded_pairs, tmp_path, capsys):
    line = fails(capsys, *evaluated(encoded_pairs, tuned=BASE))
    assert f"--tuned {BASE}: is the base itself, expected the folder of a run" in line
    (tmp_path / "model_index.json").touch()
    line = fails(capsys, *evaluated(encoded_pairs, lora=tmp_path))
    assert f"{tmp_path}: is a model's folder, not an adapter" in line
