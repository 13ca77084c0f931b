"""The largest elements. largest: reads v. peaks_: reads v; writes out."""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from lets_kernels.ops.triton import launch
from lets_kernels.ops.triton.device import chunk_at, elements, helper, kernel, load, masked, store, tree_sum

__all__ = ["largest", "peaks_"]

# Magnitudes are compared by their bits, as integers: they have the same order, and a NaN is above everything.


@kernel
def largest_kernel(
    slots, chunks, runs, vs,
    BITS: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    run, begin, count = chunk_at(chunks, index)
    v = elements(vs, run, begin, DTYPE, ALIGNED)
    whole = count // BLOCK * BLOCK
    top = tl.full([BLOCK], 0, BITS)
    for b in range(0, whole, BLOCK):
        top = tl.maximum(top, tl.abs(load(v, b, count, False, BLOCK).to(C)).to(BITS, bitcast=True))
    if whole < count:
        top = tl.maximum(top, tl.abs(load(v, whole, count, True, BLOCK).to(C)).to(BITS, bitcast=True))
    magnitude = tl.max(top, axis=0).to(C, bitcast=True).to(tl.float64)
    tl.store(slots + index, magnitude.to(tl.int64, bitcast=True))


@kernel
def largest_slot(out, slots, count, N: tl.constexpr):
    """One program: the largest of all slots."""
    lane = tl.arange(0, N)
    top = tl.full([N], 0, tl.int64)
    for begin in range(0, count, N):
        top = tl.maximum(top, tl.load(slots + begin + lane, mask=begin + lane < count, other=0))
    tl.store(out, tl.max(top, axis=0).to(tl.float64, bitcast=True))


@helper
def _peaks(
    out, v, top, at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    x = load(v, at, count, MASKED, BLOCK).to(C)
    peak = tl.abs(x).to(tl.float64) == top
    sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
    store(out, tl.where(peak, sign, 0.0).to(DTYPE), at, count, MASKED, BLOCK)
    return masked(tl.where(peak, 1.0, 0.0).to(tl.float64), at, count, MASKED, BLOCK)


@kernel
def peaks_kernel(
    slots, chunks, runs, outs, vs, largest,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    run, begin, count = chunk_at(chunks, index)
    out, v = elements(outs, run, begin, DTYPE, ALIGNED), elements(vs, run, begin, DTYPE, ALIGNED)
    top, whole = tl.load(largest), count // BLOCK * BLOCK
    total = tl.full([BLOCK], 0.0, tl.float64)
    for b in range(0, whole, BLOCK):
        total += _peaks(out, v, top, b, count, False, BLOCK, DTYPE, C)
    if whole < count:
        total += _peaks(out, v, top, whole, count, True, BLOCK, DTYPE, C)
    tl.store(slots + index, tree_sum(total, BLOCK, STAGES))


def largest(vectors: Sequence[Tensor], table: Tensor) -> Tensor:
    call = launch.Call(table, vectors, "vectors")
    v, count = call.list(vectors, "vectors"), call.plan.count
    out = torch.zeros((), dtype=torch.float64, device=call.device)
    if count:
        slots = torch.empty(count, dtype=torch.int64, device=call.device)
        call.over_chunks(largest_kernel, slots, v, BITS=tl.int64 if call.wide == torch.float64 else tl.int32)
        call.launch(largest_slot, 1, out, slots, count, N=launch.SLOTS)
    return out


def peaks_(out: Sequence[Tensor], vectors: Sequence[Tensor], table: Tensor, largest: Tensor) -> Tensor:
    call = launch.Call(table, out, "out", largest)
    lists = call.list(out, "out"), call.list(vectors, "vectors")
    return call.sum(peaks_kernel, *lists, call.scalar(largest, "largest"))
