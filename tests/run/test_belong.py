"""Data, models and adapters that do not belong together: every command that takes them says the
same one line, before weights are read and media encoded.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from commands import BASE, arguments, encoded, options, write_pairs
from families import Case, tiny, write_media
from safetensors.torch import load_file
from tiny import adapt

from fastpref.cli import main
from fastpref.pairs.dataset import PairDataset
from fastpref.pairs.encode import encode
from fastpref.run import artifact, belong

ADAPTER = "pytorch_lora_weights.safetensors"
COMMANDS = ("train", "cache-reference", "sweep", "eval", "doctor")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """name -> the encoded set of a tiny folder, made once."""
    folder, made = tmp_path_factory.mktemp("sets"), {}

    def of(name: str) -> Path:
        if name not in made:
            case = tiny(name)
            media = write_media(case.family, folder / f"{name}-media")
            made[name] = encode(case.family.name, case.path, media, folder / name, progress=False)
        return made[name]

    return of


def given(command: str, family: str, model: Path, data: Path, out: Path) -> list[str]:
    """The command's flags; eval's adapter is an empty file: what is in it is asked later."""
    values = options(data, out, family=family, model=str(model), max_train_steps=1)
    if command == "eval":
        (out / "lora").mkdir(parents=True)
        (out / "lora" / ADAPTER).touch()
        values = {k: values[k] for k in ("family", "model", "data", "device")}
        values["lora"] = out / "lora"
    if command == "cache-reference":
        values["reference"] = "cached"
    if command == "sweep":
        values |= {"objectives": "dpo,hinge", "betas": "1,2"}
        del values["beta"]
    if command == "doctor":
        values = {k: values[k] for k in ("family", "model", "data")} | {"card": "h200"}
    return [command, *arguments(values)]


def last_line(capsys: pytest.CaptureFixture[str], parts: list[str]) -> str:
    """What a command that fails says in the end; before it come the libraries' progress bars."""
    capsys.readouterr()
    assert main(parts) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"fastpref {parts[0]}: ")
    return line


def changed(case: Case, folder: Path, part: str, **changes) -> Path:
    """A copy of the family's folder whose part is made anew by another config."""
    shutil.copytree(case.path, folder, dirs_exist_ok=True)
    path = folder / part
    kind = getattr(diffusers, json.loads((path / "config.json").read_text())["_class_name"])
    model = kind.from_config({**kind.load_config(path), **changes})
    shutil.rmtree(path)
    model.save_pretrained(path)
    return folder


# ---- a set and a model


@pytest.mark.parametrize("command", COMMANDS)
def test_cases_of_another_familys_set(command, sets, tmp_path, capsys):
    """ComfyUI#7114, WanVideoWrapper#145, diffusers#7239."""
    data = sets("cogvideox-2b")
    said = last_line(capsys, given(command, "wan", tiny("wan").path, data, tmp_path / "run"))
    assert said == (
        f"fastpref {command}: data {data}: encoded with family fastpref.models.cogvideox, got "
        "family fastpref.models.wan"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_set_of_another_base_of_the_family(command, sets, tmp_path, capsys):
    data, model = sets("cogvideox-2b"), tiny("cogvideox-5b").path
    said = last_line(capsys, given(command, "cogvideox", model, data, tmp_path / "run"))
    assert f"data {data}: encoded with another base than {model}: vae.scaling_factor (" in said
    assert not list((tmp_path / "run").glob("dpo*"))


LARGE = {"in_channels": 48, "out_channels": 48}


@pytest.mark.parametrize(
    ("command", "name", "change", "says"),
    [
        *((each, "wan", LARGE, "(of 16 channels, the model takes 48)") for each in COMMANDS),
        ("eval", "wan", {"text_dim": 64}, "[512, 32] X [64, 24]"),
        (
            "eval",
            "wan",
            {"rope_max_seq_len": 1},
            "wan: latents of 3x4x6 (frames x height",
        ),
        ("eval", "wan", {"patch_size": (2, 2, 2)}, "(it predicts 16x2x4x6)"),
        ("eval", "cogvideox-5b", {"patch_size_t": 2, "patch_bias": False}, "do not go through"),
        ("eval", "sd15", {"cross_attention_dim": 48}, "[77, 32] X [48, 16]"),
    ],
)
def test_sizes_that_do_not_go_through_the_model(
    command, name, change, says, sets, tmp_path, capsys
):
    """Of a folder that holds no encoders to compare, as training needs the transformer alone."""
    case, part = tiny(name), "unet" if name == "sd15" else "transformer"
    model = changed(case, tmp_path / "model", part, **change)
    for other in ("vae", "text_encoder"):
        shutil.rmtree(model / other)
    said = last_line(capsys, given(command, case.family.name, model, sets(name), tmp_path / "run"))
    assert said.startswith(f"fastpref {command}: data {sets(name)}: ") and says in said


@pytest.mark.parametrize("name", ["wan", "cogvideox-2b", "cogvideox-5b", "sd15", "sdxl"])
def test_what_belongs_together_passes(name, sets, capsys):
    case, dataset = tiny(name), PairDataset(sets(name))
    belong.check(case.module, str(case.path), dataset)
    belong.warn_of_another_model(str(case.path), dataset)
    assert "warning" not in capsys.readouterr().err


# ---- a model by itself


def alone(command: str, family: str, model: Path, folder: Path, media: Path) -> list[str]:
    """The command where the set is still to be made, or none is needed."""
    if command != "sample":
        return given(command, family, model, media, folder)
    values = {"family": family, "model": model, "output_dir": folder, "prompts": "a fox"}
    values |= {"num_frames": 1, "height": 32, "width": 48, "steps": 2, "device": "cpu"}
    return ["sample", *arguments(values)]


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return {
        name: write_media(tiny(name).family, tmp_path_factory.mktemp("media") / name)
        for name in ("wan", "sd15")
    }


def flow_scheduler(folder: Path) -> None:
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")


def noise_scheduler(folder: Path) -> None:
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")


def no_scheduler(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")


@pytest.mark.parametrize("command", ["train", "sample"])
@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("wan", noise_scheduler, "/scheduler: wan.process: expected a flow-matching scheduler"),
        ("sd15", flow_scheduler, "stable_diffusion.process: expected a diffusion scheduler"),
        ("wan", {"in_channels": 36}, "wan.load: {} has 36 input and 16 output channels"),
        ("wan", LARGE, "its VAE makes latents of 16 channels, and its WanTransformer3DModel takes"),
        ("sd15", {"in_channels": 9}, "stable_diffusion.load: {} has 9 input and 4 output"),
        ("sd15", None, "model {}/transformer: config.json cannot be read"),
    ],
)  # fmt: skip
def test_a_model_is_refused_before_anything_is_encoded(
    command, name, change, says, media, tmp_path, capsys, monkeypatch
):
    refused_at_once(command, name, change, says, media, tmp_path, capsys, monkeypatch)


