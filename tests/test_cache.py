"""The reference errors on disk: filled, looked up in a step, refused, resumed after kill -9."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from functools import partial
from types import SimpleNamespace

import memory
import pytest
import torch
from memory import K, Pairs, prepare
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import DPO, STEPS, case, distance, gradients, plain, run

import fastpref
from fastpref import cache, data, reference


def kind(path, c, **changes):
    """A fingerprint; the files it looks at are made where they are missing."""
    path.mkdir(parents=True, exist_ok=True)
    for name in ("index.parquet", "fingerprint.json"):
        if not (path / name).exists():
            (path / name).write_text("something")
    values = {
        "model": path, "data": path, "process": c.process, "seed": 11, "draws_per_pair": K,
        "batch_size": 2, "pair_mode": "joint", "compile": None, "attention": "native",
        "device": "cpu", "dtype": "float32", "weights_dtype": "float32", "prompt_dropout": 0.0,
    }  # fmt: skip
    return cache.fingerprint(**{**values, **changes})


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """(case, dataset, reference, folder of the cache, its fingerprint), filled in joint mode."""
    c, dataset = case("wan"), Pairs()
    ref = reference.adapters_off(c.model, c.family.predict)
    folder = tmp_path_factory.mktemp("cache")
    mark = kind(folder / "data", c)
    how = {"batch_size": 2, "draws_per_pair": K}
    count = cache.fill(folder / "a", ref, c.process, dataset, prepare, mark, **how)
    assert count == 7 and dataset.loaded == 8  # the only long pair fills its batch with itself
    return c, dataset, ref, folder / "a", mark


def test_what_was_filled_is_what_a_step_would_compute(filled):
    """Looked up in another order and in other batches, winners first."""
    c, dataset, ref, folder, mark = filled
    read = cache.cached(folder, mark, dataset.pair_ids)
    for rows, k in (([4, 0], 2), ([6, 1], 0)):
        batch, draws = prepare(k, data.collate([dataset[i] for i in rows]))
        found = read(None, None, None, draws)
        noisy, t, target = c.process.noise(batch.latents, draws)
        wanted = fastpref.pair_error(ref(noisy, t, batch.cond), target)
        assert found.dtype == torch.float64 and distance(found, wanted) < 1e-6
    # In the very batch it was filled in, to the bit.
    batch, draws = prepare(1, data.collate([dataset[0], dataset[1]]))
    assert torch.equal(
        read(None, None, None, draws), reference.errors(ref, c.process, batch, draws, "joint")
    )


@pytest.mark.parametrize("form", STEPS)
def test_a_step_with_the_cache_is_the_step_with_the_reference(filled, tmp_path, form):
    c, dataset, ref, _, _ = filled
    mark = kind(tmp_path / "data", c, pair_mode=form)
    how = {"batch_size": 2, "draws_per_pair": K, "pair_mode": form}
    cache.fill(tmp_path / "b", ref, c.process, dataset, prepare, mark, **how)
    read = cache.cached(tmp_path / "b", mark, dataset.pair_ids)
    batch, draws = prepare(0, data.collate([dataset[0], dataset[1]]))
    c = c._replace(latents=batch.latents, cond=batch.cond, draws=draws)
    online, wanted = run(c, form, c.policy, ref)
    out, gradient = run(c, form, c.policy, read)
    assert torch.equal(out.ref_err, online.ref_err) and torch.equal(out.loss, online.loss)
    assert torch.equal(gradient, wanted)
    assert distance(out.err, plain(c, DPO)[1]) < 1e-5
    gradients(c.parameters)


def test_ranks_share_the_work_and_a_second_call_has_none(filled, tmp_path):
    c, dataset, ref, folder, mark = filled
    how = {"batch_size": 2, "draws_per_pair": K, "world": 2}
    counts = [
        cache.fill(tmp_path, ref, c.process, dataset, prepare, mark, rank=r, **how) for r in (1, 0)
    ]
    assert counts == [3, 4] and len(list(tmp_path.glob("errors-*"))) == 4
    assert cache.fill(tmp_path, ref, c.process, dataset, prepare, mark, rank=0, **how) == 0
    tables = []
    for where in (folder, tmp_path):
        read = cache.cached(where, mark, dataset.pair_ids)
        ids = torch.tensor(dataset.pair_ids)
        every = [fastpref.Draws(11, ids, torch.full_like(ids, k)) for k in range(K)]
        tables.append(torch.stack([read(None, None, None, draws) for draws in every]))
    assert torch.equal(*tables) and tables[0].isfinite().all()
    names = [sorted(file.name for file in where.glob("errors-*")) for where in (folder, tmp_path)]
    assert names[0] == names[1], "another number of ranks goes on with the same files"
    beyond = fastpref.Draws(11, torch.tensor([5, ids[0]]), torch.tensor([0, K]))
    assert read(None, None, None, beyond).isnan().all()


@pytest.mark.parametrize(
    ("batches", "sizes"),
    [(1, {1}), (64, {1}), (127, {1}), (128, {2}), (129, {2, 1}), (1024, {16}), (5000, {16, 8})],
)
def test_files_are_many_enough_for_ranks_and_small_enough_to_lose(batches, sizes):
    """64 of them where there are as many batches; 16 batches each at most."""
    rows = 2 * batches
    chunks = cache._chunks(["8x8"] * rows, 2)
    assert [row for chunk in chunks for batch in chunk for row in batch] == list(range(rows))
    assert {len(chunk) for chunk in chunks} == sizes and len(chunks) >= min(batches, 64)


def test_another_torch_and_another_process_are_named(filled, monkeypatch):
    """Also where every field of the other process has the same value."""
    c, dataset, _, folder, mark = filled
    where = folder.parent / "data"

    class Other(fastpref.FlowMatching):
        pass

    process = Other(**{f.name: getattr(c.process, f.name) for f in fields(c.process)})
    marks = {"process": kind(where, c, process=process)}
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    marks["torch"] = kind(where, c)
    for field, other in marks.items():
        assert [k for k in mark if mark[k] != other[k]] == [field]
        with pytest.raises(ValueError, match=rf"filled with another {field} \(.* there, "):
            cache.cached(folder, other, dataset.pair_ids)


def test_another_objectives_grid_fits_and_anything_else_is_named(filled, tmp_path):
    c, dataset, ref, folder, _ = filled
    where = folder.parent / "data"
    same = kind(where, c, process=c.process.replace(importance_steps=5))
    assert cache.cached(folder, same, dataset.pair_ids)
    changes = {
        "model": "another/model", "seed": 12, "draws_per_pair": 4, "batch_size": 1,
        "pair_mode": "deferred", "compile": "blocks", "attention": "cudnn", "device": "cuda",
        "dtype": "bfloat16", "weights_dtype": "bfloat16", "prompt_dropout": 0.1,
    }  # fmt: skip
    changed = {**changes, "process": c.process.replace(strata=K)}
    named = {"batch_size": "train_batch_size", "process": "process.strata"}
    for field, value in changed.items():
        other = kind(where, c, **{field: value})
        for use in (
            lambda other=other: cache.cached(folder, other, dataset.pair_ids),
            lambda other=other: cache.fill(
                folder, ref, c.process, dataset, prepare, other, batch_size=2, draws_per_pair=K
            ),
        ):
            with pytest.raises(
                ValueError, match=rf"another {named.get(field, field)} \(.* there, "
            ):
                use()
    (where / "index.parquet").write_text("other pairs")
    with pytest.raises(ValueError, match=r"filled with another data \("):
        cache.cached(folder, kind(where, c), dataset.pair_ids)
    (where / "index.parquet").write_text("something")
    (where / "fingerprint.json").write_text("other encoders")
    with pytest.raises(ValueError, match=r"filled with another .*encoding \("):
        cache.cached(folder, kind(where, c), dataset.pair_ids)
    (where / "fingerprint.json").write_text("something")
    flow = {"timestep_range": (0.1, 1.0), "shift": 2.0, "time_sampling": "logit_normal"}
    for field, value in flow.items():
        other = kind(where, c, process=c.process.replace(**{field: value}))
        with pytest.raises(ValueError, match=rf"another process.{field} \("):
            cache.cached(folder, other, dataset.pair_ids)
    table = torch.linspace(0.9, 0.1, 10, dtype=torch.float64)
    ddpm = [fastpref.Diffusion(alphas_cumprod=t, importance_steps=5) for t in (table, table * 0.9)]
    a, b = (kind(where, c, process=p) for p in ddpm)
    assert [k for k in a if a[k] != b[k]] == ["process.alphas_cumprod"]
    b = kind(where, c, process=ddpm[0].replace(prediction_type="v_prediction"))
    assert [k for k in a if a[k] != b[k]] == ["process.prediction_type"]


def test_an_incomplete_or_damaged_cache_is_one_line(filled, tmp_path):
    c, dataset, _, folder, mark = filled
    with pytest.raises(ValueError, match="holds no reference errors; run fastpref cache-reference"):
        cache.cached(tmp_path / "nowhere", mark, dataset.pair_ids)
    with pytest.raises(
        ValueError, match=r"lacks 1 pairs of the data \(the first is 00000000000000"
    ):
        cache.cached(folder, mark, [*dataset.pair_ids, 255])
    file = tmp_path / "errors-000000.safetensors"
    (tmp_path / "fingerprint.json").write_text(json.dumps(mark))
    file.write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"errors-000000.safetensors: cannot be used .*delete it"):
        cache.cached(tmp_path, mark, dataset.pair_ids)
    (tmp_path / "fingerprint.json").write_text("{")
    with pytest.raises(ValueError, match=r"fingerprint.json: is not readable"):
        cache.cached(tmp_path, mark, dataset.pair_ids)

    def broken(noisy, t, cond, draws):
        return torch.full_like(noisy, torch.nan)

    with pytest.raises(ValueError, match=f"pair {dataset.pair_ids[0]:016x} is not finite"):
        cache.fill(
            tmp_path / "new", broken, c.process, dataset, prepare, mark, batch_size=2,
            draws_per_pair=K,
        )  # fmt: skip
    assert not list((tmp_path / "new").glob("errors-*"))


def test_a_file_of_other_values_is_never_taken(filled, tmp_path):
    """Filled under a fingerprint that is gone, cut in draws or in rows, or no numbers."""
    c, dataset, ref, folder, mark = filled
    whole = load_file(folder / "errors-000000.safetensors")
    with safe_open(folder / "errors-000000.safetensors", "pt") as file:
        own = file.metadata()
    errors = whole["errors"]
    hole = torch.where(errors == errors[1, 1, 0], torch.nan, errors)
    cases = [
        ({"fingerprint": "0"}, errors, "filled with other values than fingerprint.json says"),
        (None, errors, "filled with other values"),
        (own, errors[:, :1], r"expected float64 \[2, 3, 2\], got \[2, 1, 2\]"),
        (own, errors[1:], r"expected float64 \[2, 3, 2\], got \[1, 3, 2\]"),
        (own, hole, "an error is not finite"),
    ]
    (tmp_path / "fingerprint.json").write_text(json.dumps(mark))
    how = {"batch_size": 2, "draws_per_pair": K}
    for metadata, table, why in cases:
        values = {"pair_id": whole["pair_id"], "errors": table.contiguous()}
        save_file(values, tmp_path / "errors-000000.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match=f"errors-000000.safetensors: cannot be used .*{why}"):
            cache.cached(tmp_path, mark, dataset.pair_ids)
        with pytest.raises(ValueError, match=why):
            cache.fill(tmp_path, ref, c.process, dataset, prepare, mark, **how)


def test_drift_is_half_beta_times_the_change_of_the_difference():
    """Of errors w, l kept as w + a, l + b: beta/2 |a - b|, the largest over the pairs."""
    draws = fastpref.Draws(0, torch.arange(2), torch.zeros(2, dtype=torch.int64))
    batch = data.Batch(torch.zeros(4, 1), {}, torch.ones(2), draws.pair_id, [])
    process = SimpleNamespace(noise=lambda latents, draws: (latents, None, None))

    def says(*errors):
        return lambda noisy, t, cond, draws=None: torch.tensor(errors, dtype=torch.float64)

    limits = {"pair_mode": "joint", "beta": 10.0, "margin_noise": 0.1}
    kept, now = says(1.0, 2.0, 4.0, 8.0), says(1.0, 2.75, 4.0, 8.25)
    worst, allowed = cache.drift(kept, now, process, [(batch, draws)], **limits)
    assert worst == pytest.approx(5 * 0.5) and allowed == 0.2


@pytest.mark.parametrize("form", STEPS)
def test_drift_of_a_changed_reference_is_reported(filled, tmp_path, capfd, form):
    c, dataset, ref, _, _ = filled
    mark = kind(tmp_path / "data", c, pair_mode=form)
    how = {"batch_size": 2, "draws_per_pair": K, "pair_mode": form}
    cache.fill(tmp_path / "b", ref, c.process, dataset, prepare, mark, **how)
    read = cache.cached(tmp_path / "b", mark, dataset.pair_ids)

    def batches():
        rows = [[0, 1], [3, 4]]
        return [prepare(k, data.collate([dataset[i] for i in r])) for k, r in enumerate(rows)]

    limits = {"pair_mode": form, "beta": 500.0, "margin_noise": 0.0}
    worst, allowed = cache.drift(read, ref, c.process, batches(), **limits)
    assert worst == 0 and allowed == 500e-6 and not capfd.readouterr().err

    def shifted(noisy, t, cond, draws=None):
        return ref(noisy, t, cond, draws) + 1e-4 * noisy

    worst, _ = cache.drift(read, shifted, c.process, batches(), **limits)
    said = capfd.readouterr().err
    assert worst > allowed and said.count("\n") == 1
    assert f"cached and online margins differ by {worst:.3g}, expected at most 0.0005" in said
    assert "delete the cache's folder (or name another reference_cache), then run" in said
    limits["margin_noise"] = worst
    assert cache.drift(read, shifted, c.process, batches(), **limits)[1] == 2 * worst
    assert not capfd.readouterr().err
    # The advice: the files that are there are kept as they are, so the folder has to go.
    limits["margin_noise"], fill = 0.0, partial(cache.fill, tmp_path / "b", shifted, c.process)
    assert fill(dataset, prepare, mark, **how) == 0
    shutil.rmtree(tmp_path / "b")
    assert fill(dataset, prepare, mark, **how) == 7
    read = cache.cached(tmp_path / "b", mark, dataset.pair_ids)
    assert cache.drift(read, shifted, c.process, batches(), **limits)[0] == 0
    assert not capfd.readouterr().err.count("warning")


def test_killed_and_started_again_it_goes_on(tmp_path):
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    script = [sys.executable, memory.__file__, str(broken), "0.2"]
    process = subprocess.Popen(script, stderr=subprocess.PIPE, text=True)
    end = time.time() + 120
    while len(list(broken.glob("errors-*.safetensors"))) < 2:
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = len(list(broken.glob("errors-*.safetensors")))
    assert left in (2, 3) and memory.fill(broken, 0) == 7 - 2 * left
    assert memory.fill(whole, 0) == 7
    names = sorted(file.name for file in whole.glob("errors-*.safetensors"))
    assert names == sorted(file.name for file in broken.glob("errors-*.safetensors"))
    for name in names:
        a, b = load_file(whole / name), load_file(broken / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
