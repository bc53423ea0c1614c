"""Folders that the families load: parts when first used, variants, and mistakes in one line."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import options, undigested
from families import FAMILIES, PROMPTS, Case, frames_of, tiny, write_media
from safetensors.torch import load_file, save_file

from fastpref import models
from fastpref.models import encoders as model_encoders
from fastpref.models import folder as model_folder
from fastpref.pairs.encode import encode
from fastpref.run.assemble import DATA
from fastpref.run.belong import warn_of_another_model
from fastpref.run.config import Config
from fastpref.run.parts import load_model, open_data


@pytest.fixture(params=FAMILIES)
def case(request) -> Case:
    return tiny(request.param)


def test_encoders_load_when_first_used(case):
    encoders = case.module.pipeline(case.path, torch.bfloat16)
    assert encoders.to("cpu") is encoders and not {"text", "media"} & encoders.__dict__.keys()
    (row,) = case.module.encode_text(encoders, PROMPTS[:1])
    assert "media" not in encoders.__dict__ and row["text"].dtype == torch.bfloat16
    assert getattr(encoders.text, "transformer", None) is getattr(encoders.text, "unet", None)
    latents = case.module.encode_media(encoders, frames_of(case.family, 0))
    assert latents.dtype == torch.bfloat16
    upcast = case.name in ("wan", "sdxl")
    assert encoders.media.vae.dtype == (torch.float32 if upcast else torch.bfloat16)
    tolerance = 0.02 if upcast else 0.1
    assert (latents.float() - case.latents[0]).abs().max() < tolerance * case.latents[0].abs().max()


def test_a_folder_of_variants_alone_loads(case, tmp_path):
    pipe = case.pipe()
    pipe.save_pretrained(tmp_path, variant="fp16")
    model, encoders = case.module.load(tmp_path), case.module.pipeline(tmp_path)
    for a, b in zip(model.parameters(), case.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(
        case.module.encode_media(encoders, frames_of(case.family, 0)), case.latents[0]
    )
    (row,) = case.module.encode_text(encoders, PROMPTS[:1])
    assert torch.equal(row["text"], case.cond(PROMPTS[:1])["text"][0])


def test_a_hub_id_loads_as_a_folder_does(tmp_path):
    """From a hub cache without a network, in a process of its own: hubs are set up at import."""
    case, module = tiny("wan"), "fastpref.models.wan"
    repository = tmp_path / "hub" / "models--someone--tiny-wan"
    commit = "0123456789" * 4
    shutil.copytree(case.path, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = f"""
