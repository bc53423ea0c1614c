"""bench.step: FLOPs by formula, true sizes, honest counting, variants that are what their names
say, and the whole command on a CPU; bench/device.sh: what it goes on with.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import meters, overhead, pair_loss, step, timing
from bench.architectures import ARCHITECTURES
from bench.baselines import BASELINES
from bench.meters import Clock, SavedBytes
from bench.variants import Ours, Setting, Usual
from fastpref import compiling
from fastpref.attention import Call

CPU = torch.device("cpu")


# ---- Architectures


@pytest.mark.parametrize(
    "name, tokens, products, attention, nothing_recomputed",
    [
        ("wan", 32760, 82.1, 200.9, 2301),
        ("cogvideox-2b", 17776, 47.2, 72.8, 938),
        ("cogvideox-5b", 17776, 169.1, 163.1, 2482),
    ],
)
def test_flops_are_the_published_counts(name, tokens, products, attention, nothing_recomputed):
    """TFLOP of one sample's forward, and of a pair with an online reference, counted by hand."""
    arch = ARCHITECTURES[name]
    assert arch.tokens(arch.shape) == tokens
    found = arch.forward_flops(arch.shape)
    assert found == pytest.approx((1e12 * products, 1e12 * attention), rel=2e-3)
    online = arch.pair_flops(arch.shape, online=True)
    assert online == pytest.approx(1e12 * nothing_recomputed, rel=1e-3)
    cached = arch.pair_flops(arch.shape, online=False)
    assert online - cached == pytest.approx(2 * sum(found))


@pytest.mark.parametrize(
    "name, billions", [("wan", 1.42), ("cogvideox-2b", 1.69), ("cogvideox-5b", 5.57)]
)
def test_architectures_have_the_true_number_of_parameters(name, billions):
    arch = ARCHITECTURES[name]
    model = arch.make(torch.device("meta"), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1e9 * billions, rel=5e-3)
    kinds = {p.dtype for p in model.parameters()}
    assert torch.bfloat16 in kinds
    if name == "wan":  # loading keeps norms and the time embedding in float32
        assert model.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
        assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16


def test_formula_counts_what_pytorch_counts():
    """Of the tiny model, in whose forward the embeddings are a small part."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from fastpref import models

    arch = ARCHITECTURES["tiny"]
    model = arch.make(CPU, torch.float32)
    latents, cond = arch.inputs("17x256x256", 1, CPU, torch.float32)
    first = {name: value[:1] for name, value in cond.items()}
    math = sdpa_kernel(SDPBackend.MATH)  # of plain products, which the counter knows
    with FlopCounterMode(display=False) as counter, torch.no_grad(), math:
        models.family("wan").predict(model, latents[:1], torch.full((1,), 9.0), first)
    assert sum(arch.forward_flops("17x256x256")) == pytest.approx(
        counter.get_total_flops(), rel=0.05
    )


@pytest.mark.parametrize("shape", ["81x480", "80x480x832", "81x480x840", "0x480x832", "a"])
def test_shapes_that_do_not_fit_are_one_line(shape, capsys):
    assert step.main(["--device", "cpu", "--shape", shape]) == 1
    said = capsys.readouterr().out
    assert said.startswith("bench.step: --shape") and said.count("\n") == 1


# ---- Meters


def test_saved_bytes_counts_storages_once_and_the_most_at_a_time():
    """x is saved twice; the weight is not counted; a graph that is gone is not held."""
    layer = nn.Linear(8, 8, bias=False)
    saved = SavedBytes(layer)
    with saved.count():
        for _ in range(3):
            x = torch.randn(4, 8, requires_grad=True)
            y = layer(x)  # x
            z = (x.detach() * y).exp()  # x's storage again; exp's result
            z.sum().backward()
            del x, y, z
    assert saved.most == 2 * 4 * 8 * 4
    assert saved.now == 0


def test_the_loss_is_timed_in_every_order_once():
    """What a variant leaves in the caches tells on the next two."""
    rounds = list(islice(timing.orders(list("abcde")), 120))
    assert len(set(map(tuple, rounds))) == 120 == pair_loss.ROUNDS


def test_clock_sums_the_parts_of_a_step():
    clock = Clock(CPU)
    with clock.part("before"):
        pass
    for k in range(3):
        clock.begin()
        for _ in range(2):
            with clock.part("forward"):
                torch.randn(200 * (k + 1), 200) @ torch.randn(200, 200)
        with clock.part("backward"):
            pass
    parts = clock.medians()
    assert set(parts) == {"forward", "backward"}
    assert parts["forward"] > parts["backward"] >= 0


def test_the_attention_kernel_is_that_of_the_forward(monkeypatch):
    """Neither its backward's nor that which draws the inputs, though those take longer."""
    call = Call(1, 2, 256, 256, 32, torch.float32, CPU)
    name = meters.attention_kernel(call, "native")
    assert name == "aten::_scaled_dot_product_flash_attention_for_cpu"
    inputs, recorded = meters.attention._inputs, []

    def slow(call):
        torch.randn(3000, 3000) @ torch.randn(3000, 3000)
        made = inputs(call)
        made[0].register_hook(recorded.append)
        return made

    monkeypatch.setattr(meters.attention, "_inputs", slow)
    assert meters.attention_kernel(call, "native") == name and not recorded


