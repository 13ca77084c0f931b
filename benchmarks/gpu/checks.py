"""The build, and a sample of the tests under compute-sanitizer."""

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.outcomes import judge
from benchmarks.gpu.process import run

SAMPLE = "cuda-gpu and (several or many-small) and (float32 or bfloat16)"  # of the op tests, by their ids
SAMPLE_FILES = ("ops/test_norm", "ops/test_perturb", "ops/test_step", "ops/test_rho", "step/test_finite")


def build(architecture: str | None, seconds: float) -> dict[str, Any]:
    """Build both libraries in place, for this card alone; without an architecture (a dry run) compile nothing."""
    with tempfile.TemporaryDirectory() as scratch:
        if architecture:
            environment = {"LETS_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture}
            command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        else:
            environment = {"LETS_KERNELS_CUDA": "0", "LETS_KERNELS_CPU": "0"}
            command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", scratch, "--build-temp", scratch]
        outcome = run(command, seconds, environment)
        what = "import json, lets_kernels as k; print(json.dumps([k.__version__, k.backends()]))"
        listed = run([sys.executable, "-c", what], 60, output=Path(scratch) / "backends")
    found: dict[str, Any] = {"architecture": architecture, "build_s": round(outcome.seconds, 1)}
    failed = [] if outcome.ok else [["build", "cut off" if outcome.cut_off else f"exit status {outcome.code}"]]
    try:
        found["lets_kernels"], found["backends"] = json.loads(listed.output.splitlines()[-1])
    except (ValueError, IndexError):
        failed.append(["import", (listed.output.strip().splitlines() or ["no output"])[-1][:200]])
    if architecture and not found.get("backends", {}).get("cuda", "").startswith("available"):
        failed.append(["backend cuda", found.get("backends", {}).get("cuda", "unknown")])
    return {**found, "failed": failed}


def sanitize(dry: bool, seconds: float) -> dict[str, Any]:
    """A sample of the op tests on the cuda backend under compute-sanitizer's memcheck and racecheck."""
    found: dict[str, Any] = {"rows": [], "failed": [], "left_out": []}
    if dry or shutil.which("compute-sanitizer") is None:
        reason = "a dry run has no GPU" if dry else "compute-sanitizer is not on the PATH"
        found["left_out"] = [[tool, reason] for tool in ("memcheck", "racecheck")]
        return found
    files = [f"tests/{file}.py" for file in SAMPLE_FILES]
    with tempfile.TemporaryDirectory() as scratch:
        for share, tool in ((0.5, "memcheck"), (1.0, "racecheck")):
            junit = Path(scratch) / f"{tool}.xml"
            sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", "--print-limit", "5"]
            pytest = [sys.executable, "-m", "pytest", *files, "-q", "-k", SAMPLE, "-p", "no:cacheprovider"]
            # torch's caching allocator would hide an access beyond a tensor's end.
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            command = [*sanitizer, *pytest, f"--junitxml={junit}"]
            outcome = run(command, share * seconds, environment, output=Path(scratch) / tool)
            seconds -= outcome.seconds
            passed = judge(junit.read_text() if junit.exists() else None, ["cuda"])["passed"].get("cuda", 0)
            verdict = sanitizer_verdict(outcome.output, outcome.code, outcome.cut_off, passed)
            found["rows"].append({"tool": tool, "tests": passed, "seconds": round(outcome.seconds, 1), **verdict})
            if not verdict["clean"]:
                print(outcome.output[-6000:], flush=True)
                found["failed"].append([tool, verdict["said"]])
    return found


def sanitizer_verdict(output: str, code: int, cut_off: bool, passed: int) -> dict[str, Any]:
    """Clean only if tests ran to their end under the tool, and its own summary counts no errors."""
    lines = [line.strip() for line in output.splitlines()]
    said = next((x for x in reversed(lines) if "SUMMARY" in x), "no summary")
    none = re.search(r"\b0 (errors|hazards)\b", said) is not None
    if cut_off:
        said = "cut off: its time was over"
    elif passed == 0:
        said = f"no test passed under it (exit status {code}; {said})"
    return {"clean": none and code == 0 and not cut_off and passed > 0, "said": said[:200]}
