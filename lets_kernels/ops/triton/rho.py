"""The gradient in the radius (LETS). Reads four gradients (theta as well where T needs it); writes nothing."""

from collections.abc import Sequence

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
    masked,
    scale,
    scaling_at,
    theta_for,
    tree_sum,
)

__all__ = ["rho_grad_diagonal", "rho_grad_secant"]


@helper
def _outer(val, train, at, count, TRAIN: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """val - train, in double."""
    outer = load(val, at, count, MASKED, BLOCK).to(tl.float64)
    if TRAIN:
        outer = outer - load(train, at, count, MASKED, BLOCK).to(tl.float64)
    return outer


@helper
def _unit(
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
    """T sign(Tv) |Tv|^(q-1), in double."""
    x = load(v, at, count, MASKED, BLOCK).to(C)
    if SCALED:
        weights = theta_for(scaling, theta, at, count, MASKED, BLOCK, C)
        t = scale(scaling, weights, x, norms, xi, at, SCALED, BLOCK, C)
        x = t * x
    if POWER == 0:
        x = x.to(tl.float64)  # a general power of a small gradient may underflow in float
    x = dual(x, q, POWER)
    if SCALED:
        x = t.to(x.dtype) * x
    return x.to(tl.float64)


@helper
def _diagonal(
    val, train, perturbed, v, theta, scaling, norms, xi, q, at, count,
    POWER: tl.constexpr, SCALED: tl.constexpr, TRAIN: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    outer = _outer(val, train, at, count, TRAIN, MASKED, BLOCK)
    hat = load(perturbed, at, count, MASKED, BLOCK).to(tl.float64)
    share = outer * (hat * hat) * _unit(v, theta, scaling, norms, xi, q, at, count, POWER, SCALED, MASKED, BLOCK, C)
    return masked(share, at, count, MASKED, BLOCK)


@helper
def _secant(val, train, perturbed, first, at, count, TRAIN: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    outer = _outer(val, train, at, count, TRAIN, MASKED, BLOCK)
    hat = load(perturbed, at, count, MASKED, BLOCK).to(tl.float64)
    return outer * (hat - load(first, at, count, MASKED, BLOCK).to(tl.float64))


@kernel
def diagonal_kernel(
    slots, chunks, runs, vals, trains, perturbeds, vs, thetas, norms, xi: tl.float64, q: tl.float64,
    POWER: tl.constexpr, SCALED: tl.constexpr, TRAIN: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    run, begin, count = chunk_at(chunks, index)
    val, train = elements(vals, run, begin, DTYPE, ALIGNED), elements(trains, run, begin, DTYPE, ALIGNED)
    perturbed, v = elements(perturbeds, run, begin, DTYPE, ALIGNED), elements(vs, run, begin, DTYPE, ALIGNED)
    theta = elements(thetas, run, begin, DTYPE, ALIGNED)
    scaling, small, exponent = scaling_at(runs, run, begin), tl.full([], xi, C), tl.full([], q, tl.float64)
    whole = count // BLOCK * BLOCK
    total = tl.full([BLOCK], 0.0, tl.float64)
    for b in range(0, whole, BLOCK):
        total += _diagonal(
            val, train, perturbed, v, theta, scaling, norms, small, exponent, b, count,
            POWER, SCALED, TRAIN, False, BLOCK, C,
        )  # fmt: skip
    if whole < count:
        total += _diagonal(
            val, train, perturbed, v, theta, scaling, norms, small, exponent, whole, count,
            POWER, SCALED, TRAIN, True, BLOCK, C,
        )  # fmt: skip
    tl.store(slots + index, tree_sum(total, BLOCK, STAGES))


@kernel
def secant_kernel(
    slots, chunks, runs, vals, trains, perturbeds, firsts,
    TRAIN: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    run, begin, count = chunk_at(chunks, index)
    val, train = elements(vals, run, begin, DTYPE, ALIGNED), elements(trains, run, begin, DTYPE, ALIGNED)
    perturbed, first = elements(perturbeds, run, begin, DTYPE, ALIGNED), elements(firsts, run, begin, DTYPE, ALIGNED)
    whole = count // BLOCK * BLOCK
    total = tl.full([BLOCK], 0.0, tl.float64)
    for b in range(0, whole, BLOCK):
        total += _secant(val, train, perturbed, first, b, count, TRAIN, False, BLOCK)
    if whole < count:
        total += _secant(val, train, perturbed, first, whole, count, TRAIN, True, BLOCK)
    tl.store(slots + index, tree_sum(total, BLOCK, STAGES))


def rho_grad_diagonal(
    val: Sequence[Tensor],
    train: Sequence[Tensor],
    perturbed: Sequence[Tensor],
    vectors: Sequence[Tensor],
    params: Sequence[Tensor],
    table: Tensor,
    filter_norms: Tensor | None,
    xi: float,
    q: float,
) -> Tensor:
    power = launch.power_of(q)
    call = launch.Call(table, val, "val")
    norms = call.norms(filter_norms, params)
    a, b = call.list(val, "val"), call.optional(train, "train")
    h, v, theta = call.list(perturbed, "perturbed"), call.list(vectors, "vectors"), call.optional(params, "params")
    lists = a, a if b is None else b, h, v, v if theta is None else theta
    kinds = {"POWER": power, "SCALED": call.plan.scaled, "TRAIN": b is not None}
    return call.sum(diagonal_kernel, *lists, norms, xi, q, **kinds)


def rho_grad_secant(
    val: Sequence[Tensor], train: Sequence[Tensor], perturbed: Sequence[Tensor], first: Sequence[Tensor], table: Tensor
) -> Tensor:
    call = launch.Call(table, val, "val")
    a, b = call.list(val, "val"), call.optional(train, "train")
    lists = a, a if b is None else b, call.list(perturbed, "perturbed"), call.list(first, "first")
    return call.sum(secant_kernel, *lists, TRAIN=b is not None)
