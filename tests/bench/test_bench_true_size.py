"""Whole runs at true size: what is made is what is published, and the command itself, tiny."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import true_size
from bench.random_weights import SIZES


def parameters(library: str, name: str, config: dict) -> int:
    kind = getattr(pytest.importorskip(library), name)
    with torch.device("meta"):
        made = kind.config_class(**config) if library == "transformers" else config
        model = kind(made) if library == "transformers" else kind.from_config(made)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "vae", "texts", "model"),
    [
        ("wan", 126.89e6, [5.681e9], 1.419e9),
        ("cogvideox-2b", 215.58e6, [4.762e9], 1.694e9),
        ("sd15", 83.65e6, [123.06e6], 859.5e6),
        ("sdxl", 83.65e6, [123.06e6, 694.66e6], 2567.5e6),
    ],
)
def test_parts_have_as_many_parameters_as_the_published_ones(name, vae, texts, model):
    size = SIZES[name]
    known = size.architecture
    assert parameters("diffusers", *size.vae) == pytest.approx(vae, rel=1e-3)
    found = [parameters("transformers", *text) for text in size.texts.values()]
    assert found == pytest.approx(texts, rel=1e-3)
    assert parameters("diffusers", known.kind, known.config) == pytest.approx(model, rel=1e-3)


@pytest.mark.slow
def test_a_whole_run_and_an_adapter_that_is_not_whole(tmp_path, capfd):
    """Six processes as a user starts them; the last one tells a lost or a changed tensor."""
    folder, rows = tmp_path / "all", tmp_path / "rows.jsonl"
    flags = ["--family", "tiny", "--device", "cpu", "--folder", str(folder)]
    true_size.main([*flags, "--output", str(rows)])
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    stages = [row["stage"] for row in found]
    assert stages == ["make", "encode", "train, 3 steps", "resume, to 5", "spo, 2 steps", "load"]
    assert all(row["seconds"] > 0 and 0.1 < row["peak_gb"] < 4 for row in found)
    assert found[3]["s_per_pair"] > 0 and found[3]["margin_noise"] == 0
    assert json.loads((folder / "run" / "result.json").read_text())["global_step"] == 5
    said = capfd.readouterr().out
    assert "resumed from" in said and "64 adapter tensors in WanPipeline" in said

    with pytest.raises(SystemExit):
        true_size.main(flags)
    assert "expected a new or an empty one" in capfd.readouterr().err
    path = folder / "run" / "pytorch_lora_weights.safetensors"
    values = load_file(path)
    name = next(iter(values))
    for change, says in (
        ({name: values[name] + 1, "transformer.blocks.9.attn1.to_q.lora_A.weight": values[name]},
         "are not in both"),
        ({n: torch.zeros_like(v) for n, v in values.items()}, "changes nothing"),
    ):  # fmt: skip
        save_file(values | change, path)
        with pytest.raises(RuntimeError, match=says):
            true_size.main([*flags, "--stage", "load"])
