"""Noise. Reads v and s where they are given; writes out."""

from collections.abc import Sequence

import triton.language as tl
from torch import Tensor

from lets_kernels.ops.triton import launch
from lets_kernels.ops.triton.device import (
    chunk_at,
    divide,
    elements,
    filters_of,
    helper,
    kernel,
    load,
    masked,
    narrow,
    scaling_at,
    square_root,
    store,
    tree_sum,
)
from lets_kernels.ops.triton.random import draw_at, normals, random_of

__all__ = ["noise_"]


@helper
def _noise(
    out, v, s, scaling, norms, draw, position, a, std, at, count,
    VECTORS: tl.constexpr, PRECISIONS: tl.constexpr, FILTERS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    moved = tl.full([BLOCK], 1, C)
    if PRECISIONS:
        moved = divide(moved, square_root(load(s, at, count, MASKED, BLOCK).to(C), C), C)
    elif FILTERS:  # noqa: SIM102 (this one is decided when the kernel is compiled, the next one when it runs)
        if scaling[0] > 0:
            moved = tl.load(norms + scaling[5] + filters_of(scaling, at, BLOCK))
    moved = std * moved * normals(draw, position + at, BLOCK).to(C)
    if VECTORS:
        moved = a * load(v, at, count, MASKED, BLOCK).to(C) + moved
    value = narrow(moved, DTYPE)
    store(out, value, at, count, MASKED, BLOCK)
    term = value.to(tl.float64)
    return masked(term * term, at, count, MASKED, BLOCK)


@kernel
def noise_kernel(
    slots, chunks, runs, outs, vs, ss, norms, random, stream: tl.int64, a: tl.float64, std: tl.float64,
    VECTORS: tl.constexpr, PRECISIONS: tl.constexpr, FILTERS: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    run, begin, count = chunk_at(chunks, index)
    out, v = elements(outs, run, begin, DTYPE, ALIGNED), elements(vs, run, begin, DTYPE, ALIGNED)
    s = elements(ss, run, begin, DTYPE, ALIGNED)
    scaling, draw, position = scaling_at(runs, run, begin), draw_at(random, stream), tl.load(runs + 5 * run) + begin
    factor, deviation = tl.full([], a, C), tl.full([], std, C)
    whole = count // BLOCK * BLOCK
    total = tl.full([BLOCK], 0.0, tl.float64)
    for b in range(0, whole, BLOCK):
        total += _noise(
            out, v, s, scaling, norms, draw, position, factor, deviation, b, count,
            VECTORS, PRECISIONS, FILTERS, False, BLOCK, DTYPE, C,
        )  # fmt: skip
    if whole < count:
        total += _noise(
            out, v, s, scaling, norms, draw, position, factor, deviation, whole, count,
            VECTORS, PRECISIONS, FILTERS, True, BLOCK, DTYPE, C,
        )  # fmt: skip
    tl.store(slots + index, tree_sum(total, BLOCK, STAGES))


def noise_(
    out: Sequence[Tensor],
    vectors: Sequence[Tensor],
    precisions: Sequence[Tensor],
    table: Tensor,
    filter_norms: Tensor | None,
    random: Tensor,
    stream: int,
    a: float,
    std: float,
) -> Tensor:
    call = launch.Call(table, out, "out", random)
    to, v, s = call.list(out, "out"), call.optional(vectors, "vectors"), call.optional(precisions, "precisions")
    norms, drawn = call.norms(filter_norms), random_of(call, random)
    kinds = {"VECTORS": v is not None, "PRECISIONS": s is not None, "FILTERS": s is None and norms is not None}
    lists = to, to if v is None else v, to if s is None else s
    return call.sum(noise_kernel, *lists, norms, drawn, stream, a, std, **kinds)
