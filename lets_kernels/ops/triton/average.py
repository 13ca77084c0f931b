"""Moving averages of gradients. average_: reads m, x; writes m, out. posterior_ascent_: reads g, s; writes out, s."""

import triton.language as tl
from torch import Tensor

from lets_kernels.ops.triton.device import (
    chunk_at,
    divide,
    elements,
    for_blocks,
    helper,
    kernel,
    load,
    narrow,
    number,
    square_root,
    store,
    sum_blocks,
)
from lets_kernels.ops.triton.launch import Call

__all__ = ["average_", "posterior_ascent_"]


@helper
def _average(
    m, x, out, begins, go, decay, rest, a, b, OUT: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr,
    at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    return term * term


@kernel
def average_kernel(
    slots, chunks, averages, vectors, out, updates, gate,
    decay: tl.float64, rest: tl.float64, a: tl.float64, b: tl.float64,
    OUT: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks)
    m, x = elements(averages, run, begin, DTYPE, ALIGNED), elements(vectors, run, begin, DTYPE, ALIGNED)
    to = elements(out, run, begin, DTYPE, ALIGNED)
    begins, go = tl.load(updates) == 0, tl.load(gate) != 0
    keep, share, of_x, of_m = tl.full([], decay, C), tl.full([], rest, C), tl.full([], a, C), tl.full([], b, C)
    arguments = (m, x, to, begins, go, keep, share, of_x, of_m)
    sum_blocks(slots, _average, arguments, (OUT, DTYPE, C), count, BLOCK, STAGES)


@kernel
def updates_kernel(updates, gate):
    """After all programs of average_kernel: increase ``updates`` by one if the gate is open."""
    if tl.load(gate) != 0:
        tl.store(updates, tl.load(updates) + 1)


@helper
def _ascend(
    out, s, g, go, beta2, rest, damping, DTYPE: tl.constexpr, C: tl.constexpr,
    at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    before = load(s, at, count, MASKED, BLOCK)
    step = load(g, at, count, MASKED, BLOCK).to(C)
    precision = before.to(C)
    store(out, narrow(divide(step, precision, C), DTYPE), at, count, MASKED, BLOCK)
    after = beta2 * precision + rest * (square_root(precision, C) * tl.abs(step) + damping)
    store(s, tl.where(go, narrow(after, DTYPE), before), at, count, MASKED, BLOCK)


@kernel
def ascent_kernel(
    gate, chunks, out, precisions, grads, numbers, per_run, beta2: tl.float64, rest: tl.float64, damping: tl.float64,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks)
    to, s = elements(out, run, begin, DTYPE, ALIGNED), elements(precisions, run, begin, DTYPE, ALIGNED)
    g, go = elements(grads, run, begin, DTYPE, ALIGNED), tl.load(gate) != 0
    more = number(numbers, per_run, run, 0, damping).to(C)
    arguments = (to, s, g, go, tl.full([], beta2, C), tl.full([], rest, C), more)
    for_blocks(_ascend, arguments, (DTYPE, C), count, BLOCK)


def average_(call: Call) -> Tensor:
    total = call.sums(average_kernel, rest=1 - call["decay"], OUT=call["out"] is not None)
    call.launch(updates_kernel, 1)
    return total


def posterior_ascent_(call: Call) -> None:
    call.launch(ascent_kernel, rest=1 - call["beta2"])
