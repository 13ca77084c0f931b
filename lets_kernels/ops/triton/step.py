"""The base optimizer's step from the saved weights.

SGD: reads saved, g (and m); writes theta (and m). Adam: reads saved, g, m, v; writes theta, m, v. Lion: reads saved, g,
m; writes theta, m. Variational SAM: as Lion, and reads s.
"""

import triton.language as tl

from lets_kernels.ops.triton.device import (
    chunk_at,
    copy_chunk,
    divide,
    elements,
    for_blocks,
    helper,
    kernel,
    load,
    narrow,
    number,
    power,
    square_root,
    store,
    typed,
)
from lets_kernels.ops.triton.launch import Call, require

__all__ = ["restore_adamw_", "restore_bsam_", "restore_lion_", "restore_sgd_"]


@helper
def _weights(dirty, thetas, saved, run, begin, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to the weights and to the weights that a step starts from, and whether the latter are the saved ones."""
    theta, old, perturbed = tl.load(thetas + run), tl.load(saved + run), tl.load(dirty) != 0
    start = tl.where(perturbed, old, theta)
    return typed(theta, DTYPE, ALIGNED) + begin, typed(start, DTYPE, ALIGNED) + begin, perturbed


@helper
def _sgd(
    theta, start, g, m, lr, momentum, decay, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    DTYPE: tl.constexpr, C: tl.constexpr, at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    # If lr is 0, not even the sign of a zero changes.
    store(theta, narrow(tl.where(lr == 0, weights, weights - lr * step), DTYPE), at, count, MASKED, BLOCK)


@kernel
def sgd_kernel(
    dirty, chunks, thetas, grads, momenta, saved, gate, numbers, per_run,
    lr: tl.float64, momentum: tl.float64, weight_decay: tl.float64,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks)
    theta, start, perturbed = _weights(dirty, thetas, saved, run, begin, DTYPE, ALIGNED)
    if tl.load(gate) != 0:
        g, m = elements(grads, run, begin, DTYPE, ALIGNED), elements(momenta, run, begin, DTYPE, ALIGNED)
        rate, inertia = number(numbers, per_run, run, 0, lr).to(C), number(numbers, per_run, run, 1, momentum).to(C)
        decay = number(numbers, per_run, run, 2, weight_decay).to(C)
        arguments = (theta, start, g, m, rate, inertia, decay)
        for_blocks(_sgd, arguments, (MOMENTUM, NESTEROV, MAXIMIZE, DTYPE, C), count, BLOCK)
    elif perturbed:
        copy_chunk(theta, start, count, BLOCK)


@helper
def _adam(
    theta, start, g, m, v, options, DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr,
    DTYPE: tl.constexpr, C: tl.constexpr, at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    decay, beta2, rest1, rest2, step_size, root_bias, eps = options
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
    dirty, chunks, thetas, grads, exp_avgs, exp_avg_sqs, saved, steps, gate, numbers, per_run,
    lr: tl.float64, beta1: tl.float64, beta2: tl.float64, eps: tl.float64, weight_decay: tl.float64,
    DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks)
    theta, start, perturbed = _weights(dirty, thetas, saved, run, begin, DTYPE, ALIGNED)
    if tl.load(gate) != 0:
        g, m = elements(grads, run, begin, DTYPE, ALIGNED), elements(exp_avgs, run, begin, DTYPE, ALIGNED)
        v = elements(exp_avg_sqs, run, begin, DTYPE, ALIGNED)
        # The count of this step. adam_counts_kernel writes it after all programs have read the old count.
        step = (tl.load(typed(tl.load(steps + run), tl.float32, False)) + 1).to(tl.float64)
        rate, first = number(numbers, per_run, run, 0, lr), number(numbers, per_run, run, 1, beta1)
        second, small = number(numbers, per_run, run, 2, beta2), number(numbers, per_run, run, 3, eps)
        decay = number(numbers, per_run, run, 4, weight_decay)
        step_size = rate / (1 - power(first, step))
        root_bias = tl.sqrt(1 - power(second, step))
        if DECOUPLED:
            decay = 1 - rate * decay
        options = (
            decay.to(C), second.to(C), (1 - first).to(C), (1 - second).to(C), step_size.to(C), root_bias.to(C),
            small.to(C),
        )  # fmt: skip
        for_blocks(_adam, (theta, start, g, m, v, options), (DECOUPLED, MAXIMIZE, DTYPE, C), count, BLOCK)
    elif perturbed:
        copy_chunk(theta, start, count, BLOCK)


@kernel
def adam_counts_kernel(dirty, gate, steps, count, N: tl.constexpr):
    """After all programs of adam_kernel: count the step if the gate is open, and set ``dirty`` to 0."""
    lane = tl.program_id(0) * N + tl.arange(0, N)
    if tl.load(gate) != 0:
        step = tl.load(steps + lane, mask=lane < count, other=0).to(tl.pointer_type(tl.float32))
        tl.store(step, tl.load(step, mask=lane < count, other=0.0) + 1, mask=lane < count)
    if tl.program_id(0) == 0:
        tl.store(dirty, 0)


@helper
def _lion(
    theta, start, g, m, options,
    DTYPE: tl.constexpr, C: tl.constexpr, at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lr, beta1, beta2, rest1, rest2, decay = options
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
    dirty, chunks, thetas, grads, exp_avgs, saved, gate, numbers, per_run,
    lr: tl.float64, beta1: tl.float64, beta2: tl.float64, weight_decay: tl.float64,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks)
    theta, start, perturbed = _weights(dirty, thetas, saved, run, begin, DTYPE, ALIGNED)
    if tl.load(gate) != 0:
        g, m = elements(grads, run, begin, DTYPE, ALIGNED), elements(exp_avgs, run, begin, DTYPE, ALIGNED)
        rate, first = number(numbers, per_run, run, 0, lr), number(numbers, per_run, run, 1, beta1)
        second, decay = number(numbers, per_run, run, 2, beta2), number(numbers, per_run, run, 3, weight_decay)
        options = rate.to(C), first.to(C), second.to(C), (1 - first).to(C), (1 - second).to(C), decay.to(C)
        for_blocks(_lion, (theta, start, g, m, options), (DTYPE, C), count, BLOCK)
    elif perturbed:
        copy_chunk(theta, start, count, BLOCK)


@helper
def _bsam(
    theta, start, g, m, s, options,
    DTYPE: tl.constexpr, C: tl.constexpr, at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lr, beta1, rest1, decay = options
    weights = load(start, at, count, MASKED, BLOCK).to(C)
    step = load(g, at, count, MASKED, BLOCK).to(C) + decay * weights
    average = beta1 * load(m, at, count, MASKED, BLOCK).to(C) + rest1 * step
    new = weights - lr * divide(average, load(s, at, count, MASKED, BLOCK).to(C), C)
    store(m, narrow(average, DTYPE), at, count, MASKED, BLOCK)
    store(theta, narrow(tl.where(lr == 0, weights, new), DTYPE), at, count, MASKED, BLOCK)


@kernel
def bsam_kernel(
    dirty, chunks, thetas, grads, exp_avgs, precisions, saved, gate, numbers, per_run,
    lr: tl.float64, beta1: tl.float64, weight_decay: tl.float64,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks)
    theta, start, perturbed = _weights(dirty, thetas, saved, run, begin, DTYPE, ALIGNED)
    if tl.load(gate) != 0:
        g, m = elements(grads, run, begin, DTYPE, ALIGNED), elements(exp_avgs, run, begin, DTYPE, ALIGNED)
        s = elements(precisions, run, begin, DTYPE, ALIGNED)
        rate, first = number(numbers, per_run, run, 0, lr), number(numbers, per_run, run, 1, beta1)
        decay = number(numbers, per_run, run, 2, weight_decay)
        options = rate.to(C), first.to(C), (1 - first).to(C), decay.to(C)
        for_blocks(_bsam, (theta, start, g, m, s, options), (DTYPE, C), count, BLOCK)
    elif perturbed:
        copy_chunk(theta, start, count, BLOCK)


def restore_sgd_(call: Call) -> None:
    moves = call["momenta"] is not None
    fits = call.plan.count == 0 or all((momentum != 0) == moves for momentum in call.numbers["momentum"])
    require(fits, "momenta go with a momentum that is not zero")
    call.launch(sgd_kernel, MOMENTUM=moves, NESTEROV=call["nesterov"], MAXIMIZE=call["maximize"])
    call["dirty"].zero_()  # a separate launch: by then no program reads it any more


def restore_adamw_(call: Call) -> None:
    call.launch(adam_kernel, DECOUPLED=call["decoupled"], MAXIMIZE=call["maximize"])
    count = len(call.plan.rows)
    call.launch(adam_counts_kernel, max(1, -(-count // 128)), count=count, N=128)


def restore_lion_(call: Call) -> None:
    call.launch(lion_kernel)
    call["dirty"].zero_()


def restore_bsam_(call: Call) -> None:
    call.launch(bsam_kernel)
    call["dirty"].zero_()
