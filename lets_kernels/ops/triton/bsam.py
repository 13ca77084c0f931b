"""The base optimizer's step of Variational SAM. Reads saved, g, m, s; writes theta, m."""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from lets_kernels.ops.triton import launch
from lets_kernels.ops.triton.device import chunk_at, divide, elements, helper, kernel, load, narrow, store, typed
from lets_kernels.ops.triton.perturb import copy_chunk
from lets_kernels.ops.triton.step import starting_point

__all__ = ["restore_bsam_"]


@helper
def _bsam(
    theta,
    g,
    m,
    s,
    start,
    o,
    at,
    count,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    C: tl.constexpr,
):
    lr, beta1, rest1, decay = o
    weights = load(start, at, count, MASKED, BLOCK).to(C)
    step = load(g, at, count, MASKED, BLOCK).to(C) + decay * weights
    average = beta1 * load(m, at, count, MASKED, BLOCK).to(C) + rest1 * step
    new = weights - lr * divide(average, load(s, at, count, MASKED, BLOCK).to(C), C)
    store(m, narrow(average, DTYPE), at, count, MASKED, BLOCK)
    store(theta, narrow(tl.where(lr == 0, weights, new), DTYPE), at, count, MASKED, BLOCK)


@kernel
def bsam_kernel(
    dirty, chunks, runs, thetas, gs, ms, ss, saveds, gate,
    lr: tl.float64, beta1: tl.float64, rest1: tl.float64, decay: tl.float64,
    DTYPE: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    run, begin, count = chunk_at(chunks, tl.program_id(0).to(tl.int64))
    theta_address, saved_address = tl.load(thetas + run), tl.load(saveds + run)
    theta = typed(theta_address, DTYPE, ALIGNED) + begin
    if tl.load(gate) != 0:
        start = typed(starting_point(dirty, theta_address, saved_address), DTYPE, ALIGNED) + begin
        g, m = elements(gs, run, begin, DTYPE, ALIGNED), elements(ms, run, begin, DTYPE, ALIGNED)
        s = elements(ss, run, begin, DTYPE, ALIGNED)
        options = tl.full([], lr, C), tl.full([], beta1, C), tl.full([], rest1, C), tl.full([], decay, C)
        whole = count // BLOCK * BLOCK
        for b in range(0, whole, BLOCK):
            _bsam(theta, g, m, s, start, options, b, count, False, BLOCK, DTYPE, C)
        if whole < count:
            _bsam(theta, g, m, s, start, options, whole, count, True, BLOCK, DTYPE, C)
    elif tl.load(dirty) != 0:
        copy_chunk(theta, typed(saved_address, DTYPE, ALIGNED) + begin, count, BLOCK)


def restore_bsam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    precisions: Sequence[Tensor],
    saved: Tensor,
    dirty: Tensor,
    table: Tensor,
    gate: Tensor,
    lr: float,
    beta1: float,
    weight_decay: float,
) -> None:
    call = launch.Call(table, params or [saved], "params")
    lists = call.list(params, "params"), call.list(grads, "grads")
    states = call.list(exp_avgs, "exp_avgs"), call.list(precisions, "precisions"), call.list([saved], "saved")
    numbers = call.scalar(gate, "gate"), lr, beta1, 1 - beta1, weight_decay
    call.over_chunks(bsam_kernel, call.scalar(dirty, "dirty", torch.int64), *lists, *states, *numbers)
    dirty.zero_()  # a launch of its own: here no program reads it any more
