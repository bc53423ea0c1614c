"""Who may import whom, read from the syntax trees, and what `import fastpref` costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastpref"
MODULES = sorted(
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py")
)
HEAVY = {"diffusers", "transformers", "peft", "av", "datasets", "matplotlib", "tensorboard"}

# The rooms, from the ground up: each imports its own files and what stands below it, no neighbour.
ORDER = (
    ("files", "progress"),
    ("ranks",),
    ("mesh",),
    ("faults",),
    ("loss", "schedule"),
    ("process",),
    ("models",),
    ("pairs",),
    ("step",),
    ("look",),
    ("run",),
    ("spo",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
# What a run is made of knows no Config either.
PARTS = {
    *("run.parts", "run.belong", "run.tuned", "run.optimisation", "run.telemetry", "run.guard"),
    *("run.checkpoint", "run.checks"),
}
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}

# Within the loss, and what it takes from outside: torch alone.
LOSS = {
    "oracle": set(),
    "native": {"_C", "oracle"},
    "ops": {"native"},
    "objectives": set(),
    "inputs": {"objectives"},
    "functional": {"inputs", "ops", "objectives", "oracle"},
}


def imports(source: str, module: str, top_level: bool = False) -> set[str]:
    """What a module imports: the package's own names in full, others by their first part."""
    here = ["fastpref", *module.split(".")]
    if here[-1] == "__init__":
        here.pop()
    is_package = module.endswith("__init__")
    tree = ast.parse(source)
    nodes = list(tree.body) if top_level else list(ast.walk(tree))
    if top_level:  # also what stands under a top-level if, try or with
        nodes = [n for node in nodes for n in shallow(node)]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + is_package] if node.level else []
            path = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*path, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            inside = name.startswith("fastpref.")
            found.add(name if inside else name.split(".")[0])
    return found


def shallow(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return []
    return [node, *(n for child in ast.iter_child_nodes(node) for n in shallow(child))]


def read(module: str) -> str:
    return (PACKAGE / (module.replace(".", "/") + ".py")).read_text()


def inner(module: str) -> set[str]:
    """What a module imports of the package itself, in full and without its name."""
    found = imports(read(module), module)
    return {name.removeprefix("fastpref.") for name in found if name.startswith("fastpref.")}


def test_the_reader_of_imports_reads_them():
    source = (
        "import os, torch.nn\nfrom . import _C\nfrom ..process import from_config\n"
        "try:\n    import av\nexcept ImportError: pass\n"
        "def f():\n    from fastpref.run.train import train\n    import diffusers.models\n"
    )
    always = {"os", "torch", "fastpref.models._C", "fastpref.process.from_config", "av"}
    late = {"fastpref.run.train.train", "diffusers"}
    assert imports(source, "models.toy") == always | late
    assert imports(source, "models.toy", top_level=True) == always
    assert imports("from . import ops", "loss.native") == {"fastpref.loss.ops"}
    assert imports("from .. import models", "pairs.encode") == {"fastpref.models"}
    assert imports("from .a import b", "models.__init__") == {"fastpref.models.a.b"}


def test_every_file_has_a_room():
    assert {module.split(".")[0] for module in MODULES} == {*FLOOR, "__init__"}
    for room in ("loss", "models", "pairs", "step", "look", "run", "demo"):
        assert len([m for m in MODULES if m.startswith(f"{room}.")]) > 3, room
        assert (ROOT / "tests" / room).is_dir(), room


@pytest.mark.parametrize("module", LOSS)
def test_the_loss_stands_on_itself(module):
    found = imports(read(f"loss.{module}"), f"loss.{module}")
    outside = {n for n in found if not n.startswith("fastpref")} - set(sys.stdlib_module_names)
    assert outside <= {"torch"}
    used = {name.removeprefix("loss.").split(".")[0] for name in inner(f"loss.{module}")}
    assert used <= LOSS[module]


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__"])
def test_every_module(module):
    room, source = module.split(".")[0], read(module)
    found, used = imports(source, module), inner(module)
    assert "bench" not in found and "tests" not in found
    for name in used - {"_C"}:
        other = name.split(".")[0]
        below = FLOOR[other] < FLOOR[room]
        assert below or other == room, f"{module} imports {name}, which does not stand below it"
    assert "_C" not in used or module == "loss.native", "the core is imported by native alone"
    if FLOOR[room] < FLOOR["run"] or module in PARTS:
        assert not re.search(r"\bConfig\b", source), "these functions take values"
    loop = any((name + ".").startswith("run.train.") for name in used)
    assert not loop or room in ("cli", "demo"), "nobody imports the loop"
    if room == "models":
        known = ("models", "process", "loss.oracle")
        assert all(name.startswith(known) for name in used), "families know how noise is added"
    else:
        assert not re.search(r"family\w* *==|== *[\"'](wan|cogvideox|toy|stable)", source)
    if {"diffusers", "transformers"} & found:
        assert room in ("models", "spo", "demo") or module == "step.context"
    late = HEAVY & imports(source, module, top_level=True)
    assert not late, f"{late} must be imported where they are used, not at the top"
    assert ast.get_docstring(ast.parse(source)), "every file opens with what lives there"


def test_a_long_file_says_why():
    """Over 350 lines a file is split, or the first sentence of its docstring says why it is not."""
    silent = []
    for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "bench").rglob("*.py")]):
        source = path.read_text()
        docstring = ast.get_docstring(ast.parse(source)) or ""
        first = re.split(r"(?<=[.!?])\s|\n\n", docstring)[0]
        if len(source.splitlines()) > 350 and "one file" not in " ".join(first.split()):
            silent.append(str(path.relative_to(ROOT)))
    assert not silent


def test_native_headers_stay_light():
    """kernels.h includes nothing heavy, the bindings no torch, and no C++ file includes torch."""
    for path in sorted((ROOT / "csrc").iterdir()):
        included = re.findall(r"#include [<\"]([^>\"]+)", path.read_text())
        assert not [name for name in included if re.match(r"torch|ATen|c10", name)], path.name
        if path.name == "kernels.h":
            assert included == ["cstdint"]
        if not path.name.endswith((".cu", ".cuh")):
            assert not [name for name in included if name.startswith("cuda")], path.name
        if path.name != "bindings.cpp":
            assert not [name for name in included if name.startswith("pybind11")], path.name


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light_and_touches_no_cuda():
    """Every public name, and the loop itself, without a model library or a CUDA context."""
    code = f"""
import sys
import fastpref
assert not {HEAVY!r} & set(sys.modules), "import fastpref"
for name in fastpref.__all__:
    getattr(fastpref, name)
import fastpref.run.train, fastpref.pairs.encode, fastpref.look.sample, fastpref.cli
import torch
heavy = {HEAVY!r} & set(sys.modules)
assert not heavy, heavy
assert not torch.cuda.is_initialized()
"""
    run(code)
