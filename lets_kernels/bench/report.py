"""What was found, in words and tables for the screen, and as JSON."""

import math
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import torch

from lets_kernels.bench.clock import Timing
from lets_kernels.bench.compare import COPY, STREAMED, Comparison
from lets_kernels.bench.contenders import DEFAULT, LOOP, Contender
from lets_kernels.bench.growth import Growth
from lets_kernels.bench.multiples import OURS, UNIT, Multiples
from lets_kernels.bench.run import Findings, Settings
from lets_kernels.bench.training import Training

WIDTH = 118
COPY_TARGET = 0.85  # of a copy's bandwidth
HOST = 0.5  # below this share of a copy's bandwidth it is the host that takes the time
DEFINITIONS = {
    "median_ms": "a SAM step outside forward and backward, first_step and second_step: median of the rounds; in "
    "training and multiples a whole step",
    "p20_ms, p80_ms": "20th and 80th percentile of the rounds",
    "times_fastest": "median over the rounds of this contender's time over that of the fastest one",
    "buffers": "parameter-sized reads and writes that the step has to make; bytes: the same in bytes; null: not known",
    "GB/s": "bytes over the median",
    "share_of_copy": "that over the bytes a second (read and written) of the faster of two copies, in the same rounds",
    "extra_bytes": "peak of the process's memory in a step, beside parameters, gradients and the base "
    "optimizer's state; null where Linux does not tell, or the parameters are small",
    "error": "largest |weight - float64's| / max(|float64's|, rms of its tensor), at θ + ε and after three steps",
    "others_cores": "cores that other processes kept busy during the rounds",
    "share_outside": "of a whole training step, the share outside forward and backward",
    "gradients, steps_a_round": "in multiples: forward and backward passes of a step, as counted; steps of a round, by "
    "which its seconds are divided",
    "times_two_gradients, times_sam": "in multiples: median over the rounds of a whole step's time over that of two "
    "gradients without an optimizer, and over that of this package's SAM",
    "disturbed": "whether other processes were busier than the idle cores could bear; no target is judged then",
}


def heading(settings: Settings, environment: dict[str, Any]) -> str:
    at, elements = environment, sum(map(math.prod, settings.shapes))
    commit = "" if at["commit"] == "unknown" else f" ({at['commit'][:9]}{'-dirty' * at['commit'].endswith('-dirty')})"
    return "\n".join(
        [
            f"A SAM step outside forward and backward: {settings.model}, {counted(len(settings.shapes), 'tensor')}, "
            f"{elements:,} weights, {name_of(settings.dtype)}",
            f"{at['cpu']}, {counted(at['threads'], 'thread')} on {counted(at['cores'], 'core')}; "
            f"torch {at['torch']}, lets_kernels {at['lets_kernels']}{commit}",
            f"kernels: {at['backend']}",
        ]
    )


def legend(contenders: Sequence[Contender], missing: Sequence[str]) -> str:
    width = max(len(c.name) for c in contenders)
    lines = [(f"  {c.name:<{width}}  ", c.what) for c in contenders] + [("  ", line) for line in missing]
    return "\n".join(_wrapped(first + what, " " * len(first)) for first, what in lines)


def text(found: Findings, settings: Settings) -> str:
    """The tables, with what follows from them."""
    off = f"by more than {found.comparisons[0].tolerance:.0e} " if found.comparisons else ""
    parts = [
        _wrapped(
            "Each contender took three steps from the same weights and gradients. One that is off the float64 step "
            f"{off}is not timed. All others ran in turn, in one process. Times are medians. Other "
            "programs share this machine, and its memory changes speed from minute to minute: read the ratios. N: the "
            "bytes of all parameters, so '11 N' are so many reads and writes of them."
        )
    ]
    parts += [comparison_text(one) for one in found.comparisons]
    parts += [training_text(one) for one in found.training]
    if found.multiples:
        parts.append(multiples_head())
    parts += [multiples_text(one) for one in found.multiples]
    parts += [growth_text(by, part) for by, part in found.growth.parts.items() if part]
    parts += [_wrapped(line) for line in found.left_out]
    if found.interrupted:
        parts.append("Interrupted: this is what had been measured by then.")
    return "\n\n".join(parts)


