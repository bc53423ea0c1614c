"""A whole comparison in the demo's world at a tiny size, killed on the way."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.evidence import rows as kept
from bench.evidence.toy import VALIDATION
from fastpref.faults import INTERRUPTED
from fastpref.run.parsing import safe_load

ROOT = Path(__file__).parents[2]
SIZE = ["--pairs", "8", "--steps", "8", "--clips", "12", "--seeds", "1"]
GRID = [
    "--betas",
    "2000",
    "--alphas",
    "0.01",
    "--objectives",
    "dpo,dmpo,sft,dpo_shuffled,sdpo_long",
]
ABOUT_TIME = ("seconds", "seconds_per_pair", "before", "time", "commit")


def command(folder: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "bench.evidence", "--output_dir", str(folder), *SIZE, *flags]


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(folder, *flags), cwd=ROOT, capture_output=True, text=True)


def kill_once(folder: Path, there: Path, by: signal.Signals = signal.SIGKILL) -> None:
    """Starts the grid and ends it by a signal as soon as `there` is there."""
    process = subprocess.Popen(
        command(folder, *GRID),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not there.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(by)
    process.wait()
    ended = INTERRUPTED if by == signal.SIGTERM else -by
    assert process.returncode == ended and there.exists()


def without_time(value):
    if isinstance(value, dict):
        return {k: without_time(v) for k, v in value.items() if k not in ABOUT_TIME}
    return [without_time(v) for v in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_killed_and_begun_again_it_ends_with_the_rows_of_an_unbroken_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = run(whole, *GRID)
    assert done.returncode == 0, done.stderr
    rows = kept.read(whole / "rows.jsonl")
    names = ["base", "dpo", "dmpo", "sft", "dpo_shuffled", "sdpo_long"]
    assert [r["name"] for r in rows] == names
    for row in rows[1:]:
        assert len(row["scores"]["report"]) == len(row["scores"]["choice"]) == 12
        assert len(row["errors"][0]) == VALIDATION
        steps = [p["step"] for p in row["curve"]]
        long = row["name"] == "sdpo_long"
        assert steps == ([4 * i for i in range(1, 9)] if long else [2, 4, 6, 8])
        assert ("report" in row["curve"][0]) == (long or row["name"] == "dpo")
    dpo, shuffled = rows[1], rows[4]
    assert dpo["scores"] != rows[0]["scores"] and dpo["scores"] != shuffled["scores"]
    assert dpo["errors"] != rows[0]["errors"]
    last = dpo["curve"][-1]
    winners = [sum(r["errors"][0]) for r in (dpo, rows[0])]
    assert last["winner"] == pytest.approx(winners[0] / winners[1] - 1, abs=2e-5)
    folder = whole / "runs" / "dpo-beta2000-seed0"
    assert not [*folder.glob("checkpoint-*"), *folder.glob("*.safetensors")]
    assert (folder / "metrics.jsonl").exists() and (folder / "config.yaml").exists()
    assert "| dpo, beta 2000 |" in done.stdout
    assert (whole / "rows_seconds.png").exists()

    kill_once(broken, broken / "world" / "validation.json")
    kill_once(broken, broken / "runs" / "dpo-beta2000-seed0" / "checkpoint-4")
    first = len(kept.read(broken / "rows.jsonl"))
    metrics = broken / "runs" / "sft-seed0" / "metrics.jsonl"
    kill_once(broken, metrics, signal.SIGTERM)  # which leaves a checkpoint of its own
    before = kept.read(broken / "rows.jsonl")
    assert first == 1 and [r["name"] for r in before] == names[:3]
    again = run(broken, *GRID, "--minutes", "0")
    assert again.returncode == INTERRUPTED and "3 runs left" in again.stdout
    again = run(broken, *GRID)
    assert again.returncode == 0, again.stderr
    after = kept.read(broken / "rows.jsonl")
    assert after[:3] == before  # not done again
    assert without_time(after) == without_time(rows)

    other = run(broken, *GRID, "--steps", "9")
    assert other.returncode == 1
    assert "steps (8 there, 9 here)" in other.stderr and other.stderr.count("\n") == 1
    assert kept.read(broken / "rows.jsonl") == after


@pytest.mark.slow
def test_spo_learns_its_preference_model_once(tmp_path):
    done = run(tmp_path, "--objectives", "spo")
    assert done.returncode == 0, done.stderr
    _, *rows = kept.read(tmp_path / "rows.jsonl")
    assert [r["beta"] for r in rows] == [3.0, 10.0, 30.0]
    (before,) = {r["before"] for r in rows}
    assert before > 0
    asked = [(tmp_path / "runs" / f"spo-beta{b}-seed0" / "config.yaml") for b in (3, 10, 30)]
    assert [safe_load(path.read_text())["beta"] for path in asked] == [3.0, 10.0, 30.0]
    assert all(r["curve"][-1]["step"] == 1 and "report" in r["curve"][-1] for r in rows)
    assert all(r["pairs_per_step"] == 32 and r["curve"][-1]["seconds"] > 0 for r in rows)
