"""Metrics between two log steps: a meter's state in a checkpoint, and one that no run wrote."""

from __future__ import annotations

import json
from hashlib import blake2b

import pytest
import torch
from commands import arguments, options

from fastpref.cli import main
from fastpref.run.telemetry import BINS, Meter

GOOD = {"names": ["loss", "x"], "sums": [[0.5, 1.0]] * BINS, "counts": [[1.0]] * BINS}


def meter(tmp_path, state) -> Meter:
    found = Meter(torch.device("cpu"))
    found.restore(state, tmp_path / "checkpoint-1")
    return found


def test_a_state_comes_back(tmp_path):
    first = meter(tmp_path, {})
    assert first.state() == {} == first.flush()
    level, values = torch.tensor([0.05, 0.95]), torch.tensor([0.1, torch.nan])
    first.add({"loss": values}, level)
    again = meter(tmp_path, json.loads(json.dumps(first.state())))
    for each in (first, again):
        each.add({"loss": torch.tensor([0.3, 0.2])}, level)
    assert str(first.state()) == str(again.state()) and "0.4" in str(again.state())


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        "x",
        {"names": ["loss"]},
        {**GOOD, "names": []},
        {**GOOD, "names": "ab"},
        {**GOOD, "names": ["loss", 1]},
        {**GOOD, "names": ["loss"]},
        {**GOOD, "sums": [[0.5, 1.0]]},
        {**GOOD, "sums": [[0.5, 1.0]] * (BINS - 1) + [[0.5]]},
        {**GOOD, "sums": [[0.5, "x"]] * BINS},
        {**GOOD, "sums": [[0.5, 10**400]] * BINS},
        {**GOOD, "counts": [1.0] * BINS},
        {**GOOD, "counts": {}},
        {**GOOD, "counts": None},
    ],
)
def test_a_state_that_is_none_is_named(state, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint-1: state.json's meter expected names, sums"):
        meter(tmp_path, state)


def test_one_of_other_values_is_named(tmp_path):
    restored = meter(tmp_path, GOOD)
    values = {"x": torch.ones(1), "loss": torch.ones(1)}  # the same, elsewhere
    with pytest.raises(ValueError, match=r"meter holds loss, x, expected x, loss: resume from ano"):
        restored.add(values, torch.zeros(1))


def test_a_forged_state_in_a_checkpoint_is_one_line(encoded_pairs, tmp_path, capsys):
    assert main(["train", *arguments(options(encoded_pairs, tmp_path, max_train_steps=2))]) == 0
    folder = tmp_path / "checkpoint-2"
    state = json.loads((folder / "state.json").read_text())
    for forged in ({"names": "loss", "sums": 1, "counts": 1}, GOOD):
        text = json.dumps(state | {"meter": forged}).encode()
        (folder / "state.json").write_bytes(text)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["state.json"] = [len(text), blake2b(text).hexdigest()[:32]]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        capsys.readouterr()
        assert main(["train", *arguments(options(encoded_pairs, tmp_path))]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert "meter" in said and said.endswith("resume from another checkpoint")
