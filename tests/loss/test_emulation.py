"""The CUDA kernels' own source on the CPU: built by g++ against emulation/, threads as fibers.

The program checks every kernel against a float64 reference, under AddressSanitizer and UBSan, and
that the bits are the same in every order of threads and blocks and on every grid. Mistakes planted
in a copy of the source show that it would notice.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastpref import oracle
from fastpref.loss.objectives import OBJECTIVES, objective

ROOT = Path(__file__).parents[2]
CSRC, EMULATION = ROOT / "csrc", Path(__file__).parent / "emulation"
SANITIZE = "-g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build with")


def compiled(source: Path, include: Path, flags: str, target: Path) -> Path:
    command = f"g++ -std=c++17 -O1 {flags} -ffp-contract=off -fno-strict-aliasing -Wall -Wextra"
    command += f" -Wno-unknown-pragmas -I{EMULATION} -I{include} -x c++ -c {source} -o {target}"
    done = subprocess.run(command.split(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory):
    """build(flags, edits): the test program from a copy of csrc, with {file: (text, new text)}."""
    tests = {}  # the program's own half, which no edit touches

    def build(flags: str = "", edits: dict[str, tuple[str, str]] | None = None) -> Path:
        folder = tmp_path_factory.mktemp("kernels")
        copy = shutil.copytree(CSRC, folder / "csrc")
        for name, (old, new) in (edits or {}).items():
            text = (copy / name).read_text()
            assert text.count(old) == 1, f"{name} does not have exactly once: {old}"
            (copy / name).write_text(text.replace(old, new))
        if flags not in tests:
            own = EMULATION / "kernels.cpp"
            tests[flags] = compiled(own, CSRC, flags, folder / "kernels.o")
        strict = flags if edits else f"{flags} -Werror"
        objects = [
            compiled(copy / f"{name}.cu", copy, strict, folder / f"{name}.o")
            for name in ("pair", "noise")
        ]
        program = folder / "kernels"
        link = ["g++", *flags.split(), *objects, tests[flags], "-o", program]
        subprocess.run(link, check=True)
        return program

    return build


def run(program: Path, what: str, given: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(
        [program, what], input=given, capture_output=True, text=True, env=environment, timeout=600
    )


@pytest.fixture(scope="module")
def program(build) -> Path:
    return build(SANITIZE)


def test_right_and_the_same_bits_in_every_order(program: Path) -> None:
    """All dtypes and forms, odd sizes, unaligned rows; 256 threads a block as on the GPU."""
    result = run(program, "all")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^[6-9]\d cases, 0 differences$", result.stdout, re.M), result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threads", "cases", "flags"), [(64, "all", SANITIZE), (512, "few", "")], ids=["64", "512"]
)
def test_other_block_sizes(build, threads: int, cases: str, flags: str) -> None:
    """The logic does not lean on 256 threads. (The bits do: a thread's share changes.)"""
    size = ("constexpr int kThreads = 256;", f"constexpr int kThreads = {threads};")
    result = run(build(flags, {"reduce.cuh": size}), cases)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_functor_is_the_oracles(program: Path) -> None:
    """loss_epilogue of every objective and option against autograd of the oracle, to 1e-9."""
    options = {
        "dpo": [{"label_smoothing": 0.1}],
        "hinge": [{"sft_weight": 0.25}],
        "dmpo": [{"alpha": 0.05}],
        "dpo_cm": [
            {"clip": 0.05, "mask_threshold": 0.8},
            {"sft_weight": 0.1},
            {"placement": "loss"},
        ],
        "sdpo": [{"combine": "min"}, {"combine": "mean", "inverse_weight": True}],
    }
    options["sdpo"] += [{**each, "placement": "ratio"} for each in options["sdpo"]]
    for name in set(OBJECTIVES) - {"spo"}:
        options.setdefault(name, []).append({"safeguard": 0.3})
        options[name].append({"safeguard": 0.2, "sft_weight": 0.4})
    generator = torch.Generator().manual_seed(1)
    lines, expected = [], []
    for name in OBJECTIVES:
        for extra in [{}, *options.get(name, [])]:
            obj = objective(name, beta=10.0, **extra)
            for _ in range(4):
                errors = torch.rand(4, 1, generator=generator, dtype=torch.float64)
                errors.requires_grad_()
                gain, weight = torch.rand(2, 1, generator=generator, dtype=torch.float64)
                gain = 0.3 * gain
                loss = weight * oracle.loss(obj, *errors, gain)
                slopes = torch.autograd.grad(loss.sum(), errors)[0][:2]
                cross = torch.rand(1, generator=generator, dtype=torch.float64) - 0.2
                share = torch.ones_like(cross)
                if obj.safeguard is not None:
                    share = oracle.safeguard(*slopes, errors[0], cross, obj.safeguard)
                expected.append([loss.item(), slopes[0].item(), (slopes[1] * share).item()])
                expected[-1].append(share.item())
                numbers = [*obj.hyper(), *errors.flatten().tolist(), gain.item(), weight.item()]
                numbers.append(0.0 if obj.safeguard is None else cross.item())
                lines.append(" ".join(map(repr, [obj.number, *map(float, numbers)])))
    result = run(program, "epilogue", "\n".join(lines))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [[float(x) for x in line.split()] for line in result.stdout.splitlines()]
    got = torch.tensor(rows, dtype=torch.float64)[:, [0, 4, 5, 6]]
    want = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-300)


@pytest.mark.slow
def test_a_planted_write_behind_a_tensor_is_reported(build) -> None:
    guarded = "if (i < count) to[i] = round_to<T>(values[i]);"
    edit = {"reduce.cuh": (guarded, "to[i] = round_to<T>(values[i]);")}
    result = run(build(SANITIZE, edit), "few")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr and "WRITE of size 2" in result.stderr


PLANTED: dict[str, tuple[str, str]] = {
    "no barrier before a block's sums are read": (
        "  __syncthreads();\n  double total = 0;",
        "  double total = 0;",
    ),
    "no barrier before the next sums are written": (
        "  __syncthreads();  // the last call's sums have been read\n",
        "",
    ),
    "no barrier between the slots and the ticket": (
        "  __shared__ bool last;\n  __syncthreads();\n",
        "  __shared__ bool last;\n",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_missing_barrier_changes_bits(build, mistake: str) -> None:
    result = run(build("", {"reduce.cuh": PLANTED[mistake]}), "few")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "orders disagree" in result.stdout
