"""The base optimizer's step from the saved weights.

SGD: reads saved, g (and m); writes theta (and m). Adam: reads saved, g, m, v; writes theta, m, v.
"""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from lets_kernels.ops.triton import launch
from lets_kernels.ops.triton.device import (
    chunk_at,
    divide,
    elements,
    helper,
    kernel,
    load,
    narrow,
    power,
    square_root,
    store,
    typed,
)
from lets_kernels.ops.triton.perturb import copy_chunk

__all__ = ["restore_adamw_", "restore_lion_", "restore_sgd_"]


@helper
def starting_point(dirty, theta_address, saved_address):
    """The weights that a step starts from: the saved ones, but only while they are what is saved."""
    return tl.where(tl.load(dirty) != 0, saved_address, theta_address)


@helper
def _sgd(
    theta,
    g,
    m,
    start,
    lr,
    momentum,
    decay,
    at,
    count,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    C: tl.constexpr,
):
    weights = load(start, at, count, MASKED, BLOCK).to(C)
    step = load(g, at, count, MASKED, BLOCK).to(C)
    if MOMENTUM:
        old = load(m, at, count, MASKED, BLOCK).to(C)
    if MAXIMIZE:
        step = -step
    step = tl.where(decay != 0, step + decay * weights, step)
    if MOMENTUM:
        average = momentum * old + step
        store(m, narrow(average, DTYPE), at, count, MASKED, BLOCK)
        step = step + momentum * average if NESTEROV else average
    # Where lr is 0 not even the sign of a zero changes.
    store(theta, narrow(tl.where(lr == 0, weights, weights - lr * step), DTYPE), at, count, MASKED, BLOCK)


@kernel
def sgd_kernel(
    dirty, chunks, runs, thetas, gs, ms, saveds, gate,
    lr: tl.float64, momentum: tl.float64, decay: tl.float64,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks, tl.program_id(0).to(tl.int64))
    theta_address, saved_address = tl.load(thetas + run), tl.load(saveds + run)
    theta = typed(theta_address, DTYPE, ALIGNED) + begin
    if tl.load(gate) != 0:
        start = typed(starting_point(dirty, theta_address, saved_address), DTYPE, ALIGNED) + begin
        g, m = elements(gs, run, begin, DTYPE, ALIGNED), elements(ms, run, begin, DTYPE, ALIGNED)
        rate, inertia, shrinkage = tl.full([], lr, C), tl.full([], momentum, C), tl.full([], decay, C)
        whole = count // BLOCK * BLOCK
        for b in range(0, whole, BLOCK):
            _sgd(
                theta, g, m, start, rate, inertia, shrinkage, b, count,
                MOMENTUM, NESTEROV, MAXIMIZE, False, BLOCK, DTYPE, C,
            )  # fmt: skip
        if whole < count:
            _sgd(
                theta, g, m, start, rate, inertia, shrinkage, whole, count,
                MOMENTUM, NESTEROV, MAXIMIZE, True, BLOCK, DTYPE, C,
            )  # fmt: skip
    elif tl.load(dirty) != 0:
        copy_chunk(theta, typed(saved_address, DTYPE, ALIGNED) + begin, count, BLOCK)


@helper
def _adam(
    theta,
    g,
    m,
    v,
    start,
    o,
    at,
    count,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    C: tl.constexpr,
):
    decay, beta2, rest1, rest2, step_size, root_bias, eps = o
    weights = load(start, at, count, MASKED, BLOCK).to(C)
    step = load(g, at, count, MASKED, BLOCK).to(C)
    average = load(m, at, count, MASKED, BLOCK).to(C)
    square = load(v, at, count, MASKED, BLOCK).to(C)
    if MAXIMIZE:
        step = -step
    if DECOUPLED:
        weights = weights * decay
    else:
        step = tl.where(decay != 0, step + decay * weights, step)
    average = average + rest1 * (step - average)
    square = beta2 * square + rest2 * (step * step)
    new = weights - step_size * divide(average, divide(square_root(square, C), root_bias, C) + eps, C)
    store(m, narrow(average, DTYPE), at, count, MASKED, BLOCK)
    store(v, narrow(square, DTYPE), at, count, MASKED, BLOCK)
    store(theta, narrow(tl.where(step_size == 0, weights, new), DTYPE), at, count, MASKED, BLOCK)