def comparison_text(one: Comparison) -> str:
    found, order = one.timings, one.order
    rows = []
    for name in order:
        t, moved = found[name], one.moved(name)
        rate = None if moved is None else moved / t.median
        rows.append(
            {
                f"SAM + {one.base.name}": name,
                "ms": ms(t.median),
                "p20 - p80": f"{ms(t.quantile(0.2))} - {ms(t.quantile(0.8))}",
                "times fastest": f"{t.over(found[order[0]]):.2f}",
                "moves": "?" if moved is None else f"{one.buffers(name)} N",
                "GB/s": "?" if rate is None else f"{rate / 1e9:.1f}",
                "of a copy": "?" if rate is None else f"{rate / one.copy_rate:.0%}",
                "extra memory": _extra(one, name),
                "off by": f"{one.results[name].error:.0e}",
            }
        )
    lines = [table(rows)] if rows else [f"SAM + {one.base.name}: {one.note or 'validated, not timed'}"]
    lines += [f"{name}: {r.refused}" for name, r in one.results.items() if r.refused]
    if not one.base.fused(one.dtype):
        lines.append(
            f"Outside lets_kernels, torch's foreach {one.base.name} steps: its fused one takes a wrong step for "
            f"{name_of(one.dtype)} on CPUs."
        )
    for name in (COPY, STREAMED):
        if name in found:
            rate = 2 * one.dtype.itemsize * one.numel / found[name].median
            lines.append(f"{name} of as many elements: {ms(found[name].median)} ms, {rate / 1e9:.1f} GB/s")
    if rows:
        busy = f"{len(found[order[0]].seconds)} rounds; other processes kept {one.others:.1f} cores busy"
        if one.disturbed:
            busy += (
                ". Too many for a verdict: who waits for all threads after every tensor loses most by it. Try again on "
                "a quiet machine, or with fewer --threads"
            )
        lines.append(_wrapped(busy + "."))
        lines += [_wrapped(line) for line in verdicts(one)]
    return "\n".join(lines)


def verdicts(one: Comparison) -> list[str]:
    """Whether this package is the fastest, and whether it keeps up with a copy; and why not, where it does not."""
    found, order = one.timings, one.order
    if DEFAULT not in order:
        return [f"{DEFAULT} was not timed: {one.results[DEFAULT].refused}"] if DEFAULT in one.results else []
    ours, lines = found[DEFAULT], []
    share = (one.moved(DEFAULT) or 0) / ours.median / one.copy_rate
    rivals = [name for name in order if not one.results[name].contender.ours]
    if rivals:
        best = rivals[0]
        ratio = ours.over(found[best])
        own, theirs = one.buffers(DEFAULT), one.buffers(best)
        target = f"Target, as fast as the best other code: {_judged(ratio <= 1, one)}."
        if ratio <= 1:
            lines.append(f"{target} {best} takes {found[best].over(ours):.2f} times as long as {DEFAULT}.")
        else:
            line = f"{target} {DEFAULT} takes {ratio:.2f} times as long as {best}."
            if share < HOST:
                line += " Little of that is the memory's time: it is the host's work, call by call."
            elif own and theirs and own > theirs:
                line += (
                    f" It moves {own} N, that moves {theirs} N, which would be {own / theirs:.2f} times: it keeps a "
                    "copy of the weights, so that no address changes and an exception can bring them back to the bit, "
                    "and looks for gradients that are not finite."
                )
                if ratio > own / theirs:
                    rival = (one.moved(best) or 0) / found[best].median / one.copy_rate
                    line += f" The rest: it reaches {share:.0%} of a copy's bandwidth, that {rival:.0%}."
            else:
                line += " It moves no more bytes, so this is the time of its passes and of the host."
            lines.append(line)
        if LOOP in found and best != LOOP:
            lines.append(f"{LOOP} takes {found[LOOP].over(ours):.2f} times as long as {DEFAULT}.")
    line = f"Target, {COPY_TARGET:.0%} of a copy's bandwidth: {_judged(share >= COPY_TARGET, one)}, {share:.0%}"
    if share < HOST:
        line += ", since the host takes most of the time"
    elif share < COPY_TARGET:
        line += ": its norms only read, which is slower than a copy on most CPUs"
    return [*lines, line + "."]


def _judged(met: bool, one: Comparison) -> str:
    return "not judged" if one.disturbed else "met" if met else "MISSED"


def training_text(one: Training) -> str:
    rows = [
        {
            "a whole training step, SAM + SGD": name,
            "ms": ms(whole),
            "outside forward and backward": ms(whole * share),
            "share": f"{share:.1%}",
        }
        for name, (whole, share) in one.rows().items()
    ]
    head = f"Two gradients and the step, on {one.network}. The gradients are the same work for all: one median."
    return "\n".join([_wrapped(head), table(rows) if rows else one.note or "not timed"])


def multiples_head() -> str:
    return _wrapped(
        "Whole training steps with SGD as the base, as multiples of two gradients (forward and backward, twice, no "
        "optimizer). The networks are small: the larger a batch, the smaller the part of a step that is outside its "
        "gradients. 'gradients' are counted. LETS every tenth step is timed over ten steps, all others over one. The "
        "first steps of SAM, and of LETS, were compared with the per-tensor loop's."
    )


def multiples_text(one: Multiples) -> str:
    rows = [
        {
            "a whole training step": name,
            "gradients": f"{one.gradients[name]:g}",
            "ms": ms(t.median),
            "p20 - p80": f"{ms(t.quantile(0.2))} - {ms(t.quantile(0.8))}",
            **{f"of {unit}": _times_over(one.over(name, unit)) for unit in (UNIT, OURS)},
        }
        for name, t in one.timings.items()
    ]
    lines = [_wrapped(f"On {one.network}:"), table(rows) if rows else one.note or "not timed"]
    lines += [f"{name}: {why}" for name, why in one.refused.items()]
    if rows:
        lines.append(f"{counted(one.rounds, 'round')}; other processes kept {one.others:.1f} cores busy.")
    return "\n".join(lines)


