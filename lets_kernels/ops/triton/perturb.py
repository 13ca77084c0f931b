"""Perturb and restore. perturb_: reads theta, v; writes theta, saved. restore_: reads saved; writes theta."""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from lets_kernels.ops.triton import launch
from lets_kernels.ops.triton.device import (
    chunk_at,
    dual,
    elements,
    helper,
    kernel,
    load,
    narrow,
    power,
    scale,
    scaling_at,
    store,
)

__all__ = ["perturb_", "restore_"]


@helper
def _ascend(
    theta, v, saved, scaling, norms, xi, q, length, shrink, moves, at, count,
    POWER: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    stored = load(theta, at, count, MASKED, BLOCK)
    x = load(v, at, count, MASKED, BLOCK).to(C)
    weights = stored.to(C)
    # Each thread reads what it writes, so v may be what stands in `saved`.
    if SCALED:
        t = scale(scaling, weights, x, norms, xi, at, SCALED, BLOCK, C)
        x = t * x
    if POWER == 0:
        x = shrink * x
    x = dual(x, q, POWER)
    if SCALED:
        x = t * x
    new = narrow(weights + length * x, DTYPE)
    store(saved, stored, at, count, MASKED, BLOCK)
    store(theta, tl.where(moves, new, stored), at, count, MASKED, BLOCK)


@kernel
def perturb_kernel(
    dirty, chunks, runs, thetas, vs, saveds, norms, total_at, rho_at, xi: tl.float64, q: tl.float64,
    POWER: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    run, begin, count = chunk_at(chunks, index)
    theta, v = elements(thetas, run, begin, DTYPE, ALIGNED), elements(vs, run, begin, DTYPE, ALIGNED)
    saved = elements(saveds, run, begin, DTYPE, ALIGNED)
    scaling, small, exponent = scaling_at(runs, run, begin), tl.full([], xi, C), tl.full([], q, C)
    total, rho = tl.load(total_at), tl.load(rho_at)
    usable = (total > 0) & (total - total == 0)
    total = tl.where(usable, total, 1.0)
    # For q other than 2 and 1 the norm divides before the power is taken, which could underflow.
    shrink = tl.full([], 1.0, C)
    if POWER == 2:
        rho = rho / tl.sqrt(total)
    elif POWER == 0:
        shrink = (1 / power(total, 1 / q)).to(C)
    length = rho.to(C)
    moves = usable & (length != 0) & (length - length == 0) & (shrink - shrink == 0)
    if index == 0:
        tl.store(dirty, 1)
    whole = count // BLOCK * BLOCK
    for b in range(0, whole, BLOCK):
        _ascend(
            theta, v, saved, scaling, norms, small, exponent, length, shrink, moves, b, count,
            POWER, SCALED, False, BLOCK, DTYPE, C,
        )  # fmt: skip
    if whole < count:
        _ascend(
            theta, v, saved, scaling, norms, small, exponent, length, shrink, moves, whole, count,
            POWER, SCALED, True, BLOCK, DTYPE, C,
        )  # fmt: skip


@helper
def copy_chunk(to, source, count, BLOCK: tl.constexpr):
    whole = count // BLOCK * BLOCK
    for b in range(0, whole, BLOCK):
        store(to, load(source, b, count, False, BLOCK), b, count, False, BLOCK)
    if whole < count:
        store(to, load(source, whole, count, True, BLOCK), whole, count, True, BLOCK)


@kernel
def restore_kernel(
    dirty, chunks, runs, thetas, saveds,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(dirty) != 0:
        run, begin, count = chunk_at(chunks, tl.program_id(0).to(tl.int64))
        theta, saved = elements(thetas, run, begin, DTYPE, ALIGNED), elements(saveds, run, begin, DTYPE, ALIGNED)
        copy_chunk(theta, saved, count, BLOCK)


def perturb_(
    params: Sequence[Tensor],
    vectors: Sequence[Tensor],
    saved: Tensor,
    dirty: Tensor,
    table: Tensor,
    filter_norms: Tensor | None,
    xi: float,
    q: float,
    total: Tensor,
    rho: Tensor,
) -> None:
    power = launch.power_of(q)
    call = launch.Call(table, params or [saved], "params")
    norms = call.norms(filter_norms, params)
    theta, v, old = call.list(params, "params"), call.optional(vectors, "vectors"), call.list([saved], "saved")
    lists = theta, old if v is None else v, old
    scalars = call.scalar(total, "total"), call.scalar(rho, "rho")
    call.scalar(dirty, "dirty", torch.int64)
    if not call.plan.count:
        dirty.fill_(1)
    call.over_chunks(perturb_kernel, dirty, *lists, norms, *scalars, xi, q, POWER=power, SCALED=call.plan.scaled)


def restore_(params: Sequence[Tensor], saved: Tensor, dirty: Tensor, table: Tensor) -> None:
    call = launch.Call(table, params or [saved], "params")
    lists = call.list(params, "params"), call.list([saved], "saved")
    call.over_chunks(restore_kernel, call.scalar(dirty, "dirty", torch.int64), *lists, num_warps=launch.MORE_WARPS)
    dirty.zero_()  # a launch of its own: here no program reads it any more
