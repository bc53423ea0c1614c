"""The reference errors on disk: filled, looked up in a step, refused, resumed after kill -9."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import memory
import pytest
import torch
from memory import K, Pairs, kind, prepare
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import DPO, STEPS, case, distance, gradients, plain, run

import fastpref
from fastpref.files import TEMPORARY
from fastpref.pairs.dataset import batches, collate
from fastpref.pairs.order import epoch_batches
from fastpref.step import cache, filling, reference

NAMES = ("pair_id", "index", "errors")


def written(folder):
    """{(pair, draw): errors} of the folder's files; no draw stands in two of them."""
    found = {}
    for file in folder.glob("errors-*.safetensors"):
        part = load_file(file)
        for pair, index, errors in zip(*(part[n].tolist() for n in NAMES), strict=True):
            assert (pair, index) not in found
            found[pair, index] = errors
    return found


def lacking(errors, draw):
    return errors.lacking(draw).nonzero().flatten().tolist()


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """(case, dataset, reference, folder of the cache, its fingerprint), filled in joint mode."""
    c, dataset = case("wan"), Pairs()
    ref = reference.adapters_off(c.model, c.family.predict)
    folder = tmp_path_factory.mktemp("cache")
    mark = kind(folder / "data", c)
    errors = cache.ErrorCache(folder / "a", mark, dataset)
    assert filling.fill(errors, ref, c.process, prepare) == 7 * K == len(written(folder / "a"))
    assert dataset.loaded == 8 * K  # the only long pair fills its batch with itself
    return c, dataset, ref, folder / "a", mark


def test_what_was_filled_is_what_a_step_would_compute(filled):
    """Looked up in another order and in other batches, winners first."""
    c, dataset, ref, folder, mark = filled
    errors = cache.ErrorCache(folder, mark, dataset)
    for rows, k in (([4, 0], 2), ([6, 1], 0)):
        batch, draws = prepare(k, collate([dataset[i] for i in rows]))
        found = errors.get(draws)
        noisy, t, target = c.process.noise(batch.latents, draws)
        wanted = fastpref.pair_error(ref(noisy, t, batch.cond), target)
        assert found.dtype == torch.float64 and distance(found, wanted) < 1e-6
    # In the batches of training's epochs to the bit.
    stream = batches(dataset, 2, 11)
    for _ in range(3 * K):
        epoch, batch = next(stream)
        batch, draws = prepare(epoch, batch)
        now = reference.errors(ref, c.process, batch, draws, "joint")
        assert torch.equal(errors.get(draws), now)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_what_fills_no_batch_of_an_epoch_comes_last(count):
    """All batches, in order, then every row that is in none."""
    shapes = ["a", "b", "a", "a", "b", "a", "a", "c"][:count]
    for draw in range(3):
        found = list(epoch_batches(shapes, 2, 5, draw, rest=True))
        every = list(epoch_batches(shapes, 2, 5, draw))
        assert found[: len(every)] == every
        assert sorted(row for rows in found for row in rows) == list(range(count))
        rest = found[len(every) :]
        assert all(len(rows) == 1 for rows in rest) and len({shapes[r] for (r,) in rest}) == len(
            rest
        )


def test_a_cache_gives_what_it_was_given(filled, tmp_path, monkeypatch):
    """At once, and to others after a write; not what is not finite, nor half of a batch."""
    _, dataset, _, _, mark = filled
    errors, a = cache.ErrorCache(tmp_path, mark, dataset), dataset.pair_ids
    draws = fastpref.Draws(11, torch.tensor([a[3], a[0]]), torch.tensor([1, 1]))
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    assert errors.get(draws) is None
    errors.put(draws, values)
    values += 100  # a recorded step's output is overwritten
    assert errors.get(draws).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert not written(tmp_path)
    other = cache.ErrorCache(tmp_path, mark, dataset)
    errors.flush()
    assert written(tmp_path) == {(a[3], 1): [1.0, 3.0], (a[0], 1): [2.0, 4.0]}
    half = fastpref.Draws(11, torch.tensor([a[0], a[1]]), torch.tensor([1, 1]))
    assert errors.get(half) is None and other.get(draws) is None
    # The other's own value of a draw stays; what it has not, it takes. Three is not finite.
    three = fastpref.Draws(11, torch.tensor([a[0], a[1], a[2]]), torch.tensor([1, 1, 1]))
    other.put(three, torch.tensor([9.0, 5.0, 7.0, 8.0, 6.0, torch.inf], dtype=torch.float64))
    assert other.get(half).tolist() == [9.0, 5.0, 8.0, 6.0] and other.get(three) is None
    monkeypatch.setattr(cache, "SECONDS", -1)
    other.put(half, torch.zeros(4, dtype=torch.float64))  # known: nothing changes, and it is time
    assert other.get(half).tolist() == [9.0, 5.0, 8.0, 6.0]
    assert other.get(draws).tolist() == [1.0, 9.0, 3.0, 8.0]
    assert lacking(other, 1) == [2, 4, 5, 6] and lacking(other, 0) == list(range(7))
    again = cache.ErrorCache(tmp_path, mark, dataset)
    assert lacking(again, 1) == [2, 4, 5, 6] and "3 of 21 errors are there" in str(again)


