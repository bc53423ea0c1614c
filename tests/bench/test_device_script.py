"""bench/device.sh: which parts it runs, what it leaves behind, and where it goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from bench import step

CPU = torch.device("cpu")


SCRIPT = Path(step.__file__).with_name("device.sh")
TABLE = re.search(r'^TABLE="\n(.*?)"', SCRIPT.read_text(), re.M | re.S).group(1).splitlines()
PARTS = [line.split()[0] for line in TABLE]
SHARES = {line.split()[0]: int(line.split()[2]) for line in TABLE}
# Instead of Python: bench.step predicts that what keeps nothing fits 100 GiB alone.
PYTHON = """
case "$*" in
  *is_available*) echo "${SEEN:-True True}" ;;
  *--plan*)
    echo "$*" >>"$CALLS"
    gib=${@: -1}
    for name; do
      case $name in
        *none+compile* | B5) ((gib > 100)) && fits= || fits="  does not fit"
          echo "$name  predicted 4.36 s/pair  70.1 GB$fits" ;;
        B[0-4] | */*) echo "$name  predicted 6.40 s/pair  19.0 GB" ;;
      esac
    done
    echo "predicted ${TAKES:-100} s" ;;
  *"-m bench."*)
    echo "$*" >>"$CALLS"
    for file; do :; done
    echo "{}" >>"$file"
    [[ "$*" != *--inductor* ]] || { sleep 0.01; echo code >>bench/results/inductor.zip; } ;;
  "- "*.csv*) touch "$3" ;;
esac
"""
GPU = 'echo "A card (80GB)"'
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

    def run(self, *parts: str, timeout: int = 60, **environment: str) -> tuple[int, list[str]]:
        """(exit code, lines); what the machine ran is in `ran` and `called`."""
        self.calls.write_text("")
        done = subprocess.run(
            ["bash", "bench/device.sh", *parts],
            cwd=self.root,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not done.stderr
        return done.returncode, done.stdout.splitlines()

    @property
    def ran(self) -> list[str]:
        """The parts, of the stand-in for timeout."""
        return [line.split()[0] for line in self.calls.read_text().splitlines()]

    def limits(self) -> dict[str, int]:
        """The seconds that each part was given, of the stand-in for timeout."""
        lines = self.calls.read_text().splitlines()
        return {part: int(seconds) for part, seconds in map(str.split, lines)}

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
    assert {file.name for file in machine.out.iterdir()} == {
        *("device.log", "device.jsonl", "step.jsonl", "pair_loss.jsonl", "kernels.jsonl"),
        *("margin_noise.jsonl", "overhead.jsonl", "inductor.zip"),
    }, "eight files at most come back"
    log = (machine.out / "device.log").read_text()
    assert all(f"=== {part}: passed" in log for part in PARTS)
    tables = [line for line in machine.calls.read_text().splitlines() if "bench.step" in line]
    assert len(tables) == sum(part.startswith("step_") for part in PARTS)
    for line in tables:
        assert 1 <= float(re.search(r"--minutes (\S+)", line).group(1)) < 500 / 60
        assert "--inductor bench/results/inductor.zip " in line
        assert line.endswith(f"--output {machine.out}/step.jsonl")
    first = "B1 deferred/none+compile+cached deferred/none+compile B4 deferred/attention+compile B5"
    assert f"-m bench.step --rounds 3 --variants {first} --family wan " in tables[0]
    assert sum("--adapters half" in line for line in tables) == 1


def test_the_most_telling_parts_come_first_and_fit_a_call():
    """No part eats the whole call, and each has more than is predicted."""
    first = ["build", "test_cuda", "attention", "step_wan", "pair_loss"]
    assert PARTS[:8] == [*first, "step_small_256", "margin_noise", "memcheck"]
    assert all(SHARES[part] <= 500 for part in PARTS)
    predicted = {part: int(n) for part, n, _ in map(str.split, TABLE) if n != "-"}
    assert all(2 * n <= SHARES[part] <= 5 * n for part, n in predicted.items())
    assert sum(predicted.get(part, SHARES[part]) for part in first) <= 570


def test_compiled_code_goes_out_and_comes_in(machine):
    """Out after each part that has added to it; in with what travels, as the file of results."""
    (machine.kept / "inductor.zip").write_text("from the last card\n")
    machine.run("build", "step_wan")
    assert (machine.out / "inductor.zip").read_text() == "from the last card\ncode\n"
    (machine.out / "inductor.zip").unlink()
    machine.run("pair_loss", OUT=str(machine.kept))
    assert (machine.kept / "inductor.zip").read_text() == "from the last card\ncode\n"


# ---- The plan


def plan(machine: Device, gib: int, **environment: str) -> list[str]:
    code, said = machine.run("--plan", str(gib), **environment)
    assert code == 0
    return said


@pytest.mark.parametrize("gib, fits", [(80, False), (141, True)])
def test_the_plan_needs_no_gpu_and_says_what_fits(gib, fits, machine):
    machine.program("nvidia-smi", "exit 9")
    said = plan(machine, gib, SEEN="False False", TAKES="361.5")
    assert said[0] == f"--- call 1, 570 s on a card of {gib} GiB"
    assert said[1:4] == [
        "build                      25 s, at most 90 s",
        "test_cuda                  40 s, at most 120 s",
        "attention                  20 s, at most 60 s",
    ]
    assert said[4] == "step_wan                  361 s, at most 395 s"
    names = ["B1", "deferred/none+compile+cached", "deferred/none+compile", "B4"]
    names += ["deferred/attention+compile", "B5"]
    lines = said[5 : 5 + len(names)]
    assert [line.split()[0] for line in lines] == names
    without = [line.split()[0] for line in lines if line.endswith("  does not fit")]
    assert without == ([] if fits else [names[1], names[2], "B5"])
    assert lines[0] == "    B1  predicted 6.40 s/pair  19.0 GB"
    parts = [line.split()[0] for line in said if line.endswith(" s") and line[0] not in "- "]
    assert sorted(parts) == sorted(PARTS) and not machine.out.exists()
    asked = machine.calls.read_text().splitlines()
    assert len(asked) == sum(part.startswith("step_") for part in PARTS)
    assert all(line.endswith(f" --plan {gib}") and "--minutes" not in line for line in asked)


def test_the_plan_fills_calls_with_what_is_predicted(machine):
    """Each call builds again; a part takes no more than its share; later ones fill what is left."""
    calls, left, longest = {}, 0, 0
    for line in plan(machine, 141, FASTPREF_SECONDS="400", TAKES="9999")[:]:
        if line.startswith("--- call"):
            call, left = int(re.match(r"--- call (\d+), 400 s", line).group(1)), 390
            left -= 25 * (call > 1)
        elif not line.startswith(" "):
            part, seconds, *_, most, _ = line.split()
            calls.setdefault(call, []).append(part)
            left -= min(int(seconds), int(most))
            assert left >= 0 or calls[call] == [part], line
            longest = max(longest, call)
    assert calls[1][:4] == ["build", "test_cuda", "attention", "pair_loss"], "step_wan is too long"
    assert calls[2] == ["step_wan"] and longest < len(PARTS)
    ran = [part for parts in calls.values() for part in parts]
    assert sorted(ran) == sorted(PARTS)


def test_a_table_without_a_prediction_ends_the_plan(machine):
    machine.program("python", 'echo "bench.step: --shape a"; echo a warning >&2; exit 1')
    done = subprocess.run(
        ["bash", "bench/device.sh", "--plan", "80"],
        cwd=machine.root, env=machine.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    said = "bench/device.sh: no prediction of step_wan:\na warning\nbench.step: --shape a\n"
    assert done.stderr == said


# ---- Going on


def test_calls_go_on_where_the_folder_is_emptied(machine):
    machine.program("timeout", ENDS)
    assert machine.run(RESULTS="step_wan=75 ncu=77")[0] == 3
    assert machine.ran == PARTS
    machine.bring_back()
    code, said = machine.run()
    assert code == 0 and machine.ran == ["build", "ncu", "step_wan"]
    assert "test_cuda: passed on 0123456789 before" in said
    machine.bring_back()
    machine.run()
    assert machine.ran == ["build"]
    machine.run(FASTPREF_COMMIT="9876543210")
    assert machine.ran == PARTS, "other sources"
    machine.program("nvidia-smi", GPU.replace("A card", "B card"))
    machine.run()
    assert machine.ran == PARTS, "another device"


@pytest.mark.parametrize(
    "result, late",
    [
        ("test_cuda=1 step_wan=75", ["test_cuda", "step_wan"]),  # failed, and without a variant
        ("pair_loss=124", ["pair_loss"]),  # its share was over
    ],
)
def test_what_failed_or_was_slow_goes_last_with_all_the_time(result, late, machine):
    machine.program("timeout", ENDS)
    skipped = " ".join(f"{part}=77" for part in PARTS)
    machine.run(RESULTS=f"{result} {skipped}")
    machine.bring_back()
    code, _ = machine.run(RESULTS=skipped)
    assert code == 0 and machine.ran == [part for part in PARTS if part not in late] + late
    for part, seconds in machine.limits().items():
        assert seconds == (590 if part in late else SHARES[part])


def test_what_a_calls_end_cut_goes_on_in_its_place_and_twice_goes_last(machine):
    machine.program("timeout", ENDS)
    for late in ([], ["step_wan"]):
        assert (
            machine.run("build", "step_wan", FASTPREF_SECONDS="300", RESULTS="step_wan=75")[0] == 3
        )
        assert machine.results()["step_wan"] == "cut"
        machine.bring_back()
        machine.run(RESULTS=" ".join(f"{part}=77" for part in PARTS))
        assert machine.ran == [part for part in PARTS if part not in late] + late
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
    """A part begins where its predicted time is left, a table where two minutes are, and what the
    call's end cuts is no failure.
    """
    machine.program("timeout", ENDS)
    code, said = machine.run(FASTPREF_SECONDS="24")
    assert code == 3 and machine.ran == []
    assert said[-1] == f"no time for {' '.join(PARTS)}: the same command goes on with them"
    code, said = machine.run(FASTPREF_SECONDS="62")
    short = ["build", "test_cuda", "attention", "memcheck", "ncu"]
    assert code == 3 and machine.ran == short
    code, said = machine.run(
        "test_cuda", "step_wan", FASTPREF_SECONDS="200", RESULTS="step_wan=124"
    )
    assert code == 3 and said[-1] == "no time for step_wan: name them in the next call"
    assert machine.results()["step_wan"] == "cut"
    assert machine.limits()["test_cuda"] > 180 and machine.limits()["step_wan"] <= 190
    machine.run("step_wan", RESULTS="step_wan=137")
    assert machine.results()["step_wan"] == "failed", "killed long before its time was over"


def test_a_part_gets_its_share_and_named_all_of_it(machine):
    machine.program("timeout", ENDS)
    code, said = machine.run(RESULTS="test_cuda=124")
    assert code == 3 and machine.results()["test_cuda"] == "slow"
    assert said[-1] == "no time for test_cuda: the same command goes on with them"
    limits = {
        p: int(seconds) for p, seconds in map(str.split, machine.calls.read_text().splitlines())
    }
    assert limits == SHARES
    code, said = machine.run("test_cuda", FASTPREF_SECONDS="5000", RESULTS="test_cuda=124")
    assert code == 1 and said[-1] == "FAILED: test_cuda"
    assert machine.limits() == {"test_cuda": 590}


def test_without_kernels_nothing_is_timed(machine):
    """A build that fails in a benchmark's part: pure PyTorch would run in their place."""
    machine.program("python", PYTHON + '[[ "$*" != *setup.py* ]] || exit 1')
    assert machine.run("step_wan", "overhead", SEEN="True False")[0] == 1
    assert machine.results() == {"step_wan": "failed", "overhead": "failed"}
    assert not machine.calls.read_text()


@pytest.mark.parametrize(
    "code, result, ended", [(3, "slow", 3), (1, "failed", 1), (75, "failed", 1)]
)
def test_a_table_without_a_variant_is_slow(code, result, ended, machine):
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


# ---- The rehearsal: nothing stands in but nvidia-smi


@pytest.mark.slow
def test_a_rehearsal_on_a_cpu_fails_in_no_part(tmp_path):
    """One part of each kind, really run with tiny shapes."""
    root, results = SCRIPT.parents[1], tmp_path / "tree" / "bench" / "results"
    for name in ("bench", "csrc", "fastpref", "tests"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
        shutil.copytree(root / name, tmp_path / "tree" / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(root / name, tmp_path / "tree")
    machine = Device(tmp_path / "tree")
    parts = ["build", "test_cuda", "attention", "step_wan", "pair_loss", "step_small_256"]
    parts += ["margin_noise", "memcheck", "ncu", "step_flash3", "overhead"]
    own = {"PYTHON": sys.executable, "FASTPREF_REHEARSE": "1", "FASTPREF_CUDA": "0"}
    own |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled"), "OMP_NUM_THREADS": "1"}
    code, said = machine.run(*parts, timeout=1200, **own)
    assert code == 0, "\n".join(said)
    skipped = {"memcheck", "ncu", "step_flash3"}
    assert machine.results() == {part: "skipped" if part in skipped else "passed" for part in parts}
    rows = [json.loads(line) for line in (machine.out / "step.jsonl").read_text().splitlines()]
    assert len(rows) > 10 and all(row["s_per_pair"] > 0 for row in rows)
    with zipfile.ZipFile(machine.out / "inductor.zip") as archive:
        (entry,) = archive.namelist()
    table = "tiny-1x64x64-1-float32-all-native-B1-deferred none+compile+cached-"
    assert entry.startswith(f"{torch.__version__}/") and table in entry
    assert sorted(results.iterdir()) == [results / "inductor.zip"]
