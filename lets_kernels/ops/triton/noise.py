"""Noise. Reads v and s if they are given; writes out."""

import triton.language as tl
from torch import Tensor

from lets_kernels.ops.triton.device import (
    chunk_at,
    divide,
    elements,
    filters_of,
    helper,
    kernel,
    load,
    narrow,
    scaling_at,
    square_root,
    store,
    sum_blocks,
)
from lets_kernels.ops.triton.launch import Call
from lets_kernels.ops.triton.random import draw_at, normals

__all__ = ["noise_"]


@helper
def _noise(
    out, v, s, scaling, norms, draw, position, a, std,
    VECTORS: tl.constexpr, PRECISIONS: tl.constexpr, FILTERS: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr,
    at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr,
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
    return term * term


@kernel
def noise_kernel(
    slots, chunks, runs, out, vectors, precisions, filter_norms, random, stream: tl.int64, a: tl.float64,
    std: tl.float64, VECTORS: tl.constexpr, PRECISIONS: tl.constexpr, FILTERS: tl.constexpr,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks)
    to, v = elements(out, run, begin, DTYPE, ALIGNED), elements(vectors, run, begin, DTYPE, ALIGNED)
    s = elements(precisions, run, begin, DTYPE, ALIGNED)
    scaling, draw, position = scaling_at(runs, run, begin), draw_at(random, stream), tl.load(runs + 5 * run) + begin
    factor, deviation = tl.full([], a, C), tl.full([], std, C)
    arguments = (to, v, s, scaling, filter_norms, draw, position, factor, deviation)
    sum_blocks(slots, _noise, arguments, (VECTORS, PRECISIONS, FILTERS, DTYPE, C), count, BLOCK, STAGES)


def noise_(call: Call) -> Tensor:
    s = call["precisions"]
    filters = s is None and call["filter_norms"] is not None
    return call.sums(noise_kernel, VECTORS=call["vectors"] is not None, PRECISIONS=s is not None, FILTERS=filters)
