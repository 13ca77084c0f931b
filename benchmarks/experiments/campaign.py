"""All runs of a campaign, each with a file of its own: kill it at any time, and it goes on with what is missing."""

import contextlib
import datetime
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.experiments import train
from benchmarks.experiments.contenders import CONTENDERS
from benchmarks.experiments.tasks import TASKS
from lets_kernels.bench.clock import threads
from lets_kernels.record import environment

RESULTS = Path(__file__).resolve().parent / "results"
KEPT = ("cpu", "cores", "lets_kernels", "torch", "python", "commit")


@dataclass(frozen=True)
class Run:
    """What to run, by names; and where its file goes."""

    task: str
    contender: str
    seed: int

    def path(self, folder: Path) -> Path:
        return folder / self.task / self.contender / f"{self.seed}.json"

    def finished(self, folder: Path) -> bool:
        """True if there is a file of a run with the settings of today."""
        try:
            found = json.loads(self.path(folder).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        wanted = train.settings(TASKS[self.task], CONTENDERS[self.contender])
        return found.get("settings") == json.loads(json.dumps(wanted))


def runs(tasks: Iterable[str], contenders: Iterable[str], seeds: Iterable[int]) -> list[Run]:
    """Task by task and then seed by seed, so that a report of the first hour compares all contenders."""
    contenders, seeds = list(contenders), list(seeds)
    return [Run(task, contender, seed) for task in tasks for seed in seeds for contender in contenders]


def execute(run: Run, folder: Path, environment: dict[str, Any]) -> None:
    """Train, and write the file by rename: there is all of it or none."""
    result = train.train(TASKS[run.task], CONTENDERS[run.contender], run.seed)
    result["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    result["environment"] = environment
    path = run.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    temporary.write_text(json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n")
    temporary.replace(path)


def campaign(planned: list[Run], folder: Path, workers: int, console: Console) -> list[str]:
    """Run what is not finished, in processes of one thread each; with one worker, in this one. Returns what failed."""
    left = [run for run in planned if not run.finished(folder)]
    console.print(f"{len(left)} of {len(planned)} runs to do, the others are in {folder}")
    machine = {key: value for key, value in environment().items() if key in KEPT}
    failed = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left:"), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("starting", total=len(left))
        for run, error in (_here if workers == 1 else _spread)(left, folder, machine, workers):
            progress.update(bar, advance=1, description=f"{run.task} {run.contender} seed {run.seed}")
            if error is not None:
                failed.append(f"{run.task} {run.contender} seed {run.seed}: {type(error).__name__}: {error}")
                console.print(f"[red]{failed[-1]}")
            elif not console.is_terminal:  # a log shows no bar
                console.print(f"{run.task} {run.contender} seed {run.seed}", highlight=False)
    return failed


Outcomes = Iterator[tuple[Run, BaseException | None]]


def _here(left: list[Run], folder: Path, environment: dict[str, Any], workers: int) -> Outcomes:
    with threads(1):
        for run in left:
            error = None
            try:
                execute(run, folder, environment)
            except Exception as raised:  # the other runs go on; the campaign says at its end what failed
                error = raised
            yield run, error


def _spread(left: list[Run], folder: Path, environment: dict[str, Any], workers: int) -> Outcomes:
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start)
    try:
        with _without_interrupts():  # the processes are born deaf to Ctrl-C
            pending: dict[Future[None], Run] = {pool.submit(execute, run, folder, environment): run for run in left}
        while pending:
            for future in wait(pending, timeout=0.5, return_when=FIRST_COMPLETED).done:
                yield pending.pop(future), future.exception()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start() -> None:
    """Called once in each process."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process whose parent was killed would go on with what was handed to it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
