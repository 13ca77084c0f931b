"""The table and the picture, from the results file alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.experiments.compare.rows import BEST, SGD, TWICE
from benchmarks.experiments.compare.runs import TEST, Results

BEGIN, END = "<!-- begin: what `make compare` wrote -->", "<!-- end -->"
TASKS = {
    "digits-0": "digits, labels right",
    "digits-40": "digits, 40 % wrong",
    "cifar-0": "CIFAR, labels right",
    "cifar-40": "CIFAR, 40 % wrong",
}
SORTED_BY = "digits-40"
REFERENCES = (SGD, TWICE, BEST)


@dataclass(frozen=True)
class Cell:
    """The accuracies of one row on one task, by seed, in per cent."""

    accuracies: dict[int, float]
    rho: float | None = None

    @property
    def mean(self) -> float:
        return fmean(self.accuracies.values())

    @property
    def error(self) -> float | None:
        """The standard error of the mean; None with one seed."""
        n = len(self.accuracies)
        return stdev(self.accuracies.values()) / math.sqrt(n) if n > 1 else None


@dataclass(frozen=True)
class Line:
    """One row of the table. ``gradients`` are those of a step, counted; of all tasks, the first that ran."""

    name: str
    gradients: float
    time: float | None
    cells: dict[str, Cell]

    @property
    def reference(self) -> bool:
        return self.name in REFERENCES


def lines(results: Results) -> list[Line]:
    """By gradients, and the most accurate first among rows with as many."""
    found = {}
    tested = [entry for entry in results.entries if entry["part"] == TEST]
    for name in dict.fromkeys(entry["row"] for entry in tested):
        own = [entry for entry in tested if entry["row"] == name]
        cells = {}
        for task in TASKS:
            here = [entry for entry in own if entry["task"] == task]
            if here:
                accuracies = {entry["seed"]: entry["accuracy"] for entry in here}
                cells[task] = Cell(accuracies, here[-1]["rho"])
        gradients = fmean(entry["gradients"] for entry in own if entry["task"] == next(iter(cells)))
        found[name] = Line(name, round(gradients, 2), results.times.get("ratio", {}).get(name), cells)

    def place(line: Line) -> tuple[float, float]:
        cell = line.cells.get(SORTED_BY)
        return line.gradients, -cell.mean if cell else 0.0

    return sorted(found.values(), key=place)


def table(found: Sequence[Line], seeds: int) -> str:
    """In Markdown. The best of a column is bold; so is what stands beside for comparison, by name.

    A column of fewer ``seeds`` says so in its head, a cell of fewer than its column in itself.
    """
    shown = [task for task in TASKS if any(task in line.cells for line in found)]
    most = {task: max(len(line.cells[task].accuracies) for line in found if task in line.cells) for task in shown}
    best = {task: max(line.cells[task].mean for line in found if task in line.cells) for task in shown}
    head = ["method", "gradients a step", "time of a step"]
    head += [TASKS[task] + (f" ({most[task]} seeds)" if most[task] != seeds else "") for task in shown]
    text = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for line in found:
        name = f"**{line.name}**" if line.reference else line.name
        time = "–" if line.time is None else f"{line.time:.2f}"
        cells = [_cell(line.cells.get(task), best[task], most[task]) for task in shown]
        text.append("| " + " | ".join([name, f"{line.gradients:g}", time, *cells]) + " |")
    return "\n".join(text)


def _cell(cell: Cell | None, best: float, seeds: int) -> str:
    if cell is None:
        return "–"
    mean = f"**{cell.mean:.1f}**" if cell.mean == best else f"{cell.mean:.1f}"
    error = "" if cell.error is None else f" ± {cell.error:.1f}"
    remarks = [] if cell.rho is None else [f"ρ = {cell.rho:g}"]
    if len(cell.accuracies) != seeds:
        remarks.append(f"{len(cell.accuracies)} seed{'s' * (len(cell.accuracies) > 1)}")
    return mean + error + (f" ({', '.join(remarks)})" if remarks else "")


def section(results: Results) -> str:
    """What stands between the two marks of docs/comparison.md."""
    found = lines(results)
    seeds = max((len(cell.accuracies) for line in found for cell in line.cells.values()), default=0)
    return "\n\n".join([BEGIN, table(found, seeds), _which(results, seeds), END])


def _which(results: Results, seeds: int) -> str:
    def values(key: str) -> str:
        return ", ".join(sorted({str(entry["environment"][key])[:60] for entry in results.entries}))

    dates = sorted(entry["date"][:10] for entry in results.entries)
    commits = sorted({entry["environment"]["commit"][:7] for entry in results.entries})
    days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    skipped = sum(entry["skipped_steps"] for entry in results.entries)
    text = (
        f"Mean ± standard error over {seeds} seeds, unless a column or a cell says otherwise; {len(results.entries)} "
        f"runs, {skipped} steps skipped for a gradient that is not finite. torch {values('torch')}, {values('cpu')}, "
        f"one thread; commit {', '.join(commits)}; {days}."
    )
    if results.times:
        t, load = results.times, results.times["environment"]["load_average"]
        text += (
            f" Time: CPU time in multiples of SGD's step ({t['sgd_ms']:.1f} ms) on the CIFAR network, sum over "
            f"{t['rounds']} interleaved rounds of {t['steps']} steps, load average {load[0] if load else 'unknown'}."
        )
    return text


def replaced(text: str, new: str) -> str:
    """The document with a new section in place of its old one."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no line {BEGIN!r} with {END!r} after it")
    return before + new + after


