"""Moving averages of gradients. average_: reads m, x; writes m, out. posterior_ascent_: reads g, s; writes out, s."""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from lets_kernels.ops.triton import launch
from lets_kernels.ops.triton.device import (
    chunk_at,
    divide,
    elements,
    helper,
    kernel,
    load,
    masked,
    narrow,
    square_root,
    store,
    tree_sum,
)

__all__ = ["average_", "posterior_ascent_"]


@helper
def _average(
    m, x, out, begins, go, o, at, count,
    OUT: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    decay, rest, a, b = o
    old = load(m, at, count, MASKED, BLOCK)
    new = load(x, at, count, MASKED, BLOCK)
    wide = new.to(C)
    moved = tl.where(begins, new, narrow(decay * old.to(C) + rest * wide, DTYPE))
    average = tl.where(go, moved, old)
    store(m, average, at, count, MASKED, BLOCK)
    v = tl.where(begins, new, narrow(a * wide + b * average.to(C), DTYPE))
    if OUT:
        store(out, v, at, count, MASKED, BLOCK)
    term = v.to(tl.float64)
    return masked(term * term, at, count, MASKED, BLOCK)


@kernel
def average_kernel(
    slots, chunks, runs, ms, xs, outs, updates, gate,
    decay: tl.float64, rest: tl.float64, a: tl.float64, b: tl.float64,
    OUT: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    run, begin, count = chunk_at(chunks, index)
    m, x = elements(ms, run, begin, DTYPE, ALIGNED), elements(xs, run, begin, DTYPE, ALIGNED)
    out = elements(outs, run, begin, DTYPE, ALIGNED)
    begins, go = tl.load(updates) == 0, tl.load(gate) != 0
    options = tl.full([], decay, C), tl.full([], rest, C), tl.full([], a, C), tl.full([], b, C)
    whole = count // BLOCK * BLOCK
    total = tl.full([BLOCK], 0.0, tl.float64)
    for at in range(0, whole, BLOCK):
        total += _average(m, x, out, begins, go, options, at, count, OUT, False, BLOCK, DTYPE, C)
    if whole < count:
        total += _average(m, x, out, begins, go, options, whole, count, OUT, True, BLOCK, DTYPE, C)
    tl.store(slots + index, tree_sum(total, BLOCK, STAGES))


@kernel
def updates_kernel(updates, gate):
    """After all programs of average_kernel: one update more where the gate is open."""
    if tl.load(gate) != 0:
        tl.store(updates, tl.load(updates) + 1)


@helper
def _ascend(
    out, s, g, go, beta2, rest, damping, at, count,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    before = load(s, at, count, MASKED, BLOCK)
    step = load(g, at, count, MASKED, BLOCK).to(C)
    precision = before.to(C)
    store(out, narrow(divide(step, precision, C), DTYPE), at, count, MASKED, BLOCK)
    after = beta2 * precision + rest * (square_root(precision, C) * tl.abs(step) + damping)
    store(s, tl.where(go, narrow(after, DTYPE), before), at, count, MASKED, BLOCK)


@kernel
def ascent_kernel(
    gate, chunks, runs, outs, ss, gs, beta2: tl.float64, rest: tl.float64, damping: tl.float64,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks, tl.program_id(0).to(tl.int64))
    out, s = elements(outs, run, begin, DTYPE, ALIGNED), elements(ss, run, begin, DTYPE, ALIGNED)
    g, go = elements(gs, run, begin, DTYPE, ALIGNED), tl.load(gate) != 0
    kept, share, least = tl.full([], beta2, C), tl.full([], rest, C), tl.full([], damping, C)
    whole = count // BLOCK * BLOCK
    for b in range(0, whole, BLOCK):
        _ascend(out, s, g, go, kept, share, least, b, count, False, BLOCK, DTYPE, C)
    if whole < count:
        _ascend(out, s, g, go, kept, share, least, whole, count, True, BLOCK, DTYPE, C)


def average_(
    averages: Sequence[Tensor],
    vectors: Sequence[Tensor],
    out: Sequence[Tensor],
    updates: Tensor,
    table: Tensor,
    gate: Tensor,
    decay: float,
    a: float,
    b: float,
) -> Tensor:
    call = launch.Call(table, averages, "averages", updates)
    m, x, to = call.list(averages, "averages"), call.list(vectors, "vectors"), call.optional(out, "out")
    counted, opened = call.scalar(updates, "updates", torch.int64), call.scalar(gate, "gate")
    lists = m, x, m if to is None else to
    total = call.sum(average_kernel, *lists, counted, opened, decay, 1 - decay, a, b, OUT=to is not None)
    call.launch(updates_kernel, 1, counted, opened)
    return total


def posterior_ascent_(
    out: Sequence[Tensor],
    precisions: Sequence[Tensor],
    grads: Sequence[Tensor],
    table: Tensor,
    gate: Tensor,
    beta2: float,
    damping: float,
) -> None:
    call = launch.Call(table, out, "out", gate)
    lists = call.list(out, "out"), call.list(precisions, "precisions"), call.list(grads, "grads")
    call.over_chunks(ascent_kernel, call.scalar(gate, "gate"), *lists, beta2, 1 - beta2, damping)
