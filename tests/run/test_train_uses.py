"""What `train` does with options whose values train alike: who was called, and how often."""

from __future__ import annotations

import importlib
import json
import threading
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from commands import BASE, options, write_pairs
from diffusers import WanTransformer3DModel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from fastpref import models, progress
from fastpref.pairs import dataset
from fastpref.run import assemble, caching, checkpoint, checks, parts, policy
from fastpref.run.config import Config
from fastpref.step import compiling

loop = importlib.import_module("fastpref.run.train")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """An encoded set."""
    folder = tmp_path_factory.mktemp("data")
    write_pairs(folder / "media", count=4)
    config = options(folder / "media", folder / "run", max_train_steps=1)
    how = Config(**config).only(*assemble.DATA)
    return parts.open_data(config["data"], folder / "run", dtype=torch.float32, **how).folder


@pytest.fixture
def spied(monkeypatch):
    """spied(where, name): the arguments of every call from now on; the call goes through."""

    def watch(where, name):
        calls, real = [], getattr(where, name)

        def seen(*args, **kwargs):
            calls.append((args, kwargs))
            return real(*args, **kwargs)

        monkeypatch.setattr(where, name, seen)
        return calls

    return watch


@pytest.fixture
def block_calls(monkeypatch):
    """Forward runs of the blocks, by index, of every model loaded from now on."""
    calls: Counter = Counter()
    real = parts.load_model

    def load(*args):
        model = real(*args)
        for i, block in enumerate(model.blocks):
            block.register_forward_hook(lambda *_, i=i: calls.update([i]))
        return model

    monkeypatch.setattr(policy, "load_model", load)
    return calls


def run(pairs, folder, **changes):
    return loop.train(Config(**options(pairs, folder, **{"max_train_steps": 1, **changes})))


