"""The tables: what a rule loses against the best fixed radius of each task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

LIMIT = -2.0  # points
HEAD = """# What the constants of `rho="auto"` are worth

Points of test accuracy against the best of seven fixed radii of the same task and setting (chosen by the test set),
both means over {seeds} seeds. "below" counts tasks. Written by `python -m benchmarks.experiments.batched`; the
accuracies are in `results_batched.json`.

torch {torch}, {cpu}, one thread; commit {commit:.7}; {date}."""


@dataclass(frozen=True)
class Row:
    """Regrets of one rule over tasks, in points of test accuracy; below zero is worse than the reference."""

    name: str
    tasks: int
    mean: float
    median: float
    worst: float
    where: str
    below: int  # tasks with less than LIMIT

    def __str__(self) -> str:
        numbers = f"{self.tasks} | {self.mean:+.2f} | {self.median:+.2f} | {self.worst:+.1f} | {self.where}"
        return f"| {self.name} | {numbers} | {self.below} |"


def rows(accuracies: Mapping[str, Mapping[str, float]], references: Sequence[str]) -> list[Row]:
    """A row for each rule that all tasks have in ``accuracies[task][rule]``; the best reference is that of the task."""
    found = []
    for name in next(iter(accuracies.values())):
        if all(name in own for own in accuracies.values()):
            best = {task: max(own[reference] for reference in references) for task, own in accuracies.items()}
            regrets = {task: own[name] - best[task] for task, own in accuracies.items()}
            values, where = list(regrets.values()), min(regrets, key=lambda task: regrets[task])
            below = sum(value < LIMIT for value in values)
            found.append(Row(name, len(values), fmean(values), median(values), regrets[where], where, below))
    return found


def markdown(content: Mapping[str, Any], sections: Sequence[tuple[str, str, Sequence[str]]]) -> str:
    """All tables of a results file; ``sections`` are title, part and tasks."""
    parts = [HEAD.format(seeds=len(content["seeds"]), **content["environment"])]
    for title, part, tasks in sections:
        cases = [c for c in content["cases"] if c["part"] == part and c["task"] in tasks]
        if cases:
            lines = rows({c["task"]: c["accuracy"] for c in cases}, cases[0]["references"])
            head = f"| rule | tasks | mean | median | worst | where | below {LIMIT:g} |\n|---|--:|--:|--:|--:|---|--:|"
            parts.append("\n".join([f"## {title}\n", head, *map(str, lines)]))
    return "\n\n".join(parts) + "\n"
