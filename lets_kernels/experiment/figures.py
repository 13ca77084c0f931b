"""Figures of an experiment, as PNG files: the score and the radius over training, the score by the first radius.

And, of the networks that came out, the loss along random directions and the spectrum of the Hessian. They need
matplotlib.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lets_kernels.experiment.campaign import Run
from lets_kernels.experiment.methods import label, method
from lets_kernels.experiment.recipes import Recipe
from lets_kernels.experiment.report import Results, scores
from lets_kernels.experiment.task import Batch, Task
from lets_kernels.experiment.train import STATE
from lets_kernels.sharpness import Objective, line, plane, spectrum
from lets_kernels.sharpness.plots import COLORS, draw_all


def draw_training(results: Results, recipe: Recipe, path: Path) -> None:
    """Score and radius after each epoch, the mean over the seeds; the radius of methods that change it."""
    own = {name: runs for (of, name), runs in results.items() if of == recipe.name and runs}
    moving = {name: runs for name, runs in own.items() if method(name).moves}
    figure = Figure(figsize=(5.0 * (1 + bool(moving)), 4.2), layout="constrained")
    panels: Any = figure.subplots(1, 1 + bool(moving), squeeze=False)
    colors = dict(zip(own, COLORS * len(own), strict=False))
    measure = next(iter(own.values()))[0]["measure"]
    for axes, shown, entry in zip(panels[0], (own, moving), ("score", "rho"), strict=False):
        for name, runs in shown.items():
            points = _means([run["epochs"] for run in runs], entry)
            axes.plot(
                *points, color=colors[name], marker="." if len(points[0]) < 20 else "", label=label(name, [recipe])
            )
        axes.set(xlabel="epoch", ylabel=measure if entry == "score" else "ρ")
        _plain(axes)
    panels[0][0].legend(frameon=False, fontsize="small")
    if moving:
        panels[0][1].set_yscale("log")
        panels[0][1].yaxis.set_major_formatter("{x:g}")
        panels[0][1].yaxis.set_minor_formatter("{x:g}")
    figure.suptitle(f"{recipe.name}: {recipe.network}")
    figure.savefig(path, dpi=130)


def _means(runs: Sequence[Sequence[Mapping[str, Any]]], entry: str) -> tuple[list[int], list[float]]:
    """By epoch, over the runs that have the entry there."""
    found: dict[int, list[float]] = {}
    for records in runs:
        for record in records:
            if record.get(entry) is not None:
                found.setdefault(record["epoch"], []).append(record[entry])
    return list(found), [fmean(values) for values in found.values()]


def draw_starts(results: Results, recipe: Recipe, path: Path) -> bool:
    """The score by the radius, or the first radius, a curve for each method with at least three; False: there is none.

    The bar is from the worst to the best seed.
    """
    curves: dict[str, list[tuple[float, Sequence[Mapping[str, Any]]]]] = {}
    for (of, name), runs in results.items():
        if of == recipe.name and scores(runs) and method(name).rho is not None:
            curves.setdefault(name.partition("@")[0], []).append((method(name).rho or 0.0, runs))
    curves = {name: sorted(points, key=lambda at: at[0]) for name, points in curves.items() if len(points) >= 3}
    if not curves:
        return False
    figure = Figure(figsize=(5.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, points), color in zip(curves.items(), COLORS * len(curves), strict=False):
        found = [scores(runs) for _, runs in points]
        means = [fmean(values) for values in found]
        reach = [
            [m - min(v) for m, v in zip(means, found, strict=True)],
            [max(v) - m for m, v in zip(means, found, strict=True)],
        ]
        axes.errorbar([rho for rho, _ in points], means, reach, color=color, marker=".", capsize=2)
        axes.lines[-1].set_label(method(name).label)
    axes.set(xscale="log", xlabel="ρ, or the first ρ of a method that changes it", ylabel=points[0][1][0]["measure"])
    axes.legend(frameon=False, fontsize="small")
    axes.set_title(f"{recipe.name}: {recipe.network}")
    _plain(axes)
    figure.savefig(path, dpi=130)
    return True


def draw_networks(runs: Sequence[Run], task: Task, output: Path, device: torch.device, path: Path) -> bool:
    """The loss around what these runs ended with, and the Hessian's spectrum; False: none of them has ended.

    Measured in evaluation mode on the first samples of the training set, 2,048 at most, not augmented.
    """
    indices = list(range(min(2048, len(task.train))))
    data = [task.train.batch(indices[i : i + 256], None).to(device) for i in range(0, len(indices), 256)]
    lines, planes, spectra = {}, {}, {}
    for run in runs:
        state = run.folder(output) / STATE
        if state.exists():
            model = task.network().to(device)
            model.load_state_dict(torch.load(state, map_location=device, weights_only=True)["model"])
            at = Objective(model, task.loss, data, size=_samples)
            shown = label(run.method, [run.recipe])
            lines[shown], planes[shown], spectra[shown] = line(at), plane(at, points=11), spectrum(at, runs=2, steps=50)
    if not lines:
        return False
    draw_all(lines, planes, spectra, path)
    return True


def _samples(batch: Batch) -> int:
    return len(batch.targets)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
