"""Gradient norm, filter norms, and the flag that a step may happen. Reads v (and theta where T needs it)."""

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
    power,
    scale,
    scaling_at,
    theta_for,
    tree_sum,
    typed,
)

__all__ = ["all_finite_", "filter_norms", "grad_norm"]


@helper
def _powers(
    v,
    theta,
    scaling,
    norms,
    xi,
    q,
    at,
    count,
    POWER: tl.constexpr,
    SCALED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
):
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
    return masked(x, at, count, MASKED, BLOCK)


@kernel
def norm_kernel(
    slots, chunks, runs, vs, thetas, norms, xi: tl.float64, q: tl.float64,
    POWER: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    run, begin, count = chunk_at(chunks, index)
    v, theta = elements(vs, run, begin, DTYPE, ALIGNED), elements(thetas, run, begin, DTYPE, ALIGNED)
    scaling, small = scaling_at(runs, run, begin), tl.full([], xi, C)
    whole = count // BLOCK * BLOCK
    total = tl.full([BLOCK], 0.0, tl.float64)
    for b in range(0, whole, BLOCK):
        total += _powers(v, theta, scaling, norms, small, q, b, count, POWER, SCALED, False, BLOCK, C)
    if whole < count:
        total += _powers(v, theta, scaling, norms, small, q, whole, count, POWER, SCALED, True, BLOCK, C)
    tl.store(slots + index, tree_sum(total, BLOCK, STAGES))


@kernel
def long_filters_kernel(
    out, items, runs, thetas,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One filter a program, stretch by stretch; ALIGNED promises that every stretch begins at 16 bytes."""
    item = items + 2 * tl.program_id(0).to(tl.int64)
    run, filter = tl.load(item), tl.load(item + 1)
    row = runs + 5 * run
    numel, length, rows, start = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    theta = tl.load(thetas + run)
    lane = tl.arange(0, BLOCK)
    total = tl.full([BLOCK], 0.0, tl.float64)
    for begin in range(filter * length, numel, length * rows):
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
    """FILTERS filters a program, EACH elements of every one of them at a time."""
    item = items + 2 * tl.program_id(0).to(tl.int64)
    run, first = tl.load(item), tl.load(item + 1)
    row = runs + 5 * run
    numel, length, rows, start = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    theta = tl.load(thetas + run).to(tl.pointer_type(DTYPE))
    filter = first + tl.arange(0, FILTERS)
    each = numel // rows
    total = tl.full([FILTERS, EACH], 0.0, tl.float64)
    for b in range(0, each, EACH):
        at = b + tl.arange(0, EACH)
        element = filter[:, None] * length + (at // length * (length * rows) + at % length)[None, :]
        mask = (filter < rows)[:, None] & (at < each)[None, :]
        x = tl.load(theta + element, mask=mask, other=0.0).to(tl.float64)
        total += x * x
    tl.store(out + (start + filter), tl.sqrt(tl.sum(total, axis=1)).to(C), mask=filter < rows)


@kernel
def finite_kernel(out, skipped, values, count, N: tl.constexpr):
    """One program: 1.0 where all values are finite; else 0.0, and one more is skipped."""
    lane = tl.arange(0, N)
    bad = tl.full([N], 0, tl.int64)
    for begin in range(0, count, N):
        x = tl.load(values + begin + lane, mask=begin + lane < count, other=0.0)
        bad += tl.where(x - x == 0, 0, 1)
    found = tl.sum(bad, axis=0) > 0
    tl.store(out, tl.where(found, 0.0, 1.0).to(tl.float64))
    tl.store(skipped, tl.load(skipped) + tl.where(found, 1, 0))


def grad_norm(
    vectors: Sequence[Tensor],
    params: Sequence[Tensor],
    table: Tensor,
    filter_norms: Tensor | None,
    xi: float,
    q: float,
) -> Tensor:
    power = launch.power_of(q)
    call = launch.Call(table, vectors, "vectors")
    norms, v, theta = call.norms(filter_norms, params), call.list(vectors, "vectors"), call.optional(params, "params")
    return call.sum(norm_kernel, v, v if theta is None else theta, norms, xi, q, POWER=power, SCALED=call.plan.scaled)


LONG = 256  # elements in a stretch, from which on a filter has a program of its own
FILTERS, EACH = 32, 32


def _items(plan: launch.Plan, long: bool) -> tuple[int, launch.Resident]:
    """(run, first filter) of every program."""
    step = 1 if long else FILTERS
    items = [torch.empty(0, 2, dtype=torch.int64, device="cpu")]
    for i, (_, _, length, count, _) in enumerate(plan.rows):
        if length > 0 and (length >= LONG) == long:
            first = torch.arange(0, count, step, device="cpu")
            items.append(torch.stack((torch.full_like(first, i), first), dim=1))
    table = torch.cat(items).contiguous()
    return len(table), launch.Resident(table, plan.device)


def filter_norms(params: Sequence[Tensor], table: Tensor, out: Tensor) -> None:
    call = launch.Call(table, params, "params")
    plan = call.plan
    if not plan.filters:
        return
    to, theta = call.filter_norms(out, "out"), call.list(params, "params")
    runs = call.use(plan.runs)
    types = {"DTYPE": launch.DTYPES[call.dtype], "C": launch.DTYPES[call.wide]}
    count, items = launch.recall(plan.items, True, 2, lambda: _items(plan, True))
    if count:
        stretches = all(row[2] * call.dtype.itemsize % 16 == 0 for row in plan.rows if row[2] >= LONG)
        block = launch.BLOCK_BYTES // call.dtype.itemsize
        sizes = {"ALIGNED": call.aligned and stretches, "BLOCK": block, "STAGES": block.bit_length() - 1}
        sizes["num_warps"] = launch.MORE_WARPS
        call.launch(long_filters_kernel, count, to, call.use(items), runs, theta, **types, **sizes)
    count, items = launch.recall(plan.items, False, 2, lambda: _items(plan, False))
    if count:
        sizes = {"FILTERS": FILTERS, "EACH": EACH}
        call.launch(short_filters_kernel, count, to, call.use(items), runs, theta, **types, **sizes)


def all_finite_(values: Sequence[Tensor], skipped: Tensor) -> Tensor:
    call = launch.Call(_NO_RUNS, values, "values")
    for v in values:
        call.scalar(v, "values")
    call.scalar(skipped, "skipped", torch.int64)
    together = values[0] if len(values) == 1 else torch.stack([v.reshape(()) for v in values])
    out = torch.empty((), dtype=torch.float64, device=call.device)
    call.launch(finite_kernel, 1, out, skipped, together, len(values), N=128)
    return out


_NO_RUNS = torch.empty(0, 5, dtype=torch.int64, device="cpu")
