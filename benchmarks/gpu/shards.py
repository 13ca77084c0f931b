"""The GPU tests, in several processes at a time, each of which takes some files and writes a report of its own.

A fault on the device, after which a process cannot use it any more, then fails the tests of one process. Before them
every op is called once (smoke.py), while pytest lists the tests. The reference on the GPU comes last: it tests no
kernel of ours.
"""

import collections
import functools
import re
import runpy
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import worker_rows
from benchmarks.gpu.outcomes import merged, read, shortened
from benchmarks.gpu.process import ROOT, cores, run

MOST_WORKERS = 6  # processes that share the GPU
SIZE = 400  # tests of a shard, at least: a process takes some seconds to start, and most tests some 30 ms
MOST_FAILED = 20  # after which a shard gives up: its device may be lost
LEAST = 5.0  # seconds, without which no shard starts
TAIL = 6000  # characters printed of a shard that failed
# Plugins that are installed here by chance cost time and may change what runs.
ENVIRONMENT = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
PYTEST = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider"]


@dataclass(frozen=True)
class Choice:
    """Which tests run: pytest's arguments, an expression for -k, and what the ids of the last ones contain."""

    arguments: tuple[str, ...]
    expression: str
    last: str


GPU = Choice(("tests", "-m", "gpu"), "", "reference-gpu")
DRY = Choice(("tests/ops/test_no_runs.py",), "(cpu or reference) and noise", "reference")


@dataclass(frozen=True)
class Shard:
    """Some files, of which a process runs the tests on our kernels, or (`last`) those of the reference."""

    files: tuple[str, ...]
    last: bool
    tests: int

    @property
    def label(self) -> str:
        files = ", ".join(file.removeprefix("tests/") for file in self.files)
        return f"{files} (reference)" if self.last else files


def pack(sizes: dict[str, int], size: int) -> list[list[str]]:
    """The files in groups of at least `size` tests, the largest first; what is left over is a group as well."""
    groups: list[list[str]] = []
    room = 0
    for file in sorted(sizes, key=lambda name: (-sizes[name], name)):
        if room <= 0:
            groups.append([])
            room = size
        groups[-1].append(file)
        room -= sizes[file]
    return groups


def planned(listing: str, choice: Choice, size: int) -> list[Shard]:
    """The shards of the tests that `pytest --collect-only -q` has listed, in the order in which they start."""
    found = []
    ids = re.findall(r"^(tests/\S+?\.py)::(.*)$", listing, re.MULTILINE)
    for last in (False, True):
        sizes = collections.Counter(file for file, name in ids if (choice.last in name) is last)
        found += [Shard(tuple(g), last, sum(sizes[file] for file in g)) for g in pack(sizes, size)]
    return found


def arguments(shard: Shard, choice: Choice) -> list[str]:
    """Those of pytest."""
    mine = choice.last if shard.last else f"not {choice.last}"
    expression = f"({choice.expression}) and {mine}" if choice.expression else mine
    return [*shard.files, *choice.arguments[1:], "-k", expression, f"--maxfail={MOST_FAILED}"]


def without_packages() -> list[list[str]]:
    """The test files that cannot be imported here, and why."""
    missing = runpy.run_path(str(ROOT / "tests" / "support" / "needs.py"))["missing"]()
    return [[f"tests/{file}", f"not run: needs {', '.join(names)}"] for file, names in missing.items()]