@pytest.mark.parametrize("command", ["train", "cache-reference", "sweep", "sample"])
def test_every_command_asks_first(command, media, tmp_path, capsys, monkeypatch):
    says = "/scheduler: scheduler_config.json cannot be read"
    where = (media, tmp_path, capsys, monkeypatch)
    refused_at_once(command, "wan", no_scheduler, says, *where)


def refused_at_once(command, name, change, says, media, tmp_path, capsys, monkeypatch):
    case, model = tiny(name), tmp_path / "model"
    if isinstance(change, dict):
        changed(case, model, "unet" if name == "sd15" else "transformer", **change)
    else:
        shutil.copytree(case.path, model)
        if change:
            change(model)
    family = case.family.name if change else "cogvideox"
    for where in ("fastpref.models.encoders.Encoders._load", "fastpref.models.folder.load_part"):
        monkeypatch.setattr(where, lambda *_, **__: pytest.fail("loaded"))
    said = last_line(capsys, alone(command, family, model, tmp_path / "out", media[name]))
    assert says.format(model) in said and said.startswith(f"fastpref {command}: ")
    assert not list((tmp_path / "out").rglob("*.safetensors"))


# ---- a run and its base


def test_a_run_of_another_base_is_told(tmp_path, capsys):
    data = encoded(write_pairs(tmp_path / "media", count=2), tmp_path / "set").folder
    run = tmp_path / "run"
    assert main(["train", *arguments(options(data, run, max_train_steps=1))]) == 0
    other = shutil.copytree(BASE, tmp_path / "other")
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": 2.0}))
    for model, lora in ((BASE, run), (other, run), (other, run / ADAPTER)):
        given = {"family": "toy", "model": model, "data": data, "lora": lora, "device": "cpu"}
        assert main(["eval", *arguments(given), "--draws_per_pair", "1"]) == 0
        said = capsys.readouterr()
        warning = f"warning: {lora} was trained on another model than {model}: what it learned is "
        assert (warning in said.err) == ("warning" in said.err) == (model == other)
        assert json.loads(said.out.splitlines()[-1])["pairs"] == 2
    assert belong.base_of(run / ADAPTER) == belong.base_of(run)
    shutil.rmtree(run / "checkpoint-1")
    assert belong.base_of(run) is None


def test_an_adapter_of_another_model_is_refused(sets, tmp_path, capsys):
    """Of another family, and of a model of another size."""
    for name, part in (("cogvideox-2b", "transformer"), ("wan", "transformer")):
        case = tiny(name)
        path = case.path
        if name == "wan":
            path = changed(case, tmp_path / "large", part, num_layers=3)
        model = case.module.load(path)
        adapt(model, case.module.LORA_TARGETS)
        artifact.export(tmp_path, model)
        given = {"family": "wan", "model": tiny("wan").path, "data": sets("wan"), "device": "cpu"}
        said = last_line(capsys, ["eval", *arguments(given | {"lora": tmp_path})])
        assert f"{tmp_path}/{ADAPTER}" in said


def test_a_model_whose_shapes_follow_from_values_is_left_to_its_first_batch(sets, monkeypatch):
    case, predict = tiny("wan"), tiny("wan").module.predict
    dataset, asked = PairDataset(sets("wan")), []

    def by_values(model, noisy, t, cond):
        asked.append(noisy.is_meta)
        noisy.nonzero()  # has no shape without values
        return predict(model, noisy, t, cond)

    monkeypatch.setattr(case.module, "predict", by_values)
    belong.check(case.module, str(case.path), dataset)
    assert asked == [True]


def test_shapes_alone_leave_no_trace(sets):
    """Asked before a model is loaded: its values are what they are without."""
    case = tiny("cogvideox-5b")
    noisy, t = case.latents[:1], torch.tensor([500.0])
    before = case.module.predict(case.model, noisy, t, case.cond(["a"]))
    belong.check(case.module, str(case.path), PairDataset(sets("cogvideox-5b")))
    again = case.module.load(case.path)
    assert torch.equal(case.module.predict(again, noisy, t, case.cond(["a"])), before)
    assert load_file(case.path / "transformer" / "diffusion_pytorch_model.safetensors")