def test_a_write_that_fails_is_a_warning_and_made_up_for(filled, tmp_path, capsys):
    """The errors stay in memory; `fill` says in the end that they are nowhere else."""
    c, dataset, ref, _, mark = filled
    errors = cache.ErrorCache(tmp_path / "here", mark, dataset)
    shutil.rmtree(tmp_path / "here")
    (tmp_path / "here").write_text("in the way")
    draws = fastpref.Draws(11, torch.tensor(dataset.pair_ids[:2]), torch.tensor([0, 0]))
    errors.put(draws, torch.arange(4, dtype=torch.float64))
    assert not errors.flush() and not errors.flush()
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "here/fingerprint.json cannot be written (" in said
    assert errors.get(draws).tolist() == [0, 1, 2, 3]
    with pytest.raises(OSError, match="cannot be written"):
        filling.fill(errors, ref, c.process, prepare)
    (tmp_path / "here").unlink()
    assert errors.flush() and len(written(tmp_path / "here")) == 7 * K


def test_two_that_begin_at_once_agree_on_the_first_ones_values(filled, tmp_path, monkeypatch):
    """Neither sees a fingerprint there; the second one finds the first one's as it writes."""
    _, dataset, _, _, mark = filled
    first = cache.ErrorCache(tmp_path, mark, dataset)
    real, blind = Path.exists, [True, True]  # as it is opened, and as it is to be written

    def exists(path):
        return not (path.name == "fingerprint.json" and blind and blind.pop()) and real(path)

    monkeypatch.setattr(Path, "exists", exists)
    with pytest.raises(ValueError, match=r"filled with another seed \(11 there, 12 here\)"):
        cache.ErrorCache(tmp_path, {**mark, "seed": 12}, dataset)
    assert cache.ErrorCache(tmp_path, mark, dataset).fingerprint == first.fingerprint
    assert [f.name for f in tmp_path.iterdir()] == ["fingerprint.json"]


def test_what_was_just_given_is_waited_for_only_where_it_is_asked_for(
    filled, tmp_path, monkeypatch
):
    """Not by every batch, which on a GPU would be a synchronisation each."""
    c, dataset, ref, _, mark = filled
    errors = cache.ErrorCache(tmp_path, mark, dataset)
    settled, real = [], errors._settle
    monkeypatch.setattr(errors, "_settle", lambda: settled.append(len(errors.waiting)) or real())
    stream = batches(dataset, 2, 11)
    for _ in range(4):  # an epoch, and a batch
        epoch, batch = next(stream)
        batch, draws = prepare(epoch, batch)
        said = filling.look_up(errors, ref, c.process, prepare, epoch, batch, draws)
    assert settled == [] and (errors.asked, errors.found) == (4, 0)
    assert torch.equal(filling.look_up(errors, ref, c.process, prepare, epoch, batch, draws), said)
    assert settled == [4] and errors.share() == 0.2 and errors.asked == 0


