"""All runs, spread over processes of one thread each, behind one progress bar."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lets_kernels.demo.methods import ALL, Settings
from lets_kernels.demo.train import Run, train


def train_all(
    methods: list[str], seeds: int, settings: Settings, jobs: int, console: Console
) -> Generator[Run, None, None]:
    """Trains every method with the seeds 0 ... seeds-1, and yields each run as it ends. Closing it ends its processes.

    The numbers do not depend on ``jobs``; the timings do.
    """
    context = multiprocessing.get_context("spawn")
    gradients, stop = context.Value("d", 0.0), context.Event()  # how many epochs x gradients a step are done
    longest_first = sorted(methods, key=lambda name: -ALL[name].gradients)  # so that no process idles at the end
    tasks = [(name, seed) for seed in range(seeds) for name in longest_first]
    total = settings.epochs * sum(ALL[name].gradients for name, _ in tasks)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    pool = ProcessPoolExecutor(jobs, context, _start, (gradients, stop))
    with Progress(*columns, TextColumn("left:"), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task(f"starting {jobs} processes", total=total)
        try:
            with _without_interrupts():  # the processes are born deaf to Ctrl-C; this one tells them when to stop
                pending = {pool.submit(_train, name, seed, settings) for name, seed in tasks}
            while pending:
                ended, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in ended)
                if gradients.value:
                    text = f"{len(tasks) - len(pending)} of {len(tasks)} runs"
                    progress.update(bar, completed=gradients.value, description=text)
        except BaseException:
            progress.update(bar, description="stopping")
            raise
        finally:
            stop.set()
            with _without_interrupts():
                pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_gradients: "Synchronized[float]"
_stop: Event


def _start(gradients: "Synchronized[float]", stop: Event) -> None:
    """Called once in each process."""
    global _gradients, _stop
    _gradients, _stop = gradients, stop
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train(name: str, seed: int, settings: Settings) -> Run:
    def after_epoch() -> None:
        with _gradients.get_lock():
            _gradients.value += ALL[name].gradients
        if _stop.is_set():
            raise InterruptedError("the demo was stopped")

    return train(name, seed, settings, after_epoch)
