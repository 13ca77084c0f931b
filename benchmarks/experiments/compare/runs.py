"""The runs: what is left of them, each written into the one file as soon as it is over."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.experiments.compare.rows import Row, Setting
from benchmarks.experiments.compare.tasks import held_out
from benchmarks.experiments.tasks import Task
from benchmarks.experiments.train import test_accuracy, train_loss
from lets_kernels import SAM, Ahead
from lets_kernels.bench.clock import threads
from lets_kernels.demo.data import batches
from lets_kernels.record import environment, now, write_json

TEST, VALIDATION = "test", "validation"
KEPT = ("cpu", "cores", "lets_kernels", "torch", "python", "commit")


@dataclass(frozen=True)
class Run:
    """One training. ``rho`` is None for a row that does not look for its radius."""

    task: Task
    row: Row
    seed: int
    part: str = TEST
    rho: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        return self.task.name, self.row.name, self.seed, self.part, self.rho

    @property
    def settings(self) -> dict[str, Any]:
        """What a finished run is known by; one whose entry has others is run again."""
        return {**self.task.settings, "call": self.row.call, "times": self.row.times}


def train(run: Run) -> dict[str, Any]:
    """Data, initial weights and the order of the batches follow from the seed, and are the same for all rows."""
    task, data = run.task, run.task.load(run.seed)
    if run.part == VALIDATION:
        data = held_out(data)
    torch.manual_seed(run.seed)
    model, steps = task.model(), task.steps * run.row.times
    optimizer = run.row.build(Setting(task, model, len(data.train_inputs), steps, run.seed), run.rho)
    scheduler = CosineAnnealingLR(optimizer, steps)
    step = Stepper(model, optimizer)
    training = batches(data.train_inputs, data.train_targets, task.batch_size, run.seed)
    validation = batches(data.train_inputs, data.train_targets, task.batch_size, run.seed + 1_000_000)
    model.train()
    for _ in range(steps):
        step(next(training), next(validation))
        scheduler.step()
    metrics = optimizer.metrics() if isinstance(optimizer, SAM) else {}
    loss = train_loss(model, data)
    return {
        "accuracy": round(test_accuracy(model, data), 3),
        "train_loss": float(f"{loss:.4g}") if math.isfinite(loss) else None,
        "gradients": round(step.gradients * run.row.times, 3),
        "skipped_steps": int(metrics.get("skipped_steps", 0)),
    }


Batch = tuple[Tensor, Tensor]


class Stepper:
    """Steps on batches in the shape that the optimizer wants, and counts the gradients of samples.

    SAMPa's second pass has the batch of the step before, as in its paper.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        sam = optimizer if isinstance(optimizer, SAM) else None
        self._learns = sam is not None and sam.radius.learns
        self._per_sample = sam is not None and sam.samples.per_sample
        self._ahead = sam is not None and isinstance(sam.direction, Ahead)
        self._before: Batch | None = None
        self._samples = self._gradients = 0

    @property
    def gradients(self) -> float:
        """Of a step, in gradients of a whole batch: half of it counts half."""
        return self._gradients / self._samples

    def __call__(self, batch: Batch, other: Batch) -> None:
        """The other batch is LETS's, to validate on."""
        self._samples += len(batch[0])
        if self._ahead:  # the second gradient is that of the batch along whose gradient ε goes
            passes = iter([self._closure(*batch), self._closure(*(self._before or batch))])
            self._before = batch
            self._optimizer.step(lambda: next(passes)())
            return
        closures = [self._closure(*one) for one in ((batch, other) if self._learns else (batch,))]
        self._optimizer.step(*closures)

    def _closure(self, inputs: Tensor, targets: Tensor) -> Callable[..., Any]:
        def closure() -> Tensor:
            self._gradients += len(inputs)
            self._optimizer.zero_grad()
            loss = cross_entropy(self._model(inputs), targets)
            loss.backward()
            return loss

        def losses(subset: Tensor | None = None) -> tuple[Tensor, Tensor]:
            chosen = slice(None) if subset is None else subset
            outputs = self._model(inputs[chosen])
            self._gradients += len(outputs) * torch.is_grad_enabled()
            return cross_entropy(outputs, targets[chosen], reduction="none"), outputs

        return losses if self._per_sample else closure


