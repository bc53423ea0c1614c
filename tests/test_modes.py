"""Whole runs in every mode of the step: the same training as the plain one."""

import json
import shutil
import subprocess
import sys
from threading import Timer

import pytest
import torch
from pairs import arguments, options
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastpref import models
from fastpref.assemble import cache_mark, cache_reference, load_model, make_process, wait_for
from fastpref.cli import main
from fastpref.config import Config
from fastpref.data import PairDataset
from fastpref.train import train


@pytest.fixture(scope="module")
def pairs(encoded_pairs):
    return encoded_pairs


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_close(folder, plain):
    a, b = (load_file(f / "pytorch_lora_weights.safetensors") for f in (folder, plain))
    change = sum((a[k] - b[k]).square().sum() for k in a).sqrt()
    assert a.keys() == b.keys() and change < 1e-3 * sum(v.square().sum() for v in b.values()).sqrt()


@pytest.mark.parametrize("objective", ["dpo", "dpo_cm", "sft"])
def test_deferred_trains_as_joint(objective, pairs, tmp_path):
    change = {"objective": objective, "gradient_accumulation_steps": 2, "max_train_steps": 3}
    change |= {"beta": None} if objective == "sft" else {"max_grad_norm": 1e-3}
    for mode in ("joint", "deferred"):
        train(Config(**options(pairs, tmp_path / mode, pair_mode=mode, **change)))
    assert_close(tmp_path / "deferred", tmp_path / "joint")
    for a, b in zip(rows(tmp_path / "deferred"), rows(tmp_path / "joint"), strict=True):
        for key in ("loss", "errors/policy_w", "errors/reference_l", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-3), key
        assert objective == "sft" or a["grad_norm"] > 1e-3  # so it was clipped


def test_a_recorded_reference_pass_fills_the_same_cache(pairs, tmp_path, capsys):
    tables = []
    for graphs in (False, True):
        folder = tmp_path / f"cache-{graphs}"
        change = {"reference": "cached", "draws_per_pair": 2, "cuda_graphs": graphs}
        cache_reference(Config(**options(pairs, tmp_path, reference_cache=str(folder), **change)))
        tables.append([load_file(file) for file in sorted(folder.glob("errors-*"))])
    assert "graphs: the reference pass runs without CUDA graphs" in capsys.readouterr().err
    assert len(tables[0]) == 3
    for eager, recorded in zip(*tables, strict=True):
        assert all(torch.equal(eager[name], recorded[name]) for name in ("pair_id", "errors"))


def test_a_rank_waits_for_the_first_ones_pick_of_attention(tmp_path):
    record = tmp_path / "fingerprint.json"
    Timer(0.5, lambda: record.write_text("{}")).start()
    wait_for(record, seconds=30)
    assert record.exists()
    with pytest.raises(ValueError, match="never: rank 0 has not written it"):
        wait_for(tmp_path / "never", seconds=0.1)


@pytest.mark.parametrize("mode", ["joint", "deferred"])
def test_cached_trains_as_online(mode, pairs, tmp_path, capsys):
    folder = tmp_path / "set"
    shutil.copytree(pairs, folder)
    change = {"pair_mode": mode, "draws_per_pair": 2, "prompt_dropout": 0.3}
    train(Config(**options(folder, tmp_path / "online", **change)))
    change["reference"] = "cached"
    flags = arguments(options(folder, tmp_path / "cached", **change))
    assert main(["train", *flags]) == 1
    assert "holds no reference errors; run fastpref cache-reference" in capsys.readouterr().err
    assert main(["cache-reference", *flags]) == 0
    assert "6 pairs computed, 2 draws each" in capsys.readouterr().out
    assert main(["train", *flags]) == 0
    said = capsys.readouterr()
    assert "reference  cached, margin noise" in said.out and "differ by" not in said.err
    assert_close(tmp_path / "cached", tmp_path / "online")
    # A cache of a reference that is not this one: the margins move by beta/2 of the difference.
    other = tmp_path / "doctored"
    shutil.copytree(folder, other)
    for file in (other / "reference").glob("errors-*"):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        values = load_file(file)
        values["errors"][..., 0] += 1e-2
        save_file(values, file, metadata=metadata)
    train(Config(**options(other, tmp_path / "drifted", **change, max_train_steps=1)))
    assert "cached and online margins differ by 5, expected at most" in capsys.readouterr().err
    # Other objectives and betas read the same cache; another seed does not fit it.
    train(Config(**options(folder, tmp_path / "other", objective="sdpo", beta=300.0, **change)))
    assert main(["train", *arguments(options(folder, tmp_path / "seed", seed=1, **change))]) == 1
    assert "filled with another seed (0 there, 1 here)" in capsys.readouterr().err


