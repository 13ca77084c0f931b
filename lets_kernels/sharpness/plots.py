"""Pictures of what was measured: each function draws one figure, returns it, and writes a PNG file if it gets a path.

They need matplotlib: pip install 'lets_kernels[sharpness]'. No window is opened, and the backend is left as it is.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from lets_kernels.sharpness.hessian import Spectrum
from lets_kernels.sharpness.landscape import Line, Plane

# Okabe and Ito's palette, which every kind of colour vision can distinguish.
COLORS = ("#000000", "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def draw_lines(found: Mapping[str, Line], path: Path | None = None) -> Figure:
    """The loss along one direction, a curve for each model (Li et al., 2018)."""
    figure, axes = _figure(1, 5.5, 4.2)
    _lines(axes[0], found)
    return _written(figure, path)


def draw_planes(found: Mapping[str, Plane], path: Path | None = None) -> Figure:
    """Contours of the loss over two directions, a panel for each model, with the same levels (Li et al., 2018)."""
    figure, axes = _figure(len(found), 4.2, 4.2)
    _planes(axes, found)
    return _written(figure, path)


def draw_surface(found: Plane, path: Path | None = None) -> Figure:
    """The loss over two directions as a surface (Li et al., 2018); a loss that is not finite leaves a hole."""
    figure = Figure(figsize=(5.5, 4.6), layout="constrained")
    axes = figure.add_subplot(projection="3d")
    places, heights = np.meshgrid(found.places, found.places), _losses(found)
    axes.plot_surface(*places, heights, cmap="viridis", rstride=1, cstride=1, linewidth=0.2, edgecolor="0.3")
    axes.set(xlabel="along d", ylabel="along e", zlabel="loss")
    axes.zaxis.labelpad = 12
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return _written(figure, path)


def draw_spectra(found: Mapping[str, Spectrum], path: Path | None = None) -> Figure:
    """The density of the Hessian's eigenvalues, on a logarithmic axis, as spectra are usually drawn.

    A panel for each model, on the same axes; the number is the largest node.
    """
    figure, axes = _figure(len(found), 4.2, 3.4)
    _spectra(axes, found)
    return _written(figure, path)


def draw_records(
    found: Mapping[str, Sequence[Mapping[str, float]]], path: Path | None = None, xlabel: str = "step"
) -> Figure:
    """What a :class:`~lets_kernels.sharpness.Watch` recorded, such as the generalisation gap over training.

    A panel for each measure, in it a curve for each training.
    """
    entries = dict.fromkeys(name for records in found.values() for record in records for name in record)
    names = [name for name in entries if name not in ("step", "seconds")]
    if not names:
        raise ValueError("there are no records to draw: call the watch after each training step")
    figure, axes = _figure(len(names), 4.6, 3.4)
    for at, name in zip(axes, names, strict=True):
        for (training, records), color in zip(found.items(), COLORS * len(found), strict=False):
            points = [(r["step"], r[name]) for r in records if name in r]
            at.plot(*zip(*points, strict=True), color=color, marker=".", label=training)
        at.set(xlabel=xlabel, title=name)
        _plain(at)
    if len(found) > 1:
        axes[0].legend(frameon=False, fontsize="small")
    return _written(figure, path)


def draw_all(
    lines: Mapping[str, Line], planes: Mapping[str, Plane], spectra: Mapping[str, Spectrum], path: Path | None = None
) -> Figure:
    """Lines, contours and spectra of the same models in one figure; the command draws this."""
    count = len(planes)
    figure = Figure(figsize=(max(3.4 * count, 6.0), 10.5), layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=(1.1, 1.0, 0.9))
    top, middle, bottom = parts
    _lines(top.subplots(), lines)
    _planes(list(middle.subplots(1, count, squeeze=False, sharey=True).flat), planes)
    _spectra(list(bottom.subplots(1, count, squeeze=False, sharex=True, sharey=True).flat), spectra)
    return _written(figure, path)


def _figure(panels: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    if not panels:
        raise ValueError("there is nothing to draw")
    figure = Figure(figsize=(max(width * panels, 5.0), height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False).flat)


def _lines(axes: Axes, found: Mapping[str, Line]) -> None:
    for (name, line), color in zip(found.items(), COLORS * len(found), strict=False):
        axes.plot(line.places, line.losses, color=color, label=name)
    axes.set(xlabel="along a random direction, in lengths of each filter", ylabel="loss")
    if len(found) > 1:
        axes.legend(frameon=False, fontsize="small")
    _plain(axes)


def _planes(axes: Sequence[Axes], found: Mapping[str, Plane]) -> None:
    losses = [_losses(plane) for plane in found.values()]
    low, high = (float(f(list(map(f, losses)))) for f in (np.nanmin, np.nanmax))
    low = max(low, 1e-6)
    levels = np.geomspace(low, max(high, 1.01 * low), 16)
    for at, (name, plane), heights in zip(axes, found.items(), losses, strict=True):
        drawn = at.contour(
            plane.places, plane.places, heights, levels=levels, cmap="viridis", norm=LogNorm(), linewidths=1
        )
        at.clabel(drawn, levels[::3], fontsize="x-small", fmt="%.3g")
        at.plot(0, 0, marker="+", color="0.2")
        at.set(title=name, xlabel="along d", aspect="equal")
        at.xaxis.set_major_locator(MaxNLocator(4))
        at.yaxis.set_major_locator(MaxNLocator(4))
    axes[0].set_ylabel("along e")


def _spectra(axes: Sequence[Axes], found: Mapping[str, Spectrum]) -> None:
    reach = max(float(one.nodes.max() - one.nodes.min()) for one in found.values())
    for at, (name, one), color in zip(axes, found.items(), COLORS * len(found), strict=False):
        places, density = one.density(width=reach / 200 or None)
        at.semilogy(places, density.clamp(min=1e-10), color=color)
        at.set(title=f"{name}\nup to {float(one.nodes.max()):.3g}", xlabel="eigenvalue", ylim=(1e-6, None))
        at.yaxis.set_major_locator(LogLocator(numticks=6))
        _plain(at)
    axes[0].set_ylabel("density")


def _losses(plane: Plane) -> np.ndarray:
    losses = np.array(plane.losses)
    return np.where(np.isfinite(losses), losses, np.nan)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def _written(figure: Figure, path: Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=130, format="png")
    return figure