# ---- The command


class Results:
    """What the command wrote to the file of --output, by variant."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "new" / "step.jsonl"

    def run(self, *arguments: str) -> int:
        return step.main([*arguments, "--output", str(self.path)])

    def __call__(self) -> dict[str, dict]:
        lines = self.path.read_text().splitlines()
        return {row["variant"]: row for row in map(json.loads, lines)}


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path)


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB")
BROKEN = ValueError("a library's own")
QUICK = ["--device", "cpu", "--shape", "1x64x64", "--rounds", "2", "--pairs", "2"]


@pytest.mark.parametrize("bench", [overhead, pair_loss, step])
def test_every_benchmark_takes_a_device_and_a_file(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    said = capsys.readouterr().out
    assert "--device" in said and "--output" in said


def test_options_of_all_benchmarks():
    """ "cuda" is its first device; without --output no file is written."""
    parser = timing.parser("What it does.")
    cuda = torch.device("cuda", 0)
    assert parser.parse_args(["--device", "cuda"]).device == cuda
    assert parser.parse_args(["--device", "cpu"]).device == CPU
    left = parser.parse_args([])
    assert left.device == (cuda if torch.cuda.is_available() else CPU) and left.output is None


def test_rows_are_written_where_output_says_alone(results, tmp_path, monkeypatch, capsys):
    """A benchmark that a README's reader runs leaves the clone as it was."""
    here = {file: file.stat().st_mtime_ns for file in Path(step.__file__).parent.rglob("*.json*")}
    assert here
    monkeypatch.chdir(tmp_path)
    assert step.main([*QUICK, "--variants", "B1"]) == 0
    assert not list(tmp_path.iterdir())
    assert here == {file: file.stat().st_mtime_ns for file in here}
    for runs in (1, 2):
        assert results.run(*QUICK, "--variants", "B1") == 0
        assert len(results.path.read_text().splitlines()) == runs
    assert f"rows appended to {results.path}" in capsys.readouterr().out


def test_every_variant_of_a_cpu_has_b1s_gradient(results, capsys):
    assert results.run(*QUICK) == 0
    rows = results()
    assert set(rows) == set(step.CPU)
    for name, row in rows.items():
        assert row["gradient_off"] < 1e-4, name
        assert row["s_per_pair"] > 0 and len(row["s_per_pair_quartiles"]) == 2
        assert row["tokens"] == 16 and row["pairs"] == 2 and row["attention"] == "native"
        assert {"device", "torch", "commit", "driver"} <= set(row)
        if "graph" not in name:
            assert all(part >= 0 for part in row["split"].values())
            assert row["split"]["reference"] == 0 or "cached" not in name
    held = [rows[name]["activation_bytes"] for name in ("deferred/none", "joint/none")]
    assert 0 < held[0] / held[1] <= 0.6
    said = capsys.readouterr().out
    assert "activations held, deferred over joint: 0." in said and "cached over B0: " in said
    table = [line.split()[0] for line in said[said.index("variant  ") :].splitlines()[1:]]
    assert table[: len(rows)] == sorted(step.CPU), "baselines, then ours before what adds to them"


