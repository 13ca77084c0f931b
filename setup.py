"""Builds lets_kernels._C with ninja, where there is a C++ compiler; otherwise installs the package without it.

LETS_KERNELS_CPU  auto (default): build where a C++ compiler works; 1: fail without one; 0: never build.
CXX, CXXFLAGS, LDFLAGS  the compiler and further flags.     MAX_JOBS  parallel compilations.

This file is also the PEP 517 backend that pyproject.toml names: setuptools' own, which asks for torch as a build
requirement only where the environment being installed into has none, so that an isolated build does not download a
second torch for its headers.
"""

import importlib.machinery
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, build_meta, setup
from setuptools.build_meta import *  # noqa: F403  the hooks that stay as they are
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TORCH_MINIMUM = (2, 10)
TORCH_TARGET_VERSION = f"0x{TORCH_MINIMUM[0]:02x}{TORCH_MINIMUM[1]:02x}000000000000"  # as torch/headeronly/version.h
GIB_PER_JOB = 1.5  # a file that includes torch's and pybind11's headers

# No -march=native, no fast-math: one binary runs on every machine, and the same source gives the same bits.
FLAGS = (
    "-std=c++20 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -Wall -Wextra "
    "-ffp-contract=off -fno-math-errno -fno-trapping-math"
).split()
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2"],
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mprefer-vector-width=512".split(),
}


class Torch(NamedTuple):
    version: str
    root: Path


def find_torch():
    """The torch that the extension is built against, found without importing it; None without a recent enough one.

    An isolated build does not see the environment that it installs into: `site` still names its directories.
    """
    directories = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:
        directories.append(site.getusersitepackages())
    for spec in (importlib.util.find_spec("torch"), importlib.machinery.PathFinder.find_spec("torch", directories)):
        if spec and spec.origin:
            root = Path(spec.origin).parent
            match = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (root / "version.py").read_text())
            if match and (int(match[2]), int(match[3])) >= TORCH_MINIMUM:
                return Torch(match[1], root)
    return None


class Compiler(NamedTuple):
    command: list
    isas: list


def find_compiler():
    """A C++ compiler that can build a Python extension, or the reason why there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    command = next((words for words in map(shlex.split, names) if words and shutil.which(words[0])), None)
    if command is None:
        return f"no C++ compiler: looked for {', '.join(names)}"
    program = "#include <Python.h>\n#if __cplusplus < 202002L\n#error too old for C++20\n#endif\n"
    check = [*command, "-std=c++20", "-fsyntax-only", f"-I{sysconfig.get_path('include')}", "-x", "c++", "-"]
    try:
        subprocess.run(check, input=program, text=True, capture_output=True, check=True)
        machine = subprocess.run([*command, "-dumpmachine"], text=True, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        detail = next((line for line in (getattr(error, "stderr", "") or "").splitlines() if "error" in line), error)
        return f"{shlex.join(command)} cannot compile C++20 against Python's headers: {detail}"
    return Compiler(command, list(ISA_FLAGS) if machine.startswith(("x86_64", "amd64")) else ["baseline"])


def choose_cpu_build():
    """The compiler for the CPU extension, or the reason why it is not built."""
    choice = os.environ.get("LETS_KERNELS_CPU") or "auto"
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"LETS_KERNELS_CPU={choice!r}: must be auto, 1 or 0")
    if choice == "0":
        return "LETS_KERNELS_CPU=0"
    compiler = find_compiler()
    if choice == "1" and isinstance(compiler, str):
        raise SystemExit(
            f"LETS_KERNELS_CPU=1 cannot be met: {compiler}\n"
            "Install g++ and Python's headers, point CXX at a compiler, or leave the variable unset to install "
            "without compiled kernels."
        )
    return compiler


def parallel_jobs():
    """As many as there are cores, and as memory allows."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = []
    for file, pattern, unit in (
        ("/proc/meminfo", r"MemAvailable:\s+(\d+)", 2**10),
        ("/sys/fs/cgroup/memory.max", r"(\d+)", 1),
    ):
        match = re.search(pattern, Path(file).read_text()) if os.path.exists(file) else None
        free += [int(match[1]) * unit / 2**30] if match else []
    return max(1, min(cores, int(min(free, default=GIB_PER_JOB * cores) / GIB_PER_JOB)))


def quote(words):
    """A command line for the shell that ninja starts."""
    return shlex.join(map(str, words)).replace("$", "$$")


