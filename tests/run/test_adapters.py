"""Adapter files by other tools, or broken: loaded as they say, or refused in one line."""

from __future__ import annotations

import json

import peft
import pytest
from commands import BASE, fails
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import adapt

from fastpref.models import toy
from fastpref.run import adapters, artifact

CONFIG = {
    "model": str(BASE), "objective": "dpo", "beta": 1.0, "beta_convention": "half_mean",
    "tuning": "lora", "data": "pairs", "timestep_range": (0, 1), "max_train_steps": 1,
    "train_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An adapter of rank 4 on the shipped base."""
    model = toy.load(BASE)
    adapt(model, toy.LORA_TARGETS)
    return artifact.export(tmp_path_factory.mktemp("lora"), model)


def said(exported, path, **change):
    """The same adapter with other metadata."""
    with safe_open(exported, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    metadata |= {f"transformer.{name}": value for name, value in change.items()}
    metadata = {"lora_adapter_metadata": json.dumps(metadata)}
    save_file(load_file(exported), path, metadata=metadata)
    return path


def test_rank_stabilised_scaling_is_kept(exported, tmp_path):
    for change, scaling in (({}, 1.0), ({"use_rslora": True}, 2.0)):  # 4 / 4, 4 / sqrt(4)
        model = adapters.load_lora(said(exported, tmp_path / "a", **change), toy.load(BASE))
        layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        assert {layer.scaling["default"] for layer in layers} == {scaling}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "use_dora: only plain LoRA is supported"),
        ({"lora_alpha": float("nan")}, "expected finite alphas, got nan"),
        ({"lora_alpha": 10**400}, "int too large"),
        ({"lora_alpha": "four"}, "must be real number, not str"),
        ({"alpha_pattern": {"blocks.0.attn1.to_q": float("inf")}}, "finite alphas, got inf"),
        ({"alpha_pattern": {"(": 4}}, "alpha_pattern '(': expected names of layers"),
        ({"alpha_pattern": [1]}, "alpha_pattern: expected a JSON object, got [1]"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA': only plain LoRA is read"),
        ({"init_lora_weights": "pissa_niter_4"}, "fits a base whose weights it changed"),
        ({"init_lora_weights": "lora_ga"}, "fits a base whose weights it changed"),
    ],
)
def test_settings_that_cannot_be_are_one_line(change, says, exported, tmp_path):
    with pytest.raises(ValueError, match="expected a LoRA file of WanTransformer3D") as error:
        adapters.load_lora(said(exported, tmp_path / "a", **change), toy.load(BASE))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_adapter_that_is_a_git_lfs_pointer(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match=r"a.safetensors: is a git-lfs pointer, not the file"):
        adapters.load_lora(path, toy.load(BASE))


@pytest.mark.parametrize("name", ["", "nope", "nope.safetensors"])
def test_an_adapter_that_is_not_there(name, tmp_path, capsys):
    where = ["--family", "toy", "--model", str(BASE), "--format", "diffusers"]
    where += ["--output", str(tmp_path / "out.safetensors"), "--lora", str(tmp_path / name)]
    line = fails(capsys, "export", *where)
    assert "no such file; expected a run's folder, or its adapter file" in line


@pytest.mark.parametrize("model, linked", [(str(BASE), False), ("owner/name", True)])
def test_a_card_links_to_a_model_of_the_hub_only(model, linked):
    card = artifact.model_card(CONFIG | {"model": model}, "lora.safetensors", "0", 1)
    assert (f"---\nbase_model: {model}\n" in card) == linked and f"| base model | {model} |" in card
    assert card.startswith("---\n")