def test_a_cache_knows_which_run_it_is_of(pairs, tmp_path):
    """Every option that decides the reference's errors, and no other, is in the fingerprint."""

    def mark(device="cpu", dtype=torch.float32, backend="native", **change):
        config = Config(**options(pairs, tmp_path, reference="cached", **change))
        process = make_process(config, models.family("toy"))
        return cache_mark(config, PairDataset(pairs), process, torch.device(device), dtype, backend)

    changes = {
        "seed": 1, "draws_per_pair": 4, "train_batch_size": 1, "pair_mode": "deferred",
        "compile": True, "prompt_dropout": 0.1, "device": "cuda", "dtype": torch.bfloat16,
        "backend": "cudnn", "timestep_range": (0.1, 1.0), "shift": 2.0,
    }  # fmt: skip
    plain, names = mark(), {"backend": "attention"}
    for field, value in changes.items():
        other = mark(**{field: value})
        differ = [k for k in plain if plain[k] != other[k]]
        assert any(names.get(field, field) in k for k in differ), field
    assert "emulate_precision_casts=True" in mark(compile=True)["compile"]
    for field, value in {"beta": 5.0, "lora_rank": 2, "learning_rate": 1.0}.items():
        assert mark(**{field: value}) == plain
    assert mark(objective="sdpo", importance_steps=5) == plain


def test_a_frozen_copy_says_what_adapters_off_say(pairs, tmp_path):
    for mode in ("adapters_off", "frozen_copy"):
        train(Config(**options(pairs, tmp_path / mode, reference=mode, max_train_steps=3)))
    assert_close(tmp_path / "frozen_copy", tmp_path / "adapters_off")
    (first, *_), (other, *_) = (rows(tmp_path / m) for m in ("frozen_copy", "adapters_off"))
    assert first["errors/reference_w"] == other["errors/reference_w"]


