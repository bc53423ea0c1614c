"""Whole runs in every mode of the step: the same training as the plain one."""

import copy
import json
import os
import shutil
import signal
import time

import pytest
import torch
from commands import arguments, command, options
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastpref import models
from fastpref.cli import main
from fastpref.pairs.dataset import PairDataset
from fastpref.run.assemble import cache_mark, noising
from fastpref.run.caching import cache_reference
from fastpref.run.config import Config
from fastpref.run.parts import load_model, make_process, weights_dtype
from fastpref.run.train import train
from fastpref.step import cache

ARTIFACT = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def pairs(encoded_pairs):
    return encoded_pairs


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def errors_in(folder):
    """{(pair, draw): errors} of a cache's files, equal where a draw stands in two of them."""
    found = {}
    for file in folder.glob("errors-*"):
        part = load_file(file)
        columns = (part[name].tolist() for name in ("pair_id", "index", "errors"))
        for pair, index, errors in zip(*columns, strict=True):
            assert found.setdefault((pair, index), errors) == errors
    return found


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
        tables.append(errors_in(folder))
    assert "graphs: the reference pass runs without CUDA graphs" in capsys.readouterr().err
    assert len(tables[0]) == 12 and tables[0] == tables[1]


@pytest.mark.parametrize("mode", ["joint", "deferred"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_run_fills_its_cache_as_it_goes(size, mode, pairs, tmp_path, capsys):
    """Bit for bit the run that was filled ahead, and while draws are new the online one. Batches of
    four leave two of the six pairs over in each epoch.
    """
    change = {"pair_mode": mode, "draws_per_pair": 2, "prompt_dropout": 0.3}
    change |= {"train_batch_size": size, "max_train_steps": 5 * (6 // size)}
    caches = {name: tmp_path / f"cache-{name}" for name in ("ahead", "through")}
    for name, where in caches.items():
        own = {"reference": "cached", "reference_cache": str(where), **change}
        flags = arguments(options(pairs, tmp_path / name, **own))
        if name == "ahead":
            assert main(["cache-reference", *flags]) == 0
            assert f"{where}: 12 errors computed" in capsys.readouterr().out
        assert main(["train", *flags]) == 0
        said = capsys.readouterr()
        assert "reference  cached, margin noise" in said.out and "differ by" not in said.err
        known = 12 if name == "ahead" else 0
        assert f"cache      {where}, {known} of 12 errors are there" in said.out
    ahead, through = (load_file(tmp_path / name / ARTIFACT) for name in caches)
    assert all(torch.equal(ahead[key], through[key]) for key in ahead)
    through = errors_in(caches["through"])
    assert errors_in(caches["ahead"]).items() >= through.items() and len(through) >= 8
    shares = {
        name: [row["perf/reference_cached"] for row in rows(tmp_path / name)] for name in caches
    }
    epoch = 6 // size
    assert shares["ahead"] == [1.0] * 5 * epoch
    beyond = shares["through"][2 * epoch :]  # what was left over is computed there, once
    assert shares["through"][: 2 * epoch] == [0.0] * 2 * epoch and set(beyond) <= {0.0, 1.0}
    assert beyond[-1] == 1.0 if size == 4 else beyond == [1.0] * 3 * epoch
    train(Config(**options(pairs, tmp_path / "online", **change)))
    seen = [
        [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows(folder)]
        for folder in (tmp_path / "online", tmp_path / "ahead", tmp_path / "through")
    ]
    assert all(each[: 2 * epoch] == seen[0][: 2 * epoch] for each in seen)
    assert_close(tmp_path / "through", tmp_path / "online")


def test_a_cache_serves_what_it_fits_and_is_checked(pairs, tmp_path, capsys, monkeypatch):
    folder, other = tmp_path / "set", tmp_path / "doctored"
    shutil.copytree(pairs, folder)
    change = {"draws_per_pair": 2, "reference": "cached"}
    train(Config(**options(folder, tmp_path / "first", **change)))
    # A cache of a reference that is not this one: the margins move by beta/2 of the difference.
    shutil.copytree(folder, other)
    for file in (other / "reference").glob("errors-*"):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        values = load_file(file)
        values["errors"][..., 0] += 1e-2
        save_file(values, file, metadata=metadata | {"content": cache._sum(values)})
    assert "differ by" not in capsys.readouterr().err
    train(Config(**options(other, tmp_path / "drifted", **change, max_train_steps=1)))
    assert "cached and online margins differ by 5, expected at most" in capsys.readouterr().err
    # Nothing has to be written where all is there.
    access = os.access
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda p, how: "reference" not in str(p) and access(p, how))
        train(Config(**options(folder, tmp_path / "read", beta=5.0, **change)))
        shutil.rmtree(folder / "reference")
        assert main(["train", *arguments(options(folder, tmp_path / "lost", **change))]) == 1
        said = capsys.readouterr().err
        assert "reference, 0 of 12 errors are there, and nothing can be written there: make" in said
    train(Config(**options(folder, tmp_path / "again", **change)))
    # Other objectives and betas read the same cache; another seed does not fit it.
    train(Config(**options(folder, tmp_path / "other", objective="sdpo", beta=300.0, **change)))
    assert [row["perf/reference_cached"] for row in rows(tmp_path / "other")] == [1.0] * 6
    assert main(["train", *arguments(options(folder, tmp_path / "seed", seed=1, **change))]) == 1
    assert "filled with another seed (0 there, 1 here)" in capsys.readouterr().err


def test_a_run_that_goes_on_keeps_its_own_attention(pairs, tmp_path, capsys):
    """Also where its cache, which says the same, is gone."""
    change = {"reference": "cached", "reference_cache": str(tmp_path / "cache")}
    train(Config(**options(pairs, tmp_path / "run", max_train_steps=2, **change)))
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "run" / "attention.json").write_text('{"attention": "flash"}')
    flags = arguments(options(pairs, tmp_path / "run", max_train_steps=4, **change))
    assert main(["train", *flags]) == 1
    assert "attention flash: needs an NVIDIA GPU" in capsys.readouterr().err


def test_a_new_run_takes_the_attention_of_its_cache(pairs, tmp_path, capsys):
    change = {"reference": "cached", "reference_cache": str(tmp_path / "cache")}
    train(Config(**options(pairs, tmp_path / "run", max_train_steps=1, **change)))
    mark = tmp_path / "cache" / "fingerprint.json"
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"attention": "flash"}))
    assert main(["train", *arguments(options(pairs, tmp_path / "new", **change))]) == 1
    assert "attention flash: needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_runs_that_share_a_cache_keep_what_they_computed(pairs, tmp_path):
    """Two at once, of two objectives, killed at some step and started again: each is the unbroken
    run with an online reference, and a third finds every error.
    """
    shared = {"draws_per_pair": 2, "max_train_steps": 12, "checkpointing_steps": 1}
    kinds = {"dpo": {"objective": "dpo"}, "dmpo": {"objective": "dmpo"}}
    cached = {"reference": "cached", "reference_cache": str(tmp_path / "cache")}
    flags = {
        name: arguments(options(pairs, tmp_path / name, **shared, **cached, **kind))
        for name, kind in kinds.items()
    }
    for kill in (True, False):
        running = {name: command("train", *own) for name, own in flags.items()}
        # Each where it is: beside a slow start of one the other may come to its end.
        waiting, end = dict(running) if kill else {}, time.time() + 300
        while waiting:
            for name, process in list(waiting.items()):
                assert process.poll() is None and time.time() < end, process.communicate()
                if list((tmp_path / name).glob("checkpoint-[4-9]")):
                    waiting.pop(name).kill()
            time.sleep(0.01)
        for process in running.values():
            said = process.communicate()
            assert process.returncode == (-signal.SIGKILL if kill else 0), said
    for name, kind in kinds.items():
        train(Config(**options(pairs, tmp_path / f"whole-{name}", **shared, **cached, **kind)))
        assert all(row["perf/reference_cached"] == 1 for row in rows(tmp_path / f"whole-{name}"))
        a, b = (load_file(tmp_path / f / ARTIFACT) for f in (name, f"whole-{name}"))
        assert all(torch.equal(a[key], b[key]) for key in a)
        train(Config(**options(pairs, tmp_path / f"online-{name}", **shared, **kind)))
        assert_close(tmp_path / name, tmp_path / f"online-{name}")
    assert len(errors_in(tmp_path / "cache")) == 12