def test_a_draw_is_computed_in_its_own_epochs_batch_whenever_it_is(filled, tmp_path):
    """By a reference that looks at the whole batch: what was left over, or lost, and is asked for
    in a later epoch's batch, is what `fill` writes.
    """
    c, dataset, _, _, mark = filled

    def says(noisy, t, cond):
        return noisy * noisy[: len(noisy) // 2].mean()

    ahead, through, late = (
        cache.ErrorCache(tmp_path / name, mark, dataset) for name in ("ahead", "through", "late")
    )
    filling.fill(ahead, says, c.process, prepare)
    stream = batches(dataset, 2, 11)
    for _ in range(3 * 5 * K):
        epoch, batch = next(stream)
        batch, draws = prepare(epoch % K, batch)
        for errors in (through, late)[: 1 + (epoch >= K)]:
            found = filling.look_up(errors, says, c.process, prepare, epoch, batch, draws)
            assert torch.equal(found, ahead.get(draws))


def test_a_file_of_many_rows_is_followed_by_another(filled, tmp_path, monkeypatch):
    _, dataset, _, _, mark = filled
    monkeypatch.setattr(cache, "ROWS", 4)
    errors = cache.ErrorCache(tmp_path, mark, dataset)
    for k in range(K):
        for i in range(3):
            ids = torch.tensor(dataset.pair_ids[2 * i : 2 * i + 2])
            draws = fastpref.Draws(11, ids, torch.full_like(ids, k))
            errors.put(draws, torch.arange(4.0, dtype=torch.float64) + i)
            errors.flush()
            errors.flush()
    sizes = [len(load_file(f)["index"]) for f in sorted(tmp_path.glob("errors-*"))]
    assert sizes == [4, 4, 4, 4, 2] and len(written(tmp_path)) == 18


def test_whether_a_run_is_covered(filled, tmp_path):
    """By the batches it will ask for, not by all pairs: one of seven is in no batch of an epoch."""
    _, dataset, _, folder, mark = filled
    assert cache.ErrorCache(folder, mark, dataset).covers(1000)
    errors = cache.ErrorCache(tmp_path, mark, dataset)
    stream = batches(dataset, 2, 11)
    for count in range(1, 8):  # three batches an epoch
        assert not errors.covers(count) and errors.covers(count - 1)
        epoch, batch = next(stream)
        _, draws = prepare(epoch, batch)
        errors.put(draws, torch.zeros(4, dtype=torch.float64))
        assert errors.covers(count)
    assert not errors.covers(8)


@pytest.mark.parametrize("form", STEPS)
def test_a_step_with_the_cache_is_the_step_with_the_reference(filled, tmp_path, form):
    c, dataset, ref, _, _ = filled
    mark = kind(tmp_path / "data", c, pair_mode=form)
    errors = cache.ErrorCache(tmp_path / "b", mark, dataset)
    filling.fill(errors, ref, c.process, prepare)
    batch, draws = prepare(0, next(batches(dataset, 2, 11))[1])
    c = c._replace(latents=batch.latents, cond=batch.cond, draws=draws)
    online, wanted = run(c, form, c.policy, ref)
    out, gradient = run(c, form, c.policy, errors.get(draws))
    assert torch.equal(out.ref_err, online.ref_err) and torch.equal(out.loss, online.loss)
    assert torch.equal(gradient, wanted)
    assert distance(out.err, plain(c, DPO)[1]) < 1e-5
    gradients(c.parameters)


def test_ranks_share_the_work_and_a_second_call_has_none(filled, tmp_path):
    """An epoch's batches are three of two, and the long pair's."""
    c, dataset, ref, folder, mark = filled

    def fill(rank):
        errors = cache.ErrorCache(tmp_path, mark, dataset)
        return filling.fill(errors, ref, c.process, prepare, rank=rank, world=2)

    assert [fill(rank) for rank in (1, 0)] == [3 * K, 4 * K]
    assert written(tmp_path) == written(folder) and fill(0) == fill(1) == 0


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
            cache.ErrorCache(folder, other, dataset)


def test_another_objectives_grid_fits_and_anything_else_is_named(filled, tmp_path):
    c, dataset, _, folder, _ = filled
    where = folder.parent / "data"
    same = kind(where, c, process=c.process.replace(importance_steps=5))
    assert cache.ErrorCache(folder, same, dataset).covers(100)
    changes = {
        "model": "another/model", "seed": 12, "draws_per_pair": 4, "batch_size": 1,
        "pair_mode": "deferred", "compile": "blocks", "attention": "cudnn", "device": "cuda",
        "dtype": "bfloat16", "weights_dtype": "bfloat16", "prompt_dropout": 0.1,
    }  # fmt: skip
    changed = {**changes, "process": c.process.replace(strata=K)}
    named = {"batch_size": "train_batch_size", "process": "process.strata"}
    for field, value in changed.items():
        other = kind(where, c, **{field: value})
        with pytest.raises(ValueError, match=rf"another {named.get(field, field)} \(.* there, "):
            cache.ErrorCache(folder, other, dataset)
    (where / "index.parquet").write_text("other pairs")
    with pytest.raises(ValueError, match=r"filled with another data \("):
        cache.ErrorCache(folder, kind(where, c), dataset)
    (where / "index.parquet").write_text("something")
    (where / "fingerprint.json").write_text("other encoders")
    with pytest.raises(ValueError, match=r"filled with another .*encoding \("):
        cache.ErrorCache(folder, kind(where, c), dataset)
    (where / "fingerprint.json").write_text("something")
    flow = {"timestep_range": (0.1, 1.0), "shift": 2.0, "time_sampling": "logit_normal"}
    flow |= {"logit_mean": 0.5, "logit_std": 2.0}
    for field, value in flow.items():
        other = kind(where, c, process=c.process.replace(**{field: value}))
        with pytest.raises(ValueError, match=rf"another process.{field} \("):
            cache.ErrorCache(folder, other, dataset)
    table = torch.linspace(0.9, 0.1, 10, dtype=torch.float64)
    ddpm = [fastpref.Diffusion(alphas_cumprod=t, importance_steps=5) for t in (table, table * 0.9)]
    a, b = (kind(where, c, process=p) for p in ddpm)
    assert [k for k in a if a[k] != b[k]] == ["process.alphas_cumprod"]
    with pytest.raises(ValueError, match=r"another process \(FlowMatching there, Diffusion here\)"):
        cache.ErrorCache(folder, a, dataset)
    b = kind(where, c, process=ddpm[0].replace(prediction_type="v_prediction"))
    assert [k for k in a if a[k] != b[k]] == ["process.prediction_type"]


def test_a_damaged_cache_is_one_line(filled, tmp_path, capsys):
    """When it is opened; what breaks later is passed over."""
    c, dataset, ref, _, mark = filled
    errors = cache.ErrorCache(tmp_path, mark, dataset)
    file = tmp_path / "errors-000000.safetensors"
    file.write_bytes(b"cut short")
    errors.flush()
    errors.flush()
    assert capsys.readouterr().err.count("warning: reference cache") == 1
    with pytest.raises(ValueError, match=r"errors-000000.safetensors: cannot be used .*delete it"):
        cache.ErrorCache(tmp_path, mark, dataset)
    for text in ("", "{", "null", "[]", "3", "{}", '{"seed": 11}', "[" * 100_000, b"\xff\xfe"):
        text = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "fingerprint.json").write_bytes(text)
        with pytest.raises(ValueError, match=r"fingerprint.json: is not readable; delete its f"):
            cache.ErrorCache(tmp_path, mark, dataset)
    (tmp_path / "link").symlink_to("nowhere")
    for name, why in (("link", "a link to nothing"), ("errors-000000.safetensors", "a file")):
        with pytest.raises(ValueError, match=f"reference_cache .*{name} is {why}"):
            cache.ErrorCache(tmp_path / name, mark, dataset)
    with pytest.raises(ValueError, match=r"draws_per_pair 268435456 of 7 pairs: .* 30.1 GB, do "):
        cache.ErrorCache(tmp_path / "huge", {**mark, "draws_per_pair": 2**28}, dataset)

    def broken(noisy, t, cond):
        return torch.full_like(noisy, torch.nan) if noisy.shape[2] > 3 else noisy

    errors = cache.ErrorCache(tmp_path / "new", mark, dataset)
    said = rf"pair {dataset.pair_ids[2]:016x} is not finite \(3 of 21 are not\)"
    with pytest.raises(ValueError, match=said):
        filling.fill(errors, broken, c.process, prepare)
    assert {pair for pair, _ in written(tmp_path / "new")} == {
        pair for i, pair in enumerate(dataset.pair_ids) if i != 2
    }
    for says in (broken, broken, ref):  # in a run: not kept, so computed again, until it is finite
        batch, draws = prepare(1, collate([dataset[2]]))
        found = filling.look_up(errors, says, c.process, prepare, K + 1, batch, draws)
        assert found.isfinite().all() == (says is ref)
    assert torch.equal(errors.get(draws), found) and lacking(errors, 1) == []


