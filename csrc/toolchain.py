"""How the kernels are compiled: which compilers there are, with which flags, as a ninja file. Used by setup.py."""

import importlib.machinery
import importlib.util
import json
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

import generate

ROOT = Path(__file__).resolve().parent.parent
DECLARED = ROOT / "build" / "declared"  # the headers that generate.py makes of the ops' declaration
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


# Contraction is off as on the CPU. ptxas reports registers and spills of every kernel, which a test reads.
# The machine code is compressed, to an eighth; the driver unpacks it when it loads the library.
NVCC_FLAGS = (
    "-std=c++20 -O3 -fmad=false -Xptxas=-v -Xcompiler=-fPIC,-fvisibility=hidden,-Wall -Xfatbin=-compress-all"
).split()
NVCC_MINIMUM = (12, 1)  # kernel parameters of more than 4 KB
ARCHITECTURES = "8.0;9.0;10.0+PTX"  # A100 and the like, H100 and H200, B200; newer ones compile the PTX when loading
NAMED_ARCHITECTURES = {  # as torch.utils.cpp_extension names them, without those for which CUDA 12 has no compiler
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
# What may stand before the compiler in CXX. nvcc starts its host compiler by itself, so it gets the word after them.
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")


class Torch(NamedTuple):
    version: str
    root: Path


def find_torch():
    """The torch that the extension is built against, found without importing it; None without a recent enough one.

    The kernels use torch's stable ABI, so any torch will do. An isolated build can import none. Under pip, `site` still
    names the directories of the environment that it installs into. Other tools build in an environment of their own and
    leave PATH, which leads to the one that was active before.

    Raises:
        SystemExit: there is none where ``LETS_KERNELS_TORCH`` says.
    """
    said = os.environ.get("LETS_KERNELS_TORCH")
    if said:
        places = [said, *packages_of(Path(said))]
    else:
        places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
        if sys.prefix == sys.base_prefix:
            places.append(site.getusersitepackages())
        for programs in filter(None, os.environ.get("PATH", "").split(os.pathsep)):
            places += packages_of(Path(programs).parent)
    minimum = ".".join(map(str, TORCH_MINIMUM))
    for place in dict.fromkeys(places):
        spec = importlib.machinery.PathFinder.find_spec("torch", [place])
        if spec and spec.origin:
            root = Path(spec.origin).parent
            match = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (root / "version.py").read_text())
            if match and (int(match[2]), int(match[3])) >= TORCH_MINIMUM:
                return Torch(match[1], root)
    if said:
        raise SystemExit(
            f"LETS_KERNELS_TORCH={said}: no torch >= {minimum}; name an environment, or a folder with torch"
        )
    return None


def packages_of(environment):
    """Where an environment keeps its packages."""
    return map(str, sorted(environment.glob("lib/python3*/site-packages")))


class Compiler(NamedTuple):
    command: list
    isas: list

    @property
    def host(self):
        """The compiler itself, for nvcc: the first word of CXX that launches no other program."""
        return next((word for word in self.command if Path(word).name not in LAUNCHERS), self.command[0])


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


def choice_of(variable):
    choice = os.environ.get(variable) or "auto"
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"{variable}={choice!r}: must be auto, 1 or 0")
    return choice


def choose_cpu_build():
    """The compiler for the CPU extension, or the reason why it is not built."""
    choice = choice_of("LETS_KERNELS_CPU")
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


class Cuda(NamedTuple):
    nvcc: str
    architectures: list  # as TORCH_CUDA_ARCH_LIST has them, without names: "9.0", "10.0+PTX"

    @property
    def gencodes(self):
        """nvcc's -gencode values."""
        found = []
        for item in self.architectures:
            number = item.removesuffix("+PTX").replace(".", "")
            kinds = ("sm", "compute") if item.endswith("+PTX") else ("sm",)
            found += [f"arch=compute_{number},code={kind}_{number}" for kind in kinds]
        return found


