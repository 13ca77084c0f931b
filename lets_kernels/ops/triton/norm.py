"""Gradient norm, filter norms, and the gate of a step. Reads v (and theta if T needs it)."""

import torch
import triton.language as tl
from torch import Tensor

from lets_kernels.ops.triton.device import (
    chunk_at,
    elements,
    helper,
    kernel,
    load,
    number,
    power,
    scale,
    scaling_at,
    sum_blocks,
    theta_for,
    tree_sum,
    typed,
)
from lets_kernels.ops.triton.launch import MORE_WARPS, Call, Plan, Resident, recall

__all__ = ["all_finite_", "filter_norms", "grad_norm"]


@helper
def _powers(
    v, theta, scaling, norms, xi, q, POWER: tl.constexpr, SCALED: tl.constexpr, C: tl.constexpr,
    at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    x = load(v, at, count, MASKED, BLOCK).to(C)
    if SCALED:
        weights = theta_for(scaling, theta, at, count, MASKED, BLOCK, C)
        x = scale(scaling, weights, x, norms, xi, at, SCALED, BLOCK, C) * x
    x = x.to(tl.float64)
    if POWER == 2:
        x = x * x
    elif POWER == 1:
        x = tl.abs(x)
    else:
        x = power(tl.abs(x), q)
    return x


@kernel
def norm_kernel(
    slots, chunks, runs, vectors, thetas, filter_norms, numbers, per_run, xi: tl.float64, q: tl.float64,
    POWER: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks)
    v, theta = elements(vectors, run, begin, DTYPE, ALIGNED), elements(thetas, run, begin, DTYPE, ALIGNED)
    small = number(numbers, per_run, run, 0, xi).to(C)
    arguments = (v, theta, scaling_at(runs, run, begin), filter_norms, small, q)
    sum_blocks(slots, _powers, arguments, (POWER, SCALED, C), count, BLOCK, STAGES)


@kernel
def long_filters_kernel(
    out, items, runs, thetas,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One filter a program, stretch by stretch; ALIGNED promises that all stretches begin at a multiple of 16 bytes."""
    item = items + 2 * tl.program_id(0).to(tl.int64)
    run, filter = tl.load(item), tl.load(item + 1)
    row = runs + 5 * run
    numel, length, filters, start = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    theta = tl.load(thetas + run)
    lane = tl.arange(0, BLOCK)
    total = tl.full([BLOCK], 0.0, tl.float64)
    for begin in range(filter * length, numel, length * filters):
        stretch = typed(theta + begin * (DTYPE.primitive_bitwidth // 8), DTYPE, ALIGNED)
        whole = length // BLOCK * BLOCK
        for b in range(0, whole, BLOCK):
            x = tl.load(stretch + b + lane).to(tl.float64)
            total += x * x
        if whole < length:
            x = tl.load(stretch + whole + lane, mask=whole + lane < length, other=0.0).to(tl.float64)
            total += x * x
    tl.store(out + (start + filter), tl.sqrt(tree_sum(total, BLOCK, STAGES)).to(C))


@kernel
def short_filters_kernel(
    out, items, runs, thetas, DTYPE: tl.constexpr, C: tl.constexpr, FILTERS: tl.constexpr, EACH: tl.constexpr
):
    """FILTERS filters a program, with EACH elements of every filter at a time."""
    item = items + 2 * tl.program_id(0).to(tl.int64)
    run, first = tl.load(item), tl.load(item + 1)
    row = runs + 5 * run
    numel, length, filters, start = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    theta = tl.load(thetas + run).to(tl.pointer_type(DTYPE))
    filter = first + tl.arange(0, FILTERS)
    each = numel // filters
    total = tl.full([FILTERS, EACH], 0.0, tl.float64)
    for b in range(0, each, EACH):
        at = b + tl.arange(0, EACH)
        element = filter[:, None] * length + (at // length * (length * filters) + at % length)[None, :]
        mask = (filter < filters)[:, None] & (at < each)[None, :]
        x = tl.load(theta + element, mask=mask, other=0.0).to(tl.float64)
        total += x * x
    tl.store(out + (start + filter), tl.sqrt(tl.sum(total, axis=1)).to(C), mask=filter < filters)


@kernel
def finite_kernel(out, skipped, values, count, N: tl.constexpr):
    """One program: 1.0 if all values are finite; otherwise 0.0, and ``skipped`` is increased by one."""
    lane = tl.arange(0, N)
    bad = tl.full([N], 0, tl.int64)
    for begin in range(0, count, N):
        x = tl.load(values + begin + lane, mask=begin + lane < count, other=0.0)
        bad += tl.where(x - x == 0, 0, 1)
    found = tl.sum(bad, axis=0) > 0
    tl.store(out, tl.where(found, 0.0, 1.0).to(tl.float64))
    tl.store(skipped, tl.load(skipped) + tl.where(found, 1, 0))


def grad_norm(call: Call) -> Tensor:
    return call.sums(norm_kernel)


LONG = 256  # from this many elements in a stretch on, each filter has a program of its own
FILTERS, EACH = 32, 32


def _items(plan: Plan, long: bool) -> tuple[int, Resident]:
    """The (run, first filter) of every program."""
    step = 1 if long else FILTERS
    items = [torch.empty(0, 2, dtype=torch.int64, device="cpu")]
    for i, (_, _, length, count, _) in enumerate(plan.rows):
        if length > 0 and (length >= LONG) == long:
            first = torch.arange(0, count, step, device="cpu")
            items.append(torch.stack((torch.full_like(first, i), first), dim=1))
    table = torch.cat(items).contiguous()
    return len(table), Resident(table, plan.device)


def filter_norms(call: Call) -> None:
    plan = call.plan
    if not plan.filters:
        return
    count, items = recall(plan.items, True, 2, lambda: _items(plan, True))
    stretches = all(row[2] * call.dtype.itemsize % 16 == 0 for row in plan.rows if row[2] >= LONG)
    aligned = call.aligned and stretches
    call.launch(long_filters_kernel, count, MORE_WARPS, items=call.use(items), ALIGNED=aligned)
    count, items = recall(plan.items, False, 2, lambda: _items(plan, False))
    call.launch(short_filters_kernel, count, items=call.use(items), FILTERS=FILTERS, EACH=EACH)


def all_finite_(call: Call) -> Tensor:
    values = call["values"]
    together = values[0] if len(values) == 1 else torch.stack([v.reshape(()) for v in values])
    out = torch.empty((), dtype=torch.float64, device=call.device)
    call.launch(finite_kernel, 1, out=out, values=together, count=len(values), N=128)
    return out
