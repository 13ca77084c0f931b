"""One command for a machine with a GPU: build, test, measure, and say which promises hold.

    python3 benchmarks/gpu_check.py

Needs no network and no virtual environment: python3 with torch, triton, pytest, pytest-benchmark, ninja and pybind11,
and nvcc. Every step is a process of its own with a time limit; what a limit leaves out is named. Results are written
after every step and while one runs: benchmarks/results/gpu-<name>.json, and the summary beside it. Exit status: 0
where everything ran and is correct, whatever the speed; 1 where a build, a test or a step failed or did not run to its
end.
"""

import argparse
import dataclasses
import functools
import json
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file, from any folder, without an installation

from benchmarks.gpu import checks, machine, report, shards, worker_rows  # noqa: E402
from benchmarks.gpu.process import run  # noqa: E402
from benchmarks.gpu.verdicts import verdicts  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
# A step's share of what is left, against the steps after it; and the most of it that a build, worth nothing when cut
# off, or the tests may take. The measurements after the tests keep half of what is left.
WEIGHTS = {"build": 110, "tests": 130, "ops": 110, "steps": 110, "end-to-end": 55, "graphs": 30, "sanitize": 60}
MOST = {"build": 0.5, "tests": 0.5, "sanitize": 1.0}
MODULES = {"ops": "ops", "steps": "steps", "end-to-end": "end_to_end", "graphs": "graphs"}
DEFAULT = ["build", "tests", "ops", "steps", "end-to-end", "graphs"]
ENDING = 10.0  # seconds kept for ending a step, and for the summary
LAST_CASE = 12.0  # seconds that a step has for the case it has begun
LEAST = 3.0


def as_json(results: dict[str, Any]) -> str:
    """The results as JSON, one line a row."""
    lines: list[str] = []

    def hold(row: Any) -> str:
        lines.append(json.dumps(row))
        return f"@{len(lines) - 1}@"

    steps = {n: {**s, "rows": list(map(hold, s["rows"]))} if "rows" in s else s for n, s in results["steps"].items()}
    text = json.dumps({**results, "steps": steps}, indent=1)
    return re.sub(r'"@(\d+)@"', lambda found: lines[int(found[1])], text) + "\n"