def escape(path):
    """A path where ninja reads a list of files."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_text(library, compiler, torch, include_pybind11):
    """The build file: csrc/*.cpp once, csrc/cpu/*.cpp once for each instruction set, one shared library."""
    flags = ["-O3", *shlex.split(os.environ.get("CXXFLAGS", "")), *FLAGS]
    python = dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude"))
    includes = [torch.root / "include", include_pybind11, *python]
    binding = [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        *[f"-DLETS_HAVE_{isa.upper()}=1" for isa in compiler.isas if isa != "baseline"],
        *[word for path in includes for word in ("-isystem", str(path))],
    ]
    link = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    # No run path: torch is imported before the library is loaded, and brings these two with it.
    libraries = [f"-L{torch.root / 'lib'}", "-ltorch_cpu", "-ltorch", *shlex.split(os.environ.get("LDFLAGS", ""))]
    lines = [
        f"cxx = {quote(compiler.command)}",
        "rule compile",
        "  command = $cxx $flags -MD -MF $out.d -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "  description = $what",
        "rule link",
        f"  command = $cxx {quote(link)} $in -o $out {quote(libraries)}",
        "  description = $out",
    ]
    objects = []

    def compile(source, what, more):
        objects.append(f"{source.stem}.{what}.o")
        lines.append(f"build {objects[-1]}: compile {escape(source)}")
        lines.append(f"  flags = {quote([*flags, *more])}")
        lines.append(f"  what = {source.relative_to(ROOT)} [{what}]")

    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        compile(source, "torch", binding)
    # The baseline stays first: where the same inline function is in several objects, the linker keeps the first.
    for isa in compiler.isas:
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            compile(source, isa, [f"-DLETS_ISA={isa}", *ISA_FLAGS[isa]])
    lines.append(f"build {library}: link {' '.join(objects)}")
    lines.append(f"default {library}")
    return "\n".join(lines) + "\n"


def pybind11_include(torch):
    try:
        import pybind11
    except ModuleNotFoundError:
        return torch.root / "include"  # torch ships a copy
    return pybind11.get_include()


def ninja_command():
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    if shutil.which("ninja"):
        return ["ninja"]
    raise SystemExit("lets_kernels is built with ninja: 'pip install ninja', or install without --no-build-isolation")


def warn_without_kernels():
    if isinstance(CPU, str) and os.environ.get("LETS_KERNELS_CPU") != "0":
        print(
            f"\n{'*' * 100}\n"
            f"  lets_kernels is set up WITHOUT compiled kernels:\n    {CPU}\n"
            "  It works, on its slower reference backend. For the fast one, install g++ and Python's headers,\n"
            "  then install lets_kernels again. 'python -m lets_kernels' shows what runs.\n"
            f"{'*' * 100}\n",
            file=sys.stderr,
        )


class BuildExt(build_ext):
    """Runs ninja in build/<platform>, which all kinds of build share, and puts the library where it belongs."""

    def run(self):
        warn_without_kernels()
        if self.inplace and isinstance(CPU, str):
            for stale in (ROOT / "lets_kernels").glob("_C.*.so"):
                stale.unlink()
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            built = self.build_library(target.name)
            if not (target.exists() and target.read_bytes() == built.read_bytes()):
                target.parent.mkdir(parents=True, exist_ok=True)
                fresh = target.with_name(target.name + ".new")
                shutil.copy(built, fresh)
                fresh.replace(target)  # a process that has the old library open keeps it

    def build_library(self, name):
        torch = find_torch()
        if torch is None:
            minimum = ".".join(map(str, TORCH_MINIMUM))
            raise SystemExit(
                f"lets_kernels needs torch >= {minimum} to build its kernels and found none: install it first, "
                "or set LETS_KERNELS_CPU=0 to install without compiled kernels"
            )
        folder = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_text(name, CPU, torch, pybind11_include(torch)))
        jobs = parallel_jobs()
        if self.verbose:
            print(f"{name}: {shlex.join(CPU.command)}, torch {torch.version}, {jobs} jobs", flush=True)
        command = [*ninja_command(), "-C", str(folder), "-j", str(jobs), *([] if self.verbose else ["--quiet"])]
        if subprocess.call(command):
            raise SystemExit("lets_kernels: the kernels did not compile; LETS_KERNELS_CPU=0 installs without them")
        return folder / name


class BuildPy(build_py):
    def run(self):
        warn_without_kernels()
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "lets_kernels", ignore_errors=True)  # no stale module in a wheel
        super().run()


def get_requires_for_build_wheel(config_settings=None):
    needs_torch = not isinstance(choose_cpu_build(), str) and find_torch() is None
    requires = build_meta.get_requires_for_build_wheel(config_settings)
    return requires + ["torch>=" + ".".join(map(str, TORCH_MINIMUM))] * needs_torch


get_requires_for_build_editable = get_requires_for_build_wheel

if __name__ == "__main__":
    os.chdir(ROOT)
    CPU = choose_cpu_build()
    setup(
        ext_modules=[] if isinstance(CPU, str) else [Extension("lets_kernels._C", sources=[])],
        cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
    )