@pytest.fixture
def narrow_cogvideox(monkeypatch):
    """The true schedules and options, on models of two blocks."""
    for name in ("cogvideox-2b", "cogvideox-5b"):
        arch = ARCHITECTURES[name]
        config = {
            **arch.config,
            **{"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2},
            **{"text_embed_dim": 32, "max_text_seq_length": 6, "time_embed_dim": 16},
            **{"sample_height": 8, "sample_width": 8, "sample_frames": 9},
        }
        sizes = {"layers": 2, "dim": 32, "ffn": 128, "text": (6, 32), "small": ("9x64x64",)}
        monkeypatch.setitem(ARCHITECTURES, name, replace(arch, config=config, **sizes))


@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox-5b"])
def test_the_other_process_and_text_in_the_sequence(name, results, narrow_cogvideox):
    """v-prediction, shifted and rescaled schedules."""
    arguments = ["--device", "cpu", "--rounds", "2", "--family", name, "--shape", "9x64x64"]
    assert results.run(*arguments, "--variants", "B0", "joint/none", "deferred/full+cached") == 0
    rows = results()
    assert all(row["gradient_off"] < 1e-3 and row["tokens"] == 54 for row in rows.values())
    assert all(row["s_per_pair"] > 0 for row in rows.values())


def test_a_wrong_gradient_is_recorded_not_timed_and_fails(results, monkeypatch, capsys):
    right = step.Ours._step

    def biased(self, *args, **kwargs):
        loss = right(self, *args, **kwargs)
        self.setting.parameters[3].grad *= 1.5
        return loss

    monkeypatch.setattr(step.Ours, "_step", biased)
    assert results.run(*QUICK, "--variants", "B0", "joint/none") == 1
    row = results()["joint/none"]
    assert "gradient is off B1's by" in row["left_out"] and "s_per_pair" not in row
    assert results()["B0"]["s_per_pair"] > 0
    assert "gradient is off" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error, reason, code", [(FULL, "out of memory", 0), (BROKEN, "ValueError: a library's own", 1)]
)
def test_what_cannot_run_is_recorded_and_the_rest_is_timed(
    error, reason, code, results, monkeypatch
):
    """A variant too large is an answer; one that fails is a mistake."""
    right = step.Ours.__init__

    def full(self, name, setting):
        if name == "joint/none":
            raise error
        right(self, name, setting)

    monkeypatch.setattr(step.Ours, "__init__", full)
    assert results.run(*QUICK, "--variants", "joint/none", "deferred/none") == code
    rows = results()
    assert rows["joint/none"]["left_out"] == reason
    assert rows["deferred/none"]["s_per_pair"] > 0


def planted(monkeypatch, kind: type, call: int, error: Exception) -> None:
    """This call and later ones of the gradient of `kind` raise: two prepare, one makes Adam's
    states, two are timed.
    """
    right, calls = kind.gradient, []

    def gradient(self, *args, **kwargs):
        calls.append(self)
        if len(calls) >= call:
            raise error
        right(self, *args, **kwargs)

    monkeypatch.setattr(kind, "gradient", gradient)


@pytest.mark.parametrize("call", [2, 3, 4, 5])
@pytest.mark.parametrize("error, code", [(FULL, 0), (BROKEN, 1)])
def test_what_fails_later_is_recorded_and_the_rest_is_timed(
    call, error, code, results, monkeypatch, capsys
):
    planted(monkeypatch, Ours, call, error)
    assert results.run(*QUICK, "--variants", "joint/full", "B0") == code
    rows = results()
    assert "s_per_pair" not in rows["joint/full"]
    assert rows["joint/full"]["left_out"] in ("out of memory", "ValueError: a library's own")
    assert rows["B1"]["times_faster_than_B1"] == 1.0 and rows["B0"]["s_per_pair"] > 0
    assert f"joint/full{' ' * 23}{rows['joint/full']['left_out']}" in capsys.readouterr().out


@pytest.mark.parametrize("call", [3, 5])
def test_the_others_are_timed_without_b1(call, results, monkeypatch, capsys):
    planted(monkeypatch, Usual, call, FULL)
    assert results.run(*QUICK, "--variants", "joint/full") == 0
    rows = results()
    assert rows["B1"]["left_out"] == "out of memory"
    assert rows["joint/full"]["s_per_pair"] > 0
    assert rows["joint/full"]["times_faster_than_B1"] is None