class Count(TorchDispatchMode):
    """Calls of the operators with a name in them."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part, self.calls = part, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls += self.part in str(op)
        return op(*args, **(kwargs or {}))


def test_checkpointing_runs_again_what_it_says(pairs, tmp_path):
    attended = {}
    for mode in ("none", "attention", "full"):
        with (
            Count("scaled_dot_product_flash_attention_for_cpu.default") as seen,
            Count("aten.gelu.default") as blocks,
        ):
            run(pairs, tmp_path / mode, checkpointing=mode, train_batch_size=4)
        attended[mode] = seen.calls, blocks.calls
    none, attention, full = (attended[m] for m in ("none", "attention", "full"))
    assert none[0] == attention[0] < full[0]
    assert none[1] < attention[1] == full[1]


@pytest.mark.parametrize("mode", ["joint", "deferred"])
def test_the_pair_mode_and_skip_zeros_reach_the_step(mode, pairs, tmp_path, spied):
    calls = {"joint": spied(loop, "backward"), "deferred": spied(loop, "deferred")}
    for skip in (False, True):
        change = {"objective": "hinge", "pair_mode": mode, "skip_zeros": skip}
        run(pairs, tmp_path / str(skip), **change)
        assert calls[mode] and all(kwargs["skip_zeros"] is skip for _, kwargs in calls[mode])
        calls[mode].clear()
    assert not calls["deferred" if mode == "joint" else "joint"]


def test_attention_is_used_as_picked(pairs, tmp_path, spied):
    entered = spied(assemble.attention, "use")
    run(pairs, tmp_path / "native")
    (args, _), = entered  # fmt: skip
    assert isinstance(args[0], WanTransformer3DModel) and args[1] == "native"


def test_the_attention_holds_in_the_step(pairs, tmp_path, monkeypatch):
    inside, seen = [False], []

    class Use:
        def __enter__(self):
            inside[0] = True

        def __exit__(self, *_):
            inside[0] = False

    real = loop.training_loss
    monkeypatch.setattr(assemble.attention, "use", lambda model, name: Use())
    monkeypatch.setattr(
        loop, "training_loss", lambda *a, **k: (seen.append(inside[0]), real(*a, **k))[1]
    )
    run(pairs, tmp_path)
    assert seen and all(seen) and inside == [False]


@pytest.mark.parametrize("kind", ["auto", "adapters_off", "frozen_copy"])
def test_another_module_is_the_frozen_copy(kind, pairs, tmp_path, monkeypatch):
    said, real = [], models.family("toy").predict

    def predict(model, *inputs):
        if not inputs[0].is_meta:  # of shapes alone: whether the set is one for the model
            said.append((id(model), torch.is_grad_enabled()))
        return real(model, *inputs)

    monkeypatch.setattr(models.family("toy"), "predict", predict)
    run(pairs, tmp_path, reference=kind)
    policy = {each for each, graded in said if graded}
    frozen = {each for each, graded in said if not graded} - policy
    assert len(policy) == 1 and len(frozen) == (kind == "frozen_copy")


def test_train_shares_the_prefix(pairs, tmp_path, block_calls):
    """Adapters on the last block: below it, one pass a step; above, two."""
    counts = []
    last = len(models.family("toy").load(BASE, torch.float32).blocks) - 1
    for steps in (3, 5):
        block_calls.clear()
        change = {"lora_targets": [f"blocks.{last}.attn1.to_q"], "logging_steps": 10}
        run(pairs, tmp_path / str(steps), max_train_steps=steps, checkpointing_steps=10, **change)
        counts.append(Counter(block_calls))
    assert [counts[1][i] - counts[0][i] for i in range(last + 1)] == [2] * last + [4]


class Reads(TorchFunctionMode):
    """Counts the ways in which Python reads a tensor's values: each waits for the device. Integers
    are left out: the order of the rows, which never leaves the host.
    """

    NAMES = ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.functions, self.calls = {getattr(torch.Tensor, n) for n in self.NAMES}, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.functions:
            self.calls += args[0].dtype not in (torch.int32, torch.int64)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "change",
    [{}, {"gradient_accumulation_steps": 2}, {"objective": "sdpo"}, {"pair_mode": "deferred"}],
)
def test_no_step_without_a_log_reads_from_the_device(change, pairs, tmp_path):
    counts = []
    for steps in (3, 6):
        with Count("_local_scalar_dense") as seen, Reads() as read:
            run(
                pairs, tmp_path / str(steps), max_train_steps=steps, logging_steps=100,
                checkpointing_steps=100, **change,
            )  # fmt: skip
        counts.append((seen.calls, read.calls))
    assert counts[0] == counts[1] and min(counts[0]) > 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"objective": "sdpo"},
        {"pair_mode": "deferred"},
        {"reference": "cached", "draws_per_pair": 8},
        {"reference": "cached", "draws_per_pair": 1, "pair_mode": "deferred"},
    ],
)
def test_on_a_gpu_steps_wait_for_nothing_and_recorded_ones_train_alike(
    change, pairs, tmp_path, monkeypatch
):
    """Steps 7 and 8 of 9, long after the recording, under PyTorch's own watch on waiting."""

    class Progress(tqdm):
        def update(self, n=1):
            super().update(n)
            waits = "error" if self.n in (6, 7) else "default"
            torch.cuda.set_sync_debug_mode(waits)

    monkeypatch.setattr(progress, "tqdm", Progress)
    losses = {}
    for graphs in (False, True):
        if "reference" in change:
            change = change | {"reference_cache": str(tmp_path / f"cache-{graphs}")}
        try:
            result = run(
                pairs, tmp_path / str(graphs), device="cuda", cuda_graphs=graphs,
                max_train_steps=9, logging_steps=9, checkpointing_steps=100,
                **change,
            )  # fmt: skip
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses[graphs] = result["metrics"]
    for name in ("loss", "grad_norm", "errors/policy_w"):
        assert losses[True][name] == pytest.approx(losses[False][name], rel=1e-3), name


def test_the_cache_is_filled_with_compiled_blocks(pairs, tmp_path, spied, monkeypatch):
    real = compiling.compile_blocks
    monkeypatch.setattr(
        compiling, "compile_blocks", lambda model, paths: real(model, paths, backend="eager")
    )
    calls = spied(compiling, "compile_blocks")
    for compiled in (False, True):
        change = {"reference": "cached", "draws_per_pair": 1, "compile": compiled}
        change |= {"reference_cache": str(tmp_path / str(compiled))}
        caching.cache_reference(Config(**options(pairs, tmp_path / "run", **change)))
        assert len(calls) == compiled