from {module} import load, pipeline, process, encode_text
from fastpref.models.folder import scheduler_config
name = "someone/tiny-wan"
print(sum(p.double().sum().item() for p in load(name).parameters()))
print(encode_text(pipeline(name), [{PROMPTS[0]!r}])[0]["text"].double().sum().item())
print(process(scheduler_config(name)).shift)
"""
    where = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **where}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    weights, text, shift = map(float, done.stdout.split())
    assert weights == pytest.approx(sum(p.double().sum().item() for p in case.model.parameters()))
    assert text == pytest.approx(case.cond(PROMPTS[:1])["text"].double().sum().item(), rel=1e-5)
    assert shift == 3.0


def test_the_schedulers_config_is_read_whatever_its_class(case):
    config = model_folder.scheduler_config(case.path)
    assert config == case.config
    with pytest.raises(ValueError, match=r"nowhere: no such folder"):
        model_folder.scheduler_config("/nowhere")


@pytest.mark.parametrize(
    "text",
    ["[1]", '[["shift", 3]]', "5", "null", '"x"', "{", "\ud800", "[" * 100_000],
    ids=range(8),
)
def test_a_scheduler_config_that_is_no_object_is_named(text, tmp_path):
    (tmp_path / "scheduler").mkdir()
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=r"scheduler: scheduler_config.json cannot be read") as e:
        model_folder.scheduler_config(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("key", ["shift", "flow_shift"])
@pytest.mark.parametrize("value", ["a", -1, 0, None, True, math.nan, math.inf])
def test_a_timestep_shift_that_is_no_number_above_0_is_named(key, value, tmp_path):
    (tmp_path / "scheduler").mkdir()
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", key: value}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        model_folder.scheduler_config(tmp_path)
    said = f"model {tmp_path}/scheduler: {key} in scheduler_config.json expected a number above 0, "
    assert str(error.value).startswith(f"{said}got {value!r}; ")


@pytest.mark.parametrize("name", ["Nope", "UNet2DConditionModel", "utils", None, 5])
def test_a_scheduler_of_an_unknown_class_is_named(name, tmp_path):
    (tmp_path / "scheduler").mkdir()
    config = {} if name is None else {"_class_name": name}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"expected a scheduler of diffusers, got {name}; copy"):
        model_folder.scheduler_config(tmp_path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.safetensors", "model.fp16.safetensors"], None),
        (["model.fp16.safetensors"], "fp16"),
        (["model.fp16.safetensors", "model.bf16.safetensors"], "bf16"),
        (["diffusion_pytorch_model-00001-of-00002.safetensors"], None),
        (["diffusion_pytorch_model-00001-of-00002.fp16.safetensors"], "fp16"),
        (["diffusion_pytorch_model.fp16-00001-of-00002.safetensors"], "fp16"),
        (["diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.safetensors"],
         None),
        ([], None),
    ],
)  # fmt: skip
def test_variants_by_file_name(names, expected, tmp_path):
    (tmp_path / "unet").mkdir()
    for name in names:
        (tmp_path / "unet" / name).touch()
    assert model_folder.variant(tmp_path, "unet") == expected


# ---- mistakes


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("wan", (9, 24, 48), "divisible by 16, got 24x48: pass --height 16 --width 48"),
        ("wan", (8, 32, 48), "frames expected 4k+1, got 8: pass --num_frames 5 or 9"),
        ("cogvideox-2b", (9, 32, 40), "divisible by 16, got 32x40"),
        ("cogvideox-5b", (2, 32, 48), "frames expected 4k+1, got 2: pass --num_frames 1 or 5"),
        ("sd15", (2, 32, 48), "takes images, got 2 frames: pass --num_frames 1"),
        ("sdxl", (1, 31, 48), "divisible by 4, got 31x48: pass --height 28 --width 48"),
    ],
)
def test_media_that_do_not_fit_are_named(name, shape, says):
    case = tiny(name)
    with pytest.raises(ValueError) as error:
        case.module.encode_media(case.encoders, torch.zeros(*shape, 3, dtype=torch.uint8))
    assert says in str(error.value)
    with pytest.raises(ValueError, match=r"uint8 \[F, H, W, 3\], got float32"):
        case.module.encode_media(case.encoders, torch.zeros(1, 32, 48, 3))


def test_another_familys_folder_is_named(case):
    other = tiny("sd15" if case.name == "wan" else "wan")
    subfolder = "unet" if case.family.frames == 1 else "transformer"
    with pytest.raises(ValueError, match=rf"{other.path}/{subfolder}"):
        case.module.load(other.path)
    with pytest.raises(ValueError, match=r"this another family's model|cannot be read"):
        case.module.pipeline(other.path)
    for nowhere in ("/nowhere", "no-such-model"):
        with pytest.raises(ValueError, match=f"model {nowhere}: no such folder"):
            case.module.load(nowhere)
        with pytest.raises(ValueError, match=f"model {nowhere}: no such folder"):
            case.module.pipeline(nowhere)
    if other.family.name == "wan" or case.name == "wan":
        with pytest.raises(ValueError, match=f"{case.family.name}.process: expected a"):
            case.module.process(other.config)


def test_a_family_is_known_by_its_class():
    with pytest.raises(ValueError, match="expected a WanTransformer3DModel, got CogVideoX"):
        models.family("wan").load(tiny("cogvideox-2b").path)


@pytest.mark.parametrize(
    ("name", "subfolder", "change", "says"),
    [
        ("wan", "transformer", {"in_channels": 36}, "36 input and 16 output channels"),
        ("cogvideox-2b", "transformer", {"in_channels": 8}, "8 input and 4 output channels"),
        ("sd15", "unet", {"in_channels": 9}, "9 input and 4 output channels"),
        ("sd15", "unet", {"addition_embed_type": "text"}, "addition_embed_type text"),
    ],
)
def test_models_that_take_more_than_text_are_refused(name, subfolder, change, says, tmp_path):
    case = tiny(name)
    kind = type(case.model)
    model = kind.from_config({**case.model.config, **change})
    model.save_pretrained(tmp_path / subfolder)
    with pytest.raises(ValueError, match=says):
        case.module.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("wan", {"boundary_ratio": 0.875}, "is a Wan2.2 model"),
        ("wan", {"expand_timesteps": True}, "is a Wan2.2 model"),
        ("sdxl", {"text_encoder": [None, None]}, "is a refiner"),
    ],
)
def test_pipelines_that_differ_are_refused(name, change, says, tmp_path):
    case = tiny(name)
    shutil.copytree(case.path, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **change}))
    with pytest.raises(ValueError, match=says):
        case.module.pipeline(tmp_path / "model")


def test_missing_and_unsafe_weights_are_named(case, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(case.path, path)
    subfolder = "unet" if case.family.frames == 1 else "transformer"
    weights = path / subfolder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))  # a pickle is not read
    weights.unlink()
    with pytest.raises(ValueError, match=f"{subfolder}: weights cannot be read"):
        case.module.load(path)
    shutil.rmtree(path / "text_encoder")
    with pytest.raises(ValueError, match="expected text_encoder beside model_index"):
        case.module.encode_text(case.module.pipeline(path), ["a"])


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("vae/config.json", {"latent_channels": 8}, "/vae: weights cannot be read"),
        ("model_index.json", {"vae": ["my_code", "MyVae"]}, ": model_index.json: vae expected"),
        ("text_encoder/config.json", {"hidden_size": 16}, "/text_encoder: weights"),
    ],
)
def test_encoders_that_do_not_load_are_no_fault_of_the_data(file, change, says, tmp_path):
    case = tiny("sd15")
    path = shutil.copytree(case.path, tmp_path / "model") / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    media = write_media(case.family, tmp_path / "media")
    with pytest.raises(ValueError, match=f"^model {tmp_path}/model{says}") as error:
        encode("stable_diffusion", tmp_path / "model", media, tmp_path / "set", progress=False)
    assert "\n" not in str(error.value) and not (tmp_path / "set" / "bad_rows.jsonl").exists()


def test_latents_that_are_not_finite_are_bad_rows(tmp_path):
    case = tiny("sd15")
    path = shutil.copytree(case.path, tmp_path / "model") / "vae"
    weights = load_file(path / "diffusion_pytorch_model.safetensors")
    weights["quant_conv.bias"].fill_(torch.nan)
    save_file(weights, path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    media = write_media(case.family, tmp_path / "media")
    said = "4 bad rows; first: metadata.jsonl line 1, chosen: latents_w encoded as NaN"
    with pytest.raises(ValueError, match=said):
        encode("stable_diffusion", tmp_path / "model", media, tmp_path / "set", progress=False)
    assert not list((tmp_path / "set").rglob("*.safetensors"))


def test_a_finished_set_loads_no_encoder(tmp_path, monkeypatch):
    case = tiny("sd15")
    media = write_media(case.family, tmp_path / "media")
    given = ("stable_diffusion", case.path, media, tmp_path / "set")
    encode(*given, progress=False)
    monkeypatch.setattr(model_encoders.Encoders, "_load", lambda *_: pytest.fail("loaded"))
    encode(*given, progress=False)


@pytest.mark.parametrize("name", ["sd15", "wan", "cogvideox-2b"])
def test_a_resumed_set_has_the_bytes_of_an_unbroken_one(name, tmp_path, monkeypatch):
    """What is left to encode would stand in a smaller batch of prompts, but for filling it up."""
    case = tiny(name)
    media = write_media(case.family, tmp_path / "media")
    real, sizes = case.module.encode_text, []
    monkeypatch.setattr(
        case.module,
        "encode_text",
        lambda pipe, texts: sizes.append(len(texts)) or real(pipe, texts),
    )
    given = (case.family.name, case.path, media, tmp_path / "set")
    encode(*given, batch_size=3, progress=False)
    files = sorted((tmp_path / "set").rglob("*.safetensors"))
    before = {path: path.read_bytes() for path in files}
    for path in (tmp_path / "set" / "empty.safetensors", files[1], files[-1]):
        path.unlink()
    encode(*given, batch_size=3, progress=False)
    assert {path: path.read_bytes() for path in files} == before
    assert sizes == [3] * 5


def changed(case: Case, path: Path) -> Path:
    """A copy of the family's folder, to be damaged."""
    return shutil.copytree(case.path, path / "model")