def test_without_b1s_gradient_nothing_is_timed_and_it_fails(results, monkeypatch):
    planted(monkeypatch, Usual, 1, FULL)
    assert results.run(*QUICK, "--variants", "joint/full") == 1
    rows = results()
    assert rows["B1"]["left_out"] == "out of memory"
    assert rows["joint/full"]["left_out"] == "nothing to compare with: B1 is left out"


def test_what_a_gpu_does_not_record_is_left_out():
    """On a CPU there are no graphs, and the row says so."""
    variant = Ours("joint/none+graph", setting("tiny"))
    assert [graph.name for graph in variant.graphs] == ["joint/none+graph", "optimiser"]
    assert step.not_recorded(variant, CPU) is None
    for graph in variant.graphs:
        graph.why_not = None
    assert step.not_recorded(variant, torch.device("cuda")) is None
    variant.graphs[1].why_not = "it waits"
    said = step.not_recorded(variant, torch.device("cuda"))
    assert said == "the optimiser was not recorded: it waits"


def test_time_that_runs_out_is_recorded_and_is_no_success(results, monkeypatch):
    short = [*QUICK, "--variants", "B0", "joint/none", "--minutes", "0.00001"]
    assert results.run(*short) == 3
    rows = results()
    assert rows["B1"]["s_per_pair"] > 0
    assert all("no time left" in rows[name]["left_out"] for name in ("B0", "joint/none"))
    planted(monkeypatch, Usual, 3, BROKEN)
    assert results.run(*short) == 1, "a mistake is one, also where time ran out"


def test_a_row_is_written_as_soon_as_it_is_final(results, monkeypatch):
    right, there = Ours.__init__, {}

    def looking(self, name, setting):
        if name == "joint/full":
            raise BROKEN
        there.update(results())
        right(self, name, setting)

    monkeypatch.setattr(Ours, "__init__", looking)
    assert results.run(*QUICK, "--variants", "joint/full", "joint/none") == 1
    assert list(there) == ["joint/full"]
    lines = results.path.read_text().splitlines()
    assert len(lines) == len(results()) == 3, "each once"


