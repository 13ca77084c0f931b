"""The gradient in the radius (LETS). Reads four gradients (and theta if T needs it); writes nothing."""

import triton.language as tl
from torch import Tensor

from lets_kernels.ops.triton.device import (
    chunk_at,
    dual,
    elements,
    helper,
    kernel,
    load,
    number,
    scale,
    scaling_at,
    sum_blocks,
    theta_for,
)
from lets_kernels.ops.triton.launch import Call

__all__ = ["rho_grad_diagonal", "rho_grad_secant"]


@helper
def _outer(val, train, TRAIN: tl.constexpr, at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """val - train, in double."""
    outer = load(val, at, count, MASKED, BLOCK).to(tl.float64)
    if TRAIN:
        outer = outer - load(train, at, count, MASKED, BLOCK).to(tl.float64)
    return outer


@helper
def _diagonal(
    val, train, perturbed, v, theta, scaling, norms, xi, q, POWER: tl.constexpr, SCALED: tl.constexpr,
    TRAIN: tl.constexpr, C: tl.constexpr, at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    outer = _outer(val, train, TRAIN, at, count, MASKED, BLOCK)
    hat = load(perturbed, at, count, MASKED, BLOCK).to(tl.float64)
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
    return outer * (hat * hat) * x.to(tl.float64)


@helper
def _secant(
    val, train, perturbed, first, TRAIN: tl.constexpr, at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    outer = _outer(val, train, TRAIN, at, count, MASKED, BLOCK)
    hat = load(perturbed, at, count, MASKED, BLOCK).to(tl.float64)
    return outer * (hat - load(first, at, count, MASKED, BLOCK).to(tl.float64))


@kernel
def diagonal_kernel(
    slots, chunks, runs, val, train, perturbed, vectors, thetas, filter_norms, numbers, per_run, xi: tl.float64,
    q: tl.float64, POWER: tl.constexpr, SCALED: tl.constexpr, TRAIN: tl.constexpr, DTYPE: tl.constexpr,
    C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks)
    a, b = elements(val, run, begin, DTYPE, ALIGNED), elements(train, run, begin, DTYPE, ALIGNED)
    hat, v = elements(perturbed, run, begin, DTYPE, ALIGNED), elements(vectors, run, begin, DTYPE, ALIGNED)
    theta = elements(thetas, run, begin, DTYPE, ALIGNED)
    scaling, exponent = scaling_at(runs, run, begin), tl.full([], q, tl.float64)
    small = number(numbers, per_run, run, 0, xi).to(C)
    terms = (a, b, hat, v, theta, scaling, filter_norms, small, exponent)
    sum_blocks(slots, _diagonal, terms, (POWER, SCALED, TRAIN, C), count, BLOCK, STAGES)


@kernel
def secant_kernel(
    slots, chunks, val, train, perturbed, first, TRAIN: tl.constexpr, DTYPE: tl.constexpr, C: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks)
    a, b = elements(val, run, begin, DTYPE, ALIGNED), elements(train, run, begin, DTYPE, ALIGNED)
    hat, g = elements(perturbed, run, begin, DTYPE, ALIGNED), elements(first, run, begin, DTYPE, ALIGNED)
    sum_blocks(slots, _secant, (a, b, hat, g), (TRAIN,), count, BLOCK, STAGES)


def rho_grad_diagonal(call: Call) -> Tensor:
    return call.sums(diagonal_kernel, TRAIN=call["train"] is not None)


def rho_grad_secant(call: Call) -> Tensor:
    return call.sums(secant_kernel, TRAIN=call["train"] is not None)