def damage(weights: Path, how: str) -> str:
    """Leaves a tensor out, changes the last one's shape or cuts the file; returns what is hurt."""
    tensors = load_file(weights)
    name = sorted(tensors)[-1]
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
        return "cannot be read"
    if how == "reshaped":
        tensors[name] = torch.zeros(3, 5)
    else:
        del tensors[name]
    save_file(tensors, weights, metadata={"format": "pt"})
    return "cannot be read" if how == "reshaped" else f"weights lack {name}"


@pytest.mark.parametrize("how", ["missing", "reshaped", "cut"])
def test_encoders_whose_weights_are_not_whole_are_named(case, how, tmp_path):
    """Nothing is left random: one line says which part, and no row of the data gets the blame."""
    path = changed(case, tmp_path)
    says = damage(path / "text_encoder" / "model.safetensors", how)
    with pytest.raises(ValueError, match=f"{path}/text_encoder: weights") as error:
        case.module.encode_text(case.module.pipeline(path), ["a"])
    assert says in str(error.value) and "\n" not in str(error.value)
    says = damage(path / "vae" / "diffusion_pytorch_model.safetensors", how)
    with pytest.raises(ValueError, match=f"{path}/vae: weights") as error:
        case.module.encode_media(case.module.pipeline(path), frames_of(case.family, 0))
    assert says in str(error.value) and "\n" not in str(error.value)
    transformer = path / ("unet" if case.family.frames == 1 else "transformer")
    says = damage(transformer / "diffusion_pytorch_model.safetensors", how)
    with pytest.raises(ValueError, match=f"{transformer}: weights") as error:
        case.module.load(path)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight"])
