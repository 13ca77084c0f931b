"""Two vectors: inner products and linear combinations.

dots: reads x, y. displacement_dots: reads g, theta, saved. combine_: reads x, y; writes out.
"""

from collections.abc import Sequence

import triton.language as tl
from torch import Tensor

from lets_kernels.ops.triton import launch
from lets_kernels.ops.triton.device import chunk_at, elements, helper, kernel, load, narrow, store, tree_sum

__all__ = ["combine_", "displacement_dots", "dots"]


@helper
def _products(x, y, at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    a = load(x, at, count, MASKED, BLOCK).to(tl.float64)
    b = load(y, at, count, MASKED, BLOCK).to(tl.float64)
    return a * a, a * b, b * b


@kernel
def dots_kernel(
    slots, chunks, runs, xs, ys,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    index, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    run, begin, count = chunk_at(chunks, index)
    x, y = elements(xs, run, begin, DTYPE, ALIGNED), elements(ys, run, begin, DTYPE, ALIGNED)
    whole = count // BLOCK * BLOCK
    first = tl.full([BLOCK], 0.0, tl.float64)
    mixed, second = first, first
    for b in range(0, whole, BLOCK):
        xx, xy, yy = _products(x, y, b, count, False, BLOCK)
        first, mixed, second = first + xx, mixed + xy, second + yy
    if whole < count:
        xx, xy, yy = _products(x, y, whole, count, True, BLOCK)
        first, mixed, second = first + xx, mixed + xy, second + yy
    tl.store(slots + index, tree_sum(first, BLOCK, STAGES))
    tl.store(slots + (programs + index), tree_sum(mixed, BLOCK, STAGES))
    tl.store(slots + (2 * programs + index), tree_sum(second, BLOCK, STAGES))


@helper
def _displaced(g, theta, saved, at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    a = load(g, at, count, MASKED, BLOCK).to(tl.float64)
    moved = load(theta, at, count, MASKED, BLOCK).to(C) - load(saved, at, count, MASKED, BLOCK).to(C)
    d = moved.to(tl.float64)
    return a * a, a * d, d * d


@kernel
def displacement_kernel(
    slots, chunks, runs, grads, thetas, saveds,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    index, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    run, begin, count = chunk_at(chunks, index)
    g, theta = elements(grads, run, begin, DTYPE, ALIGNED), elements(thetas, run, begin, DTYPE, ALIGNED)
    saved = elements(saveds, run, begin, DTYPE, ALIGNED)
    whole = count // BLOCK * BLOCK
    first = tl.full([BLOCK], 0.0, tl.float64)
    mixed, second = first, first
    for b in range(0, whole, BLOCK):
        gg, gd, dd = _displaced(g, theta, saved, b, count, False, BLOCK, C)
        first, mixed, second = first + gg, mixed + gd, second + dd
    if whole < count:
        gg, gd, dd = _displaced(g, theta, saved, whole, count, True, BLOCK, C)
        first, mixed, second = first + gg, mixed + gd, second + dd
    tl.store(slots + index, tree_sum(first, BLOCK, STAGES))
    tl.store(slots + (programs + index), tree_sum(mixed, BLOCK, STAGES))
    tl.store(slots + (2 * programs + index), tree_sum(second, BLOCK, STAGES))


@helper
def _combine(
    out, x, y, a, b, at, count,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    # Each thread reads what it writes, so `out` may be x or y.
    value = a * load(x, at, count, MASKED, BLOCK).to(C) + b * load(y, at, count, MASKED, BLOCK).to(C)
    store(out, narrow(value, DTYPE), at, count, MASKED, BLOCK)


@kernel
def combine_kernel(
    gate, chunks, runs, outs, xs, ys, coefficients,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(gate) != 0:
        run, begin, count = chunk_at(chunks, tl.program_id(0).to(tl.int64))
        out, x = elements(outs, run, begin, DTYPE, ALIGNED), elements(xs, run, begin, DTYPE, ALIGNED)
        y = elements(ys, run, begin, DTYPE, ALIGNED)
        first, second = tl.load(coefficients).to(C), tl.load(coefficients + 1).to(C)
        whole = count // BLOCK * BLOCK
        for b in range(0, whole, BLOCK):
            _combine(out, x, y, first, second, b, count, False, BLOCK, DTYPE, C)
        if whole < count:
            _combine(out, x, y, first, second, whole, count, True, BLOCK, DTYPE, C)


def dots(x: Sequence[Tensor], y: Sequence[Tensor], table: Tensor) -> Tensor:
    call = launch.Call(table, x, "x")
    return call.sums((3,), dots_kernel, call.list(x, "x"), call.list(y, "y"))


def displacement_dots(grads: Sequence[Tensor], params: Sequence[Tensor], saved: Tensor, table: Tensor) -> Tensor:
    call = launch.Call(table, grads, "grads", saved)
    lists = call.list(grads, "grads"), call.list(params, "params"), call.list([saved], "saved")
    return call.sums((3,), displacement_kernel, *lists)


def combine_(
    out: Sequence[Tensor],
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    table: Tensor,
    coefficients: Tensor,
    gate: Tensor,
) -> None:
    call = launch.Call(table, out, "out", gate)
    lists = call.list(out, "out"), call.list(x, "x"), call.list(y, "y")
    call.over_chunks(
        combine_kernel, call.scalar(gate, "gate"), *lists, call.scalar(coefficients, "coefficients", count=2)
    )
