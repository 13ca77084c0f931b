"""The C++ kernels under sanitizers: what is built of tests/sanitize, and `make sanitize`, which runs all of it.

``csrc/ops.cpp`` and the kernels are compiled unchanged, against a stand-in for torch (``sanitize/standin``). ``walk``
runs every op on random layouts between guard bands, ``fuzz`` gives the ops tables and lists that make no sense.
"""

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "sanitize"
OUT = ROOT / "build" / "sanitize"
SUMMARY = ROOT / "tests" / "results" / "sanitize.json"

sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402  csrc/toolchain.py

SANITIZERS = {"address": "-fsanitize=address", "thread": "-fsanitize=thread"}
# Goes with the first, for what is under test: it multiplies the time that a file takes to compile.
UNDEFINED = "-fsanitize=undefined,float-cast-overflow -fno-sanitize-recover=all"
# What fails at once, and is told apart from the programs' own exit 1 by its code.
REPORT = 66
ENVIRONMENT = {
    "ASAN_OPTIONS": f"exitcode={REPORT}:detect_stack_use_after_return=1:strict_string_checks=1",
    "UBSAN_OPTIONS": f"exitcode={REPORT}:print_stacktrace=1",
    "TSAN_OPTIONS": f"exitcode={REPORT}:halt_on_error=1",
}
# Small enough that a few thousand elements take every path that 2^31 would (csrc/layout.h). A chunk ends within a
# vector, and 40 chunks fill a launch.
SMALL = "-DLETS_CHUNK=43 -DLETS_WORTH_A_THREAD=1 -DLETS_NONTEMPORAL_BYTES=8192 -DLETS_CHUNKS_A_LAUNCH=40"


def ninja_text(compiler, isas, optimization):
    """The programs as ``<sanitizer>/<name>``, with the instruction sets of ``isas[sanitizer]``: ``walk``, ``fuzz`` and
    ``sizes``, ``-small`` with the limits of that name; and ``walk-emulated``, the CUDA kernels in the emulator.
    """
    flags = [
        optimization,
        "-g1",
        *toolchain.FLAGS,
        *toolchain.declared(),
        "-Werror",
        "-Wconversion",
        "-Wno-sign-conversion",
        "-pthread",
    ]
    lines = [
        f"cxx = {toolchain.quote(compiler.command)}",
        "rule compile",
        "  command = $cxx $flags -MD -MF $out.d -c -x c++ $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "  description = $out",
        "rule link",
        "  command = $cxx $flags $in -o $out",
        "  description = $out",
    ]
    for sanitizer, options in SANITIZERS.items():
        base = [*flags, *shlex.split(options)]
        have = [f"-DLETS_HAVE_{isa.upper()}=1" for isa in isas[sanitizer] if isa != "baseline"]

        def compile(source, name, more, base=base, sanitizer=sanitizer):
            target = f"{sanitizer}/{name}.o"
            undefined = (
                shlex.split(UNDEFINED) if sanitizer == "address" and source.is_relative_to(ROOT / "csrc") else []
            )
            # Only what ships on the CPU is worth the time that -O3 takes.
            plain = [] if source.parent in (ROOT / "csrc", ROOT / "csrc" / "cpu") else ["-O1"]
            lines.append(f"build {target}: compile {toolchain.escape(source)}")
            lines.append(f"  flags = {toolchain.quote([*base, *plain, *undefined, *more])}")
            return target

        def link(name, objects, base=base, sanitizer=sanitizer):
            lines.append(f"build {sanitizer}/{name}: link {' '.join(objects)}")
            lines.append(
                f"  flags = {toolchain.quote([*base, *(UNDEFINED.split() if sanitizer == 'address' else [])])}"
            )

        standin = ["-I", str(HERE / "standin")]
        emulator = ["-I", str(HERE.parent / "emulator"), "-DLETS_EMULATED", "-Wno-unknown-pragmas"]
        # In a frame that outlives its function gcc 12 aligns variables to 32 bytes, and stores 64 to them as aligned.
        apart = {isa: ["--param=asan-use-after-return=0"] * (isa == "avx512") for isa in isas[sanitizer]}
        kernels = [
            compile(source, f"{source.stem}.{isa}", [f"-DLETS_ISA={isa}", *toolchain.ISA_FLAGS[isa], *apart[isa]])
            for isa in isas[sanitizer]
            for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
        ]
        kernels.append(compile(ROOT / "csrc" / "isa.cpp", "isa", have))
        walk = compile(HERE / "walk.cpp", "walk", standin)
        ops = ROOT / "csrc" / "ops.cpp"
        small = compile(ops, "ops-small", [*standin, *shlex.split(SMALL)])
        link("walk", [walk, compile(ops, "ops", standin), *kernels])
        link("walk-small", [walk, small, *kernels])
        if sanitizer == "address":
            link("fuzz", [compile(HERE / "fuzz.cpp", "fuzz", standin), small, *kernels])
            for name, limits in (("sizes", []), ("sizes-small", shlex.split(SMALL))):
                link(
                    name,
                    [
                        compile(HERE / "sizes.cpp", name, [*standin, *emulator, *shlex.split(UNDEFINED), *limits]),
                        *kernels,
                    ],
                )
            # Fibers switch stacks by themselves, so that AddressSanitizer must leave stacks alone.
            fibers = [*standin, *emulator, *shlex.split(SMALL), "--param=asan-stack=0"]
            objects = [
                compile(source, f"emulated-{source.stem}", fibers)
                for source in sorted((ROOT / "csrc" / "cuda").glob("*.c*"))
            ]
            link("walk-emulated", [compile(HERE / "walk.cpp", "emulated-walk", fibers), *objects])
    return "\n".join(lines) + "\n"


