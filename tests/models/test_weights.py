"""Weights that do not load: quantised ones, files that are named and must not be opened."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import pickle
import shutil
from pathlib import Path

import pytest
from commands import arguments, fails
from families import Case, tiny
from safetensors.torch import load_file, save_file

from fastpref.models.folder import load_part

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def part_of(case: Case, part: str, path: Path) -> object:
    """Loads that part alone."""
    if part == "vae":
        return case.module.pipeline(path).media
    return case.module.pipeline(path).text if part == "text_encoder" else case.module.load(path)


def config_of(case: Case, part: str, folder: Path, quantised: object) -> Path:
    """A copy of the family's folder whose part says that it is quantised."""
    path = shutil.copytree(case.path, folder / "model")
    file = path / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": quantised}))
    return path


@pytest.mark.skipif(bool(importlib.util.find_spec("bitsandbytes")), reason="it is installed")
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("said", [NF4, {k: v for k, v in NF4.items() if k != "quant_method"}])
def test_cases_of_a_quantised_part_say_what_to_install(part, said, tmp_path):
    """diffusers#3194, ComfyUI#11766."""
    path = config_of(tiny("wan"), part, tmp_path, said)
    with pytest.raises(ValueError) as error:
        part_of(tiny("wan"), part, path)
    assert str(error.value).startswith(f"model {path}/{part}: weights cannot be read (")
    end = "it is quantised (bitsandbytes): pip install bitsandbytes accelerate, or take the folder"
    assert str(error.value).endswith(f"{end} of unquantised weights")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize(
    "said", [{"quant_method": "no"}, {"quant_method": 5}, {"bits": 4}, "nf4", [1]]
)
def test_what_no_library_knows_is_not_read_as_it_stands(part, said, tmp_path):
    """transformers only warns, and takes the numbers for weights."""
    path = config_of(tiny("wan"), part, tmp_path, said)
    with pytest.raises(ValueError, match=rf"^model {path}/{part}: .*take the folder of unquant"):
        part_of(tiny("wan"), part, path)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_part_that_is_not_quantised_may_say_so(part, tmp_path):
    assert part_of(tiny("wan"), part, config_of(tiny("wan"), part, tmp_path, None))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (importlib.metadata.PackageNotFoundError("sentencepiece"), "sentencepiece): install that"),
        (ImportError("pip install protobuf"), "(pip install protobuf): install that package"),
        (AssertionError(), "(AssertionError)"),
        (pickle.UnpicklingError("bad"), "(bad)"),
    ],
)
def test_whatever_a_library_raises_names_the_part(error, says, tmp_path, monkeypatch):
    from diffusers import DDIMScheduler

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(DDIMScheduler, "from_pretrained", fails)
    with pytest.raises(ValueError) as raised:
        load_part(DDIMScheduler, tmp_path, "scheduler")
    assert str(raised.value).startswith(f"model {tmp_path}/scheduler: DDIMScheduler cannot be read")
    assert says in str(raised.value)


class Evil:
    """Runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def sharded(case: Case, part: str, folder: Path, names: object) -> Path:
    """A copy whose part's weights are in several files by an index; names: of the file of each
    tensor, in turn. The pickle that it may name is there.
    """
    path = shutil.copytree(case.path, folder / "model")
    (whole,) = (path / part).glob("*.safetensors")
    tensors = load_file(whole)
    whole.unlink()
    for i, name in enumerate(("a.safetensors", "b.safetensors")):
        half = dict(list(tensors.items())[i::2])
        save_file(half, path / part / name, metadata={"format": "pt"})
    (path / part / "c.bin").write_bytes(pickle.dumps(Evil(folder / "it_ran")))
    shutil.copy(path / part / "c.bin", path / "c.safetensors")
    places = {name: names[i % 2] for i, name in enumerate(tensors)}
    index = {"metadata": {}, "weight_map": places}
    (path / part / f"{whole.name}.index.json").write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a.safetensors", "c.bin"], "names 'c.bin', expected a .safetensors file beside it"),
        (
            ["a.safetensors", "../c.safetensors"],
            "names '../c.safetensors', expected a .safetensors",
        ),
        (["a.safetensors", 5], "is damaged, expected a weight_map"),
        (["a.safetensors", None], "is damaged, expected a weight_map"),
    ],
)
def test_an_index_that_names_a_pickle(part, names, says, tmp_path):
    """It is not opened, whatever it is."""
    path = sharded(tiny("wan"), part, tmp_path, names)
    with pytest.raises(ValueError, match=rf"^model {path}/{part}: .*\.index\.json ") as error:
        part_of(tiny("wan"), part, path)
    assert says in str(error.value) and not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_an_index_that_names_what_is_there_or_is_not(part, tmp_path):
    """One that names what was not downloaded stands beside variants that were."""
    there, gone = ["a.safetensors", "b.safetensors"], ["a.safetensors", "d.safetensors"]
    assert part_of(tiny("wan"), part, sharded(tiny("wan"), part, tmp_path / "there", there))
    path = sharded(tiny("wan"), part, tmp_path / "gone", gone)
    with pytest.raises(ValueError, match=f"^model {path}/{part}: weights cannot be read") as error:
        part_of(tiny("wan"), part, path)
    assert "\n" not in str(error.value)
    (whole,) = (tiny("wan").path / part).glob("*.safetensors")
    shutil.copy(whole, path / part / whole.name.replace(".safe", ".fp16.safe"))
    for file in (path / part).glob("?.safetensors"):
        file.unlink()
    assert part_of(tiny("wan"), part, path)


@pytest.mark.parametrize("text", ["{}", "[]", '{"weight_map": 5}', "{", "[" * 100_000])
def test_an_index_that_is_none(text, tmp_path, capsys):
    path = sharded(tiny("wan"), "text_encoder", tmp_path, ["a.safetensors", "b.safetensors"])
    (index,) = (path / "text_encoder").glob("*.index.json")
    index.write_text(text)
    given = {"family": "wan", "model": path, "output_dir": tmp_path / "clips", "prompts": "a"}
    given |= {"num_frames": 1, "height": 32, "width": 48, "device": "cpu"}
    assert f"{index.name} is damaged, expected a weight_map" in fails(
        capsys, "sample", *arguments(given)
    )


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_cases_of_git_lfs_pointers_in_a_model(part, tmp_path):
    """DALI#1872: a folder that was cloned without git-lfs."""
    path = shutil.copytree(tiny("wan").path, tmp_path / "model")
    (*_, file) = sorted(p for p in (path / part).iterdir() if p.suffix in (".safetensors", ".json"))
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match=rf"{file.name} is a git-lfs pointer, run git lfs pull"):
        part_of(tiny("wan"), "text_encoder" if part == "tokenizer" else part, path)


@pytest.mark.parametrize(
    "error", [MemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_a_part_that_fits_no_memory_is_not_a_damaged_one(error, monkeypatch):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("transformers.UMT5EncoderModel.from_pretrained", full)
    with pytest.raises(type(error)) as raised:
        part_of(tiny("wan"), "text_encoder", tiny("wan").path)
    assert raised.value is error
