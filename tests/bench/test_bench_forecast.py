"""What the benchmarks' tables are predicted to take, and which variants are left out for it."""

from __future__ import annotations

from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
from test_bench_variants import setting

from bench import step, table
from bench.forecast import Beside, forecast, plan
from fastpref.step import memory

NAMES = ["B0", "B1", "joint/none", "joint/none+graph", "deferred/none+cached"]
H100, H200 = memory.CARDS["h100-80"], memory.CARDS["h200"]


def test_variants_are_what_they_are_predicted_as():
    found = forecast("tiny", None, 2, "all", NAMES, H100)
    b0, b1, joint, graph, cached = (found[name] for name in NAMES)
    assert list(found) == NAMES
    assert b0.weights == pytest.approx(2 * b1.weights, rel=0.01) and b0.kept == b1.kept
    assert b1.checkpointing == "full" and b1.kept < joint.kept
    assert joint.kept == 4 * cached.kept, "two pairs at once, or one member"
    assert graph.seconds < joint.seconds, "launches take all of a small step's time"
    assert b1.seconds > joint.seconds
    online = forecast("tiny", None, 2, "all", ["deferred/none"], H100)["deferred/none"]
    assert cached.seconds < online.seconds
    assert joint.seconds == pytest.approx(online.seconds / 4, rel=0.01), "one launch for four rows"


def test_a_shared_prefix_is_ours_alone():
    every = forecast("tiny", None, 1, "all", ["joint/full"], H100)["joint/full"]
    found = forecast("tiny", None, 1, "half", ["B1", "joint/full"], H100)
    assert found["joint/full"].seconds < 0.9 * found["B1"].seconds
    assert found["B1"].seconds < every.seconds


@pytest.mark.slow
@pytest.mark.parametrize("card", ["80", "141"])
def test_the_plan_of_a_table(card, capsys):
    arguments = ["--variants", "B0", "B1", "deferred/attention", "deferred/none", "--family", "wan"]
    assert step.main([*arguments, "--rounds", "3", "--plan", card]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["B1", *arguments[1:2], *arguments[3:5]]
    words = {line.split()[0]: line for line in lines}
    assert ("does not fit" in words["deferred/none"]) == (card == "80")
    assert sum("does not fit" in line for line in lines) == (card == "80")
    assert " predicted 6.9" in words["B1"] or card == "141"
    assert last.startswith("predicted ") and last.endswith(" s")
    assert 150 < int(last.split()[1]) < 400


@pytest.mark.slow
def test_the_headline_on_both_cards(capsys):
    """What a first call on a card compiles: nothing recomputed on both, B5 on neither."""
    names = ["B1", "deferred/none+compile+cached", "deferred/none+compile", "B4"]
    names += ["deferred/attention+compile", "B5"]
    found = forecast("wan", None, 1, "all", names, H100)
    for on in (H100, H200):
        assert [name for name, row in found.items() if not row.fits(on)] == ["B5"]
    plan(found, 1, 3, H100)
    assert 250 < int(capsys.readouterr().out.split()[-2]) < 500
    names = ["deferred/none+compile", "deferred/attention+compile"]
    found = forecast("cogvideox-5b", None, 1, "all", names, H100)
    assert [row.fits(H100) for row in found.values()] == [False, True]
    assert all(row.fits(H200) for row in found.values())


def beside(found: dict | Exception, on: memory.Card) -> Beside:
    """A forecast that is done, or failed."""
    made = Beside.__new__(Beside)
    made.on, made.found, made.future = on, None, Future()
    made.pool = ProcessPoolExecutor(1)
    done = made.future.set_exception if isinstance(found, Exception) else made.future.set_result
    done(found)
    return made


def test_a_forecast_that_fails_leaves_the_table_alone(capsys):
    failed = beside(RuntimeError("no\nsuch operator"), H100)
    assert failed.why_not("B5", {}) is None and failed.why_not("B4", {}) is None
    assert capsys.readouterr().out == "nothing is predicted: RuntimeError: no such operator\n"


@pytest.mark.slow
def test_a_forecast_beside_the_table_is_the_same():
    """In a process of its own, which is ended with the table."""
    told, rows = ("tiny", None, 1, "all", ["B1"]), {"B1": {}}
    made = Beside(H100, *told)
    assert made.why_not("B1", rows) is None
    assert rows["B1"]["predicted_gb"] == forecast(*told, H100)["B1"].peak / 1e9
    (worker,) = made.pool._processes.values()
    made.leave()
    assert not worker.is_alive()


@pytest.mark.slow
def test_a_variant_that_is_predicted_not_to_fit_is_not_tried(monkeypatch):
    """As on a card, here with a forecast of the CPU's table: it is named in its row."""
    args = ["--variants", "joint/none", "deferred/none", "--family", "tiny", "--device", "cpu"]
    own = setting(family="tiny")
    found = forecast("tiny", own.shape, 1, "all", ["B1", "joint/none", "deferred/none"], H100)
    few, many = sorted(("joint/none", "deferred/none"), key=lambda name: found[name].peak)
    less, more = found[few].peak, found[many].peak
    gib = ((less + more) / 2 / (1 - memory.SPARE) + memory.CONTEXT) / memory.GIB
    made, tried = [], []

    class Table(table.Table):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.forecast = beside(found, replace(H100, gib=gib))
            made.append(self)

    real = table.prepare
    monkeypatch.setattr(table, "prepare", lambda name, *a: (tried.append(name), real(name, *a))[1])
    monkeypatch.setattr(table, "Table", Table)
    assert step.main([*args, "--shape", own.shape, "--rounds", "2", "--minutes", "1"]) == 0
    assert tried == ["B1", few] and made
    rows = made[0].rows
    assert rows[many]["left_out"].startswith("out of memory, as predicted: 0.0 GB, 0.0 are there")
    assert rows[few]["predicted_gb"] == less / 1e9
    assert torch.tensor(rows["B1"]["predicted_s"]).isfinite()