@pytest.mark.parametrize("call, rounds", [(1, 0), (3, 0), (5, 0), (6, 2), (8, 4)])
def test_sigterm_leaves_the_rounds_that_are_complete(call, rounds, results, monkeypatch):
    """In preparation, while Adam's states are made, in the second round, in the third, the last."""
    right, calls, before = Ours.gradient, [], signal.getsignal(signal.SIGTERM)

    def gradient(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        right(self, *args, **kwargs)

    monkeypatch.setattr(Ours, "gradient", gradient)
    code = results.run(*QUICK, "--rounds", "5", "--variants", "joint/full", "B0")
    assert code == (0 if rounds else 3)
    rows = results()
    assert set(rows) == {"B0", "B1", "joint/full"}
    for row in rows.values():
        if rounds:
            assert row["rounds"] == rounds and row["s_per_pair"] > 0
            assert row["times_faster_than_B1"] > 0
        else:
            assert row["left_out"] == "no time left: ended by SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("dtype, most", [("float32", 1e-4), ("bfloat16", 0.1)])
def test_dtype_is_what_the_step_computes_in(dtype, most, results):
    assert results.run(*QUICK, "--variants", "joint/none", "--dtype", dtype) == 0
    row = results()["joint/none"]
    assert row["dtype"] == dtype and 0 < row["gradient_off"] < most
    assert dtype == "float32" or row["gradient_off"] > 1e-4


def test_an_unknown_variant_is_one_line(results, capsys):
    assert results.run(*QUICK, "--variants", "joint/some") == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("got joint/some")


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
        held = step.activation_bytes(variant, tiny["all"])
        assert held > 0.7e6 if "/none" in name else held < 0.3e6


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


def test_half_is_said_in_rows_and_table(results, capsys):
    names = ["--adapters", "half", "--variants", "B0", "deferred/attention", "joint/none+cached"]
    assert results.run(*QUICK, *names) == 0
    rows = results()
    assert all(row["adapters"] == "half" and row["gradient_off"] < 1e-4 for row in rows.values())
    assert "; adapters half; " in capsys.readouterr().out


def test_a_baseline_draws_its_times_beforehand(tiny, monkeypatch):
    """Our process's arithmetic on the host is no part of the loops users write."""
    variant = make("B1", tiny["all"])
    expected = tiny["all"].times(tiny["all"].draws(2)).float()
    assert torch.equal(torch.stack(variant.times[2]), expected)
    monkeypatch.setattr(Setting, "times", lambda *_: pytest.fail("times are drawn in the step"))
    variant.gradient(2)


@pytest.mark.parametrize("family", ["tiny", "cogvideox-2b"])
def test_compiled_baselines_compile_every_block(family, narrow_cogvideox):
    """Also of models that name no repeated blocks, as diffusers' CogVideoX."""
    there = setting(family)
    model = Usual("B4", there).model
    found = compiling.blocks(model, there.family.BLOCKS)
    assert len(found) == there.arch.layers
    assert all(block._compiled_call_impl is not None for block in found)


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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny", "toy", "cogvideox-2b"])
def test_compiled_variants_too(family, results, narrow_cogvideox):
    names = ["B4", "B5", "joint/full+compile", "deferred/attention+compile+cached"]
    shape = ["--shape", ARCHITECTURES[family].small[0]]
    arguments = ["--device", "cpu", "--rounds", "2", "--family", family, "--variants", *names]
    assert results.run(*arguments, *shape) == 0
    assert all(row["s_per_pair"] > 0 for row in results().values())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_gradients_are_b1s_in_float32(results, monkeypatch):
    """A factor of 1.05 would pass bf16's tolerance."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    names = ["B0", "B4", "joint/full", "joint/none+graph", "joint/none+cached+graph"]
    names += ["deferred/attention+compile", "deferred/none+cached"]
    shape = ["--family", "tiny", "--shape", "1x64x64", "--dtype", "float32"]
    assert results.run(*shape, "--device", "cuda", "--rounds", "2", "--variants", *names) == 0
    assert all(row["gradient_off"] < 1e-3 for row in results().values())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_small_shapes_are_recorded_as_graphs(results):
    names = ["B4", "joint/none", "joint/none+graph", "joint/none+cached+graph", "deferred/none"]
    shape = ["--family", "tiny", "--shape", "1x64x64"]
    assert results.run(*shape, "--device", "cuda", "--rounds", "5", "--variants", *names) == 0
    rows = results()
    for name in names:
        assert rows[name]["s_per_pair"] > 0 and rows[name]["peak_gb"] > 0
    assert rows["joint/none+graph"]["what"] == "ours", "the graph was recorded"
    faster = rows["joint/none"]["s_per_pair"] / rows["joint/none+graph"]["s_per_pair"]
    assert faster > 2


# ---- bench/device.sh

SCRIPT = Path(step.__file__).with_name("device.sh")
PARTS = re.search(r"^PARTS=\(([^)]*)\)", SCRIPT.read_text(), re.M).group(1).split()
PYTHON = """
case "$*" in
  *is_available*) echo True ;;
  *"-m bench."*) echo "$*" >>"$CALLS"; for file; do :; done; echo "{}" >>"$file" ;;
  "- "*.csv*) touch "$3" ;;
