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

# The core may import only these modules of the package; the rest is free within the rules below.
MAY_IMPORT = {
    "oracle": set(),
    "native": {"_C", "oracle"},
    "ops": {"native"},
    "objectives": set(),
    "functional": {"ops", "objectives", "oracle"},
    "process": {"functional", "oracle"},
}


def imports(source: str, module: str, top_level: bool = False) -> set[str]:
    """What a module imports: package modules as "fastpref.x", others by their first name."""
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
            parts = name.split(".")
            inside = parts[0] == "fastpref" and len(parts) > 1
            found.add(".".join(parts[:2]) if inside else parts[0])
    return found


def shallow(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return []
    return [node, *(n for child in ast.iter_child_nodes(node) for n in shallow(child))]


def read(module: str) -> str:
    return (PACKAGE / (module.replace(".", "/") + ".py")).read_text()


def inner(module: str) -> set[str]:
    """The package's own modules that a module imports, by their first name."""
    found = imports(read(module), module)
    return {name.split(".")[1] for name in found if name.startswith("fastpref.")}


def test_the_reader_of_imports_reads_them():
    source = (
        "import os, torch.nn\nfrom . import _C\nfrom ..process import from_config\n"
        "try:\n    import av\nexcept ImportError: pass\n"
        "def f():\n    from fastpref.train import train\n    import diffusers.models\n"
    )
    assert imports(source, "models.toy") == {
        "os", "torch", "fastpref.models", "fastpref.process", "av", "fastpref.train", "diffusers",
    }  # fmt: skip
    assert imports(source, "models.toy", top_level=True) == {
        "os", "torch", "fastpref.models", "fastpref.process", "av",
    }  # fmt: skip
    assert imports("from . import ops", "__init__") == {"fastpref.ops"}
    assert imports("from .a import b", "models.__init__") == {"fastpref.models"}


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_the_core_stands_on_itself(module):
    found = imports(read(module), module)
    outside = {n for n in found if not n.startswith("fastpref")} - set(sys.stdlib_module_names)
    assert outside <= {"torch"}
    assert inner(module) <= MAY_IMPORT[module]


@pytest.mark.parametrize("module", MODULES)
def test_every_module(module):
    first = module.split(".")[0]
    source = read(module)
    found, used = imports(source, module), inner(module)
    assert "bench" not in found and "tests" not in found
    assert "_C" not in used or module == "native", "the core is imported by native alone"
    assert "cli" not in used or first in ("cli", "__main__"), "nobody imports the commands"
    assert "train" not in used or first in ("cli", "demo", "spo"), "nobody imports the loop"
    if first in ("reference", "graphs", "process", "data"):
        assert not used & {"train", "config", "step"}, "they know no trainer"
    if first == "models":
        assert used <= {"process", "models", "oracle"}
    else:
        assert not re.search(r"family\w* *==|== *[\"'](wan|cogvideox|toy|stable)", source)
    if {"diffusers", "transformers"} & found:
        assert first in ("models", "encode", "sample", "spo", "demo")
    late = HEAVY & imports(source, module, top_level=True)
    assert not late, f"{late} must be imported where they are used, not at the top"
    assert ast.get_docstring(ast.parse(source)), "every file opens with what lives there"


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
import fastpref.train, fastpref.encode, fastpref.sample, fastpref.cli
import torch
heavy = {HEAVY!r} & set(sys.modules)
assert not heavy, heavy
assert not torch.cuda.is_initialized()
"""
    run(code)
