"""What nvcc made of the kernels for sm_90: registers, loads and stores, instructions, the ticket.

Compiled as setup.py does it. Held to vectors are the loops over whole aligned vectors, one in each
of the 36 kernels that move tensors. Not held: their second loops, for rows that are not aligned
and the last elements; the last block's sums over slots and the epilogue, scalars of a pair both.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SIZES = {"f32": 4, "bf16": 2, "f16": 2}
MANGLED = {"f": "f32", "13__nv_bfloat16": "bf16", "6__half": "f16"}
KERNEL = r"\d+(noise|error|grad|epilogue)_kernel(?:I({0})({0}|S\d*_)(?:Lb([01])E)?EE)?".format(
    "|".join(MANGLED)
)
# Tensors of the first and of the second dtype that are loaded, and those that are stored, of a
# member: x0 | x_t; pred, ref, target | seed; pred, target | grad_pred.
MOVED = {"noise": ((1, 0), (0, 1)), "error": ((2, 1), (1, 0)), "grad": ((1, 1), (1, 0))}
MOVED["cross"] = MOVED["error"]  # the error kernel with the product of the residuals
# What the order of memory rests on, and what it orders, at the head of a line of PTX.
ORDERED = r"^\s*(?:@%p\d+ )?((?:bar|fence|membar|atom|red|(?:ld|st)\.global)[\w.]*)"
BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "": 4}
PAIRS = list(product(SIZES, SIZES))
Code = list[tuple[int, str]]  # address, instruction


class Made(NamedTuple):
    folder: Path
    said: str  # by nvcc and ptxas
    nvcc: str  # its version


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """noise.o, pair.o and their PTX, made by setup.py's own rules."""
    folder = tmp_path_factory.mktemp("sass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **_: None)
        patch.setenv("FASTPREF_WERROR", "1")
        setup = runpy.run_path(str(ROOT / "setup.py"))
        nvcc, why_not = setup["find_nvcc"]()
        if not nvcc:
            pytest.skip(f"needs nvcc: {why_not}")
        rules = setup["Build"]._rules(folder, folder / "_C.so", "c++", nvcc, ["90"])
        (folder / "build.ninja").write_text(rules)
        more = f"-Xptxas -v -Xcompiler -Wextra --keep --keep-dir {folder}"
        patch.setenv("NVCC_APPEND_FLAGS", more)
        command = [setup["find_ninja"](), "-C", str(folder), "noise.o", "pair.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    version = setup["output_of"](nvcc, "--version")
    return Made(folder, done.stdout, re.search(r"release ([\d.]+)", version)[1])


def named(mangled: str) -> str:
    """error<bf16,f32> of _ZN..12error_kernelI13__nv_bfloat16fEE.., epilogue of its kernel."""
    kernel = re.search(KERNEL, mangled)
    assert kernel, mangled
    name, first, second, cross = kernel.groups()
    name = "cross" if cross == "1" else name
    return f"{name}<{MANGLED[first]},{MANGLED.get(second, MANGLED[first])}>" if first else name


def test_registers_and_stack(build: Made) -> None:
    """No warning, no spill, no stack; every kernel within the 80 registers that were promised."""
    said = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_90'\n.*\n"
        r" *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers",
        build.said,
    )
    said = [(named(mangled), *map(int, numbers)) for mangled, *numbers in said]
    tensors = {f"{kernel}<{a},{b}>" for kernel, (a, b) in product(MOVED, PAIRS)}
    assert {line[0] for line in said} == tensors | {"epilogue"}
    wrong = [line for line in said if any(line[1:4]) or line[4] > 80]
    assert not wrong, wrong


def test_the_ticket_is_what_was_checked(build: Made) -> None:
    """The order of instructions that tests/loss/litmus/ticket.litmus speaks of, in PTX."""
    text = (build.folder / "pair.ptx").read_text()
    kernels = {named(part.split("(")[0]): part for part in re.split(r"\.entry ", text)[1:]}
    errors = [part for name, part in kernels.items() if name.startswith(("error", "cross"))]
    assert len(errors) == 2 * len(PAIRS)
    for ptx in errors:
        order = re.findall(ORDERED, ptx, re.M)
        (ticket,) = [i for i, word in enumerate(order) if word.startswith(("atom", "red"))]
        around = order[ticket - 3 : ticket + 4]
        assert around == [
            "st.global.f64",  # a slot
            "bar.sync",
            "membar.gl",
            "atom.global.add.u32",
            "membar.gl",
            "bar.sync",
            "ld.global.cg.f64",  # slots
        ], around
        assert not [word for word in order[ticket:] if ".nc" in word]


def find_cuobjdump() -> str | None:
    """From PATH, CUDA_HOME, NVIDIA's wheel or triton's."""
    places = [os.environ.get("PATH", ""), os.environ.get("CUDA_HOME", "") + "/bin"]
    for site in sys.path:
        places += map(str, Path(site).glob("nvidia/cu*/bin"))
        places.append(f"{site}/triton/backends/nvidia/bin")
    return shutil.which("cuobjdump", path=os.pathsep.join(places))


@pytest.fixture(scope="module")
def sass(build: Made) -> dict[str, Code]:
    """The instructions of every kernel, each with its address."""
    tool, kernels = find_cuobjdump(), {}
    if not tool:
        pytest.skip("needs cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    for source in ("noise.o", "pair.o"):
        done = subprocess.run(
            [tool, "-sass", build.folder / source], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        for part in done.stdout.split("Function : ")[1:]:
            lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?) *;", part)
            kernels[named(part.split()[0])] = [(int(at, 16), text) for at, text in lines]
    assert len(kernels) == len(MOVED) * len(PAIRS) + 1
    return kernels


def test_no_local_memory(sass: dict[str, Code]) -> None:
    found = [
        (k, text) for k, code in sass.items() for _, text in code if re.search("LDL|STL", text)
    ]
    assert not found, found


def main_loop(code: Code) -> list[str]:
    """The one innermost loop with 16-byte accesses of global memory; a loop: a branch backwards."""
    jumps = [(at, re.search(r"\bBRA\b.* 0x([0-9a-f]+)$", text)) for at, text in code]
    loops = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    bodies = [
        [text for at, text in code if begin <= at <= end]
        for begin, end in loops
        if not any(begin <= b and e <= end for b, e in loops if (b, e) != (begin, end))
    ]
    wide = [body for body in bodies if any(re.search(r"\b(LD|ST)G\S*\.128", t) for t in body)]
    assert len(wide) == 1, f"{len(wide)} innermost loops with 16-byte loads or stores"
    return wide[0]


def moves(body: list[str], what: str) -> Counter[int]:
    """How many loads ("LD") or stores ("ST") of how many bytes, of global memory."""
    words = re.findall(rf"\b{what}G?\.E\.?({'|'.join(BYTES)})\b", "\n".join(body))
    return Counter(BYTES[word] for word in words)


@pytest.mark.parametrize("kernel", MOVED)
def test_main_loops_move_vectors(sass: dict[str, Code], kernel: str) -> None:
    """Both members' vectors by one instruction each, of 16 bytes, or 8 of the narrower dtype."""
    for pair in PAIRS:
        body = main_loop(sass[f"{kernel}<{pair[0]},{pair[1]}>"])
        size = [16 * SIZES[dtype] // max(SIZES[d] for d in pair) for dtype in pair]
        for what, tensors in zip(("LD", "ST"), MOVED[kernel], strict=True):
            expected: Counter[int] = Counter()
            for width, count in zip(size, tensors, strict=True):
                expected[width] += 2 * count
            assert moves(body, what) == +expected, (kernel, pair, what)
        assert not [text for text in body if "CALL" in text], (kernel, pair)


def test_instructions_are_those_noted(sass: dict[str, Code], build: Made) -> None:
    """bench/NOTES.md's table within 2 %; within 25 % where another nvcc has compiled."""
    notes = (ROOT / "bench" / "NOTES.md").read_text()
    near = 0.02 if f"nvcc {build.nvcc} " in notes else 0.25
    table, same = "", True
    for a, b in PAIRS:
        lane = 2 * 16 // max(SIZES[a], SIZES[b])  # elements of both members
        now = [len(main_loop(sass[f"{kernel}<{a},{b}>"])) for kernel in MOVED]
        cells = (f"{count} ({count / lane:.1f})" for count in now)
        table += f"| {a}, {b} | {' | '.join(cells)} |\n"
        row = re.search(rf"^\| {a}, {b} \|(.*)\|$", notes, re.M)
        noted = [int(count) for count in re.findall(r" (\d+) \(", row[1])] if row else []
        same &= now == pytest.approx(noted, rel=near)
    assert same, f"bench/NOTES.md says otherwise than nvcc {build.nvcc}:\n{table}"
