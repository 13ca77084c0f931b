"""The results of the trainings: a table on the screen and a JSON file."""

import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from statistics import fmean, median, stdev
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table

import lets_kernels
from lets_kernels.demo.data import TEST_SIZE
from lets_kernels.demo.methods import ALL, Settings
from lets_kernels.demo.train import Training
from lets_kernels.record import commit, cpu, now

DEFINITIONS = {
    "train_loss": "mean cross-entropy (nats) on the training set with its wrong labels, in evaluation mode",
    "test_loss": "mean cross-entropy (nats) on the test set with its right labels",
    "noisy_test_loss": "as test_loss, in expectation over labels as noisy as those of the training set",
    "gap": "generalisation gap: noisy_test_loss - train_loss",
    "test_accuracy": "share of the test images, with their right labels, that are classified correctly",
    "rho": "the radius at the end of the epoch (epoch 0: at the start)",
    "gradients": "how many gradients all steps so far have taken; a gradient of a part of the batch counts as one, too",
    "step_ms": "wall time of optimizer.step in ms, median over the epoch; summary: median of epochs, mean of seeds",
    "optimizer_ms": "as step_ms, without the time spent in the closures, that is in zero_grad, forward and backward "
    "(null for ESAM and δ-SAM, which call backward themselves)",
}


@dataclass(frozen=True)
class Summary:
    """A method with one first radius, over its seeds: means, and the sample deviation of the accuracy."""

    method: str
    label: str
    seeds: int
    gradients: float
    gradients_per_step: float
    test_accuracy: float
    test_accuracy_sd: float | None  # None with one seed
    rho_start: float | None
    rho_end: float | None
    step_ms: float
    optimizer_ms: float | None


def in_order(trainings: list[Training]) -> list[Training]:
    """The trainings sorted by method, as in ALL, then by radius and seed."""
    order = list(ALL)
    return sorted(trainings, key=lambda training: (order.index(training.method), training.rho or 0.0, training.seed))


def summarise(trainings: list[Training], settings: Settings) -> list[Summary]:
    """One summary for each method and first radius, in order."""
    return [
        _summary(list(group), settings)
        for _, group in groupby(in_order(trainings), lambda each: (each.method, each.rho))
    ]


def _summary(trainings: list[Training], settings: Settings) -> Summary:
    accuracies = [training.epochs[-1].test_accuracy for training in trainings]
    gradients = fmean(training.epochs[-1].gradients for training in trainings)
    return Summary(
        method=trainings[0].method,
        label=ALL[trainings[0].method].label,
        seeds=len(trainings),
        gradients=gradients,
        gradients_per_step=gradients / settings.steps,
        test_accuracy=fmean(accuracies),
        test_accuracy_sd=stdev(accuracies) if len(accuracies) > 1 else None,
        rho_start=trainings[0].rho,
        rho_end=_of(fmean, (training.epochs[-1].rho for training in trainings)),
        step_ms=fmean(median(epoch.step_ms or 0.0 for epoch in training.epochs[1:]) for training in trainings),
        optimizer_ms=_of(fmean, (_of(median, (epoch.optimizer_ms for epoch in each.epochs[1:])) for each in trainings)),
    )


def _of(statistic: Callable[[list[float]], float], values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistic(present) if present else None


def table(summaries: list[Summary], settings: Settings, jobs: int) -> Table:
    """The summaries for the screen; the caption says what was measured."""
    processes = "in a process" if jobs == 1 else f"in {jobs} processes at once, each"
    result = Table(
        title=f"8x8 digits, {settings.noise:.0%} of the training labels wrong, {settings.epochs} epochs",
        caption=(
            f"Accuracy: on {TEST_SIZE} test images with right labels, after the last epoch, mean ± sd over seeds "
            f"({summaries[0].seeds}). Radius: mean. Times: median over steps, mean over seeds, {processes} of one "
            f"thread; the optimizer's part is the step without its gradients."
        ),
        caption_justify="left",
        box=SIMPLE,
    )
    result.add_column("method")
    gradients, times = "gradients\na step / all", "ms a step\n(optimizer)"
    for heading in ("first\nradius", "last\nradius", "test\naccuracy, %", gradients, times):
        result.add_column(heading, justify="right", no_wrap=True)
    for summary in summaries:
        spread = "" if summary.test_accuracy_sd is None else f" ± {100 * summary.test_accuracy_sd:4.1f}"
        result.add_row(
            summary.label,
            *("-" if rho is None else f"{rho:.3f}" for rho in (summary.rho_start, summary.rho_end)),
            f"{100 * summary.test_accuracy:.1f}{spread}",
            f"{summary.gradients_per_step:.3g} / {summary.gradients:.0f}",
            f"{summary.step_ms:.2f} ({'-' if summary.optimizer_ms is None else f'{summary.optimizer_ms:.2f}'})",
        )
    return result


def findings(summaries: list[Summary]) -> str:
    """How much the first radius decided: a sentence for each method that was trained from several."""
    sentences = []
    for _, same in groupby(summaries, lambda summary: summary.method):
        by_accuracy = sorted(same, key=lambda summary: summary.test_accuracy)
        worst, best = by_accuracy[0], by_accuracy[-1]
        if worst is not best:
            sentences.append(
                f"{best.label} ends between {100 * worst.test_accuracy:.1f} % (from radius {worst.rho_start:g}) and "
                f"{100 * best.test_accuracy:.1f} % (from {best.rho_start:g}), at {best.gradients_per_step:.3g} "
                "gradients a step."
            )
    return " ".join([*sentences, "docs/radius.md says how each radius works, and which is for whom."])


def document(trainings: list[Training], settings: Settings, jobs: int, seconds: float) -> dict[str, Any]:
    """Everything that is known about the trainings, ready for JSON."""
    return {
        "what": "lets_kernels demo",
        "date": now(),
        "seconds": round(seconds, 1),
        "config": {**asdict(settings), "jobs": jobs, "threads_per_job": 1},
        "hardware": {
            "cpu": f"{cpu()} ({torch.backends.cpu.get_cpu_capability()})",
            "logical_cpus": os.cpu_count(),
            "platform": platform.platform(),
        },
        "versions": {
            "lets_kernels": lets_kernels.__version__,
            "commit": commit(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "scikit-learn", "matplotlib")},
        },
        "backends": lets_kernels.backends(),
        "definitions": DEFINITIONS,
        "summary": [asdict(summary) for summary in summarise(trainings, settings)],
        "runs": [asdict(training) for training in in_order(trainings)],
    }
