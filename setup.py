"""Builds the kernels with ninja: lets_kernels._C where there is a C++ compiler, and lets_kernels._cuda where there is
nvcc as well. Without them the package is installed all the same, and runs on what there is.

LETS_KERNELS_CPU   auto (default): build where a C++ compiler works; 1: fail without one; 0: never build.
LETS_KERNELS_CUDA  the same for nvcc, which may stand beside a torch without CUDA. CUDA_HOME says where it is.
TORCH_CUDA_ARCH_LIST  the GPUs to build for, by default "8.0;9.0;10.0+PTX"; names such as Ampere are understood.
LETS_KERNELS_TORCH  an environment, or a folder, whose torch is to be built against: any from 2.10 on will do.
CXX, CXXFLAGS, LDFLAGS  the compiler and further flags.     MAX_JOBS  parallel compilations, or auto.

This file is also the PEP 517 backend that pyproject.toml names: setuptools' own, which asks for torch as a build
requirement only where none is found (toolchain.find_torch says where it looks), so that an isolated build does not
download a second torch for its headers.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, build_meta, setup
from setuptools.build_meta import *  # noqa: F403  the hooks that stay as they are
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))

import toolchain
from toolchain import ROOT, TORCH_MINIMUM


def warn_without_kernels():
    if isinstance(CPU, str) and os.environ.get("LETS_KERNELS_CPU") != "0":
        print(
            f"\n{'*' * 100}\n"
            f"  lets_kernels is set up WITHOUT compiled kernels:\n    {CPU}\n"
            "  It works all the same, but slower, by PyTorch's own functions. For the kernels, install g++ and\n"
            "  Python's headers, then install lets_kernels again. 'python -m lets_kernels' shows what runs.\n"
            f"{'*' * 100}\n",
            file=sys.stderr,
        )
    elif isinstance(CUDA, str) and "TORCH_CUDA_ARCH_LIST" in CUDA:
        print(f"\n  lets_kernels is set up without kernels for GPUs: {CUDA}\n", file=sys.stderr)


class BuildExt(build_ext):
    """Runs ninja in build/<platform>, which all kinds of build share, and puts the library where it belongs."""

    def run(self):
        warn_without_kernels()
        if self.inplace:
            wanted = [extension.name.rpartition(".")[2] for extension in self.extensions]
            for stale in (ROOT / "lets_kernels").glob("_*.so"):
                if stale.name.partition(".")[0] not in wanted:
                    stale.unlink()
        folder = self.build_libraries() if self.extensions else None
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            built = folder / target.name
            if not (target.exists() and target.read_bytes() == built.read_bytes()):
                target.parent.mkdir(parents=True, exist_ok=True)
                fresh = target.with_name(target.name + ".new")
                shutil.copy(built, fresh)
                fresh.replace(target)  # a process that has the old library open keeps it

    def build_libraries(self):
        """The folder with the compiled libraries."""
        torch = toolchain.find_torch()
        if torch is None:
            minimum = ".".join(map(str, TORCH_MINIMUM))
            raise SystemExit(
                f"lets_kernels needs torch >= {minimum} to build its kernels and found none: install it first, "
                "or set LETS_KERNELS_CPU=0 to install without compiled kernels"
            )
        folder = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        text = toolchain.ninja_text(CPU, CUDA, torch, toolchain.pybind11_include(torch), suffix)
        (folder / "build.ninja").write_text(text)
        jobs = toolchain.parallel_jobs()
        if self.verbose:
            cuda = CUDA if isinstance(CUDA, str) else f"{CUDA.nvcc} for {', '.join(CUDA.architectures)}"
            print(f"{shlex.join(CPU.command)}, torch {torch.version}, {jobs} jobs; CUDA: {cuda}", flush=True)
        quiet = [] if self.verbose else ["--quiet"]
        if subprocess.call([*toolchain.ninja_command(), "-C", str(folder), "-j", str(jobs), *quiet]):
            raise SystemExit(
                "lets_kernels: the kernels did not compile; LETS_KERNELS_CUDA=0 installs without those for GPUs, "
                "LETS_KERNELS_CPU=0 without any"
            )
        return folder


class BuildPy(build_py):
    def run(self):
        warn_without_kernels()
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "lets_kernels", ignore_errors=True)  # no stale module in a wheel
        super().run()


def get_requires_for_build_wheel(config_settings=None):
    needs_torch = not isinstance(toolchain.choose_cpu_build(), str) and toolchain.find_torch() is None
    requires = build_meta.get_requires_for_build_wheel(config_settings)
    return requires + ["torch>=" + ".".join(map(str, TORCH_MINIMUM))] * needs_torch


get_requires_for_build_editable = get_requires_for_build_wheel

if __name__ == "__main__":
    os.chdir(ROOT)
    CPU = toolchain.choose_cpu_build()
    CUDA = toolchain.choose_cuda_build(CPU)
    names = [name for name, found in (("_C", CPU), ("_cuda", CUDA)) if not isinstance(found, str)]
    setup(
        ext_modules=[Extension(f"lets_kernels.{name}", sources=[]) for name in names],
        cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
    )
