"""One PNG file: bars of each comparison and of whole steps; with ``--full`` multiples, the roofline and growth too."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no screen

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter, NullFormatter

from lets_kernels.bench.compare import Comparison
from lets_kernels.bench.contenders import DEFAULT
from lets_kernels.bench.growth import Growth
from lets_kernels.bench.multiples import LOOPED, PLAIN, UNIT, Multiples
from lets_kernels.bench.report import counted, ms, name_of
from lets_kernels.bench.run import Findings, Settings
from lets_kernels.bench.training import Training

# From Okabe and Ito's palette, which every kind of colour vision can distinguish.
OURS, OTHERS, PASSES = "#0072B2", "#E69F00", "#BBBBBB"
LINES: dict[str, dict[str, Any]] = {
    DEFAULT: {"color": "#0072B2", "marker": "o"},
    "per-tensor loop": {"color": "#D55E00", "marker": "s"},
    "foreach": {"color": "#009E73", "marker": "^"},
    "foreach, swapped": {"color": "#CC79A7", "marker": "D"},
}


def write_plot(found: Findings, settings: Settings, path: Path) -> bool:
    """Whether there was anything to draw."""
    timed = [one for one in found.comparisons if one.order]
    trained = [one for one in found.training if one.rows()]
    multiples = [one for one in found.multiples if one.timings]
    grown = {by: [one for one in part if one.order] for by, part in found.growth.parts.items()}
    roofed = [*grown["elements"], *grown["tensors"]]
    panels = len(timed) + len(trained) + len(multiples) + sum(map(bool, grown.values())) + bool(roofed)
    if not panels:
        return False
    columns = min(panels, 3)
    rows = -(-panels // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(6.4 * columns, 3.9 * rows), layout="constrained", squeeze=False)
    free = iter(grid.flat)
    for one in timed:
        _bars(next(free), one)
    for training in trained:
        _shares(next(free), training)
    for whole in multiples:
        _multiples(next(free), whole)
    for by, part in grown.items():
        if part:
            _growth(next(free), by, part)
    if roofed:
        _roofline(next(free), roofed)
    for axes in free:
        axes.set_visible(False)
    figure.suptitle(
        f"A SAM step outside forward and backward: {settings.model}, {len(settings.shapes)} tensors, "
        f"{sum(one.numel for one in found.comparisons[:1]):,} weights, {name_of(settings.dtype)}, "
        f"{counted(settings.threads, 'thread')}"
    )
    figure.supxlabel("medians; whiskers: 20th to 80th percentile of the rounds", fontsize="small", color="0.4")
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)
    return True


def _bars(axes: Axes, one: Comparison) -> None:
    found, order = one.timings, one.order
    medians = [1e3 * found[name].median for name in order]
    low = [1e3 * (found[name].median - found[name].quantile(0.2)) for name in order]
    high = [1e3 * (found[name].quantile(0.8) - found[name].median) for name in order]
    colors = [OURS if one.results[name].contender.ours else OTHERS for name in order]
    axes.barh(order, medians, xerr=(low, high), color=colors, ecolor="0.3", capsize=2)
    for place, name in enumerate(order):
        buffers, moved = one.buffers(name), one.moved(name)
        said = "" if moved is None else f"{buffers} N, {moved / found[name].median / one.copy_rate:.0%}"
        axes.annotate(said, (medians[place] + high[place], place), (4, 0), textcoords="offset points", va="center")
    axes.margins(x=0.3)
    axes.invert_yaxis()
    axes.set(title=f"SAM + {one.base.name}", xlabel="ms; what it moves, and the share of a copy's bandwidth")
    _plain(axes, "x")


def _shares(axes: Axes, one: Training) -> None:
    rows = one.rows()
    passes = [1e3 * whole * (1 - share) for whole, share in rows.values()]
    outside = [1e3 * whole * share for whole, share in rows.values()]
    axes.barh(list(rows), passes, color=PASSES, label="two gradients")
    axes.barh(
        list(rows), outside, left=passes, color=[OURS if n == DEFAULT else OTHERS for n in rows], label="the step"
    )
    for place, (whole, share) in enumerate(rows.values()):
        axes.text(1e3 * whole, place, f" {share:.1%}", va="center", ha="left", fontsize="small")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(title="A whole training step, SAM + SGD")
    axes.set_xlabel(f"ms (grey: two gradients)\n{textwrap.fill(one.network, 46)}", fontsize="small")
    _plain(axes, "x")


def _roofline(axes: Axes, comparisons: Sequence[Comparison]) -> None:
    """Bytes against time, with the time of a copy of as many bytes as a roof that nobody gets over for long."""
    for name, style in LINES.items():
        points = [(one.moved(name) or 0, one.timings[name].median) for one in comparisons if name in one.order]
        rates = [moved / seconds / 1e9 for moved, seconds in points]
        axes.plot(
            [moved / 1e6 for moved, _ in points], rates, linestyle="", markerfacecolor="none", **style, label=name
        )
    roof: dict[float, float] = {}
    for one in comparisons:  # many are of one size
        size = round(2 * one.dtype.itemsize * one.numel / 1e6, 1)
        roof[size] = max(roof.get(size, 0.0), one.copy_rate / 1e9)
    axes.plot(*zip(*sorted(roof.items()), strict=True), color="0.4", linestyle="--", label="a copy")
    axes.set(title="Roofline", xlabel="MB that must be moved", ylabel="GB/s", xscale="log", yscale="log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())
    axes.legend(frameon=False, fontsize="small")
    _plain(axes, "both")


def _multiples(axes: Axes, one: Multiples) -> None:
    """Whole steps as multiples of two gradients, with a line at one."""
    found, names = one.timings, [name for name in one.timings if name != UNIT]
    times = [one.over(name, UNIT) or 0.0 for name in names]
    axes.barh(names, times, color=[OTHERS if name in (PLAIN, LOOPED) else OURS for name in names])
    for place, name in enumerate(names):
        said = f"{times[place]:.2f}, {ms(found[name].median)} ms"
        text = axes.annotate(said, (times[place], place), (4, 0), textcoords="offset points", va="center")
        text.set_bbox({"color": "white", "pad": 0.5})
    axes.axvline(1.0, color="0.4", linestyle="--", zorder=2)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(times, default=1.0))
    axes.set(title="Whole training steps")
    axes.set_xlabel(
        f"times two gradients ({ms(found[UNIT].median)} ms)\n{textwrap.fill(one.network, 46)}", fontsize="small"
    )
    _plain(axes, "x")


def _growth(axes: Axes, by: str, comparisons: Sequence[Comparison]) -> None:
    """Times by what grows. The legend says where a line ends before the last comparison."""
    last = Growth.at(by, comparisons[-1])
    for name, style in LINES.items():
        points = [(Growth.at(by, one), 1e3 * one.timings[name].median) for one in comparisons if name in one.order]
        if points:
            end = points[-1][0]
            label = name if end == last else f"{name} (up to {_short(end)})"
            axes.plot(*zip(*points, strict=True), markerfacecolor="none", **style, label=label)
    axes.set(title="Growth, SAM + SGD", ylabel="ms", xscale="log", yscale="log")
    axes.set_xlabel(textwrap.fill(Growth.label(by), 46))
    axes.xaxis.set_major_formatter(lambda x, _: _short(x))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())
    axes.set_ylim(top=3 * axes.get_ylim()[1])  # lines rise to the right: room for the legend on the left
    axes.legend(frameon=False, fontsize="small", loc="upper left")
    _plain(axes, "both")


def _plain(axes: Axes, grid: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, axis=grid)


def _short(number: float) -> str:
    return f"{number / 1e6:,.4g} M" if number >= 999_500 else f"{number:,.0f}"
