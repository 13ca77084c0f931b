"""The restore fused with the step of a base optimizer."""

import torch
from torch import Tensor

from lets_kernels.ops.reference.shared import Tensors, runs, wide

__all__ = ["restore_adamw_", "restore_bsam_", "restore_lion_", "restore_sgd_"]


def restore_sgd_(
    params: Tensors, grads: Tensors, momenta: Tensors, saved: Tensor, dirty: Tensor, table: Tensor, gate: Tensor,
    lr: float, momentum: float, weight_decay: float, nesterov: bool, maximize: bool,
) -> None:  # fmt: skip
    """A step of torch.optim.SGD with dampening 0, from the weights before they were perturbed.

    g <- g + λ w (after -g with ``maximize``), m <- μ m + g, w <- w - lr (g + μ m with ``nesterov``, otherwise m). w are
    the saved weights if ``dirty`` is not 0, otherwise θ (Sutskever et al., 2013, in torch's form). λ is
    ``weight_decay``, μ ``momentum``; with μ = 0 ``momenta`` is empty, and the step is w - lr g. With lr = 0 no bit of w
    changes. If the gate (0-d float64) is 0, θ <- w and m does not change. ``dirty`` is always 0 afterwards.

    Raises:
        RuntimeError: momenta are given without a momentum, or the reverse (compiled and Triton backends).
    """
    go, from_saved = gate != 0, dirty != 0
    buffers = runs(momenta, table) if momentum else [None] * len(table)
    for theta, g, m, old in zip(runs(params, table), runs(grads, table), buffers, runs([saved], table), strict=True):
        old = torch.where(from_saved, old, theta)
        weights, step = wide(old), -wide(g) if maximize else wide(g)
        if weight_decay:
            step = step + weight_decay * weights
        if m is not None:
            average = momentum * wide(m) + step
            step = step + momentum * average if nesterov else average
            m.copy_(torch.where(go, average.to(m.dtype), m))
        new = weights - lr * step if lr else weights
        theta.copy_(torch.where(go, new.to(theta.dtype), old))
    dirty.fill_(0)


def restore_adamw_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, steps: Tensors, saved: Tensor,
    dirty: Tensor, table: Tensor, gate: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    decoupled: bool, maximize: bool,
) -> None:  # fmt: skip
    """A step of torch.optim.Adam, or with ``decoupled`` of AdamW, from the weights before they were perturbed.

    m <- m + (1 - β₁)(g - m), v <- β₂ v + (1 - β₂) g², w <- w - lr/(1 - β₁ᵗ) m / (√v/√(1 - β₂ᵗ) + eps) (Kingma & Ba,
    2015, Algorithm 1), after g <- g + λ w, or w <- (1 - lr λ) w where decoupled (Loshchilov & Hutter, 2019, Algorithm
    2). ``steps`` has one float32 count t a run, which is increased first. The weights w, the gate and ``dirty`` are as
    in :func:`restore_sgd_`; a closed gate leaves m, v and t unchanged.
    """
    go, from_saved = gate != 0, dirty != 0
    lists = (params, grads, exp_avgs, exp_avg_sqs, [saved])
    for theta, g, m, v, old, t in zip(*(runs(x, table) for x in lists), steps, strict=True):
        t.add_(go.to(t.dtype))
        old = torch.where(from_saved, old, theta)
        weights, step = wide(old), -wide(g) if maximize else wide(g)
        if decoupled:
            weights = weights * (1 - lr * weight_decay)
        elif weight_decay:
            step = step + weight_decay * weights
        average = wide(m) + (1 - beta1) * (step - wide(m))
        square = beta2 * wide(v) + (1 - beta2) * (step * step)
        count = t.double()
        step_size = (lr / (1 - beta1**count)).to(weights.dtype)
        root_bias = (1 - beta2**count).sqrt().to(weights.dtype)
        new = weights - step_size * (average / (square.sqrt() / root_bias + eps)) if lr else weights
        m.copy_(torch.where(go, average.to(m.dtype), m))
        v.copy_(torch.where(go, square.to(v.dtype), v))
        theta.copy_(torch.where(go, new.to(theta.dtype), old))
    dirty.fill_(0)


def restore_lion_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, saved: Tensor, dirty: Tensor, table: Tensor, gate: Tensor,
    lr: float, beta1: float, beta2: float, weight_decay: float,
) -> None:  # fmt: skip
    """A step of Lion from the weights before they were perturbed (Chen et al., 2023, Algorithm 2).

    c = β₁ m + (1 - β₁) g, w <- w - lr (sign(c) + λ w), m <- β₂ m + (1 - β₂) g, with λ = ``weight_decay``: every element
    moves by lr, in the units of the weights, whatever the size of its gradient. The weights it starts from, the gate
    and ``dirty`` are those of :func:`restore_sgd_`; a closed gate leaves m as it is.
    """
    go, from_saved = gate != 0, dirty != 0
    lists = (params, grads, exp_avgs, [saved])
    for theta, g, m, old in zip(*(runs(x, table) for x in lists), strict=True):
        old = torch.where(from_saved, old, theta)
        weights, gradient, average = wide(old), wide(g), wide(m)
        sign = (beta1 * average + (1 - beta1) * gradient).sign()
        new = weights - lr * (sign + weight_decay * weights) if lr else weights
        m.copy_(torch.where(go, (beta2 * average + (1 - beta2) * gradient).to(m.dtype), m))
        theta.copy_(torch.where(go, new.to(theta.dtype), old))
    dirty.fill_(0)


def restore_bsam_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, precisions: Tensors, saved: Tensor, dirty: Tensor,
    table: Tensor, gate: Tensor, lr: float, beta1: float, weight_decay: float,
) -> None:  # fmt: skip
    """A step of Variational SAM from the weights before they were perturbed (Möllenhoff & Khan, 2023).

    m <- β₁ m + (1 - β₁)(g + δ w), w <- w - lr m/s with the precisions s, which are read, and δ = ``weight_decay``. The
    weights it starts from, the gate and ``dirty`` are those of :func:`restore_sgd_`; a closed gate leaves m as it is.
    """
    go, from_saved = gate != 0, dirty != 0
    lists = (params, grads, exp_avgs, precisions, [saved])
    for theta, g, m, s, old in zip(*(runs(x, table) for x in lists), strict=True):
        old = torch.where(from_saved, old, theta)
        weights = wide(old)
        average = beta1 * wide(m) + (1 - beta1) * (wide(g) + weight_decay * weights)
        new = weights - lr * (average / wide(s)) if lr else weights
        m.copy_(torch.where(go, average.to(m.dtype), m))
        theta.copy_(torch.where(go, new.to(theta.dtype), old))
    dirty.fill_(0)