def test_a_cache_knows_which_run_it_is_of(pairs, tmp_path):
    """Every option that decides the reference's errors, and no other, is in the fingerprint."""

    def mark(device="cpu", dtype=torch.float32, backend="native", **change):
        config = Config(**options(pairs, tmp_path, reference="cached", **change))
        process = make_process(models.family("toy"), config.model, **noising(config))
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


def test_full_tuning_needs_a_second_copy_until_the_cache_is_filled(
    pairs, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "set"
    shutil.copytree(pairs, folder)
    change = {"tuning": "full", "lora_rank": None, "draws_per_pair": 2, "learning_rate": 1e-4}
    change["max_train_steps"] = 9  # three epochs
    train(Config(**options(folder, tmp_path / "copy", **change)))
    change["reference"] = "cached"
    copies, real = [], copy.deepcopy
    monkeypatch.setattr(copy, "deepcopy", lambda x, *a: copies.append(type(x)) or real(x, *a))
    for name, count in (("first", 1), ("second", 0)):
        copies.clear()
        train(Config(**options(folder, tmp_path / name, **change)))
        assert copies.count(WanTransformer3DModel) == count
    assert "differ by" not in capsys.readouterr().err
    name = "transformer/diffusion_pytorch_model.safetensors"
    a, b, c = (load_file(tmp_path / f / name) for f in ("first", "second", "copy"))
    for key in a:
        assert torch.equal(a[key], b[key])
        torch.testing.assert_close(a[key], c[key], rtol=1e-3, atol=1e-5)
    # A longer run needs what is not there again: errors of the trained model are never kept.
    kept = folder / "reference"
    shutil.rmtree(kept)
    copies.clear()
    train(Config(**options(folder, tmp_path / "second", **change | {"max_train_steps": 11})))
    assert copies.count(WanTransformer3DModel) == 1
    again = errors_in(kept)
    shutil.rmtree(kept)
    cache_reference(Config(**options(folder, tmp_path / "fill", **change)))
    assert errors_in(kept).items() >= again.items() and again


def test_a_cache_knows_what_the_weights_are_kept_in(pairs, tmp_path):
    """Under autocast to bf16 full tuning keeps float32 weights: other errors than LoRA's."""
    family, device, marks = models.family("toy"), torch.device("cpu"), {}
    for precision, dtype in (("bf16", torch.bfloat16), ("no", torch.float32)):
        for change in ({"tuning": "lora"}, {"tuning": "full", "lora_rank": None}):
            change |= {"mixed_precision": precision, "reference": "cached"}
            config = Config(**options(pairs, tmp_path, **change))
            process = make_process(family, config.model, **noising(config))
            mark = cache_mark(config, PairDataset(pairs), process, device, dtype, "native")
            kept = weights_dtype(config.tuning, dtype)
            model = load_model(family, config.model, device, kept)
            assert str(model.blocks[0].attn1.to_q.weight.dtype) == f"torch.{mark['weights_dtype']}"
            marks[precision, config.tuning] = mark
    lora, full = marks["bf16", "lora"], marks["bf16", "full"]
    assert [k for k in lora if lora[k] != full[k]] == ["weights_dtype"]
    assert marks["no", "lora"] == marks["no", "full"]


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