esac
"""
GPU = 'case "$1" in *memory*) echo 143771 ;; *) echo "A card (80GB)" ;; esac'
# Instead of coreutils' timeout: how the parts of RESULTS end (PART=CODE ...), the others well.
ENDS = """
part=${@: -1}
echo "$part $3" >>"$CALLS"
for one in $RESULTS; do [[ $one == "$part="* ]] && exit "${one#*=}"; done
exit 0
"""


class Device:
    """The script in a tree of its own, on a machine whose programs are stand-ins."""

    def __init__(self, root: Path) -> None:
        self.root, self.out, self.kept = root, root / "out", root / "bench" / "results"
        self.kept.mkdir(parents=True)
        shutil.copy(SCRIPT, root / "bench")
        self.calls, self.bin = root / "calls", root / "bin"
        for name in ("nvcc", "ncu", "compute-sanitizer"):
            self.program(name, "exit 0")
        self.program("nvidia-smi", GPU)
        self.program("python", PYTHON)
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PYTHON": str(self.bin / "python"),
            "OUT": str(self.out),
            "CALLS": str(self.calls),
            "FASTPREF_COMMIT": "0123456789",
            "GIT_CEILING_DIRECTORIES": str(root.parent),
        }

    def program(self, name: str, text: str) -> None:
        self.bin.mkdir(exist_ok=True)
        (self.bin / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (self.bin / name).chmod(0o755)

    def run(self, *parts: str, **environment: str) -> tuple[int, list[str]]:
        """(exit code, lines); what the machine ran is in `ran` and `called`."""
        self.calls.write_text("")
        done = subprocess.run(
            ["bash", "bench/device.sh", *parts],
            cwd=self.root,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not done.stderr
        return done.returncode, done.stdout.splitlines()

    @property
    def ran(self) -> list[str]:
        """The parts, of the stand-in for timeout."""
        return [line.split()[0] for line in self.calls.read_text().splitlines()]

    def results(self) -> dict[str, str]:
        """What the last call says of each part."""
        lines = (self.out / "device.jsonl").read_text().splitlines()
        return {row["part"]: row["result"] for row in map(json.loads, lines)}

    def bring_back(self) -> None:
        """What came back goes to bench/results; the machine empties its folder."""
        with (self.kept / "device.jsonl").open("a") as file:
            file.write((self.out / "device.jsonl").read_text())
        shutil.rmtree(self.out)


@pytest.fixture
def machine(tmp_path) -> Device:
    return Device(tmp_path / "tree")


def test_every_part_runs_and_leaves_at_most_eight_files(machine):
    code, said = machine.run()
    assert code == 0 and said[-1] == "no part failed"
    assert machine.results() == dict.fromkeys(PARTS, "passed")
    files = sorted(file.name for file in machine.out.iterdir())
    assert len(files) <= 8 and {"device.log", "device.jsonl", "step.jsonl"} <= set(files)
    log = (machine.out / "device.log").read_text()
    assert all(f"=== {part}: passed" in log for part in PARTS)
    tables = [line for line in machine.calls.read_text().splitlines() if "bench.step" in line]
    assert len(tables) == sum(part.startswith("step_") for part in PARTS)
    for line in tables:
        assert 8.5 < float(re.search(r"--minutes (\S+)", line).group(1)) < 590 / 60
        assert line.endswith(f"--output {machine.out}/step.jsonl")
    first = "B1 deferred/none+compile+cached deferred/none+compile B4 B5"
    assert f"-m bench.step --rounds 3 --family wan --variants {first} " in tables[0]
    assert sum("--adapters half" in line for line in tables) == 1


def test_cards_of_80_gb_get_variants_that_fit(machine):
    machine.program("nvidia-smi", GPU.replace("143771", "81559"))
    machine.run("step_cogvideox_5b")
    assert "B1 deferred/attention+compile+cached deferred/attention+compile B4" in (
        machine.calls.read_text()
    )


def test_calls_go_on_where_the_folder_is_emptied(machine):
    machine.program("timeout", ENDS)
    assert machine.run(RESULTS="step_wan=75 ncu=77")[0] == 3
    assert machine.ran == PARTS
    machine.bring_back()
    code, said = machine.run()
    assert code == 0 and machine.ran == ["build", "step_wan", "ncu"]
    assert "test: passed on 0123456789 before" in said
    machine.bring_back()
    machine.run()
    assert machine.ran == ["build"]
    machine.run(FASTPREF_COMMIT="9876543210")
    assert machine.ran == PARTS, "other sources"
    machine.program("nvidia-smi", GPU.replace("A card", "B card"))
    machine.run()
    assert machine.ran == PARTS, "another device"


def test_what_failed_or_was_cut_twice_goes_last(machine):
    machine.program("timeout", ENDS)
    few, rest = PARTS[:4], PARTS[4:]
    for first in (few, ["build", "test", "step_wan"]):
        machine.run(*first, RESULTS="test=1 step_wan=75")
        machine.bring_back()
        code, _ = machine.run(RESULTS=" ".join(f"{part}=77" for part in PARTS))
        late = ["test"] if first == few else ["test", "step_wan"]
        early = [part for part in ("build", "test", "step_wan", *rest) if part not in late]
        assert code == 0 and machine.ran == early + late
        shutil.rmtree(machine.out)


def test_results_committed_between_calls_are_no_other_sources(machine):
    """Without FASTPREF_COMMIT, by the history; a change of something else is said."""
    machine.program("timeout", ENDS)
    (machine.root / ".gitignore").write_text("/out\n/calls\n/bin\n")
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]

    def git(*arguments: str) -> None:
        subprocess.run(["git", *identity, *arguments], cwd=machine.root, check=True)

    def commit() -> None:
        git("add", "-A")
        git("commit", "-qm", "x")

    git("init", "-q")
    commit()
    machine.run(FASTPREF_COMMIT="")
    machine.bring_back()
    commit()
    machine.run(FASTPREF_COMMIT="")
    assert machine.ran == ["build"]
    with (machine.root / "bench" / "device.sh").open("a") as file:
        file.write("# changed\n")
    _, said = machine.run(FASTPREF_COMMIT="")
    assert machine.ran == PARTS
    assert re.match(r"the sources are not those of a commit \(\w+-dirty\): every part", said[0])


def test_without_a_commit_every_part_runs_and_it_is_said(machine):
    machine.program("timeout", ENDS)
    for _ in range(2):
        code, said = machine.run(FASTPREF_COMMIT="", RESULTS="overhead=75")
        assert code == 3 and machine.ran == PARTS
        assert said[0].startswith("the commit is unknown (no git history, FASTPREF_COMMIT is not")
        assert said[-1] == "no time for overhead: name them in the next call"


def test_a_budget_ends_the_call_in_time(machine):
    """No part begins in the last minute, a part's time is what is left, and a cut is no failure."""
    machine.program("timeout", ENDS)
    code, said = machine.run(FASTPREF_SECONDS="50")
    assert code == 3 and machine.ran == []
    assert said[-1] == f"no time for {' '.join(PARTS)}: the same command goes on with them"
    code, said = machine.run(FASTPREF_SECONDS="300", RESULTS="test=124 step_wan=137")
    limits = {int(line.split()[1]) for line in machine.calls.read_text().splitlines()}
    assert code == 3 and machine.ran == PARTS and limits <= set(range(270, 291))
    assert said[-1] == "no time for test step_wan: the same command goes on with them"
    assert [machine.results()[part] for part in ("test", "step_wan")] == ["cut", "cut"]
    code, said = machine.run("test", FASTPREF_SECONDS="5000", RESULTS="test=124")
    assert code == 1 and said[-1] == "FAILED: test" and machine.calls.read_text() == "test 590\n"


