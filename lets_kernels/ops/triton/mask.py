"""Masks. masked_: reads v (and the mask); writes out. count_above: reads v, mask. select_: reads v; writes the mask."""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from lets_kernels.ops.triton import launch
from lets_kernels.ops.triton.device import (
    chunk_at,
    elements,
    helper,
    kernel,
    load,
    masked,
    narrow,
    store,
    tree_sum,
)
from lets_kernels.ops.triton.random import draw_at, random_of, words

__all__ = ["count_above", "masked_", "select_"]


@helper
def mask_at(mask, position, ALIGNED: tl.constexpr):
    """The pointer to the mask of the element at a position."""
    pointer = mask + position
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@helper
def _masked(
    out, v, mask, draw, position, limit, factor, at, count,
    GIVEN: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    stored = load(v, at, count, MASKED, BLOCK)
    if GIVEN:
        keep, value = load(mask, at, count, MASKED, BLOCK) != 0, stored
    else:
        keep, value = words(draw, position + at, BLOCK) < limit, narrow(stored.to(C) * factor, DTYPE)
    store(out, tl.where(keep, value, tl.full([BLOCK], 0.0, DTYPE)), at, count, MASKED, BLOCK)
    term = stored.to(tl.float64)
    return masked(term * term, at, count, MASKED, BLOCK)


@kernel
def masked_kernel(
    slots, chunks, runs, outs, vs, mask, random, stream: tl.int64, limit: tl.int64, factor: tl.float64,
    GIVEN: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    run, begin, count = chunk_at(chunks, index)
    out, v = elements(outs, run, begin, DTYPE, ALIGNED), elements(vs, run, begin, DTYPE, ALIGNED)
    position = tl.load(runs + 5 * run) + begin
    keeps, draw, scale = mask_at(mask, position, ALIGNED), draw_at(random, stream), tl.full([], factor, C)
    whole = count // BLOCK * BLOCK
    total = tl.full([BLOCK], 0.0, tl.float64)
    for b in range(0, whole, BLOCK):
        total += _masked(out, v, keeps, draw, position, limit, scale, b, count, GIVEN, False, BLOCK, DTYPE, C)
    if whole < count:
        total += _masked(out, v, keeps, draw, position, limit, scale, whole, count, GIVEN, True, BLOCK, DTYPE, C)
    tl.store(slots + index, tree_sum(total, BLOCK, STAGES))


@helper
def _above(v, draw, position, threshold, at, count, VECTORS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Where the key of an element is above the threshold."""
    key = words(draw, position + at, BLOCK)
    if VECTORS:
        magnitude = tl.abs(load(v, at, count, MASKED, BLOCK).to(tl.float32))
        key = (magnitude.to(tl.int32, bitcast=True).to(tl.int64) << 32) | key
    else:
        key = key << 31
    return key > threshold


@helper
def _count(
    v, mask, draw, position, threshold, member, at, count,
    VECTORS: tl.constexpr, MEMBER: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    above = _above(v, draw, position, threshold, at, count, VECTORS, MASKED, BLOCK)
    if MEMBER:
        above = above & (load(mask, at, count, MASKED, BLOCK).to(tl.int64) == member)
    return masked(tl.where(above, 1.0, 0.0).to(tl.float64), at, count, MASKED, BLOCK)


@kernel
def count_kernel(
    slots, chunks, runs, vs, mask, threshold, random, stream: tl.int64, member: tl.int64,
    VECTORS: tl.constexpr, MEMBER: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    run, begin, count = chunk_at(chunks, index)
    v, position = elements(vs, run, begin, DTYPE, ALIGNED), tl.load(runs + 5 * run) + begin
    own, draw, least = mask_at(mask, position, ALIGNED), draw_at(random, stream), tl.load(threshold)
    whole = count // BLOCK * BLOCK
    total = tl.full([BLOCK], 0.0, tl.float64)
    for b in range(0, whole, BLOCK):
        total += _count(v, own, draw, position, least, member, b, count, VECTORS, MEMBER, False, BLOCK)
    if whole < count:
        total += _count(v, own, draw, position, least, member, whole, count, VECTORS, MEMBER, True, BLOCK)
    tl.store(slots + index, tree_sum(total, BLOCK, STAGES))


@helper
def _select(
    v, mask, draw, position, threshold, member, value, at, count,
    VECTORS: tl.constexpr, MEMBER: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    above = _above(v, draw, position, threshold, at, count, VECTORS, MASKED, BLOCK)
    own = load(mask, at, count, MASKED, BLOCK)
    if MEMBER:
        above = above & (own.to(tl.int64) == member)
    # What is not selected is written as it was: a store of whole blocks is wide, one of single bytes is not.
    store(mask, tl.where(above, value, own), at, count, MASKED, BLOCK)


@kernel
def select_kernel(
    mask, chunks, runs, vs, threshold, random, stream: tl.int64, member: tl.int64, value: tl.int64,
    VECTORS: tl.constexpr, MEMBER: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks, tl.program_id(0).to(tl.int64))
    v, position = elements(vs, run, begin, DTYPE, ALIGNED), tl.load(runs + 5 * run) + begin
    own, draw, least = mask_at(mask, position, ALIGNED), draw_at(random, stream), tl.load(threshold)
    to = value.to(tl.uint8)
    whole = count // BLOCK * BLOCK
    for b in range(0, whole, BLOCK):
        _select(v, own, draw, position, least, member, to, b, count, VECTORS, MEMBER, False, BLOCK)
    if whole < count:
        _select(v, own, draw, position, least, member, to, whole, count, VECTORS, MEMBER, True, BLOCK)


def mask_of(call: launch.Call, mask: Tensor) -> Tensor:
    """The mask, addressed by the runs' starts; whether that is aligned counts for the whole call."""
    fits = mask.device == call.device and mask.is_contiguous() and mask.numel() >= call.plan.end
    fits = fits and launch.has_memory(mask)
    launch.require(
        fits and mask.dtype == torch.uint8,
        f"mask must be a flat uint8 tensor with one element for each of the bucket, on {call.device}",
    )
    call.aligned = call.aligned and mask.data_ptr() % 16 == 0 and not any(start % 16 for start in call.plan.starts)
    return mask


def _chosen(
    call: launch.Call, vectors: Sequence[Tensor], mask: Tensor, threshold: Tensor, member: int
) -> tuple[Tensor | None, Tensor, Tensor, dict[str, bool]]:
    """What is ranked, among whom, and above what, of count_above and select_."""
    launch.require(-1 <= member <= 255, f"member must be a value of the mask, or -1 for all, not {member}")
    v, own = call.optional(vectors, "vectors"), mask_of(call, mask)
    kinds = {"VECTORS": v is not None, "MEMBER": member >= 0}
    return v, own, call.scalar(threshold, "threshold", torch.int64), kinds


def masked_(
    out: Sequence[Tensor],
    vectors: Sequence[Tensor],
    mask: Tensor | None,
    table: Tensor,
    random: Tensor,
    stream: int,
    share: float,
) -> Tensor:
    call = launch.Call(table, out, "out", random)
    launch.require(mask is not None or 0 < share <= 1, f"share must be a probability above 0, not {share}")
    lists = call.list(out, "out"), call.list(vectors, "vectors")
    given = None if mask is None else mask_of(call, mask)
    drawn, numbers = random_of(call, random), (int(share * 2**32), 1 / share) if given is None else (0, 1.0)
    return call.sum(masked_kernel, *lists, given, drawn, stream, *numbers, GIVEN=given is not None)


def count_above(
    vectors: Sequence[Tensor],
    mask: Tensor,
    table: Tensor,
    threshold: Tensor,
    random: Tensor,
    stream: int,
    member: int,
) -> Tensor:
    call = launch.Call(table, vectors, "vectors", mask)
    v, own, least, kinds = _chosen(call, vectors, mask, threshold, member)
    return call.sum(count_kernel, v, own, least, random_of(call, random), stream, member, **kinds)


def select_(
    mask: Tensor,
    vectors: Sequence[Tensor],
    table: Tensor,
    threshold: Tensor,
    random: Tensor,
    stream: int,
    member: int,
    value: int,
) -> None:
    call = launch.Call(table, vectors, "vectors", mask)
    v, own, least, kinds = _chosen(call, vectors, mask, threshold, member)
    launch.require(0 <= value <= 255, f"value must fit the mask, not be {value}")
    call.over_chunks(select_kernel, own, v, least, random_of(call, random), stream, member, value, **kinds)
