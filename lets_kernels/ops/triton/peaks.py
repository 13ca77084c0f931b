"""The largest elements. largest: reads v. peaks_: reads v; writes out."""

import torch
import triton.language as tl
from torch import Tensor

from lets_kernels.ops.triton import launch
from lets_kernels.ops.triton.device import chunk_at, elements, helper, kernel, load, store, sum_blocks

__all__ = ["largest", "peaks_"]

# Magnitudes are compared by their bits as integers, which have the same order and put NaN above everything.


@kernel
def largest_kernel(
    slots, chunks, vectors,
    BITS: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks)
    v = elements(vectors, run, begin, DTYPE, ALIGNED)
    whole = count // BLOCK * BLOCK
    top = tl.full([BLOCK], 0, BITS)
    for b in range(0, whole, BLOCK):
        top = tl.maximum(top, tl.abs(load(v, b, count, False, BLOCK).to(C)).to(BITS, bitcast=True))
    if whole < count:
        top = tl.maximum(top, tl.abs(load(v, whole, count, True, BLOCK).to(C)).to(BITS, bitcast=True))
    magnitude = tl.max(top, axis=0).to(C, bitcast=True).to(tl.float64)
    tl.store(slots + tl.program_id(0).to(tl.int64), magnitude.to(tl.int64, bitcast=True))


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
    out, v, top, DTYPE: tl.constexpr, C: tl.constexpr, at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    x = load(v, at, count, MASKED, BLOCK).to(C)
    peak = tl.abs(x).to(tl.float64) == top
    sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
    store(out, tl.where(peak, sign, 0.0).to(DTYPE), at, count, MASKED, BLOCK)
    return tl.where(peak, 1.0, 0.0).to(tl.float64)


@kernel
def peaks_kernel(
    slots, chunks, out, vectors, largest,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks)
    to, v = elements(out, run, begin, DTYPE, ALIGNED), elements(vectors, run, begin, DTYPE, ALIGNED)
    sum_blocks(slots, _peaks, (to, v, tl.load(largest)), (DTYPE, C), count, BLOCK, STAGES)


def largest(call: launch.Call) -> Tensor:
    count = call.plan.count
    out = torch.zeros((), dtype=torch.float64, device=call.device)
    if count:
        slots = torch.empty(count, dtype=torch.int64, device=call.device)
        call.launch(largest_kernel, slots=slots, BITS=tl.int64 if call.wide == torch.float64 else tl.int32)
        call.launch(largest_slot, 1, out=out, slots=slots, count=count, N=launch.SLOTS)
    return out


def peaks_(call: launch.Call) -> Tensor:
    return call.sums(peaks_kernel)
