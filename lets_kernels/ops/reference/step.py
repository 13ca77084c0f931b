"""The restore fused with the step of a base optimizer."""

import torch
from torch import Tensor

from lets_kernels.ops.reference.shared import PerRun, Tensors, per_run, runs, wide

__all__ = ["restore_adamw_", "restore_bsam_", "restore_lion_", "restore_sgd_"]


def restore_sgd_(
    params: Tensors, grads: Tensors, momenta: Tensors, saved: Tensor, dirty: Tensor, table: Tensor, gate: Tensor,
    lr: PerRun, momentum: PerRun, weight_decay: PerRun, nesterov: bool, maximize: bool,
) -> None:  # fmt: skip
    """A step of torch.optim.SGD with dampening 0, from the weights before they were perturbed.

    g <- g + λ w (after -g with ``maximize``), m <- μ m + g, w <- w - lr (g + μ m with ``nesterov``, otherwise m). w are
    the saved weights if ``dirty`` is not 0, otherwise θ (Sutskever et al., 2013, in torch's form). λ is
    ``weight_decay``, μ ``momentum``, and each number is one for all runs, or one a run; with μ = 0 ``momenta`` is
    empty, and the step is w - lr g. With lr = 0 no bit of w changes. If the gate (0-d float64) is 0, θ <- w and m does
    not change. ``dirty`` is always 0 afterwards.

    Raises:
        RuntimeError: momenta are given without a momentum, or the reverse (compiled and Triton backends).
    """
    go, from_saved = gate != 0, dirty != 0
    rates, inertias, decays = (per_run(x, table) for x in (lr, momentum, weight_decay))
    buffers = runs(momenta, table) if any(inertias) else [None] * len(table)
    lists = (runs(params, table), runs(grads, table), buffers, runs([saved], table), rates, inertias, decays)
    for theta, g, m, old, rate, inertia, decay in zip(*lists, strict=True):
        old = torch.where(from_saved, old, theta)
        weights, step = wide(old), -wide(g) if maximize else wide(g)
        if decay:
            step = step + decay * weights
        if m is not None:
            average = inertia * wide(m) + step
            step = step + inertia * average if nesterov else average
            m.copy_(torch.where(go, average.to(m.dtype), m))
        new = weights - rate * step if rate else weights
        theta.copy_(torch.where(go, new.to(theta.dtype), old))
    dirty.fill_(0)


def restore_adamw_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors, saved: Tensor,
    dirty: Tensor, table: Tensor, gate: Tensor, lr: PerRun, beta1: PerRun, beta2: PerRun, eps: PerRun,
    weight_decay: PerRun, decoupled: bool, maximize: bool,
) -> None:  # fmt: skip
    """A step of torch.optim.Adam, or with ``decoupled`` of AdamW, from the weights before they were perturbed.

    m <- m + (1 - β₁)(g - m), v <- β₂ v + (1 - β₂) g², w <- w - lr/(1 - β₁ᵗ) m / (√v/√(1 - β₂ᵗ) + eps) (Kingma & Ba,
    2015, Algorithm 1), after g <- g + λ w, or w <- (1 - lr λ) w where decoupled (Loshchilov & Hutter, 2019, Algorithm
    2). ``steps`` has one float32 count t a run, which is increased first. The weights w, the gate and ``dirty`` are as
    in :func:`restore_sgd_`; a closed gate leaves m, v and t unchanged.
    """
    go, from_saved = gate != 0, dirty != 0
    lists = (params, grads, exp_avgs, exp_avg_sqs, [saved])
    numbers = (per_run(x, table) for x in (lr, beta1, beta2, eps, weight_decay))
    each = zip(*(runs(x, table) for x in lists), steps, *numbers, strict=True)
    for theta, g, m, v, old, t, rate, keep1, keep2, small, decay in each:
        t.add_(go.to(t.dtype))
        old = torch.where(from_saved, old, theta)
        weights, step = wide(old), -wide(g) if maximize else wide(g)
        if decoupled:
            weights = weights * (1 - rate * decay)
        elif decay:
            step = step + decay * weights
        average = wide(m) + (1 - keep1) * (step - wide(m))
        square = keep2 * wide(v) + (1 - keep2) * (step * step)
        count = t.double()
        step_size = (rate / (1 - keep1**count)).to(weights.dtype)
        root_bias = (1 - keep2**count).sqrt().to(weights.dtype)
        new = weights - step_size * (average / (square.sqrt() / root_bias + small)) if rate else weights
        m.copy_(torch.where(go, average.to(m.dtype), m))
        v.copy_(torch.where(go, square.to(v.dtype), v))
        theta.copy_(torch.where(go, new.to(theta.dtype), old))
    dirty.fill_(0)


def restore_lion_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, saved: Tensor, dirty: Tensor, table: Tensor, gate: Tensor,
    lr: PerRun, beta1: PerRun, beta2: PerRun, weight_decay: PerRun,
) -> None:  # fmt: skip
    """A step of Lion from the weights before they were perturbed (Chen et al., 2023, Algorithm 2).

    c = β₁ m + (1 - β₁) g, w <- w - lr (sign(c) + λ w), m <- β₂ m + (1 - β₂) g, with λ = ``weight_decay``: every element
    moves by lr, in the units of the weights, whatever the size of its gradient. The weights it starts from, the gate
    and ``dirty`` are those of :func:`restore_sgd_`; a closed gate leaves m as it is.
    """
    go, from_saved = gate != 0, dirty != 0
    lists = (params, grads, exp_avgs, [saved])
    numbers = (per_run(x, table) for x in (lr, beta1, beta2, weight_decay))
    for theta, g, m, old, rate, keep1, keep2, decay in zip(*(runs(x, table) for x in lists), *numbers, strict=True):
        old = torch.where(from_saved, old, theta)
        weights, gradient, average = wide(old), wide(g), wide(m)
        sign = (keep1 * average + (1 - keep1) * gradient).sign()
        new = weights - rate * (sign + decay * weights) if rate else weights
        m.copy_(torch.where(go, (keep2 * average + (1 - keep2) * gradient).to(m.dtype), m))
        theta.copy_(torch.where(go, new.to(theta.dtype), old))
    dirty.fill_(0)


def restore_bsam_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, precisions: Tensors, saved: Tensor, dirty: Tensor,
    table: Tensor, gate: Tensor, lr: PerRun, beta1: PerRun, weight_decay: PerRun,
) -> None:  # fmt: skip
    """A step of Variational SAM from the weights before they were perturbed (Möllenhoff & Khan, 2023).

    m <- β₁ m + (1 - β₁)(g + δ w), w <- w - lr m/s with the precisions s, which are read, and δ = ``weight_decay``. The
    weights it starts from, the gate and ``dirty`` are those of :func:`restore_sgd_`; a closed gate leaves m as it is.
    """
    go, from_saved = gate != 0, dirty != 0
    lists = (params, grads, exp_avgs, precisions, [saved])
    numbers = (per_run(x, table) for x in (lr, beta1, weight_decay))
    for theta, g, m, s, old, rate, keep1, decay in zip(*(runs(x, table) for x in lists), *numbers, strict=True):
        old = torch.where(from_saved, old, theta)
        weights = wide(old)
        average = keep1 * wide(m) + (1 - keep1) * (wide(g) + decay * weights)
        new = weights - rate * (average / wide(s)) if rate else weights
        m.copy_(torch.where(go, average.to(m.dtype), m))
        theta.copy_(torch.where(go, new.to(theta.dtype), old))
    dirty.fill_(0)
