"""Perturb and restore. perturb_: reads theta, v; writes theta, saved. restore_: reads saved; writes theta."""

import triton.language as tl

from lets_kernels.ops.triton.device import (
    chunk_at,
    copy_chunk,
    dual,
    elements,
    for_blocks,
    helper,
    kernel,
    load,
    narrow,
    number,
    power,
    scale,
    scaling_at,
    store,
)
from lets_kernels.ops.triton.launch import MORE_WARPS, Call

__all__ = ["perturb_", "restore_"]


@helper
def _ascend(
    theta, v, saved, scaling, norms, xi, q, length, shrink, moves, POWER: tl.constexpr, SCALED: tl.constexpr,
    DTYPE: tl.constexpr, C: tl.constexpr, at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    stored = load(theta, at, count, MASKED, BLOCK)
    x = load(v, at, count, MASKED, BLOCK).to(C)
    weights = stored.to(C)
    # Each thread reads the elements that it writes, so v may stand in `saved`.
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
    dirty, chunks, runs, thetas, vectors, saved, filter_norms, total, rho, stride, numbers, per_run, xi: tl.float64,
    q: tl.float64, POWER: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks)
    theta, v = elements(thetas, run, begin, DTYPE, ALIGNED), elements(vectors, run, begin, DTYPE, ALIGNED)
    old = elements(saved, run, begin, DTYPE, ALIGNED)
    scaling, exponent = scaling_at(runs, run, begin), tl.full([], q, C)
    small = number(numbers, per_run, run, 0, xi).to(C)
    norm, radius = tl.load(total), tl.load(rho + run * stride)
    usable = (norm > 0) & (norm - norm == 0)
    norm = tl.where(usable, norm, 1.0)
    # For q other than 2 and 1, divide by the norm before taking the power, which could underflow.
    shrink = tl.full([], 1.0, C)
    if POWER == 2:
        radius = radius / tl.sqrt(norm)
    elif POWER == 0:
        shrink = (1 / power(norm, 1 / q)).to(C)
    length = radius.to(C)
    moves = usable & (length != 0) & (length - length == 0) & (shrink - shrink == 0)
    if tl.program_id(0) == 0:
        tl.store(dirty, 1)
    arguments = (theta, v, old, scaling, filter_norms, small, exponent, length, shrink, moves)
    for_blocks(_ascend, arguments, (POWER, SCALED, DTYPE, C), count, BLOCK)


@kernel
def restore_kernel(
    dirty, chunks, thetas, saved, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    if tl.load(dirty) != 0:
        run, begin, count = chunk_at(chunks)
        theta, old = elements(thetas, run, begin, DTYPE, ALIGNED), elements(saved, run, begin, DTYPE, ALIGNED)
        copy_chunk(theta, old, count, BLOCK)


def perturb_(call: Call) -> None:
    if not call.plan.count:
        call["dirty"].fill_(1)
    call.launch(perturb_kernel, vectors=call["saved"] if call["vectors"] is None else call["vectors"])


def restore_(call: Call) -> None:
    call.launch(restore_kernel, num_warps=MORE_WARPS)
    call["dirty"].zero_()  # a separate launch: by then no program reads it any more