def _times_over(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def growth_text(by: str, comparisons: Sequence[Comparison]) -> str:
    rows: list[dict[str, str]] = []
    refused = []
    for one in comparisons:
        what = f"{Growth.at(by, one):,}"
        cells = {name: ms(t.median) for name, t in one.timings.items() if name in one.results}
        rows.append({by: what, **cells})
        refused += [f"{what} {by}: {name}: {r.refused}" for name, r in one.results.items() if r.refused]
        refused += [f"{what} {by}: {one.note}"] if one.note else []
    return "\n".join([f"ms of SAM + SGD by {Growth.label(by)}", table(rows), *refused])


def table(rows: Sequence[dict[str, str]]) -> str:
    """Columns under their names; numbers to the right."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([row.get(name, "-") for name in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    left = [not all(re.match(r"[\d.?-]+", row[i]) for row in cells[1:]) for i in range(len(columns))]
    lines = []
    for row in cells:
        aligned = (c.ljust(w) if at else c.rjust(w) for c, w, at in zip(row, widths, left, strict=True))
        lines.append("  ".join(aligned).rstrip())
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def document(found: Findings, settings: Settings, environment: dict[str, Any]) -> dict[str, Any]:
    """Everything that was found, ready for JSON."""
    return {
        "what": "lets_kernels bench",
        "seconds": round(found.seconds, 1),
        "interrupted": found.interrupted,
        "config": {
            "model": settings.model,
            "dtype": name_of(settings.dtype),
            "threads": settings.threads,
            "seconds": settings.seconds,
            "full": settings.full,
        },
        "environment": environment,
        "definitions": DEFINITIONS,
        "comparisons": [_comparison(one) for one in found.comparisons],
        "training": [_training(one) for one in found.training],
        "multiples": [_multiples(one) for one in found.multiples],
        "growth": {by: [_comparison(one) for one in part] for by, part in found.growth.parts.items()},
        "left_out": found.left_out,
    }


def _comparison(one: Comparison) -> dict[str, Any]:
    found, order = one.timings, one.order
    rows = []
    for name, result in one.results.items():
        row: dict[str, Any] = {
            "contender": name,
            "what": result.contender.what,
            "ours": result.contender.ours,
            "error": result.error,
            "refused": result.refused or None,
            "extra_bytes": result.extra_bytes,
            "buffers": one.buffers(name),
            "bytes": one.moved(name),
        }
        if name in found:
            t, moved = found[name], one.moved(name)
            rate = None if moved is None else moved / t.median
            row |= {**_times(t), "times_fastest": round(t.over(found[order[0]]), 4)}
            row["GB/s"] = None if rate is None else round(rate / 1e9, 3)
            row["share_of_copy"] = None if rate is None else round(rate / one.copy_rate, 4)
        rows.append(row)
    return {
        "step": f"SAM + {one.base.name}",
        "dtype": name_of(one.dtype),
        "tensors": len(one.shapes),
        "groups": one.base.groups,
        "elements": one.numel,
        "tolerance": one.tolerance,
        "contenders": rows,
        "copies": {name: _times(found[name]) for name in (COPY, STREAMED) if name in found},
        "copy_GB/s": round(one.copy_rate / 1e9, 3) if found else None,
        "others_cores": round(one.others, 2),
        "disturbed": one.disturbed,
        "verdicts": verdicts(one) if order else [],
        "note": one.note or None,
    }


def _training(one: Training) -> dict[str, Any]:
    rows = [{"contender": n, "median_ms": w * 1e3, "share_outside": s} for n, (w, s) in one.rows().items()]
    return {"network": one.network, "base": "SGD", "contenders": rows, "note": one.note or None}


def _multiples(one: Multiples) -> dict[str, Any]:
    rows = [
        {
            "method": name,
            "gradients": one.gradients[name],
            "steps_a_round": one.steps[name],
            **_times(t),
            **{
                key: _rounded(one.over(name, unit))
                for key, unit in (("times_two_gradients", UNIT), ("times_sam", OURS))
            },
        }
        for name, t in one.timings.items()
    ]
    return {
        "network": one.network,
        "base": "SGD",
        "methods": rows,
        "refused": one.refused,
        "others_cores": round(one.others, 2),
        "note": one.note or None,
    }


def _rounded(ratio: float | None) -> float | None:
    return None if ratio is None else round(ratio, 4)


def _times(t: Timing) -> dict[str, Any]:
    return {name: value for name, value in t.summary().items() if name != "others"}


def _extra(one: Comparison, name: str) -> str:
    extra = one.results[name].extra_bytes
    return "?" if extra is None else f"{extra / one.numel / one.dtype.itemsize:.1f} N"


def ms(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wrapped(line: str, indent: str = "") -> str:
    return textwrap.fill(line, WIDTH, subsequent_indent=indent, drop_whitespace=True)
