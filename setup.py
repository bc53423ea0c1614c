"""Builds fastpref._C, without torch: the core for the CPU, and for CUDA where nvcc is found.

Environment:
  FASTPREF_CUDA   auto (default): CUDA where nvcc is found | 1: fail without it | 0: CPU only
  FASTPREF_ARCHS  "90" (default): compute capabilities to compile for, separated by ; or spaces;
                  the last one also as PTX, from which later chips make their own code
  FASTPREF_DEBUG  1: -O1 -g and assertions instead of -O3
  FASTPREF_WERROR 1: warnings are errors
  CUDA_HOME       the toolkit to take nvcc from, before PATH
  MAX_JOBS        compilers run at once (default: all cores)
  CXX             the host compiler (default: c++)
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent.resolve()
CUDA_SOURCES = ["noise", "pair"]
# Instruction set: floats in a vector, compiler flags (g++ 12 warns inside its own avx512 header).
ISAS = {"portable": (4, "")}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = (8, "-mavx2 -mfma")
    avx512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
    ISAS["avx512"] = (16, f"{avx512} -mavx2 -mfma -Wno-maybe-uninitialized")


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def find_nvcc() -> tuple[str, str]:
    """(path of nvcc or "", why there is none)."""
    wish = os.environ.get("FASTPREF_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"FASTPREF_CUDA: expected auto, 1 or 0, got {wish!r}")
    if wish == "0":
        return "", "FASTPREF_CUDA=0"
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else None
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc:
        return nvcc, ""
    why = "nvcc not found in CUDA_HOME or PATH"
    if wish == "1":
        raise SystemExit(f"FASTPREF_CUDA=1, but {why}: install the CUDA toolkit or set CUDA_HOME")
    return "", why


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Build(build_ext):
    """Writes a build.ninja for the one module and runs it."""

    def build_extension(self, ext: Extension) -> None:
        nvcc, why_not = find_nvcc()
        archs = re.split(r"[;,\s]+", os.environ.get("FASTPREF_ARCHS", "90").strip()) if nvcc else []
        version = ""
        if nvcc:
            version = re.search(r"release ([\d.]+)", output_of(nvcc, "--version")).group(1)
        what = (
            f"CPU and CUDA {version}, sm_{' sm_'.join(archs)}" if nvcc else f"CPU only: {why_not}"
        )
        print(f"fastpref: building for {what}", file=sys.stderr, flush=True)

        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "c++")
        self._write_facts(work, cxx, archs, version, why_not)
        (work / "build.ninja").write_text(self._rules(work, out, cxx, nvcc, archs))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([find_ninja(), "-C", str(work), *jobs], stdout=sys.stderr).returncode:
            raise SystemExit("fastpref: the build failed; the compiler's message is above")

    @staticmethod
    def _rules(work: Path, out: Path, cxx: str, nvcc: str, archs: list[str]) -> str:
        import pybind11

        strict = flag("FASTPREF_WERROR")
        # fma only where written; sqrtf may vectorise: errno and traps are all that is given up
        host = "-std=c++17 -ffp-contract=off -fno-math-errno -fno-trapping-math "
        host += "-fvisibility=hidden -fPIC -pthread -Wall -Wextra" + (" -Werror" if strict else "")
        host += " -O1 -g -D_GLIBCXX_ASSERTIONS" if flag("FASTPREF_DEBUG") else " -O3"
        device = "-std=c++17 -O3 -fmad=false --expt-relaxed-constexpr -lineinfo -cudart static "
        device += (
            "-Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall,-Wno-unknown-pragmas"
        )
        device += " -Werror all-warnings" if strict else ""
        for arch in archs:
            device += f" -gencode arch=compute_{arch},code=sm_{arch}"
        if archs:
            device += f" -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"
        include = (
            f"-I{quote(work)} -I{quote(HERE / 'csrc')} -isystem {quote(pybind11.get_include())}"
        )
        include += f" -isystem {quote(sysconfig.get_path('include'))}"
        link = f"{quote(nvcc)} -cudart static -Xcompiler -pthread" if nvcc else f"{cxx} -pthread"

        steps = [
            ("cpu.o", "cxx", "cpu.cpp", ""),
            ("bindings.o", "cxx", "bindings.cpp", "-DFASTPREF_WITH_CUDA" if nvcc else ""),
        ]
        for isa, (width, flags) in ISAS.items():
            defines = f"-DFASTPREF_ISA={isa} -DFASTPREF_WIDTH={width}"
            steps.append((f"cpu_{isa}.o", "cxx", "cpu_kernels.cpp", f"{flags} {defines}"))
        if nvcc:
            steps += [(f"{name}.o", "nvcc", f"{name}.cu", "") for name in CUDA_SOURCES]

        rules = f"""\
rule cxx
  command = {cxx} -MMD -MF $out.d {host} {include} $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = {quote(nvcc)} -MMD -MF $out.d {device} {include} -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {link} -shared $in -o $out
"""
        for target, rule, source, flags in steps:
            rules += f"build {target}: {rule} {escape(HERE / 'csrc' / source)}\n  flags = {flags}\n"
        return rules + f"build {escape(out)}: link {' '.join(step[0] for step in steps)}\n"

    @staticmethod
    def _write_facts(work: Path, cxx: str, archs: list[str], nvcc: str, why_not: str) -> None:
        facts = {
            "COMPILER": output_of(*shlex.split(cxx), "--version").splitlines()[0],
            "CUDA_ARCHS": " ".join(f"sm_{arch}" for arch in archs),
            "NVCC": nvcc,
            "WHY_NOT_CUDA": why_not,
        }
        lines = [f'#define FASTPREF_{name} "{value}"' for name, value in facts.items()]
        text = "\n".join(lines) + "\n"
        header = work / "build_info.h"
        if not header.exists() or header.read_text() != text:
            header.write_text(text)


def quote(path: object) -> str:
    return '"' + str(path).replace("$", "$$") + '"'


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def find_ninja() -> str:
    found = shutil.which("ninja")
    if found:
        return found
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


setup(
    ext_modules=[Extension("fastpref._C", sources=[], depends=sorted(glob("csrc/*")))],
    cmdclass={"build_ext": Build},
)
