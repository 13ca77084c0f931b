"""The steps that are no measurement: the build, the tests, and the tests under compute-sanitizer."""

import importlib.util
import json
import re
import shutil
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.process import cores, run

SAMPLE = "cuda-gpu and (several or many-small) and (float32 or bfloat16)"  # of the op tests, by their ids
SAMPLE_FILES = ("ops/test_norm", "ops/test_perturb", "ops/test_step", "ops/test_rho", "step/test_finite")
DRY_TESTS = ("tests/step/test_finite.py::test_a_gradient_of_zero_perturbs_nothing",)
MOST_NAMED = 15
MOST_WORKERS = 6  # processes that share the GPU, where pytest-xdist is installed


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


def judge(junit: str | None, backends: Sequence[str]) -> dict[str, Any]:
    """What pytest's XML says: how many tests passed on each backend, and everything that speaks against a pass.

    `failed` is empty only if tests passed on each of the backends, none failed and none was skipped. A test belongs to
    a backend whose name is one of the parts of its id: ``test_x[cuda-float32]``.
    """
    if junit is None:
        return {"passed": {}, "failed": [["tests", "pytest wrote no results"]]}
    passed, failed, skipped = dict.fromkeys(backends, 0), [], []
    for case in ElementTree.fromstring(junit).iter("testcase"):
        name = case.get("name", "")
        kinds = {child.tag: child.get("message", "") for child in case}
        label = f"{case.get('classname', '')}::{name}"
        if "failure" in kinds or "error" in kinds:
            message = (kinds.get("failure") or kinds.get("error") or "").strip()
            failed.append([label, (message.splitlines() or ["no message"])[0][:200]])
        elif "skipped" in kinds:
            skipped.append([label, f"skipped: {kinds['skipped'][:160]}"])
        else:
            parts = set(re.split(r"[\[\]\-, ]", name[name.find("[") :] if "[" in name else ""))
            for backend in backends:
                passed[backend] += backend in parts
    for backend, count in passed.items():
        if count == 0:
            failed.append([f"tests on {backend}", "not one of them passed"])
    return {"passed": passed, "skipped": len(skipped), "failed": [*failed, *skipped]}


def tests(dry: bool, backends: Sequence[str], seconds: float) -> dict[str, Any]:
    """The GPU tests with pytest; in a dry run a few tests of the CPU's backends."""
    with tempfile.TemporaryDirectory() as scratch:
        junit = Path(scratch) / "junit.xml"
        which = [*DRY_TESTS, "-k", " or ".join(backends)] if dry else ["tests", "-m", "gpu"]
        options = [
            "-q",
            "--no-header",
            "--tb=short",
            "--continue-on-collection-errors",
            "-p",
            "no:cacheprovider",
            f"--junitxml={junit}",
        ]
        if not dry and importlib.util.find_spec("xdist"):
            options += ["-n", str(max(1, min(MOST_WORKERS, cores() // 2)))]
        outcome = run([sys.executable, "-m", "pytest", *which, *options], seconds)
        found = judge(junit.read_text() if junit.exists() else None, backends)
    if outcome.cut_off:
        found["failed"].insert(0, ["tests", f"cut off after {outcome.seconds:.0f} s"])
    elif outcome.code and not found["failed"]:
        found["failed"].append(["tests", f"pytest's exit status is {outcome.code}"])
    more = len(found["failed"]) - MOST_NAMED
    if more > 0:
        found["failed"] = [*found["failed"][:MOST_NAMED], [f"{more} more", "not named here"]]
    return found


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
