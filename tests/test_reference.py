"""The reference: adapters off, a frozen copy, the shared prefix, and the cache on disk."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter

import memory
import pytest
import torch
from memory import K, Pairs, prepare
from safetensors.torch import load_file
from tiny import case, distance, gradients, plain
from torch import nn

import fastpref
from fastpref import cache, checkpointing, compiling, data, reference, step
from fastpref.prefix import Prefix

STEPS = {"joint": step.joint, "deferred": step.deferred}
DPO = fastpref.objective("dpo", beta=40.0)


def run(c, form, policy, ref, **changes):
    noisy, t, target = c.inputs()
    out = STEPS[form](
        policy, ref, noisy, t, target, c.cond, c.draws, DPO,
        **{"weight": c.weight, "parameters": c.parameters, **changes},
    )  # fmt: skip
    return out, gradients(c.parameters)


# ---- One copy, two copies


@pytest.mark.parametrize("name", ["wan", "cogvideox-2b", "sd15"])
def test_adapters_off_and_a_frozen_copy_say_what_the_base_says(name):
    c = case(name)
    noisy, t, _ = c.inputs()
    wanted = c.family.predict(c.base, noisy, t, c.cond)
    off = reference.adapters_off(c.model, c.family.predict)
    copied = reference.frozen_copy(c.base, c.family.predict)
    assert torch.equal(off(noisy, t, c.cond, c.draws), wanted)
    with torch.no_grad():
        for p in c.base.parameters():
            p.zero_()
    assert torch.equal(copied(noisy, t, c.cond, c.draws), wanted)
    assert not torch.equal(c.policy(noisy, t, c.cond), wanted)
    with pytest.raises(ValueError, match="no LoRA layers; use frozen_copy"):
        reference.adapters_off(c.base, c.family.predict)
    with pytest.raises(ValueError, match="no LoRA layers; use frozen_copy"):
        reference.shared_prefix(c.base, c.family.predict)


# ---- The shared prefix


def count_calls(model: nn.Module) -> Counter:
    """Forward runs of every part from now on, by the part's path."""
    calls: Counter = Counter()
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: calls.update([path]))
    return calls


# What each model computes below an adapter in its last half (UNet: its upper half).
SHARED = {
    "toy": ("patch_embedding", "condition_embedder", "blocks.0", "blocks.1"),
    "wan": ("patch_embedding", "condition_embedder.time_embedder", "rope", "blocks.0", "blocks.1"),
    "cogvideox-2b": ("patch_embed", "time_embedding", "transformer_blocks.1"),
    "cogvideox-5b": ("patch_embed", "time_embedding", "transformer_blocks.1"),
    "sd15": ("conv_in", "time_embedding", "down_blocks.0", "down_blocks.1", "mid_block"),
}
ABOVE = {"toy": "blocks.2", "wan": "blocks.2", "sd15": "up_blocks.0"}


@pytest.mark.parametrize("form", STEPS)
@pytest.mark.parametrize("name", SHARED)
def test_the_prefix_runs_once_and_changes_nothing(name, form, capfd):
    c = case(name, half=True)
    whole, wanted = run(c, form, c.policy, reference.adapters_off(c.model, c.family.predict))
    expected = plain(c, DPO)
    assert distance(gradients(c.parameters), wanted) < 1e-5
    policy, ref = reference.shared_prefix(c.model, c.family.predict)
    run(c, form, policy, ref)  # checks itself once
    calls = count_calls(c.model)
    out, gradient = run(c, form, policy, ref)
    for field in ("loss", "err", "ref_err", "margin"):
        assert torch.equal(getattr(out, field), getattr(whole, field)), field
    assert torch.equal(gradient, wanted)
    assert distance(out.err, expected[1]) < 1e-5 and distance(out.ref_err, expected[2]) < 1e-5
    passes = 1 if form == "joint" else 2 * len(c.weight)
    for path in SHARED[name]:
        assert calls[path] == passes, path
    assert calls[ABOVE.get(name, "transformer_blocks.2")] == 2 * passes
    assert "shared prefix" not in capfd.readouterr().err


@pytest.mark.parametrize("name", SHARED)
def test_adapters_on_every_block_still_share_the_embedders(name):
    c = case(name)
    whole, wanted = run(c, "joint", c.policy, reference.adapters_off(c.model, c.family.predict))
    policy, ref = reference.shared_prefix(c.model, c.family.predict)
    run(c, "joint", policy, ref)
    calls = count_calls(c.model)
    out, gradient = run(c, "joint", policy, ref)
    assert torch.equal(out.err, whole.err) and torch.equal(gradient, wanted)
    assert [calls[path] for path in SHARED[name][:2]] == [1, 1]


