"""bench/device.sh: which parts it runs, what it leaves behind, and where it goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from bench import step

CPU = torch.device("cpu")


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