def test_full_tuning_needs_no_second_copy_with_a_cache(pairs, tmp_path, capsys):
    folder = tmp_path / "set"
    shutil.copytree(pairs, folder)
    change = {"tuning": "full", "lora_rank": None, "draws_per_pair": 2, "learning_rate": 1e-4}
    train(Config(**options(folder, tmp_path / "copy", max_train_steps=3, **change)))
    change["reference"] = "cached"
    config = Config(**options(folder, tmp_path / "cached", max_train_steps=3, **change))
    assert cache_reference(config)[1] == 6
    train(config)
    assert "differ by" not in capsys.readouterr().err
    name = "transformer/diffusion_pytorch_model.safetensors"
    a, b = (load_file(tmp_path / f / name) for f in ("cached", "copy"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)


def test_a_cache_knows_what_the_weights_are_kept_in(pairs, tmp_path):
    """Under autocast to bf16 full tuning keeps float32 weights: other errors than LoRA's."""
    family, device, marks = models.family("toy"), torch.device("cpu"), {}
    for precision, dtype in (("bf16", torch.bfloat16), ("no", torch.float32)):
        for change in ({"tuning": "lora"}, {"tuning": "full", "lora_rank": None}):
            change |= {"mixed_precision": precision, "reference": "cached"}
            config = Config(**options(pairs, tmp_path, **change))
            process = make_process(config, family)
            mark = cache_mark(config, PairDataset(pairs), process, device, dtype, "native")
            model = load_model(config, family, device, dtype)
            assert str(model.blocks[0].attn1.to_q.weight.dtype) == f"torch.{mark['weights_dtype']}"
            marks[precision, config.tuning] = mark
    lora, full = marks["bf16", "lora"], marks["bf16", "full"]
    assert [k for k in lora if lora[k] != full[k]] == ["weights_dtype"]
    assert marks["no", "lora"] == marks["no", "full"]


def test_ranks_fill_one_cache(pairs, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "set"
    shutil.copytree(pairs, folder)
    change = {"reference": "cached", "draws_per_pair": 1, "train_batch_size": 1}
    flags = arguments(options(folder, tmp_path / "run", **change))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, count in ((1, 3), (0, 3)):
        monkeypatch.setenv("RANK", str(rank))
        assert main(["cache-reference", *flags]) == 0
        assert f"{count} pairs computed" in capsys.readouterr().out
    assert main(["train", *flags]) == 0


@pytest.mark.slow
def test_torchrun_fills_the_cache_of_one_process(pairs, tmp_path, capsys):
    """Two ranks of a real launcher, six batches: the same numbers in the same files, and a run
    reads them.
    """
    ranks, alone = tmp_path / "ranks", tmp_path / "alone"
    change = {"reference": "cached", "draws_per_pair": 2, "train_batch_size": 1}
    flags = {
        where: arguments(options(pairs, tmp_path / "run", reference_cache=str(where), **change))
        for where in (ranks, alone)
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    code = "import sys; from fastpref.cli import main; sys.exit(main())"
    program = [sys.executable, "-c", code, "cache-reference", *flags[ranks]]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", *program], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 pairs computed, 2 draws each") == 2
    assert main(["cache-reference", *flags[alone]]) == 0
    assert "6 pairs computed" in capsys.readouterr().out
    files = [sorted(f.name for f in where.glob("errors-*")) for where in (ranks, alone)]
    assert files[0] == files[1] and len(files[0]) == 6
    for name in files[0]:
        a, b = load_file(ranks / name), load_file(alone / name)
        assert torch.equal(a["pair_id"], b["pair_id"]) and torch.equal(a["errors"], b["errors"])
    assert (ranks / "fingerprint.json").read_bytes() == (alone / "fingerprint.json").read_bytes()
    assert main(["train", *flags[ranks]]) == 0
    assert "differ by" not in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["attention", "full"])
def test_checkpointing_modes_train_alike(mode, pairs, tmp_path):
    for name in ("none", mode):
        train(Config(**options(pairs, tmp_path / name, checkpointing=name, max_train_steps=2)))
    assert_close(tmp_path / mode, tmp_path / "none")


def test_zeros_are_skipped_and_counted(pairs, tmp_path):
    change = {"objective": "dpo_cm", "mask_threshold": 0.995, "train_batch_size": 1}
    for skip in (False, True):
        train(Config(**options(pairs, tmp_path / str(skip), skip_zeros=skip, **change)))
    a, b = rows(tmp_path / "False"), rows(tmp_path / "True")
    shares = [row["zero_gradient"] for row in a]
    assert 0 < sum(shares) < len(shares) and shares == [row["zero_gradient"] for row in b]
    names = [tmp_path / str(s) / "pytorch_lora_weights.safetensors" for s in (False, True)]
    x, y = (load_file(name) for name in names)
    assert all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"reference_cache": "x"}, "reference_cache has no effect with reference auto"),
        ({"skip_zeros": True}, "skip_zeros has no effect with objective dpo"),
        ({"skip_zeros": True, "objective": "sdpo", "sft_weight": 0.1}, "with sft_weight"),
    ],
)
def test_options_without_effect_are_refused(change, says, pairs, tmp_path):
    with pytest.raises(ValueError, match=says):
        Config(**options(pairs, tmp_path, **change))


def test_cache_reference_says_what_it_needs(pairs, tmp_path, capsys):
    assert main(["cache-reference", *arguments(options(pairs, tmp_path))]) == 1
    assert "got reference auto: set reference: cached" in capsys.readouterr().err
