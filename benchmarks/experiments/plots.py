"""Three PNG files: accuracy against the radius, regret by contender, and radii over training."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no screen

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from benchmarks.experiments.contenders import FAMILIES
from benchmarks.experiments.regret import Interval, Results, over_tasks, per_task
from benchmarks.experiments.report import NAMES, Line, lines

# Okabe and Ito's palette, told apart with every kind of colour vision.
COLOURS = {
    "base": "#000000",
    "sam": "#56B4E9",
    "sam-ramp": "#0072B2",
    "asam": "#E69F00",
    "loss-equated": "#CC79A7",
    "lets-paper": "#D55E00",
}
REACH = 6.0  # points below the best that a panel shows in any case
#: Of families that are added, in their order.
OTHERS = ("#009E73", "#7F3C8D", "#8C6D31", "#666666", "#A50026", "#2B4C9B")


def colour(family: str) -> str:
    added = [name for name in FAMILIES if name not in COLOURS]
    return COLOURS.get(family) or to_hex(OTHERS[added.index(family) % len(OTHERS)])


def write(results: Results, folder: Path) -> list[Path]:
    return [
        _accuracy(results, folder / "accuracy.png"),
        _regret(lines(results), folder / "regret.png"),
        _radii(results, folder / "radii.png"),
    ]


def _panels(tasks: list[str], height: float) -> tuple[Figure, list[Axes]]:
    columns = min(4, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    size = (2.9 * columns + 0.6, height * rows + 0.7)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[len(tasks) :]:
        axes.set_visible(False)
    for axes, task in zip(grid.flat, tasks, strict=False):
        axes.set_title(task, fontsize="medium")
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid.flat)


def _accuracy(results: Results, path: Path) -> Path:
    """Fixed radii as curves; a learner's starts as marks on the same axis, level where the start does not matter."""
    tasks = list(results.references())
    figure, grid = _panels(tasks, 2.4)
    for axes, task in zip(grid, tasks, strict=False):
        shown = []
        for family, members in results.members.items():
            found = [(_value(results, m), results.accuracies(m).get(task)) for m in members if family != "asam"]
            points = [(x, Interval.of(list(by_seed.values()))) for x, by_seed in found if by_seed]
            if not points:
                continue
            means = [interval.mean for _, interval in points]
            name, shade = NAMES.get(family, family), colour(family)
            if len(members) == 1:
                axes.axhline(means[0], color=shade, linestyle=":", label=name)
            elif FAMILIES[family].meaning == "setting":  # not a radius: only its best has a place here
                axes.axhline(max(means), color=shade, linestyle="-.", linewidth=1, label=f"{name}, best")
            elif FAMILIES[family].meaning == "radius":
                x, half = [x for x, _ in points], [interval.half or 0.0 for _, interval in points]
                axes.plot(x, means, color=shade, marker="o", markersize=3, label=f"{name}, against ρ")
                low, high = ([m + s * h for m, h in zip(means, half, strict=True)] for s in (-1, 1))
                axes.fill_between(x, low, high, color=shade, alpha=0.2, linewidth=0)
            else:
                marks = {"linestyle": "--", "linewidth": 1, "marker": "D", "markersize": 4}
                axes.plot([x for x, _ in points], means, color=shade, label=f"{name}, against its start", **marks)
            shown += means
        best = max(shown)
        # Collapsed runs would flatten what is to be seen; they leave the picture at the bottom.
        base = results.accuracies("base").get(task, {}).values()
        near = [*base, *(value for value in shown if value > best - REACH)]
        margin = 0.08 * (best - min(near)) + 0.2
        axes.set_ylim(min(near) - margin, best + margin)
    figure.supylabel("test accuracy (%)", fontsize="medium")
    return _save(
        figure,
        path,
        "ρ, or the start of a learned ρ; mean over seeds, band: 95 % t-interval; more than 20 points down: not shown",
    )


def _value(results: Results, contender: str) -> float:
    return next(run["settings"]["value"] for run in results.runs if run["contender"] == contender)


def _regret(found: list[Line], path: Path) -> Path:
    """One row a line of the table: the mean over tasks with its interval, and the tasks as ticks."""
    figure, axes = plt.subplots(figsize=(8, 0.36 * len(found) + 1.2), layout="constrained")
    for y, line in enumerate(reversed(found)):
        shade, overall = colour(line.family), over_tasks(line.regrets)
        tasks = [interval.mean for interval in per_task(line.regrets).values()]
        axes.plot(tasks, [y] * len(tasks), "|", color=shade, markersize=9, alpha=0.6)
        if overall is not None:
            axes.errorbar(overall.mean, y, xerr=overall.half, fmt="o", color=shade, capsize=3, markersize=5)
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=1, linscale=1)
    ticks = [-50, -20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10]
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in ticks if low <= tick <= high], minor=False)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}".replace("-", "−"))
    axes.minorticks_off()
    axes.set_yticks(range(len(found)), [line.label for line in reversed(found)], fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(
        "regret: points of accuracy against SAM with the best ρ of each task\n"
        "mean over tasks, 95 % t-interval over seeds; ticks: the tasks",
        fontsize="small",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _radii(results: Results, path: Path) -> Path:
    """How the radii of the first seed move, for the families whose radius does; not for each fixed one."""
    tasks = list(results.references())
    figure, grid = _panels(tasks, 2.1)
    for axes, task in zip(grid, tasks, strict=False):
        axes.set_xscale("linear")
        axes.set_yscale("log")
        for run in results.runs:
            moves = len(set(run["rho"])) > 1 and FAMILIES[run["family"]].meaning != "radius"
            if run["task"] == task and run["seed"] == min(results.seeds(run["contender"], task)) and moves:
                share = [i / (len(run["rho"]) - 1) for i in range(len(run["rho"]))]
                name = NAMES.get(run["family"], run["family"])
                axes.plot(share, run["rho"], color=colour(run["family"]), linewidth=1, label=name)
        reference = float(results.references()[task].partition("@")[2])
        axes.axhline(reference, color=colour("sam"), linestyle=":", label="best fixed ρ of the task")
    figure.supylabel("ρ", fontsize="medium")
    return _save(figure, path, "share of the run's steps; the first seed, every start or setting")


def _save(figure: Figure, path: Path, below: str) -> Path:
    legends = [axes.get_legend_handles_labels() for axes in figure.axes if axes.get_visible()]
    marks = {label: mark for pair in legends for mark, label in zip(*pair, strict=True)}
    figure.supxlabel(below, fontsize="small", color="0.4")
    figure.legend(marks.values(), marks.keys(), loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
