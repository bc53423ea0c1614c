"""What is built, and that a machine without a CUDA compiler, or without torch, builds it too."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastpref
from fastpref.loss import native as core

ROOT = Path(__file__).parents[1]
native = pytest.mark.skipif(core._C is None, reason="needs the compiled core")


def copy_of_the_sources(folder: Path) -> Path:
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "fastpref").mkdir()
    shutil.copy(ROOT / "fastpref" / "__init__.py", folder / "fastpref")
    return folder


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Build in place, with torch made impossible to import."""
    hide = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', 'build_ext', '-i']"
    )
    return subprocess.run(
        [sys.executable, "-c", hide + "; runpy.run_path('setup.py', run_name='__main__')"],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def built_facts(folder: Path) -> str:
    run = [sys.executable, "-c", "import _C; print(_C.build_info())"]
    result = subprocess.run(run, cwd=folder / "fastpref", capture_output=True, text=True)
    return result.stdout + result.stderr


def path_without_nvcc(folder: Path) -> str:
    """A PATH of links to everything on ours except nvcc."""
    tools = folder / "tools"
    tools.mkdir()
    for place in reversed(os.environ["PATH"].split(os.pathsep)):
        for tool in Path(place).iterdir() if Path(place).is_dir() else ():
            link = tools / tool.name
            if tool.name != "nvcc" and not tool.is_dir():
                link.unlink(missing_ok=True)
                link.symlink_to(tool)
    return str(tools)


@native
def test_build_info_says_what_was_built():
    info = fastpref.build_info()
    assert info["cpu"] in ("avx512", "avx2", "portable")
    if info["cuda"]:
        assert re.fullmatch(r"sm_\d+\w?( sm_\d+\w?)*", info["cuda"])
        assert re.fullmatch(r"\d+\.\d+", info["nvcc"]) and not info["why_not_cuda"]
    else:
        assert info["why_not_cuda"] and not info["nvcc"]


@native
@pytest.mark.skipif(shutil.which("ldd") is None, reason="needs ldd")
def test_the_binary_stands_alone():
    """Neither torch nor the CUDA runtime is linked: one binary for all torches and machines."""
    linked = subprocess.run(["ldd", core._C.__file__], capture_output=True, text=True).stdout
    assert "libc.so" in linked
    for library in ("libcudart", "libcuda", "libtorch", "libc10", "libpython"):
        assert library not in linked


@native
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_binary_exports_its_init_function_alone():
    """Nothing of ours or of the static CUDA runtime can be mixed up with another library's."""
    command = ["nm", "-D", "--defined-only", core._C.__file__]
    symbols = subprocess.run(command, capture_output=True, text=True).stdout.split()[2::3]
    assert "PyInit__C" in symbols
    assert not [s for s in symbols if "fastpref" in s or s.startswith("cuda")]


def test_a_wrong_wish_is_one_line(tmp_path):
    result = build(copy_of_the_sources(tmp_path), FASTPREF_CUDA="yes")
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and last == "FASTPREF_CUDA: expected auto, 1 or 0, got 'yes'"


def test_cuda_wished_for_but_missing_is_one_line(tmp_path):
    source = copy_of_the_sources(tmp_path)
    environment = {"FASTPREF_CUDA": "1", "CUDA_HOME": "", "PATH": path_without_nvcc(tmp_path)}
    result = build(source, **environment)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and "nvcc not found" in last and "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("way", ["FASTPREF_CUDA=0", "no nvcc"])
def test_builds_without_cuda_and_says_so(way, tmp_path):
    source = copy_of_the_sources(tmp_path)
    if way == "no nvcc":
        why = "nvcc not found in CUDA_HOME or PATH"
        environment = {"FASTPREF_CUDA": "auto", "PATH": path_without_nvcc(tmp_path)}
        environment["CUDA_HOME"] = ""
    else:
        why, environment = way, {"FASTPREF_CUDA": "0"}
    result = build(source, FASTPREF_WERROR="1", **environment)
    assert result.returncode == 0, result.stderr
    assert f"building for CPU only: {why}" in result.stderr
    facts = built_facts(source)
    assert why in facts and "'cuda': ''" in facts