@kernel
def adam_kernel(
    dirty, chunks, runs, thetas, gs, ms, vs, saveds, steps, gate,
    lr: tl.float64, beta1: tl.float64, beta2: tl.float64, eps: tl.float64, decay: tl.float64,
    DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks, tl.program_id(0).to(tl.int64))
    theta_address, saved_address = tl.load(thetas + run), tl.load(saveds + run)
    theta = typed(theta_address, DTYPE, ALIGNED) + begin
    if tl.load(gate) != 0:
        start = typed(starting_point(dirty, theta_address, saved_address), DTYPE, ALIGNED) + begin
        g, m = elements(gs, run, begin, DTYPE, ALIGNED), elements(ms, run, begin, DTYPE, ALIGNED)
        v = elements(vs, run, begin, DTYPE, ALIGNED)
        # The count of this very step: adam_counts_kernel writes it down when all programs have read the old one.
        step = (tl.load(typed(tl.load(steps + run), tl.float32, False)) + 1).to(tl.float64)
        one = tl.full([], 1.0, tl.float64)
        first, second = one * beta1, one * beta2
        step_size = lr / (1 - power(first, step))
        root_bias = tl.sqrt(1 - power(second, step))
        shrinkage = 1 - one * lr * decay if DECOUPLED else one * decay
        options = (
            shrinkage.to(C), second.to(C), (1 - first).to(C), (1 - second).to(C), step_size.to(C), root_bias.to(C),
            (one * eps).to(C),
        )  # fmt: skip
        whole = count // BLOCK * BLOCK
        for b in range(0, whole, BLOCK):
            _adam(theta, g, m, v, start, options, b, count, DECOUPLED, MAXIMIZE, False, BLOCK, DTYPE, C)
        if whole < count:
            _adam(theta, g, m, v, start, options, whole, count, DECOUPLED, MAXIMIZE, True, BLOCK, DTYPE, C)
    elif tl.load(dirty) != 0:
        copy_chunk(theta, typed(saved_address, DTYPE, ALIGNED) + begin, count, BLOCK)


@kernel
def adam_counts_kernel(dirty, gate, steps, rows, N: tl.constexpr):
    """After all programs of adam_kernel: the steps are counted where the gate is open, and nothing is perturbed."""
    lane = tl.program_id(0) * N + tl.arange(0, N)
    if tl.load(gate) != 0:
        count = tl.load(steps + lane, mask=lane < rows, other=0).to(tl.pointer_type(tl.float32))
        tl.store(count, tl.load(count, mask=lane < rows, other=0.0) + 1, mask=lane < rows)
    if tl.program_id(0) == 0:
        tl.store(dirty, 0)


def restore_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    saved: Tensor,
    dirty: Tensor,
    table: Tensor,
    gate: Tensor,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    call = launch.Call(table, params or [saved], "params")
    launch.require(
        call.plan.count == 0 or bool(len(momenta)) == (momentum != 0), "momenta go with a momentum that is not zero"
    )
    lists = call.list(params, "params"), call.list(grads, "grads"), call.optional(momenta, "momenta")
    before = call.list([saved], "saved")
    numbers = call.scalar(gate, "gate"), lr, momentum, weight_decay
    kinds = {"MOMENTUM": momentum != 0, "NESTEROV": nesterov, "MAXIMIZE": maximize}
    call.over_chunks(sgd_kernel, call.scalar(dirty, "dirty", torch.int64), *lists, before, *numbers, **kinds)
    dirty.zero_()  # a launch of its own: here no program reads it any more