def find_nvcc():
    """nvcc's path (empty if there is none) and, for that case, what to do."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [Path(home, "bin", "nvcc") for home in homes]
    if not homes:
        places = [Path(found) for found in [shutil.which("nvcc")] if found] + [Path("/usr/local/cuda/bin/nvcc")]
    found = next((str(place) for place in places if place.exists()), None)
    return found or "", f"no nvcc: looked for {', '.join(map(str, places))}; set CUDA_HOME"


def nvcc_version(nvcc):
    """(12, 8) and so on, or None if it does not say."""
    try:
        text = subprocess.run([nvcc, "--version"], text=True, capture_output=True).stdout
    except OSError:
        return None
    match = re.search(r"release (\d+)\.(\d+)", text)
    return match and (int(match[1]), int(match[2]))


class BuildError(Exception):
    """What was asked for cannot be built; the message says why."""


def architectures(nvcc):
    """The GPUs of ``TORCH_CUDA_ARCH_LIST``, written as torch has it: "8.0;9.0a;10.0+PTX" or "Ampere;Hopper".

    Raises:
        BuildError: an item of the list means nothing, or nvcc does not know the GPU.
    """
    given = (os.environ.get("TORCH_CUDA_ARCH_LIST") or "").strip("; ,")
    code = subprocess.run([nvcc, "--list-gpu-code"], text=True, capture_output=True).stdout
    known = [f"{major}.{minor}" for major, minor in re.findall(r"sm_(\d+)(\d)\b", code)]
    found = []
    for name in re.split(r"[;, ]+", given or ARCHITECTURES):
        base, ptx = (name, "") if name in NAMED_ARCHITECTURES else re.fullmatch(r"(.*?)(\+PTX)?", name).groups("")
        for item in (NAMED_ARCHITECTURES.get(base, base) + ptx).replace("+PTX+PTX", "+PTX").split(";"):
            match = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", item)
            if not match:
                raise BuildError(
                    f"TORCH_CUDA_ARCH_LIST: {item!r} is neither of the form 9.0, 9.0a or 9.0+PTX nor one of "
                    + ", ".join(NAMED_ARCHITECTURES)
                )
            if match[1] in known:
                found.append(item)
            elif given:  # by default, an older nvcc builds what it knows
                raise BuildError(
                    f"TORCH_CUDA_ARCH_LIST={given}: {nvcc} does not compile for {match[1]}; it knows {', '.join(known)}"
                )
    if not found:
        raise BuildError(f"{nvcc} compiles for none of {ARCHITECTURES}: set TORCH_CUDA_ARCH_LIST")
    return list(dict.fromkeys(found))


def choose_cuda_build(cpu):
    """What builds the CUDA library, or the reason why it is not built. ``cpu``: as ``choose_cpu_build`` returns it."""
    choice = choice_of("LETS_KERNELS_CUDA")
    if choice == "0":
        return "LETS_KERNELS_CUDA=0"
    nvcc, reason = find_nvcc()
    if isinstance(cpu, str):
        reason = f"the CUDA library goes with the C++ extension, which is not built: {cpu}"
    elif nvcc:
        version = nvcc_version(nvcc)
        if version is not None and version >= NVCC_MINIMUM:
            try:
                return Cuda(nvcc, architectures(nvcc))
            except BuildError as error:
                reason = str(error)
        else:
            found = "does not run" if version is None else f"is of CUDA {'.'.join(map(str, version))}"
            reason = f"{nvcc} {found}; CUDA {'.'.join(map(str, NVCC_MINIMUM))} or later is needed"
    if choice == "1":
        raise SystemExit(f"LETS_KERNELS_CUDA=1 cannot be met: {reason}")
    return reason


def parallel_jobs():
    """``MAX_JOBS``; where it is not set, or ``auto``, as many as there are cores, and as memory allows."""
    given = (os.environ.get("MAX_JOBS") or "auto").strip()
    if given.isdecimal():
        return max(1, int(given))
    if given != "auto":
        raise SystemExit(f"MAX_JOBS={given!r}: must be auto or a whole number of compilations")
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


def declared():
    """Write the headers of the declared ops, where they are out of date; the flags with which they are found."""
    return ["-I", str(generate.write(DECLARED))]


def about(cuda):
    """What the module says of the CUDA library beside it: the GPUs it is for, or why it was not built."""
    without = cuda if isinstance(cuda, str) else ""
    listed = "" if without else ";".join(cuda.architectures)
    return [f"-DLETS_WITHOUT_CUDA={json.dumps(without)}", f"-DLETS_CUDA_ARCHITECTURES={json.dumps(listed)}"]


def ninja_text(compiler, cuda, torch, include_pybind11, suffix):
    """The build file: csrc/*.cpp once, csrc/cpu/*.cpp once for each instruction set, into one library; csrc/cuda, where
    there is an nvcc, into another. The headers that it needs are written.
    """
    flags = ["-O3", *shlex.split(os.environ.get("CXXFLAGS", "")), *FLAGS, *declared()]
    python = dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude"))
    includes = [include_pybind11, torch.root / "include", *python]  # torch's own pybind11 is not for extensions
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
    if isinstance(cuda, Cuda):
        host = ["-ccbin", compiler.host]
        codes = [word for code in cuda.gencodes for word in ("-gencode", code)]
        # The current stream's function is in torch's CUDA library, which comes with libtorch where torch has CUDA.
        static = "--forward-unknown-to-host-compiler -shared -cudart static".split()
        static += "-Xlinker --exclude-libs,ALL -Xlinker --no-as-needed".split()
        lines += [
            "rule nvcc",
            f"  command = {quote([cuda.nvcc, *host, *NVCC_FLAGS, *declared(), *codes])} -MD -MF $out.d -c $in -o $out"
            " > $out.ptxas 2>&1 || (cat $out.ptxas; false)",
            "  deps = gcc",
            "  depfile = $out.d",
            "  description = $what",
            "rule nvlink",
            f"  command = {quote([cuda.nvcc, *host, *static])} $in -o $out {quote(libraries)}",
            "  description = $out",
        ]
    objects = {"_C": [], "_cuda": []}

    def compile(library, source, what, more):
        objects[library].append(f"{source.stem}.{what}.o")
        lines.append(
            f"build {objects[library][-1]}: {'compile' if source.suffix == '.cpp' else 'nvcc'} {escape(source)}"
        )
        if source.suffix == ".cpp":  # nvcc takes further flags from NVCC_APPEND_FLAGS
            lines.append(f"  flags = {quote([*flags, *more])}")
        lines.append(f"  what = {source.relative_to(ROOT)} [{what}]")

    if isinstance(cuda, Cuda):  # first, since they take longest
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.c*")):
            compile("_cuda", source, "cuda", binding if source.suffix == ".cpp" else [])
    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        compile("_C", source, "torch", [*binding, *(about(cuda) if source.stem == "module" else [])])
    # The baseline stays first: where the same inline function is in several objects, the linker keeps the first.
    for isa in compiler.isas:
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            compile("_C", source, isa, [f"-DLETS_ISA={isa}", *ISA_FLAGS[isa]])
    for library, rule in (("_C", "link"), ("_cuda", "nvlink")):
        if objects[library]:
            lines.append(f"build {library}{suffix}: {rule} {' '.join(objects[library])}")
            lines.append(f"default {library}{suffix}")
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