COLOURS = {SGD: "#000000", TWICE: "#D55E00", BEST: "#0072B2"}
REACH = 2.0  # a panel shows so many times as far below the best as SGD is, and at least so many points


def picture(results: Results, path: Path) -> None:
    """Accuracy against gradients: the rows from few gradients to many, a panel a task; what stands beside as lines."""
    import matplotlib

    matplotlib.use("Agg")  # draws to files, needs no screen
    import matplotlib.pyplot as plt

    found = lines(results)
    shown = [task for task in TASKS if any(task in line.cells for line in found)]
    size = (2.4 + 2.6 * len(shown), 0.19 * len(found) + 1.1)
    figure, grid = plt.subplots(1, len(shown), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axes, task in zip(grid.flat, shown, strict=True):
        _panel(axes, task, found)
    names = [f"{line.name}   {line.gradients:g}" for line in found]
    grid.flat[0].set_yticks(range(len(found)), names, fontsize="x-small")
    grid.flat[0].invert_yaxis()
    grid.flat[0].set_ylabel("method, gradients a step", fontsize="small")
    below = "test accuracy (%), mean ± standard error; lines: SGD, with twice the steps, SAM at its best ρ"
    figure.supxlabel(below, fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _panel(axes: Any, task: str, found: Sequence[Line]) -> None:
    means = {line.name: line.cells[task].mean for line in found if task in line.cells}
    top = max(means.values())
    low = top - REACH * max(1.0, top - means.get(SGD, top))
    for y, line in enumerate(found):
        cell, shade = line.cells.get(task), COLOURS.get(line.name, "#777777")
        if cell is None:
            continue
        if cell.mean < low:
            axes.annotate(f"← {cell.mean:.1f}", (low, y), fontsize="x-small", color=shade, va="center")
            continue
        axes.errorbar(cell.mean, y, xerr=cell.error, fmt="o", color=shade, markersize=3.5, capsize=2, linewidth=1)
        if line.reference:
            axes.axvline(cell.mean, color=shade, linestyle=":", linewidth=1)
    for y, (above, below) in enumerate(pairwise(found)):
        if below.gradients >= 2 > above.gradients or below.gradients > 2 >= above.gradients:
            axes.axhline(y + 0.5, color="#BBBBBB", linewidth=0.8)
    axes.set_xlim(low - 0.12 * (top - low), top + 0.15 * (top - low))
    axes.set_ylim(-0.7, len(found) - 0.3)
    axes.set_title(TASKS[task], fontsize="medium")
    axes.grid(axis="x", alpha=0.3)
    axes.grid(axis="y", alpha=0.15)  # leads from a name to its points
    axes.spines[["top", "right"]].set_visible(False)
