"""All trainings, spread over processes of one thread each, behind one progress bar."""

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

from lets_kernels.demo.methods import Settings, Task
from lets_kernels.demo.train import Training, train


def train_all(planned: list[Task], settings: Settings, jobs: int, console: Console) -> Generator[Training, None, None]:
    """Trains all that is planned, and yields each training when it ends. Closing the generator ends its processes.

    The numbers do not depend on ``jobs``; the timings do.
    """
    context = multiprocessing.get_context("spawn")
    epochs, stop = context.Value("i", 0), context.Event()  # how many epochs are done
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    pool = ProcessPoolExecutor(jobs, context, _start, (epochs, stop))
    with Progress(*columns, TextColumn("left:"), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task(f"starting {jobs} processes", total=settings.epochs * len(planned))
        try:
            with _without_interrupts():  # the new processes ignore Ctrl-C; this process tells them when to stop
                pending = {pool.submit(_train, task, settings) for task in planned}
            while pending:
                ended, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in ended)
                if epochs.value:
                    text = f"{len(planned) - len(pending)} of {len(planned)} trainings"
                    progress.update(bar, completed=epochs.value, description=text)
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


_epochs: "Synchronized[int]"
_stop: Event


def _start(epochs: "Synchronized[int]", stop: Event) -> None:
    """Called once in each process."""
    global _epochs, _stop
    _epochs, _stop = epochs, stop
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process if its parent was killed; otherwise it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train(task: Task, settings: Settings) -> Training:
    def after_epoch() -> None:
        with _epochs.get_lock():
            _epochs.value += 1
        if _stop.is_set():
            raise InterruptedError("the demo was stopped")

    return train(*task, settings, after_epoch)
