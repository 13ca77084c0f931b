"""Masks. masked_: reads v (and the mask); writes out. count_above: reads v, mask. select_: reads v; writes the mask."""

from typing import Any

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
    sum_blocks,
)
from lets_kernels.ops.triton.launch import Call, require
from lets_kernels.ops.triton.random import draw_at, words

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
    out, v, mask, draw, position, limit, factor, GIVEN: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr,
    at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    stored = load(v, at, count, MASKED, BLOCK)
    if GIVEN:
        keep, value = load(mask, at, count, MASKED, BLOCK) != 0, stored
    else:
        keep, value = words(draw, position + at, BLOCK) < limit, narrow(stored.to(C) * factor, DTYPE)
    store(out, tl.where(keep, value, tl.full([BLOCK], 0.0, DTYPE)), at, count, MASKED, BLOCK)
    term = stored.to(tl.float64)
    return term * term


@kernel
def masked_kernel(
    slots, chunks, runs, out, vectors, mask, random, stream: tl.int64, limit: tl.int64, factor: tl.float64,
    GIVEN: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks)
    to, v = elements(out, run, begin, DTYPE, ALIGNED), elements(vectors, run, begin, DTYPE, ALIGNED)
    position = tl.load(runs + 5 * run) + begin
    keeps, draw, scale = mask_at(mask, position, ALIGNED), draw_at(random, stream), tl.full([], factor, C)
    arguments = (to, v, keeps, draw, position, limit, scale)
    sum_blocks(slots, _masked, arguments, (GIVEN, DTYPE, C), count, BLOCK, STAGES)


@helper
def _above(
    v, mask, draw, position, threshold, member, VECTORS: tl.constexpr, MEMBER: tl.constexpr,
    at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which elements have a key above the threshold and the given mask."""
    key = words(draw, position + at, BLOCK)
    if VECTORS:
        magnitude = tl.abs(load(v, at, count, MASKED, BLOCK).to(tl.float32))
        key = (magnitude.to(tl.int32, bitcast=True).to(tl.int64) << 32) | key
    else:
        key = key << 31
    above = key > threshold
    if MEMBER:
        above = above & (load(mask, at, count, MASKED, BLOCK).to(tl.int64) == member)
    return above


@helper
def _count(
    v, mask, draw, position, threshold, member, VECTORS: tl.constexpr, MEMBER: tl.constexpr,
    at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    above = _above(v, mask, draw, position, threshold, member, VECTORS, MEMBER, at, count, MASKED, BLOCK)
    return tl.where(above, 1.0, 0.0).to(tl.float64)


@kernel
def count_kernel(
    slots, chunks, runs, vectors, mask, threshold, random, stream: tl.int64, member: tl.int64,
    VECTORS: tl.constexpr, MEMBER: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks)
    v, position = elements(vectors, run, begin, DTYPE, ALIGNED), tl.load(runs + 5 * run) + begin
    own, draw, least = mask_at(mask, position, ALIGNED), draw_at(random, stream), tl.load(threshold)
    arguments = (v, own, draw, position, least, member)
    sum_blocks(slots, _count, arguments, (VECTORS, MEMBER), count, BLOCK, STAGES)


@helper
def _select(
    v, mask, draw, position, threshold, member, value, VECTORS: tl.constexpr, MEMBER: tl.constexpr,
    at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    above = _above(v, mask, draw, position, threshold, member, VECTORS, MEMBER, at, count, MASKED, BLOCK)
    # Elements that are not selected are written unchanged: a store of whole blocks is wide, of single bytes it is not.
    own = load(mask, at, count, MASKED, BLOCK)
    store(mask, tl.where(above, value, own), at, count, MASKED, BLOCK)


@kernel
def select_kernel(
    mask, chunks, runs, vectors, threshold, random, stream: tl.int64, member: tl.int64, value: tl.int64,
    VECTORS: tl.constexpr, MEMBER: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks)
    v, position = elements(vectors, run, begin, DTYPE, ALIGNED), tl.load(runs + 5 * run) + begin
    own, draw, least = mask_at(mask, position, ALIGNED), draw_at(random, stream), tl.load(threshold)
    arguments = (v, own, draw, position, least, member, value.to(tl.uint8))
    for_blocks(_select, arguments, (VECTORS, MEMBER), count, BLOCK)


def masked_(call: Call) -> Tensor:
    drawn, share = call["mask"] is None, call["share"]
    require(not drawn or 0 < share <= 1, f"share must be a probability above 0, not {share}")
    limit, factor = (int(share * 2**32), 1 / share) if drawn else (0, 1.0)
    return call.sums(masked_kernel, limit=limit, factor=factor, GIVEN=not drawn)


def _kinds(call: Call) -> dict[str, Any]:
    """Whether vectors rank the elements, and whether all elements are ranked."""
    member = call["member"]
    require(-1 <= member <= 255, f"member must be a value of the mask, or -1 for all, not {member}")
    return {"VECTORS": call["vectors"] is not None, "MEMBER": member >= 0}


def count_above(call: Call) -> Tensor:
    return call.sums(count_kernel, **_kinds(call))


def select_(call: Call) -> None:
    kinds, value = _kinds(call), call["value"]
    require(0 <= value <= 255, f"value must fit the mask, not be {value}")
    call.launch(select_kernel, **kinds)