@pytest.mark.parametrize("form", STEPS)
@pytest.mark.parametrize("name", ["wan", "cogvideox-2b", "sd15"])
def test_the_prefix_in_bfloat16_as_runs_have_it(name, form):
    """Weights in bfloat16, adapters in float32, under autocast: equal to the bit; a zero adapter
    starts at the reference.
    """
    c = case(name, torch.bfloat16, half=True)
    with torch.no_grad():
        for p in c.parameters:
            p.data = p.data.float()
        for key, p in c.model.named_parameters():
            if "lora_B" in key:
                p.zero_()

    def predict(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return c.family.predict(*arguments)

    whole, wanted = run(
        c, form, lambda *inputs: predict(c.model, *inputs), reference.adapters_off(c.model, predict)
    )
    policy, ref = reference.shared_prefix(c.model, predict)
    for _ in range(2):
        out, gradient = run(c, form, policy, ref)
        assert (out.margin == 0).all() and torch.equal(out.err, whole.err)
        assert torch.equal(gradient, wanted) and gradient.norm() > 0


@pytest.mark.parametrize("mode", ["attention", "full"])
@pytest.mark.parametrize("form", STEPS)
def test_prefix_and_checkpointing_go_together(form, mode):
    c = case("wan", half=True)
    _, wanted = run(c, form, c.policy, reference.adapters_off(c.model, c.family.predict))
    checkpointing.apply(c.model, c.family.BLOCKS, mode)
    policy, ref = reference.shared_prefix(c.model, c.family.predict)
    for _ in range(2):
        assert torch.equal(run(c, form, policy, ref)[1], wanted)


def test_between_the_passes_one_activation_is_kept():
    """Of the frozen blocks' outputs only the last one's, which the first adapted block reads."""
    c = case("wan", half=True, pairs=1)
    prefix = Prefix(c.model, reference.adapter_layers(c.model))
    noisy, t, _ = c.inputs()
    with torch.no_grad(), prefix.record(noisy, t, c.cond):
        c.policy(noisy, t, c.cond)
    first, second = (prefix.outputs[block] for block in c.model.blocks[:2])
    assert first.untyped_storage().nbytes() < 100 < second.untyped_storage().nbytes()
    assert c.model.blocks[2] not in prefix.outputs


def test_other_inputs_get_a_whole_pass():
    c = case("wan", half=True)
    policy, ref = reference.shared_prefix(c.model, c.family.predict)
    noisy, t, _ = c.inputs()
    with torch.no_grad():
        ref(noisy, t, c.cond)
        other = policy(noisy.clone(), t, c.cond)
        # Recorded for the same values, but the tensors say nothing of it: computed whole, equal.
        assert torch.equal(other, c.policy(noisy, t, c.cond))
        assert torch.equal(policy(noisy, t, c.cond), other)  # the replay
        calls = count_calls(c.model)
        assert torch.equal(policy(noisy, t, c.cond), other)  # used up: whole again
        assert calls["blocks.0"] == 1


def test_an_adapter_that_does_not_train_is_not_below_the_first():
    """Frozen adapters are off in the reference alone, so what follows them is not shared."""
    c = case("wan")
    with torch.no_grad():
        for name, p in c.model.named_parameters():
            p.requires_grad_(p.requires_grad and "blocks.3." in name)
    whole, wanted = run(c, "joint", c.policy, reference.adapters_off(c.model, c.family.predict))
    policy, ref = reference.shared_prefix(c.model, c.family.predict)
    calls = count_calls(c.model)
    for _ in range(2):
        out, gradient = run(c, "joint", policy, ref)
    assert torch.equal(out.err, whole.err) and torch.equal(gradient, wanted)
    assert calls["blocks.0"] == 2 + 2 + 2  # two steps, and the comparison of the first


class Odd(nn.Module):
    """A model whose blocks do not only hand their output on."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.scale = kind, nn.Parameter(torch.ones(4), requires_grad=False)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        kept = 0
        for block in self.blocks:
            x = block(x)
            kept = kept + 2 * x if self.kind == "hidden sum" else kept
        if self.kind == "repeated":
            x = self.blocks[0](x)
        return (x + kept) * self.scale


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("plain", None),
        ("hidden sum", "the second pass would not say the same"),
        ("repeated", "the second pass would not say the same"),
        ("trains outside", "scale trains and belongs to no part of Odd"),
        ("twice", "a Linear is called twice below the first adapter"),
    ],
)
def test_what_cannot_be_shared_exactly_is_not_shared(kind, says, capfd):
    torch.manual_seed(0)
    model = Odd(kind).requires_grad_(False)
    model.blocks[2].requires_grad_()
    if kind == "trains outside":
        model.scale.requires_grad_()
    if kind == "twice":
        model.forward = lambda x: model.blocks[2](model.blocks[0](model.blocks[0](x)))
    x = torch.randn(2, 4)
    wanted = model(x)
    prefix = Prefix(model, [])
    for _ in range(2):
        with torch.no_grad(), prefix.record(x):
            model(x)
        assert torch.equal(prefix.run(lambda: model(x), x), wanted)
    said = capfd.readouterr().err
    assert prefix.why_not == says
    assert said.count("shared prefix: off, two whole passes instead") == (says is not None)
    assert says is None or says in said
    assert [type(block) for block in model.blocks] == [nn.Linear] * 3


def test_compiled_blocks_that_round_otherwise_still_share(capfd):
    """The comparison runs eagerly; what is recorded and replayed comes from the compiled blocks."""

    def rounding(graph, inputs):
        return lambda *values: tuple(value + 1e-3 for value in graph.forward(*values))

    torch.manual_seed(0)
    model = Odd("plain").requires_grad_(False)
    model.blocks[2].requires_grad_()
    x = torch.randn(2, 4)
    eager = model(x)
    compiling.compile_blocks(model, "blocks", backend=rounding)
    prefix = Prefix(model, [])
    with torch.no_grad():
        whole = model(x)
        assert not torch.equal(whole, eager)
        for _ in range(2):
            with prefix.record(x):
                model(x)
            assert torch.equal(prefix.run(lambda: model(x), x), whole)
    assert prefix.why_not is None and not capfd.readouterr().err


def test_an_error_in_a_pass_leaves_the_model_as_it_was():
    c = case("wan", half=True)
    ref = reference.shared_prefix(c.model, c.family.predict)[1]
    noisy, t, _ = c.inputs()
    before = [type(m) for m in c.model.modules()]
    with pytest.raises(RuntimeError):
        ref(noisy[:, :5], t, c.cond)
    assert [type(m) for m in c.model.modules()] == before


# ---- The cache


def kind(path, c, **changes):
    """A fingerprint; the files it looks at are made where they are missing."""
    path.mkdir(parents=True, exist_ok=True)
    for name in ("index.parquet", "fingerprint.json"):
        if not (path / name).exists():
            (path / name).write_text("something")
    values = {
        "model": path, "data": path, "process": c.process, "seed": 11, "draws_per_pair": K,
        "batch_size": 2, "pair_mode": "joint", "compile": None, "attention": "native",
        "dtype": "float32", "prompt_dropout": 0.0,
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


def test_ranks_share_the_work_and_a_second_call_has_none(filled, tmp_path, monkeypatch):
    c, dataset, ref, folder, mark = filled
    monkeypatch.setattr(cache, "CHUNK", 1)
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
    beyond = fastpref.Draws(11, torch.tensor([5, ids[0]]), torch.tensor([0, K]))
    assert read(None, None, None, beyond).isnan().all()


def test_another_objectives_grid_fits_and_anything_else_is_named(filled, tmp_path):
    c, dataset, ref, folder, _ = filled
    where = folder.parent / "data"
    same = kind(where, c, process=c.process.replace(importance_steps=5))
    assert cache.cached(folder, same, dataset.pair_ids)
    changes = {
        "model": "another/model", "seed": 12, "draws_per_pair": 4, "batch_size": 1,
        "pair_mode": "deferred", "compile": "blocks", "attention": "cudnn", "dtype": "bfloat16",
        "prompt_dropout": 0.1,
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
    table = torch.linspace(0.9, 0.1, 10, dtype=torch.float64)
    ddpm = [fastpref.Diffusion(alphas_cumprod=t, importance_steps=5) for t in (table, table * 0.9)]
    a, b = (kind(where, c, process=p) for p in ddpm)
    assert [k for k in a if a[k] != b[k]] == ["process.alphas_cumprod"]


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
    with pytest.raises(ValueError, match=r"errors-000000.safetensors: cannot be read .*delete it"):
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
    limits["margin_noise"] = worst
    assert cache.drift(read, shifted, c.process, batches(), **limits)[1] == 2 * worst
    assert not capfd.readouterr().err


def test_killed_and_started_again_it_goes_on(tmp_path, monkeypatch):
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
    monkeypatch.setattr(cache, "CHUNK", 1)
    assert left in (2, 3) and memory.fill(broken, 0) == 7 - 2 * left
    assert memory.fill(whole, 0) == 7
    names = sorted(file.name for file in whole.glob("errors-*.safetensors"))
    assert names == sorted(file.name for file in broken.glob("errors-*.safetensors"))
    for name in names:
        a, b = load_file(whole / name), load_file(broken / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
