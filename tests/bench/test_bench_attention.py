"""bench.attention: its truth is right, its rows hold what they say, what is wrong is not timed."""

from __future__ import annotations

import json

import pytest
import torch

from bench import attention as bench
from fastpref.step import backends
from fastpref.step.backends import Call

CPU = torch.device("cpu")
QUICK = ["--device", "cpu", "--rounds", "3"]


@pytest.fixture
def at_hand(monkeypatch):
    """As on a GPU: on CPU tensors PyTorch's flash attention runs, and cuDNN does not."""
    here = {"native", "flash", "cudnn"}
    why = lambda name, device: None if name in here else "not installed"  # noqa: E731
    monkeypatch.setattr(backends, "why_not_here", why)


@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_the_truth_is_float64_attention(scale, monkeypatch):
    """With keys of another number, and queries that leave a rest."""
    monkeypatch.setattr(bench, "ROWS", 7)
    call = Call(2, 3, 24, 16, 8, torch.bfloat16, CPU)
    q, k, v, grad = (x.detach().double() for x in backends.inputs(call, scale))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
    right = [out, *torch.autograd.grad(out, leaves, grad)]
    for found, expected in zip(bench.exact(call, scale), right, strict=True):
        off = (found.double() - expected).norm() / expected.norm()
        assert off < 2e-5


@pytest.mark.parametrize(
    "family, said",
    [
        ("wan", "[1, 12, 32760, 128] on 32760 keys in bfloat16"),
        ("cogvideox-2b", "[1, 30, 17776, 64] on 17776 keys in bfloat16"),
    ],
)
def test_the_calls_are_those_of_the_steps(family, said):
    assert str(bench.self_attention(family, None, CPU)) == said


def test_rows_of_what_runs_and_reasons_for_the_rest(at_hand, tmp_path, capsys):
    assert bench.main([*QUICK, "--output", str(tmp_path / "rows")]) == 0
    rows = {row["backend"]: row for row in map(json.loads, (tmp_path / "rows").open())}
    assert set(rows) == set(backends.BACKENDS)
    said = capsys.readouterr().out
    for name in ("native", "flash"):
        row = rows[name]
        assert "left_out" not in row and row["kernel"].startswith("aten::_scaled_dot_product_flash")
        assert 0 < row["off_at_1"] < 1e-2 and 0 < row["off_at_16"] < 5e-2
        for part, flops in (("forward", 4), ("backward", 10)):
            seconds = row[f"{part}_ms"] / 1e3
            assert row[f"{part}_tflops"] * seconds * 1e12 == pytest.approx(flops * 4 * 192**2 * 32)
            low, high = row[f"{part}_ms_quartiles"]
            assert low <= row[f"{part}_ms"] <= high
    assert "does not run on [1, 4, 192, 32] on 192 keys" in rows["cudnn"]["left_out"]
    assert rows["flash3"]["left_out"] == "not installed"
    assert "flash3      not installed\n" in said and "\nflash " in said


def test_a_kernel_that_is_wrong_is_not_timed(at_hand, tmp_path, monkeypatch):
    right = backends.attend
    wrong = lambda name, q, k, v: right("native", q, k, v) * (1 + (name == "flash"))  # noqa: E731
    monkeypatch.setattr(backends, "attend", wrong)
    assert bench.main([*QUICK, "--output", str(tmp_path / "rows")]) == 0
    rows = {row["backend"]: row for row in map(json.loads, (tmp_path / "rows").open())}
    assert "strays from native attention" in rows["flash"]["left_out"]
    assert "forward_ms" not in rows["flash"] and rows["native"]["forward_ms"] > 0


def test_a_shape_that_does_not_divide_is_one_line(capsys):
    assert bench.main([*QUICK, "--shape", "9x99x128"]) == 1
    said = capsys.readouterr().out
    assert said.startswith("bench.attention: --shape 9x99x128") and said.count("\n") == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_two_backends_at_least_are_timed(tmp_path):
    arguments = ["--families", "wan", "--shape", "5x256x256", "--rounds", "3"]
    assert bench.main([*arguments, "--output", str(tmp_path / "rows")]) == 0
    rows = {row["backend"]: row for row in map(json.loads, (tmp_path / "rows").open())}
    ran = [name for name, row in rows.items() if "left_out" not in row]
    assert "native" in ran and {"cudnn", "flash"} & set(ran)
    assert all(rows[name]["off_at_1"] < 1e-2 and rows[name]["kernel"] for name in ran)
    assert all(rows[name]["off_at_16"] < 2e-2 for name in ran)