class Tests:
    """A run of the tests: until when, and what has come of them."""

    def __init__(self, choice: Choice, device: str, backends: Sequence[str], seconds: float, scratch: Path) -> None:
        self.choice, self.device, self.backends, self.scratch = choice, device, backends, scratch
        self._end = time.monotonic() + seconds
        self._stop = threading.Event()
        self.reports: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.smoke: dict[str, Any] = {}
        self.left_out = without_packages()

    def remaining(self) -> float:
        return self._end - time.monotonic()

    def found(self) -> dict[str, Any]:
        """What there is so far."""
        together = merged(self.reports, self.backends)
        together["failed"] = shortened(together["failed"])
        return {**together, "smoke": self.smoke, "rows": self.rows, "left_out": self.left_out}

    def against(self, label: str, reason: str) -> None:
        self.reports.append({"failed": [[label, reason]]})

    def _look_in(self) -> None:
        if self._stop.is_set():
            raise InterruptedError("the run was interrupted")

    def call_every_op(self) -> None:
        """One call an op; what is wrong is named before all else."""
        rows = self.scratch / "smoke"
        share = 0.5 * self.remaining()
        options = ["--device", self.device, "--rows", str(rows), "--until", f"{time.time() + share:.1f}"]
        outcome = run([sys.executable, "-m", "benchmarks.gpu.smoke", *options], share, look_in=self._look_in)
        found = worker_rows.collect(rows)
        failed = [[f"smoke: {case}", reason] for case, reason in found["failed"]]
        if outcome.cut_off or (outcome.code and not failed):
            ended = "cut off" if outcome.cut_off else f"ended with exit status {outcome.code}"
            failed.append(["smoke", f"{ended} after {outcome.seconds:.0f} s"])
        self.smoke = {"checked": len(found["rows"]), "seconds": round(outcome.seconds, 1)}
        self.reports.insert(0, {"failed": failed})

    def listed(self, size: int) -> list[Shard]:
        """The shards; a file that cannot be read is a failure, one that skips itself for want of a package is named."""
        junit, output = self.scratch / "listed.xml", self.scratch / "listed"
        keep = ["-k", self.choice.expression] if self.choice.expression else []
        options = [*self.choice.arguments, *keep, "--collect-only", "--continue-on-collection-errors"]
        command = [*PYTEST, *options, f"--junitxml={junit}"]
        outcome = run(command, 0.5 * self.remaining(), ENVIRONMENT, self._look_in, output)
        report = read(junit.read_text() if junit.exists() else None, self.backends)
        for skipped in list(report.get("skipped", ())):
            if needs := re.search(r"could not import '([\w.]+)'", skipped[1]):
                report["skipped"].remove(skipped)
                self.left_out.append([skipped[0].removeprefix("::"), f"not run: needs {needs[1]}"])
        self.reports.append(report)
        shards = planned(outcome.output, self.choice, size)
        if not shards and not report["failed"]:
            self.against("tests", f"pytest listed none of them: {outcome.output.strip()[-160:]}")
        return shards

    def take(self, number: int, shard: Shard) -> dict[str, Any]:
        """Run one shard; its report, and the row about it."""
        row = {"shard": shard.label, "tests": shard.tests, "ran": 0, "failed": 0, "seconds": 0.0}
        seconds = self.remaining()
        if self._stop.is_set() or seconds < LEAST:
            return {"row": row, "failed": [[shard.label, "no time was left"]]}
        junit, output = self.scratch / f"{number}.xml", self.scratch / f"{number}"
        command = [*PYTEST, *arguments(shard, self.choice), f"--junitxml={junit}"]
        outcome = run(command, seconds, ENVIRONMENT, self._look_in, output)
        report = read(junit.read_text() if junit.exists() else None, self.backends)
        ran, failed = report.get("ran", 0), len(report["failed"]) + len(report.get("skipped", ()))
        row |= {"ran": ran, "failed": failed, "seconds": round(outcome.seconds, 1)}
        if outcome.cut_off:
            ended = f"cut off after {outcome.seconds:.0f} s, {ran} of {shard.tests} tests ran"
            report["failed"].insert(0, [shard.label, ended])
        elif ran < shard.tests:
            ended = f"{ran} of {shard.tests} tests ran, exit status {outcome.code}"
            report["failed"].append([shard.label, ended])
        elif outcome.code and not failed:
            report["failed"].append([shard.label, f"pytest's exit status is {outcome.code}"])
        said = outcome.output[-TAIL:] if report["failed"] else ""
        print(f"{said}  {shard.label}: {ran} of {shard.tests} in {outcome.seconds:.0f} s, {failed} failed", flush=True)
        return {**report, "row": row}

    def all(self, tasks: Sequence[Callable[[], Any]], workers: int) -> Iterator[Any]:
        """What the tasks return, as they end; so many at a time, in their order. An interrupt ends their commands."""
        with ThreadPoolExecutor(max(1, workers)) as pool:
            futures = [pool.submit(task) for task in tasks]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise


def tests(
    device: str, backends: Sequence[str], seconds: float, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """All of them; on the CPU, for a dry run, a few. `keep` is called with what there is whenever a shard ends."""
    choice, size = (DRY, 1) if device == "cpu" else (GPU, SIZE)
    with tempfile.TemporaryDirectory() as scratch:
        run_of = Tests(choice, device, backends, seconds, Path(scratch))
        shards: list[Shard] = []
        for found in run_of.all([run_of.call_every_op, functools.partial(run_of.listed, size)], 2):
            shards += found or []
        takes = [functools.partial(run_of.take, number, shard) for number, shard in enumerate(shards)]
        for report in run_of.all(takes, min(MOST_WORKERS, cores() // 2)):
            run_of.rows.append(report.pop("row"))
            run_of.reports.append(report)
            keep(run_of.found())
        return run_of.found()
