"""Each variant of bench.step is what its name says."""

from __future__ import annotations

import re
from argparse import Namespace
from functools import partial

import pytest
import torch
from torch import nn

from bench import table
from bench.architectures import ARCHITECTURES
from bench.baselines import BASELINES
from bench.variants import Ours, Setting, Usual, rungs
from fastpref.step import compiling

CPU = torch.device("cpu")


# ---- Each variant is what its name says


def setting(family: str, adapters: str = "all") -> Setting:
    shape = ARCHITECTURES[family].small[0]
    options = {"pairs": 1, "adapters": adapters, "attention": "native", "dtype": None}
    return Setting(Namespace(family=family, shape=shape, **options), CPU)


@pytest.fixture(scope="module")
def tiny() -> dict[str, Setting]:
    return {adapters: setting("tiny", adapters) for adapters in ("all", "half")}


def runs(variant: Usual | Ours) -> dict[str, int]:
    """Kernels and compiled blocks that run in a step, the second: the first checks the prefix."""
    from torch.profiler import ProfilerActivity, profile

    variant.gradient(0)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        variant.gradient(1)
    found = {"attention": 0, "gelu": 0, "compiled": 0}
    for event in trace.events():
        inside = {child.name for child in event.cpu_children}
        if event.name == "aten::_scaled_dot_product_flash_attention_for_cpu":
            # Under selective checkpointing a call that is answered from what was kept has none.
            found["attention"] += "aten::transpose" in inside
        elif event.name == "aten::gelu":
            found["gelu"] += "PythonDispatchMode" not in inside  # whose inner call is the kernel's
        elif event.name.startswith("Torch-Compiled Region"):
            found["compiled"] += 1
    return found


def make(name: str, setting: Setting) -> Usual | Ours:
    return (Usual if name in BASELINES else Ours)(name, setting)


# Of a pair on four blocks of two attentions (self, cross) and one gelu each, and one gelu for the
# text below them. A pass over both members is 8 and 5: B1 is reference, policy and the blocks
# again. Ours have the text once, and deferred ones one member at a time, so twice as many.
RUNS = {
    "B0": (24, 14),
    "B1": (24, 14),
    "joint/full": (24, 13),
    "joint/attention": (16, 13),
    "joint/none": (16, 9),
    "joint/none+cached": (8, 5),
    "deferred/full": (48, 26),
    "deferred/attention": (32, 26),
    "deferred/none": (32, 18),
    "deferred/full+cached": (32, 18),
    "deferred/none+cached": (16, 10),
}
# Where two blocks have adapters: B1 runs two again, and of ours the policy runs two alone.
HALF_RUNS = {
    "B1": (20, 12),
    "joint/full": (16, 9),
    "joint/none": (12, 7),
    "deferred/none": (24, 14),
    "joint/none+cached": (8, 5),
}


@pytest.mark.parametrize(
    "adapters, name",
    [*(("all", name) for name in RUNS), *(("half", name) for name in HALF_RUNS)],
)
def test_a_variant_runs_as_many_blocks_as_its_name_says(adapters, name, tiny):
    expected = (RUNS if adapters == "all" else HALF_RUNS)[name]
    found = runs(make(name, tiny[adapters]))
    assert (found["attention"], found["gelu"], found["compiled"]) == (*expected, 0)


# Attentions that run, compiled blocks that run (a baseline's run again from outside, ours within),
# and compilations: adapters off, first block, the others.
COMPILED = {
    "B4": (24, 12, 3),
    "B5": (16, 8, 3),
    "joint/full+compile": (24, 8, 3),
    "deferred/attention+compile": (32, 16, 3),
    "deferred/none+compile": (32, 16, 3),
    "deferred/none+compile+cached": (16, 8, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_variant_compiles_and_runs_what_its_name_says(name, tiny, monkeypatch):
    """With a backend that only traces: what is run again is decided before it."""
    plain, backend = nn.Module.compile, {"backend": "aot_eager"}
    monkeypatch.setattr(nn.Module, "compile", lambda self, **given: plain(self, **given, **backend))
    monkeypatch.setattr(compiling, "compile_blocks", partial(compiling.compile_blocks, **backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    variant = make(name, tiny["all"])
    found = runs(variant)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert (found["attention"], found["compiled"], graphs) == COMPILED[name]
    if name not in BASELINES:  # 0.9 MB a member, or a block's inputs and its attentions' outputs
        held = table.activation_bytes(variant, tiny["all"])
        assert held > 0.7e6 if "/none" in name else held < 0.3e6


def test_loose_blocks_are_compiled_as_inductor_does_on_its_own(tiny, monkeypatch):
    given = []
    monkeypatch.setattr(compiling, "compile_blocks", lambda *_, **options: given.append(options))
    for name in ("joint/none+compile", "joint/none+compile+loose"):
        make(name, tiny["all"])
    assert given == [{"options": compiling.AS_EAGER}, {"options": None}]
    with pytest.raises(ValueError, match=r"or \+compile\+loose, .* got joint/none\+loose"):
        rungs("joint/none+loose")


def test_a_step_and_its_optimiser_go_through_the_graphs(tiny):
    """Each has one record of the inputs it was called with: on a GPU that is replayed."""
    variant = make("joint/none+graph", tiny["all"])
    assert [len(graph.records) for graph in variant.graphs] == [0, 0]
    variant.gradient(0)
    variant.update()
    assert [len(graph.records) for graph in variant.graphs] == [1, 1]
    assert not make("joint/none", tiny["all"]).graphs


def test_half_of_the_blocks_have_adapters_in_every_variant(tiny):
    """The upper ones, with as many targets each; B1 learns the very same tensors as ours."""
    names = {
        adapters: {name for name, p in there.model.named_parameters() if p.requires_grad}
        for adapters, there in tiny.items()
    }
    upper = {name for name in names["all"] if re.match(r"blocks\.[23]\.", name)}
    assert names["half"] == upper and 2 * len(upper) == len(names["all"])
    learned = [
        {id(p) for p in make(name, tiny["half"]).model.parameters() if p.requires_grad}
        for name in ("B1", "deferred/none")
    ]
    assert learned[0] == learned[1] == {id(p) for p in tiny["half"].parameters}


def test_a_baseline_draws_its_times_beforehand(tiny, monkeypatch):
    """Our process's arithmetic on the host is no part of the loops users write."""
    variant = make("B1", tiny["all"])
    expected = tiny["all"].times(tiny["all"].draws(2)).float()
    assert torch.equal(torch.stack(variant.times[2]), expected)
    monkeypatch.setattr(Setting, "times", lambda *_: pytest.fail("times are drawn in the step"))
    variant.gradient(2)


def test_a_reference_that_fails_leaves_the_adapters_on():
    """Out of memory there is a variant's end; the others learn the same parameters."""
    there = setting("tiny")
    first, other = Usual("B1", there), Usual("B1", there)

    def full(*_):
        raise torch.OutOfMemoryError

    first.run.predict = full
    with pytest.raises(torch.OutOfMemoryError):
        first.gradient(0)
    assert there.parameters and all(p.requires_grad for p in there.parameters)
    other.gradient(0)
    assert all(p.grad.abs().max() > 0 for p in there.parameters)
