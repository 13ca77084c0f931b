"""Two vectors: inner products and linear combinations.

dots: reads x, y. displacement_dots: reads g, theta, saved. combine_: reads x, y; writes out.
"""

import triton.language as tl
from torch import Tensor

from lets_kernels.ops.triton.device import (
    chunk_at,
    elements,
    for_blocks,
    helper,
    kernel,
    load,
    narrow,
    store,
    tree_sum,
)
from lets_kernels.ops.triton.launch import Call

__all__ = ["combine_", "displacement_dots", "dots"]


@helper
def _sum_products(slots, body: tl.constexpr, arguments, kinds, count, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Like :func:`sum_blocks`, for a body that returns two doubles, 0 where masked: the sums of their products.

    The sums are first · first, first · second, and second · second.
    """
    index, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    whole = count // BLOCK * BLOCK
    first = tl.full([BLOCK], 0.0, tl.float64)
    mixed, second = first, first
    for at in range(0, whole, BLOCK):
        a, b = body(*arguments, *kinds, at, count, False, BLOCK)
        first, mixed, second = first + a * a, mixed + a * b, second + b * b
    if whole < count:
        a, b = body(*arguments, *kinds, whole, count, True, BLOCK)
        first, mixed, second = first + a * a, mixed + a * b, second + b * b
    tl.store(slots + index, tree_sum(first, BLOCK, STAGES))
    tl.store(slots + (programs + index), tree_sum(mixed, BLOCK, STAGES))
    tl.store(slots + (2 * programs + index), tree_sum(second, BLOCK, STAGES))


@helper
def _pair(x, y, at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    return load(x, at, count, MASKED, BLOCK).to(tl.float64), load(y, at, count, MASKED, BLOCK).to(tl.float64)


@kernel
def dots_kernel(
    slots, chunks, x, y, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    run, begin, count = chunk_at(chunks)
    a, b = elements(x, run, begin, DTYPE, ALIGNED), elements(y, run, begin, DTYPE, ALIGNED)
    _sum_products(slots, _pair, (a, b), (), count, BLOCK, STAGES)


@helper
def _displaced(g, theta, saved, C: tl.constexpr, at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    moved = load(theta, at, count, MASKED, BLOCK).to(C) - load(saved, at, count, MASKED, BLOCK).to(C)
    return load(g, at, count, MASKED, BLOCK).to(tl.float64), moved.to(tl.float64)


@kernel
def displacement_kernel(
    slots, chunks, grads, thetas, saved,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks)
    g, theta = elements(grads, run, begin, DTYPE, ALIGNED), elements(thetas, run, begin, DTYPE, ALIGNED)
    old = elements(saved, run, begin, DTYPE, ALIGNED)
    _sum_products(slots, _displaced, (g, theta, old), (C,), count, BLOCK, STAGES)


@helper
def _combine(
    out, x, y, a, b, DTYPE: tl.constexpr, C: tl.constexpr, at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # Each thread reads the elements that it writes, so `out` may be x or y.
    value = a * load(x, at, count, MASKED, BLOCK).to(C) + b * load(y, at, count, MASKED, BLOCK).to(C)
    store(out, narrow(value, DTYPE), at, count, MASKED, BLOCK)


@kernel
def combine_kernel(
    gate, chunks, out, x, y, coefficients,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(gate) != 0:
        run, begin, count = chunk_at(chunks)
        to, u = elements(out, run, begin, DTYPE, ALIGNED), elements(x, run, begin, DTYPE, ALIGNED)
        v = elements(y, run, begin, DTYPE, ALIGNED)
        a, b = tl.load(coefficients).to(C), tl.load(coefficients + 1).to(C)
        for_blocks(_combine, (to, u, v, a, b), (DTYPE, C), count, BLOCK)


def dots(call: Call) -> Tensor:
    return call.sums(dots_kernel, (3,))


def displacement_dots(call: Call) -> Tensor:
    return call.sums(displacement_kernel, (3,))


def combine_(call: Call) -> None:
    call.launch(combine_kernel)