class Check:
    """A run of the chosen steps, and the results file that grows with it."""

    def __init__(self, device: str, chosen: list[str], budget: float, out: Path, environment: dict[str, Any]) -> None:
        self.dry, self.device, self.chosen, self.budget, self.out = device == "cpu", device, chosen, budget, out
        self.start = time.monotonic()
        self.architecture = environment.get("capability")
        self.results: dict[str, Any] = {
            "question": "Is it correct on this GPU, and how fast?",
            "dry_run": self.dry,
            "note": report.NOT_A_MEASUREMENT if self.dry else None,
            "environment": environment,
            "backends": ["cpu", "reference"] if self.dry else ["cuda", "triton"],
            "budget_s": budget,
            "seconds": 0.0,
            "steps": {},
            "verdicts": [],
        }

    def remaining(self) -> float:
        return self.start + self.budget - time.monotonic() - ENDING

    def limit(self, name: str) -> float:
        """Seconds for a step: its share of what is left. What a step does not use goes to those after it."""
        later = self.chosen[self.chosen.index(name) :]
        share = WEIGHTS[name] / sum(WEIGHTS[n] for n in later)
        return self.remaining() * (max(share, MOST.get(name, 0.0)) if len(later) > 1 else 1.0)

    def write(self) -> str:
        """Write both files, whole or not at all; returns the summary."""
        r = self.results
        r["seconds"] = round(time.monotonic() - self.start, 1)
        r["verdicts"] = [dataclasses.asdict(v) for v in verdicts(r["steps"], r["backends"], self.dry)]
        text = report.summary(r, str(self.out))
        for path, content in ((self.out, as_json(r)), (self.out.with_suffix(".txt"), text)):
            fresh = path.with_name(path.name + ".new")
            fresh.write_text(content)
            fresh.replace(path)
        return text

    def keep(self, name: str, found: dict[str, Any]) -> None:
        """Write down what a step has found so far."""
        self.results["steps"][name] = {"status": "running", **found}
        self.write()

    def measure(self, name: str, seconds: float) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            rows = Path(scratch) / "rows"
            until = time.time() + max(0.5 * seconds, seconds - LAST_CASE)
            options = ["--device", self.device, "--rows", str(rows), "--until", f"{until:.1f}"]

            def look_in() -> None:
                self.keep(name, worker_rows.collect(rows))

            try:
                command = [sys.executable, "-m", f"benchmarks.gpu.{MODULES[name]}", *options]
                outcome = run(command, seconds, look_in=look_in)
            except BaseException:
                look_in()
                raise
            found = worker_rows.collect(rows)
        if outcome.cut_off:
            found["failed"].append([name, f"cut off after {outcome.seconds:.0f} s"])
        elif outcome.code and not found["failed"]:
            found["failed"].append([name, f"ended with exit status {outcome.code}"])
        return found

    def step(self, name: str) -> None:
        seconds = self.limit(name)
        if seconds < LEAST:
            self.results["steps"][name] = {"status": "left out", "reason": "no time was left"}
            return
        print(f"== {name}, at most {seconds:.0f} s", flush=True)
        begun = time.monotonic()
        try:
            if name == "build":
                found = checks.build(self.architecture, seconds)
            elif name == "tests":
                found = shards.tests(self.device, self.results["backends"], seconds, functools.partial(self.keep, name))
            elif name == "sanitize":
                found = checks.sanitize(self.dry, seconds)
            else:
                found = self.measure(name, seconds)
        except KeyboardInterrupt:
            step = self.results["steps"].setdefault(name, {"failed": []})
            step["failed"].append([name, "interrupted"])
            step["status"] = "interrupted"
            raise
        status = "failed" if found["failed"] else "ok"
        spent = {"seconds": round(time.monotonic() - begun, 1), "budget_s": round(seconds, 1)}
        self.results["steps"][name] = {"status": status, **spent, **found}

    def run(self) -> int:
        """All steps; returns the exit status."""
        try:
            for name in self.chosen:
                self.step(name)
                self.write()
        except KeyboardInterrupt:
            self.results["interrupted"] = True
        for name in self.chosen:
            self.results["steps"].setdefault(name, {"status": "left out", "reason": "interrupted before it began"})
        text = self.write()
        print(f"\n{text}", end="", flush=True)
        return 0 if all(s["status"] == "ok" for s in self.results["steps"].values()) else 1


def chosen_steps(only: str | None, sanitize: bool) -> list[str]:
    """The steps in their order.

    Raises:
        SystemExit: a name is unknown.
    """
    names = only.split(",") if only else list(DEFAULT)
    unknown = [n for n in names if n not in WEIGHTS]
    if unknown:
        raise SystemExit(f"--only {only}: no step is called {unknown[0]!r}; there are {', '.join(WEIGHTS)}")
    return [n for n in WEIGHTS if n in names or (sanitize and n == "sanitize")]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="STEPS", help=f"some of {','.join(WEIGHTS)}")
    parser.add_argument("--sanitize", action="store_true", help="compute-sanitizer as well")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything (default: 540)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a dry run, not a measurement")
    parser.add_argument("--out", type=Path, help="the JSON file (default: benchmarks/results/gpu-<name>.json)")
    parser.add_argument("--commit", help="the commit to name, where the sources are no git repository")
    options = parser.parse_args()
    chosen = chosen_steps(options.only, options.sanitize)
    if options.device == "cpu" and options.out and RESULTS in options.out.resolve().parents:
        raise SystemExit(f"a dry run is not a measurement and writes nothing into {RESULTS}")
    try:
        import torch
    except ImportError as missing:
        raise SystemExit(f"gpu-check needs torch, which this python3 ({sys.executable}) lacks: {missing}") from missing
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu-check needs a GPU that torch can use, and there is none here; --device cpu is a dry run")
    environment = machine.environment(options.device)
    if options.commit and environment["commit"] == "unknown":
        environment["commit"] = f"{options.commit} (as told)"
    out = options.out
    if out is None and options.device == "cpu":
        out = Path(tempfile.mkdtemp(prefix="gpu-check-")) / "gpu-dry-run.json"
    elif out is None:
        out = RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', environment['gpu'].lower()).strip('-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, interrupt)
    return Check(options.device, chosen, options.budget, out, environment).run()


if __name__ == "__main__":
    raise SystemExit(main())