def test_without_kernels_nothing_is_timed(machine):
    """A build that fails in a benchmark's part: pure PyTorch would run in their place."""
    fails = '[[ "$*" != *build_info* && "$*" != *setup.py* ]] || exit 1'
    machine.program("python", PYTHON + fails)
    assert machine.run("step_wan", "overhead")[0] == 1
    assert machine.results() == {"step_wan": "failed", "overhead": "failed"}
    assert not machine.calls.read_text()


@pytest.mark.parametrize(
    "code, result, ended", [(3, "cut", 3), (1, "failed", 1), (75, "failed", 1)]
)
def test_a_table_without_a_variant_is_cut(code, result, ended, machine):
    machine.program("python", PYTHON + f'[[ "$*" != *bench.step* ]] || exit {code}')
    assert machine.run("step_wan")[0] == ended
    assert machine.results() == {"step_wan": result}


def test_a_part_that_is_ended_has_the_last_word(machine):
    """timeout ends the shell and what it runs alike: the table is written before both are gone."""
    program = 'trap "sleep 1; echo the table; exit 0" TERM\nfor i in {1..99}; do sleep 0.1; done'
    machine.program("python", f'{PYTHON}\n[[ "$*" == *bench.step* ]] || exit 0\n{program}')
    begin, said = time.monotonic(), machine.root / "said"
    with said.open("w") as file:  # whose end nobody waits for
        done = subprocess.run(
            ["timeout", "-k", "10", "3", "bash", "bench/device.sh", "--run", "step_wan"],
            cwd=machine.root,
            env=machine.environment | {"FASTPREF_PART": "200"},
            stdout=file,
        )
    assert done.returncode == 124 and said.read_text().endswith("the table\n")
    assert 3.5 < time.monotonic() - begin < 9
