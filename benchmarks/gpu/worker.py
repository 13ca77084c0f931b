"""What the measuring steps share: their command line, the clock that they must keep to, and the file of their rows.

A step is a process of its own, so that a fault on the device ends that step and no other. What it writes is described
in worker_rows.py.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.timing import Device
from lets_kernels import ops

IN_A_ROW = 3  # failures, after which a step gives up: the device does not recover from some of them


def in_words(failure: Exception) -> str:
    """An exception in one line."""
    return f"{type(failure).__name__}: {(str(failure).splitlines() or ['no message'])[0][:200]}"


class Work:
    """One step's run: where it measures, how long it may, and what it has to say."""

    def __init__(self, device: Device, until: float, rows: Path) -> None:
        self.device, self._end, self.path = device, until, rows
        self._failures = 0
        self.failed = False
        names = ("cuda", "triton") if device.cuda else ("cpu", "reference")
        self.backends: list[str] = []
        for name in names:
            module, reason = ops.load(name)
            if module is not None:
                self.backends.append(name)
            else:
                self.fail(f"backend {name}", reason)

    @property
    def dry(self) -> bool:
        return not self.device.cuda

    def remaining(self) -> float:
        return self._end - time.time()

    def write(self, **entry: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def row(self, **kept: Any) -> None:
        self.write(row=kept)

    def leave_out(self, case: str, reason: str) -> None:
        self.write(left_out=[case, reason])

    def fail(self, case: str, reason: str) -> None:
        self.failed = True
        self.write(failed=[case, reason])
        print(f"  {case} failed: {reason}", flush=True)

    def end_if_lost(self) -> None:
        """End the step if the device answers no more, as after an access to memory that it does not have."""
        try:
            self.device.synchronize()
        except Exception as error:
            self.fail("the device", f"is lost: {in_words(error)}")
            raise SystemExit(1) from error

    def case(self, name: str, run: Callable[[], None]) -> None:
        """Run one case; a failure is written down and the next case comes.

        Raises:
            SystemExit: after three failures in a row.
        """
        if self.remaining() <= 0:
            return  # planned and not done: collect() says so
        self.write(begin=name)
        try:
            run()
            self.device.synchronize()
        except Exception as error:
            self.fail(name, in_words(error))
            self._failures += 1
            if self._failures >= IN_A_ROW:
                raise SystemExit(1) from error
        else:
            self._failures = 0
            self.write(done=name)
        self.release()

    def release(self) -> None:
        """Give back the device memory that nobody holds any more."""
        if self.device.cuda:
            gc.collect()
            torch.cuda.empty_cache()


def main(step: Callable[[Work], None], what: str | None) -> None:
    """The command line of a step's module."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a dry run, not a measurement")
    parser.add_argument("--until", type=float, help="the time (seconds since 1970) after which no case starts")
    parser.add_argument("--rows", type=Path, required=True, help="file to which results are appended, one a line")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU that torch can use here; --device cpu is a dry run")
    if options.device == "cpu":
        torch.set_num_threads(1)
    work = Work(Device(options.device), options.until or time.time() + 120, options.rows)
    step(work)
    raise SystemExit(1 if work.failed else 0)
