"""One PNG file: accuracy by the first radius, and the course of the radii that move."""

from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no screen

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from lets_kernels.demo.methods import ALL, OTHERS, Settings
from lets_kernels.demo.report import in_order
from lets_kernels.demo.train import Training

# The first colours are from Okabe and Ito's palette, which every kind of colour vision can distinguish.
STYLES: dict[str, dict[str, Any]] = {
    "sgd": {"color": "#000000", "linestyle": ":"},
    "sam": {"color": "#0072B2", "marker": "o"},
    "sam-auto": {"color": "#D55E00", "marker": "*", "markersize": 15},
    "lets-sam": {"color": "#009E73", "marker": "D"},
    **{name: {"color": matplotlib.colormaps["tab20"](i % 20), "marker": "sv^"[i % 3]} for i, name in enumerate(OTHERS)},
}


def write_plot(trainings: list[Training], settings: Settings, path: Path) -> None:
    """Accuracy against the first radius; radii that move, over the epochs. Means, and the range over the seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, of_method in groupby(in_order(trainings), lambda training: training.method):
        style = {**STYLES[name], "label": ALL[name].label, "markerfacecolor": "none"}  # or one marker hides another
        by_radius = [list(group) for _, group in groupby(of_method, lambda training: training.rho)]
        last = [[100 * training.epochs[-1].test_accuracy for training in group] for group in by_radius]
        mean, low, high = np.mean(last, 1), np.min(last, 1), np.max(last, 1)
        if name == "sgd":
            left.axhline(mean[0], **style)
            continue
        rhos = np.array([[[epoch.rho for epoch in training.epochs] for training in group] for group in by_radius])
        moves = (rhos != rhos[..., :1]).any()
        radii = [group[0].rho for group in by_radius]
        left.errorbar(radii, mean, (mean - low, high - mean), linestyle="" if moves else "-", **style)
        for seeds in rhos if moves else ():  # [seeds, epochs + 1]
            epochs = np.arange(seeds.shape[1])
            right.plot(epochs, seeds.mean(0), markevery=[0], clip_on=False, **style)
            right.fill_between(epochs, seeds.min(0), seeds.max(0), color=style["color"], alpha=0.15, linewidth=0)
    left.set(
        title=f"Accuracy, {settings.noise:.0%} of the training labels wrong", ylabel="test accuracy (%)", ylim=(0, 102)
    )
    left.set(xscale="log", xlabel="first radius ρ (log scale)")
    right.set(title="Radii that move", xlabel="epoch", ylabel="radius ρ (log scale)", yscale="log")
    _label(left.xaxis)
    _label(right.yaxis)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    note = "mean over the seeds; bars and bands: from the lowest to the highest"
    figure.supxlabel(note, fontsize="small", color="0.4")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _label(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
