"""bench.step and its like: the whole command, on a CPU and on a GPU."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_bench_variants import setting

from bench import attention, margin_noise, overhead, pair_loss, spo, step, table, timing, variants
from bench.architectures import ARCHITECTURES
from bench.variants import Ours, Usual
from fastpref.step import compiling

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("bench", [attention, margin_noise, overhead, pair_loss, spo, step])
def test_every_benchmark_takes_a_device_and_a_file(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    said = capsys.readouterr().out
    assert "--device" in said and "--output" in said


def test_margin_noise_of_every_family_run_eagerly_is_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(margin_noise, "WAYS", {"eager": None})
    file = tmp_path / "rows.jsonl"
    margin_noise.main(["--device", "cpu", "--pairs", "2", "--output", str(file)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    expected = {(name, mode) for name in margin_noise.TINY for mode in ("joint", "deferred")}
    assert {(row["family"], row["pair_mode"]) for row in rows} == expected
    assert all(row["max_margin"] == 0 for row in rows)


def test_one_prediction_of_spo_beside_two(tmp_path):
    """Both forms of every part are called alike, on tensors whose gradients were compared."""
    file = tmp_path / "rows.jsonl"
    spo.main([*QUICK, "--family", "tiny", "--output", str(file)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    cases = [(row["guidance_scale"], row["part"]) for row in rows]
    assert cases == [(1.0, "forwards"), (1.0, "step"), (5.0, "forwards"), (5.0, "step")]
    for row in rows:
        assert row["s_per_pair"]["one"] > 0 and row["two_over_one"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name, pairs, most", [("wan", 3, 0.0), ("sd15", 12, 1e-2)])
def test_margin_noise_of_loose_blocks_shows_and_of_ours_does_not(name, pairs, most):
    ways = ("compiled", "loose")
    found = {w: margin_noise.largest(margin_noise.TINY[name], "joint", w, pairs, CPU) for w in ways}
    assert found["compiled"] <= most < 0.05 < found["loose"]


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


@pytest.mark.slow
def test_every_variant_of_a_cpu_has_b1s_gradient(results, capsys):
    assert results.run(*QUICK) == 0
    rows = results()
    assert set(rows) == set(variants.CPU)
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
    shown = [line.split()[0] for line in said[said.index("variant  ") :].splitlines()[1:]]
    in_order = sorted(variants.CPU)  # baselines, then ours before what adds to them
    assert shown[: len(rows)] == in_order


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
    right = Ours._step

    def biased(self, *args, **kwargs):
        loss = right(self, *args, **kwargs)
        self.setting.parameters[3].grad *= 1.5
        return loss

    monkeypatch.setattr(Ours, "_step", biased)
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
    right = Ours.__init__

    def full(self, name, setting):
        if name == "joint/none":
            raise error
        right(self, name, setting)

    monkeypatch.setattr(Ours, "__init__", full)
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
    assert table.not_recorded(variant, CPU) is None
    for graph in variant.graphs:
        graph.why_not = None
    assert table.not_recorded(variant, torch.device("cuda")) is None
    variant.graphs[1].why_not = "it waits"
    said = table.not_recorded(variant, torch.device("cuda"))
    assert said == "the optimiser was not recorded: it waits"


def test_time_that_runs_out_is_recorded_and_is_no_success(results, monkeypatch):
    short = [*QUICK, "--variants", "B0", "joint/none", "--minutes", "0.00001"]
    assert results.run(*short) == 3
    rows = results()
    assert rows["B1"]["s_per_pair"] > 0
    assert all("no time left" in rows[name]["left_out"] for name in ("B0", "joint/none"))
    planted(monkeypatch, Usual, 3, BROKEN)
    assert results.run(*short) == 1, "a mistake is one, also where time ran out"


@pytest.mark.parametrize("seconds, prepared", [(20.0, False), (5.0, True)])
def test_preparing_leaves_what_timing_takes(seconds, prepared, results, monkeypatch):
    """Of 600 seconds 250 are left when B1 and joint/full are prepared: with one more variant, steps
    of 20 seconds need 360 to be timed, of 5 seconds 90.
    """
    right, clock, passed = table.prepare, table.time.perf_counter, [0.0]

    def prepare(name, *rest):
        variant, known = right(name, *rest)
        passed[0] += {"B1": 100, "joint/full": 250}.get(name, 0)
        return variant, known | {"s_first": seconds}

    monkeypatch.setattr(table, "prepare", prepare)
    monkeypatch.setattr(table.time, "perf_counter", lambda: clock() + passed[0])
    names = ["--variants", "joint/full", "joint/none"]
    assert results.run(*QUICK, *names, "--minutes", "10") == (0 if prepared else 3)
    rows = results()
    assert ("s_per_pair" in rows["joint/none"]) == prepared
    assert prepared or rows["joint/none"]["left_out"] == "no time left of --minutes 10"
    assert rows["B1"]["s_per_pair"] > 0 and rows["joint/full"]["s_per_pair"] > 0


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


def test_compiled_code_is_saved_before_a_process_can_be_ended(results, monkeypatch, tmp_path):
    """After each variant, the one that fails included, and after SIGTERM in the last."""
    saved, path = [], tmp_path / "inductor.zip"
    monkeypatch.setattr(table.Carried, "load", lambda self: saved.append(self.entry) or 0)
    monkeypatch.setattr(table.Carried, "save", lambda self: saved.append(len(prepared)))
    right, prepared = table.prepare, []

    def prepare(name, *rest):
        prepared.append(name)
        if name == "joint/none":
            raise BROKEN
        if name == "deferred/none":
            os.kill(os.getpid(), signal.SIGTERM)
        return right(name, *rest)

    monkeypatch.setattr(table, "prepare", prepare)
    names = ["--variants", "joint/full", "joint/none", "deferred/none"]
    assert results.run(*QUICK, *names, "--inductor", str(path)) == 1
    assert prepared == ["B1", "joint/full", "joint/none", "deferred/none"]
    assert saved[1:] == [1, 2, 3, 4]
    told = "tiny-1x64x64-2-float32-all-native-B1-joint full-joint none-deferred none"
    assert saved[0].endswith(f"/{told}")


@pytest.mark.parametrize("dtype, most", [("float32", 1e-4), ("bfloat16", 0.1)])
def test_dtype_is_what_the_step_computes_in(dtype, most, results):
    assert results.run(*QUICK, "--variants", "joint/none", "--dtype", dtype) == 0
    row = results()["joint/none"]
    assert row["dtype"] == dtype and 0 < row["gradient_off"] < most
    assert dtype == "float32" or row["gradient_off"] > 1e-4


def test_an_unknown_variant_is_one_line(results, capsys):
    assert results.run(*QUICK, "--variants", "joint/some") == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("got joint/some")


@pytest.mark.slow
def test_half_is_said_in_rows_and_table(results, capsys):
    names = ["--adapters", "half", "--variants", "B0", "deferred/attention", "joint/none+cached"]
    assert results.run(*QUICK, *names) == 0
    rows = results()
    assert all(row["adapters"] == "half" and row["gradient_off"] < 1e-4 for row in rows.values())
    assert "; adapters half; " in capsys.readouterr().out


@pytest.mark.parametrize("family", ["tiny", "cogvideox-2b"])
def test_compiled_baselines_compile_every_block(family, narrow_cogvideox):
    """Also of models that name no repeated blocks, as diffusers' CogVideoX."""
    there = setting(family)
    model = Usual("B4", there).model
    found = compiling.blocks(model, there.family.BLOCKS)
    assert len(found) == there.arch.layers
    assert all(block._compiled_call_impl is not None for block in found)


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