class Results:
    """The file: finished runs by key, and the times of steps. It is written whole after every run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = json.loads(path.read_text()) if path.exists() else {}
        self.times: dict[str, Any] = found.get("times", {})
        self._runs = {(e["task"], e["row"], e["seed"], e["part"], e["rho"]): e for e in found.get("runs", ())}

    @property
    def entries(self) -> list[dict[str, Any]]:
        return list(self._runs.values())

    def entry(self, run: Run) -> dict[str, Any] | None:
        """None where the run is not finished, or was one with other settings."""
        found = self._runs.get(run.key)
        return found if found and found["settings"] == json.loads(json.dumps(run.settings)) else None

    def add(self, run: Run, outcome: dict[str, Any], machine: dict[str, Any]) -> None:
        """Keeps a finished run; of the tests with one seed only that of the ρ that was chosen last."""
        if run.part == TEST:
            for key in [key for key in self._runs if key[:4] == run.key[:4]]:
                del self._runs[key]
        names = dict(zip(("task", "row", "seed", "part", "rho"), run.key, strict=True))
        entry = {**names, **outcome, "settings": run.settings, "environment": machine, "date": now()}
        self._runs[run.key] = json.loads(json.dumps(entry))
        self.write()

    def forget(self, tasks: Iterable[Task], rows: Iterable[Row]) -> None:
        """Drops the runs that would not be the same today: another call, another task, a row that is gone."""
        known = {(task.name, row.name): Run(task, row, 0) for task in tasks for row in rows}
        for key, entry in list(self._runs.items()):
            run = known.get(key[:2])
            if run is None or entry["settings"] != json.loads(json.dumps(run.settings)):
                del self._runs[key]

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"times": self.times, "runs": self.entries})

    def best_radius(self, task: Task, row: Row, seeds: Sequence[int]) -> float | None:
        """The ρ with the highest mean accuracy on what was held out, once all have run; the smallest of equals."""
        found = {rho: [self.entry(Run(task, row, seed, VALIDATION, rho)) for seed in seeds] for rho in row.radii}
        means = {rho: fmean(e["accuracy"] for e in es if e) for rho, es in found.items() if es and all(es)}
        return max(means, key=lambda rho: means[rho]) if len(means) == len(row.radii) else None


def planned(tasks: Iterable[Task], rows: Iterable[Row], seeds: Sequence[int]) -> Iterator[Run]:
    """Seed by seed, so that a campaign that is cut short compares all rows; ρ is chosen before it is tested."""
    tasks, rows = list(tasks), list(rows)
    for seed in seeds:
        for task in tasks:
            for row in rows:
                yield from (Run(task, row, seed, VALIDATION, rho) for rho in row.radii)
    for seed in seeds:
        for task in tasks:
            yield from (Run(task, row, seed) for row in rows)


def campaign(
    results: Results, tasks: Iterable[Task], rows: Iterable[Row], seeds: Sequence[int], console: Console
) -> list[str]:
    """Runs what is not finished, with one thread. Returns what failed."""
    everything = list(planned(tasks, rows, seeds))
    machine = {key: value for key, value in environment().items() if key in KEPT}
    failed: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with threads(1), Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("", total=len(everything))
        for run in everything:
            progress.update(bar, description=f"{run.task.name} {run.row.name} seed {run.seed}")
            if run.part == TEST and run.row.radii:
                run = replace(run, rho=results.best_radius(run.task, run.row, seeds))
            if results.entry(run) is None:
                try:
                    results.add(run, train(run), machine)
                except Exception as error:  # the other runs go on; what failed is said at the end
                    failed.append(f"{run.task.name} {run.row.name} seed {run.seed}: {type(error).__name__}: {error}")
            progress.advance(bar)
    return failed
