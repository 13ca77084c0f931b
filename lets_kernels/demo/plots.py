"""Three PNG files: radius, accuracy and generalisation gap over time."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no screen

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from lets_kernels.demo.methods import ALL, METHODS, OTHERS, Settings
from lets_kernels.demo.train import Run

# Okabe and Ito's palette, told apart with every kind of colour vision. Dashed: the radius is fixed.
STYLES: dict[str, tuple[str, Any]] = {
    "sgd": ("#000000", ":"),
    "sam": ("#56B4E9", (0, (3, 3))),
    "lets-sam-diagonal": ("#009E73", "-"),
    "lets-sam-secant": ("#0072B2", "-"),
    "asam": ("#E69F00", (3, (3, 3))),
    "lets-asam-diagonal": ("#CC79A7", "-"),
    "lets-asam-secant": ("#D55E00", "-"),
    **{name: (to_hex(matplotlib.colormaps["tab20"](i)), "-.") for i, name in enumerate(OTHERS)},
}


def write_plots(runs: list[Run], settings: Settings, folder: Path) -> list[Path]:
    """Writes the plots. A line is the mean over seeds; the band reaches from the lowest seed to the highest."""
    noise = f"{settings.noise:.0%} of the training labels wrong"
    written = [_radius(runs, folder / "radius.png")]

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    _draw(axes, runs, "test_accuracy", 100)
    late = [100 * epoch.test_accuracy for run in runs for epoch in run.epochs[len(run.epochs) // 8 :]]
    axes.set_ylim(min(late) - 2)  # the climb of the first epochs would flatten what follows
    axes.set(title=f"Test accuracy, {noise}", ylabel="accuracy on right labels (%)")
    written.append(_save(figure, folder / "accuracy.png"))

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    _draw(axes, runs, "gap", 1)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(title=f"Generalisation gap, {noise}", ylabel="test loss under like label noise\n− training loss (nats)")
    written.append(_save(figure, folder / "gap.png"))
    return written


def _radius(runs: list[Run], path: Path) -> Path:
    """One panel for each meaning that a radius has; SGD has none."""
    usual = [run for run in runs if run.method in METHODS]
    panels = {
        "SAM: norm of the perturbation": [run for run in usual if run.method != "sgd" and "asam" not in run.method],
        "ASAM: norm relative to |weight|": [run for run in usual if "asam" in run.method],
        "others: as each defines it": [run for run in runs if run.method in OTHERS],
    }
    shown = {title: group for title, group in panels.items() if group}
    figure, row = plt.subplots(1, max(1, len(shown)), figsize=(9, 4.5), layout="constrained", squeeze=False)
    for axes, (title, group) in zip(row[0], shown.items(), strict=False):
        _draw(axes, group, "rho", 1)
        axes.set_title(title, fontsize="medium")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    row[0][0].set_ylabel("radius ρ (log scale)" if shown else "none of the methods that ran has a radius")
    return _save(figure, path)


def _draw(axes: Axes, runs: list[Run], field: str, scale: float) -> None:
    """One line a method: the records' ``field`` times ``scale`` over the epochs."""
    for name, (colour, dashes) in STYLES.items():
        values = [[getattr(epoch, field) for epoch in run.epochs] for run in runs if run.method == name]
        if values:
            seeds = scale * np.array(values, dtype=float)  # [seeds, epochs + 1]
            epochs = np.arange(seeds.shape[1])
            axes.plot(epochs, seeds.mean(0), color=colour, linestyle=dashes, label=ALL[name].label)
            axes.fill_between(epochs, seeds.min(0), seeds.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


def _save(figure: Figure, path: Path) -> Path:
    legends = [axes.get_legend_handles_labels() for axes in figure.axes]
    lines = {label: line for pair in legends for line, label in zip(*pair, strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside right center", frameon=False)
    figure.supxlabel("line: mean over the seeds; band: from the lowest to the highest", fontsize="small", color="0.4")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
