"""The CUDA kernels (csrc/cuda) compiled for the CPU, where an emulator runs their blocks and threads (emulator/)."""

import ctypes
import fcntl
import functools
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests" / "emulator"
OUT = ROOT / "build" / "emulated"
FLAGS = "-std=c++20 -O1 -g -fPIC -Wall -Wextra -Wno-unknown-pragmas -ffp-contract=off -DLETS_EMULATED"
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.c*"))

sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402  csrc/toolchain.py


def build(out=OUT, flags=(), link=()):
    """Compile what is out of date; the library's path. Of several processes one compiles, and the others wait."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(out, flags, link)


def _build(out, flags, link):
    compiler, torch_found = toolchain.find_compiler(), toolchain.find_torch()
    assert not isinstance(compiler, str), compiler
    declared = toolchain.declared()
    depends = [
        *(ROOT / "csrc").glob("**/*.h"),
        *toolchain.DECLARED.glob("*.h"),
        *EMULATOR.glob("*.h"),
        Path(__file__),
    ]
    newest = max(path.stat().st_mtime for path in depends)
    version = f"-DTORCH_TARGET_VERSION={toolchain.TORCH_TARGET_VERSION}"
    includes = [*declared, "-I", str(EMULATOR), "-isystem", str(torch_found.root / "include")]

    def compile(source):
        target = out / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime):
            common = [*compiler.command, *shlex.split(FLAGS), *flags, version, *includes]
            subprocess.run([*common, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(toolchain.parallel_jobs()) as pool:
        objects = list(pool.map(compile, SOURCES))
    library = out / "emulated.so"
    if not library.exists() or library.stat().st_mtime < max(o.stat().st_mtime for o in objects):
        fresh = library.with_suffix(f".{os.getpid()}")
        torch_libraries = [f"-L{torch_found.root / 'lib'}", "-ltorch_cpu", "-ltorch"]
        command = [*compiler.command, "-shared", *link, *map(str, objects), "-o", str(fresh), *torch_libraries]
        subprocess.run(command, check=True)
        fresh.replace(library)
    return library


@functools.cache
def load():
    library = build()
    torch.ops.load_library(str(library))
    return ctypes.CDLL(str(library))


def launches():
    """How many kernels have been launched so far."""
    count = load().lets_emulated_launches
    count.restype = ctypes.c_int64
    return count()


def rows_of_a_launch(op):
    """The rows of the run table that a short launch of an op takes, and a long one: kFew and kMany of its numbers."""
    few, many = load().lets_emulated_few_rows, load().lets_emulated_rows
    few.restype = many.restype = ctypes.c_int64
    return few(), many(op.encode())


def __getattr__(op):
    if op.startswith("_"):
        raise AttributeError(op)
    load()
    return getattr(torch.ops.lets_kernels_emulated, op).default