def test_a_file_of_other_values_is_never_taken(filled, tmp_path):
    """Filled under a fingerprint that is gone, cut in draws or in rows, or no numbers."""
    _, dataset, _, folder, mark = filled
    (file,) = folder.glob("errors-*")
    whole = load_file(file)
    with safe_open(file, "pt") as opened:
        own = opened.metadata()
    errors, ids, index = (whole[name] for name in ("errors", "pair_id", "index"))
    hole = torch.where(errors == errors[1, 0], torch.nan, errors)
    cases = [
        ({"fingerprint": "0"}, {}, "filled with other values than fingerprint.json says"),
        (None, {}, "filled with other values"),
        (own, {"errors": errors[:, :1]}, r"expected float64 \[21, 2\], got \[21, 1\]"),
        (own, {"errors": errors[1:]}, r"expected float64 \[21, 2\], got \[20, 2\]"),
        (own, {"errors": errors.float()}, r"expected float64 \[21, 2\]"),
        (own, {"errors": hole}, "its numbers are not those that were written"),
        (own, {"errors": errors.nextafter(errors + (index == 2)[:, None])}, "its numbers are not"),
        (own, {"pair_id": ids + (ids == ids[4])}, "a pair that the data has not"),
        (own, {"pair_id": ids + (ids == ids.max())}, "a pair that the data has not"),
        (own, {"index": index + 1}, "a draw beyond draws_per_pair"),
        (own, {"index": index - 1}, "a draw beyond draws_per_pair"),
    ]
    (tmp_path / "fingerprint.json").write_text(json.dumps(mark))
    for metadata, change, why in cases:
        values = {name: value.contiguous() for name, value in {**whole, **change}.items()}
        if "numbers" not in why and metadata is own:  # written so, as it seems
            metadata = own | {"content": cache._sum(values)}
        save_file(values, tmp_path / "errors-000000.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match=f"errors-000000.safetensors: cannot be used .*{why}"):
            cache.ErrorCache(tmp_path, mark, dataset)
    del whole["index"]  # as an earlier version wrote them
    save_file(whole, tmp_path / "errors-000000.safetensors", metadata=own)
    with pytest.raises(ValueError, match=r"cannot be used .*index.*; delete it \(or the whole"):
        cache.ErrorCache(tmp_path, mark, dataset)


def test_digests_never_change():
    """Written down once: a cache of one version must be read by the next."""
    rows = {"pair_id": torch.tensor([1, 2]), "index": torch.tensor([0, 1])}
    rows["errors"] = torch.tensor([[0.5, 1.0], [2.0, 3.0]], dtype=torch.float64)
    assert cache._sum(rows) == "1546a16e96c5b740dad65f65f1a928ad"
    assert cache._digest({"seed": 1, "data": "x"}) == "e7c89d331a391a1e2c0796f215caa972"


def test_killed_and_started_again_it_goes_on(tmp_path):
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    script = [sys.executable, memory.__file__, str(broken), "0.2"]
    process = subprocess.Popen(script, stderr=subprocess.PIPE, text=True)
    end = time.time() + 120
    while len(written(broken)) < 6:
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = len(written(broken))
    (broken / f"{TEMPORARY}1.errors.tmp").touch()
    assert left < 7 * K and memory.fill(broken, 0) == 7 * K - left
    assert memory.fill(whole, 0) == 7 * K
    assert written(broken) == written(whole)
    assert not list(broken.glob("*.tmp"))


@pytest.mark.parametrize("lacks", [False, True])
def test_where_one_of_several_has_to_ask_each_asks(lacks, filled, monkeypatch):
    """Once, of its own batch, also beyond draws_per_pair: a pass that is one of all of them."""
    c, dataset, _, folder, mark = filled
    asked, said = [], [False, lacks]
    monkeypatch.setattr(filling.ranks, "gathered", lambda mine: [mine, *said])

    def says(noisy, t, cond):
        asked.append(len(noisy))
        return torch.zeros_like(noisy)

    errors = cache.ErrorCache(folder, mark, dataset)
    for epoch in (0, K + 1):
        batch, draws = prepare(epoch % K, collate([dataset[4], dataset[0]]))
        known = errors.get(draws)
        given = (errors, says, c.process, prepare, epoch, batch, draws)
        found = filling.look_up(*given, together=True)
        assert torch.equal(found, known) is not lacks
        assert torch.equal(errors.get(draws), known)  # what is known stays
    assert asked == [4, 4] * lacks and errors.found == 2