def restore_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    saved: Tensor,
    dirty: Tensor,
    table: Tensor,
    gate: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
) -> None:
    call = launch.Call(table, params or [saved], "params")
    lists = call.list(params, "params"), call.list(grads, "grads")
    states = call.list(exp_avgs, "exp_avgs"), call.list(exp_avg_sqs, "exp_avg_sqs"), call.list([saved], "saved")
    counts, opened = call.steps(steps), call.scalar(gate, "gate")
    numbers = lr, beta1, beta2, eps, weight_decay
    kinds = {"DECOUPLED": decoupled, "MAXIMIZE": maximize}
    call.scalar(dirty, "dirty", torch.int64)
    call.over_chunks(adam_kernel, dirty, *lists, *states, counts, opened, *numbers, **kinds)
    rows = len(call.plan.rows)
    call.launch(adam_counts_kernel, max(1, -(-rows // 128)), dirty, opened, counts, rows, N=128)


@helper
def _lion(
    theta,
    g,
    m,
    start,
    o,
    at,
    count,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    C: tl.constexpr,
):
    lr, beta1, beta2, rest1, rest2, decay = o
    weights = load(start, at, count, MASKED, BLOCK).to(C)
    gradient, average = load(g, at, count, MASKED, BLOCK).to(C), load(m, at, count, MASKED, BLOCK).to(C)
    mixed = beta1 * average + rest1 * gradient
    sign = tl.where(mixed > 0, 1.0, tl.where(mixed < 0, -1.0, 0.0)).to(C)
    new = weights - lr * (sign + decay * weights)
    average = beta2 * average + rest2 * gradient
    store(m, narrow(average, DTYPE), at, count, MASKED, BLOCK)
    store(theta, narrow(tl.where(lr == 0, weights, new), DTYPE), at, count, MASKED, BLOCK)


@kernel
def lion_kernel(
    dirty, chunks, runs, thetas, gs, ms, saveds, gate,
    lr: tl.float64, beta1: tl.float64, beta2: tl.float64, rest1: tl.float64, rest2: tl.float64, decay: tl.float64,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks, tl.program_id(0).to(tl.int64))
    theta_address, saved_address = tl.load(thetas + run), tl.load(saveds + run)
    theta = typed(theta_address, DTYPE, ALIGNED) + begin
    if tl.load(gate) != 0:
        start = typed(starting_point(dirty, theta_address, saved_address), DTYPE, ALIGNED) + begin
        g, m = elements(gs, run, begin, DTYPE, ALIGNED), elements(ms, run, begin, DTYPE, ALIGNED)
        options = (
            tl.full([], lr, C),
            tl.full([], beta1, C),
            tl.full([], beta2, C),
            tl.full([], rest1, C),
            tl.full([], rest2, C),
            tl.full([], decay, C),
        )
        whole = count // BLOCK * BLOCK
        for b in range(0, whole, BLOCK):
            _lion(theta, g, m, start, options, b, count, False, BLOCK, DTYPE, C)
        if whole < count:
            _lion(theta, g, m, start, options, whole, count, True, BLOCK, DTYPE, C)
    elif tl.load(dirty) != 0:
        copy_chunk(theta, typed(saved_address, DTYPE, ALIGNED) + begin, count, BLOCK)


def restore_lion_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    saved: Tensor,
    dirty: Tensor,
    table: Tensor,
    gate: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    call = launch.Call(table, params or [saved], "params")
    lists = call.list(params, "params"), call.list(grads, "grads")
    states = call.list(exp_avgs, "exp_avgs"), call.list([saved], "saved")
    numbers = call.scalar(gate, "gate"), lr, beta1, beta2, 1 - beta1, 1 - beta2, weight_decay
    call.over_chunks(lion_kernel, call.scalar(dirty, "dirty", torch.int64), *lists, *states, *numbers)
    dirty.zero_()  # a launch of its own: here no program reads it any more
