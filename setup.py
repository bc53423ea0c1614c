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
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent.resolve()
CUDA_SOURCES = ["noise.cu", "pair.cu"]
ISAS = {"portable": (4, "")}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = (8, "-mavx2 -mfma")
    ISAS["avx512"] = (
        16,
        "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mprefer-vector-width=512",
    )


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
        import pybind11

        nvcc, why_not = find_nvcc()
        archs = re.split(r"[;,\s]+", os.environ.get("FASTPREF_ARCHS", "90").strip()) if nvcc else []
        cxx = os.environ.get("CXX", "c++")
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)

        version = ""
        if nvcc:
            version = re.search(r"release ([\d.]+)", output_of(nvcc, "--version")).group(1)
        self._write_facts(work, cxx, archs, version, why_not)

        optimise = "-O1 -g -D_GLIBCXX_ASSERTIONS" if flag("FASTPREF_DEBUG") else "-O3"
        # fma only where written; sqrtf may vectorise (errno and traps are all that is given up)
        host = (
            f"-std=c++17 {optimise} -ffp-contract=off -fno-math-errno -fno-trapping-math "
            "-fvisibility=hidden -fPIC -pthread -Wall -Wextra"
        )
        if flag("FASTPREF_WERROR"):
            host += " -Werror"
        includes = [work, HERE / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
        include = " ".join(f"-isystem {quote(path)}" for path in includes[2:])
        include = " ".join(f"-I{quote(path)}" for path in includes[:2]) + " " + include

        steps = [(f"cpu_{isa}.o", "cxx", "cpu_kernels.cpp",
                  f"{flags} -DFASTPREF_ISA={isa} -DFASTPREF_WIDTH={width}")
                 for isa, (width, flags) in ISAS.items()]  # fmt: skip
        steps += [("cpu.o", "cxx", "cpu.cpp", "")]
        steps += [
            ("bindings.o", "cxx", "bindings.cpp", "-DFASTPREF_WITH_CUDA" if nvcc else ""),
        ]
        steps += [(f"{Path(name).stem}_cuda.o", "nvcc", name, "") for name in CUDA_SOURCES if nvcc]
        gencode = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
        if archs:
            gencode += f" -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"
        device = "-std=c++17 -O3 -fmad=false --expt-relaxed-constexpr -lineinfo -cudart static "
        device += f"{gencode} -Xcompiler "
        device += "-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall,-Wno-unknown-pragmas"
        if flag("FASTPREF_WERROR"):
            device += " -Werror all-warnings"
        link = (
            f"{quote(nvcc)} -shared -cudart static -Xcompiler -pthread"
            if nvcc
            else f"{cxx} -shared -pthread"
        )

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
  command = {link} $in -o $out
"""
        for target, rule, source, flags in steps:
            rules += f"build {target}: {rule} {ninja_path(HERE / 'csrc' / source)}\n"
            if flags:
                rules += f"  flags = {flags}\n"
        rules += f"build {ninja_path(out)}: link {' '.join(step[0] for step in steps)}\n"
        (work / "build.ninja").write_text(rules)
        what = (
            f"CPU and CUDA {version} (sm_{' sm_'.join(archs)})" if nvcc else f"CPU only: {why_not}"
        )
        print(f"fastpref: building for {what}", file=sys.stderr, flush=True)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([find_ninja(), "-C", str(work), *jobs], stdout=sys.stderr).returncode:
            raise SystemExit("fastpref: the build failed; the compiler's message is above")

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


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def find_ninja() -> str:
    found = shutil.which("ninja")
    if found:
        return found
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


setup(
    ext_modules=[Extension("fastpref._C", sources=[])],
    cmdclass={"build_ext": Build},
)