def test_tied_embeddings_stand_in_the_file_under_either_name(name, tmp_path):
    case = tiny("cogvideox-2b")
    path = changed(case, tmp_path)
    weights = path / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    (stored,) = tensors.keys() & {"shared.weight", "encoder.embed_tokens.weight"}
    tensors[name] = tensors.pop(stored)
    save_file(tensors, weights, metadata={"format": "pt"})
    (row,) = case.module.encode_text(case.module.pipeline(path), PROMPTS[:1])
    assert torch.equal(row["text"], case.cond(PROMPTS[:1])["text"][0])


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "scheduler"])
@pytest.mark.parametrize(
    ("library", "name"),
    [("evilmod", "Evil"), ("diffusers", "Evil"), (["evilmod"], "Evil"), ("diffusers", "utils")],
)
def test_code_in_a_folder_is_not_run(part, library, name, tmp_path):
    path = changed(tiny("wan"), tmp_path)
    index = json.loads((path / "model_index.json").read_text())
    index[part] = [library, name]
    (path / "model_index.json").write_text(json.dumps(index))
    for file in ("evilmod.py", "diffusers.py"):
        (path / part / file).write_text("raise SystemExit('it ran')\nclass Evil: pass\n")
    with pytest.raises(ValueError, match=f"{part} expected a class of diffusers or transformers"):
        tiny("wan").module.pipeline(path)


def test_a_folder_with_a_safety_checker_loads(tmp_path):
    """As SD1.5's own, whose entry names a module of diffusers; it is not loaded."""
    case = tiny("sd15")
    path = changed(case, tmp_path)
    index = json.loads((path / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (path / "model_index.json").write_text(json.dumps(index))
    (row,) = case.module.encode_text(case.module.pipeline(path), PROMPTS[:1])
    assert torch.equal(row["text"], case.cond(PROMPTS[:1])["text"][0])


def test_a_set_of_another_base_is_refused(tmp_path, capsys):
    """In training, and in `predict` where the set does not say what it was encoded with."""
    sd15, sdxl = tiny("sd15"), tiny("sdxl")
    media, folder = write_media(sd15.family, tmp_path / "media"), tmp_path / "set"
    encode("stable_diffusion", sd15.path, media, folder, progress=False)

    def opened(model: Path | str) -> None:
        values = {"family": "stable_diffusion", "model": str(model)}
        config = Config(**options(folder, tmp_path / "run", **values))
        device, dtype = torch.device("cpu"), torch.float32
        dataset = open_data(config.data, tmp_path / "run", dtype=dtype, **config.only(*DATA))
        load_model(sd15.module, config.model, device, dtype)
        warn_of_another_model(config.model, dataset)

    says = r"another base than .*: vae.scaling_factor \(0.18215 there, 0.13025 here\); encode it"
    with pytest.raises(ValueError, match=says):
        opened(sdxl.path)
    opened(sd15.path)
    assert "warning: data" not in capsys.readouterr().err
    other = changed(sd15, tmp_path)
    for part in ("vae", "text_encoder"):  # saved by another version: a default left out
        config = json.loads((other / part / "config.json").read_text())
        left_out = "scaling_factor" if part == "vae" else "_name_or_path"
        config.pop(left_out, None)
        (other / part / "config.json").write_text(json.dumps(config))
    opened(other)
    shutil.rmtree(other / "text_encoder")  # training needs the transformer alone
    opened(other)
    assert capsys.readouterr().err.count("warning: data") == 2
    for file in (other / "unet").glob("*.safetensors"):
        file.write_bytes(b"cut")
    with pytest.raises(ValueError, match="weights cannot be read"):
        opened(other)
    assert "warning: data" not in capsys.readouterr().err  # beside the point

    mark = json.loads((undigested(folder) / "fingerprint.json").read_text())
    del mark["encoders"]  # of a family without, and as sets were before
    (folder / "fingerprint.json").write_text(json.dumps(mark))
    opened(sd15.path)
    assert "warning: data" not in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"^data .*/set: .*no embedding `pooled` for a UNet of S"):
        opened(sdxl.path)

    noisy, t = sd15.latents[:1], torch.tensor([500.0])
    with pytest.raises(ValueError, match="no embedding `pooled` for a UNet of SDXL: the set was"):
        sdxl.module.predict(sdxl.model, noisy, t, sd15.cond(["a"]))
    with pytest.raises(ValueError, match=r"an embedding `pooled` for a UNet of SD1.5: the set was"):
        sd15.module.predict(sd15.model, noisy, t, sdxl.cond(["a"]))