def build(*targets, optimization="-O1", isas=None):
    """Compile what is out of date; the directory of the programs."""
    compiler = toolchain.find_compiler()
    assert not isinstance(compiler, str), compiler
    out = OUT / optimization.strip("-")
    out.mkdir(parents=True, exist_ok=True)
    text = ninja_text(compiler, isas or dict.fromkeys(SANITIZERS, compiler.isas), optimization)
    file = out / "build.ninja"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    command = [*toolchain.ninja_command(), "-C", str(out), f"-j{toolchain.parallel_jobs()}", "--quiet", *targets]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


def run(program, *arguments):
    """The finished process; a sanitizer's report makes it return ``REPORT``."""
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.run([str(program), *map(str, arguments)], env=environment, capture_output=True, text=True)


# Faults that are made on purpose, and how they must end: a sanitizer's report, or a guard band's message.
FAULTS = {
    "address": {
        "write": (REPORT, "heap-buffer-overflow"),
        "read": (REPORT, "use-after-poison"),
        "unaligned": (REPORT, "misaligned address"),
        "band": (1, "in a guard band, was written"),
    },
    "thread": {"race": (REPORT, "data race"), "band": (1, "in a guard band, was written")},
}


def check_fault(program, fault, code, words):
    result = run(program, "--fault", fault)
    assert result.returncode == code and words in result.stderr, f"{program} did not tell of '{fault}': {result}"


def counts(program, *arguments):
    """What the program says it did, once it has come to its end without a report."""
    result = run(program, *arguments)
    assert result.returncode == 0, f"{program} {arguments} ended with {result.returncode}:\n{result.stderr[-6000:]}"
    return json.loads(result.stdout)


def walks(isas):
    """(sanitizer, program, options) of every walk of `make sanitize`."""
    for sanitizer in SANITIZERS:
        for isa in isas:
            common = ("--isa", isa, "--seed", isas.index(isa))
            yield sanitizer, "walk-small", ("--layouts", 100, "--threads", 3, *common)
            yield sanitizer, "walk-small", ("--layouts", 40, "--callers", 4, "--threads", 2, *common)
            yield sanitizer, "walk", ("--layouts", 20, "--threads", 3, "--long", *common)
            yield sanitizer, "walk", ("--layouts", 10, "--callers", 4, "--threads", 2, "--long", *common)
    yield "address", "walk-emulated", ("--layouts", 20)


def main():
    """`make sanitize`: everything, with the optimization that ships, and a summary of it."""
    begin, compiler = time.monotonic(), toolchain.find_compiler()
    out = build(optimization="-O3")
    built = time.monotonic() - begin
    isas = [isa for isa in compiler.isas if run(out / "address" / "walk", "--layouts", 0, "--isa", isa).returncode == 0]
    for sanitizer, faults in FAULTS.items():
        for fault, (code, words) in faults.items():
            check_fault(out / sanitizer / "walk", fault, code, words)
    totals = {}
    for sanitizer, program, options in walks(isas):
        print(sanitizer, program, *options, flush=True)
        total = totals.setdefault(sanitizer, {"runs": 0})
        total["runs"] += 1
        for key, value in counts(out / sanitizer / program, *options).items():
            total[key] = total.get(key, 0) + value
    print("address fuzz, sizes", flush=True)
    fuzzed = [counts(out / "address" / "fuzz", "--inputs", 200000, "--seed", seed) for seed in range(5)]
    sizes = [counts(out / "address" / name, 0) for name in ("sizes", "sizes-small")]
    version = subprocess.run([*compiler.command, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT).stdout
    summary = {
        "walk": totals,
        "fuzz": {key: sum(each[key] for each in fuzzed) for key in fuzzed[0]},
        "sizes": {"most_elements": sizes[0]["most_elements"], "launches": sum(each["launches"] for each in sizes)},
        "faults_caught": {sanitizer: sorted(faults) for sanitizer, faults in FAULTS.items()},
        "threads": {"of an op": [2, 3], "callers at once": [1, 4]},
        "isas": isas,
        "seconds": {"build": round(built), "all": round(time.monotonic() - begin)},
        "compiler": version,
        "machine": platform.machine(),
        "load": os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
        "commit": git.strip() or "unknown",
    }
    SUMMARY.parent.mkdir(exist_ok=True)
    SUMMARY.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