@pytest.mark.parametrize("mode", ["joint", "deferred"])
def test_the_reference_is_asked_once_a_draw(mode, pairs, tmp_path, block_calls):
    """Two draws of four pairs in batches of two: four steps ask it, all later ones do not."""
    change = {"pair_mode": mode, "reference": "cached", "draws_per_pair": 2, "train_batch_size": 2}
    change["checkpointing_steps"] = 100
    calls = {}
    for cache, steps in (("a", 1), ("b", 4), ("c", 9), ("c", 9)):
        block_calls.clear()
        folder, change["reference_cache"] = tmp_path / f"run-{len(calls)}", str(tmp_path / cache)
        run(pairs, folder, max_train_steps=steps, **change)
        calls[len(calls)] = block_calls[0]
    a_pass = {"joint": 1, "deferred": 4}[mode]
    one, four, nine, again = calls.values()
    assert four - one == 3 * 2 * a_pass and nine - four == 5 * a_pass
    assert again - one == (9 - 2 + 4) * a_pass, "and once for each batch that is checked"


def test_train_refuses_adapters_that_change_the_base(pairs, tmp_path, monkeypatch):
    def add(model, *args):
        parts.add_lora(model, *args)
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "base_layer.weight" in n).mul_(1.01)

    monkeypatch.setattr(policy, "add_lora", add)
    with pytest.raises(ValueError, match="self-check: with its adapters off the model differs"):
        run(pairs, tmp_path)


def test_the_first_step_after_an_update_is_checked(pairs, tmp_path, spied):
    """Once in a run of adapters, and once more where it is resumed; fully tuned never."""
    calls = spied(checks, "check_step")
    for steps, seen in ((1, 0), (4, 1), (6, 2)):
        run(pairs, tmp_path / "lora", max_train_steps=steps)
        assert len(calls) == seen
    assert all(not torch.equal(err, ref_err) for (err, ref_err), _ in calls)
    run(pairs, tmp_path / "full", max_train_steps=3, tuning="full", lora_rank=None)
    assert len(calls) == 2


def test_a_resumed_run_keeps_its_margin_noise(pairs, tmp_path, monkeypatch):
    run(pairs, tmp_path, max_train_steps=2)
    real = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda *a: real(*a) | {"margin_noise": 0.0123})
    assert run(pairs, tmp_path, max_train_steps=3)["margin_noise"] == 0.0123
    assert json.loads((tmp_path / "result.json").read_text())["margin_noise"] == 0.0123


def test_weights_of_pairs_reach_the_loss(pairs, tmp_path, monkeypatch):
    real, weight = dataset.collate, [1.0, 1.0]

    def collate(rows):
        batch = real(rows)
        batch.weight.copy_(torch.tensor(weight))
        return batch

    monkeypatch.setattr(dataset, "collate", collate)
    found = {}
    for name, weight in {"one": [1.0, 1.0], "some": [0.0, 2.0], "none": [0.0, 0.0]}.items():  # noqa: B007
        found[name] = run(pairs, tmp_path / name, weight_decay=0.0)["metrics"]
    assert found["none"]["loss"] == 0 == found["none"]["grad_norm"]
    assert found["some"]["loss"] == pytest.approx(found["one"]["loss"])  # log 2 either way
    assert found["some"]["grad_norm"] != pytest.approx(found["one"]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_margin_noise_is_of_eight_pairs_and_needs_no_backward(size, pairs, tmp_path, spied):
    calls, backwards = spied(checks, "changes"), []
    for steps in (1, 2):
        with Count("aten.gelu_backward.default") as seen:
            run(pairs, tmp_path / str(steps), train_batch_size=size, max_train_steps=steps)
        backwards.append(seen.calls)
    assert len(calls) == 2 * -(-8 // size) and backwards[1] == 2 * backwards[0] > 0
    assert {kwargs.get("pair_mode", args[-1]) for args, kwargs in calls} == {"joint"}


@pytest.mark.parametrize("bad", [False, True])
def test_a_run_leaves_no_reader_behind(bad, pairs, tmp_path, monkeypatch):
    def readers():
        return {t for t in threading.enumerate() if t.name.startswith("fastpref-data")}

    before = readers()  # those of earlier tests may end at any time
    if bad:
        monkeypatch.setattr(loop, "backward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError) if bad else nullcontext():
        run(pairs, tmp_path, num_workers=3)
    mine = readers() - before
    for thread in mine:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in mine)
