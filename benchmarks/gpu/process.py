"""Running a command for a limited time, and looking in on it."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen, TimeoutExpired

ROOT = Path(__file__).resolve().parent.parent.parent
GRACE = 8.0  # seconds between the request to end and the end: pytest writes its results in them


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Outcome:
    code: int
    seconds: float
    cut_off: bool
    output: str = ""  # where it was asked for

    @property
    def ok(self) -> bool:
        return self.code == 0 and not self.cut_off


def run(
    command: Sequence[str],
    seconds: float,
    environment: Mapping[str, str] | None = None,
    look_in: Callable[[], None] = lambda: None,
    output: Path | None = None,
    every: float = 3.0,
) -> Outcome:
    """Run a command in the project's folder, calling `look_in` `every` few seconds; end it when its time is over.

    Its output goes where ours goes, or to the file `output`, whose text is then returned. An interrupt of this process
    ends the command as well.
    """
    sys.stdout.flush()
    start = time.monotonic()
    sink = output.open("w") if output else None
    process = Popen(
        [*command],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdin=DEVNULL,
        stdout=sink,
        stderr=STDOUT if sink else None,
        start_new_session=True,
    )
    cut_off = False
    try:
        while process.poll() is None:
            left = start + seconds - time.monotonic()
            if left <= 0:
                cut_off = True
                break
            try:
                process.wait(min(every, left))
            except TimeoutExpired:
                look_in()
    finally:
        _end(process)
        if sink:
            sink.close()
    text = output.read_text(errors="replace") if output else ""
    return Outcome(process.returncode, time.monotonic() - start, cut_off, text)


def _end(process: "Popen[bytes]") -> None:
    """Ask the command and its children to end, and then make those that have not."""
    if process.poll() is not None:
        return
    for number, wait in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutExpired):
            process.wait(wait)
