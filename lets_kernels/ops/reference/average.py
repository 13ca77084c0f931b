"""Moving averages of gradients, and the vectors that perturbations make from them."""

import torch
from torch import Tensor

from lets_kernels.ops.reference.shared import PerRun, Tensors, per_run, root, runs, wide

__all__ = ["average_", "posterior_ascent_"]


def average_(
    averages: Tensors, vectors: Tensors, out: Tensors, updates: Tensor, table: Tensor, gate: Tensor, decay: float,
    a: float, b: float,
) -> Tensor:  # fmt: skip
    """m <- decay m + (1 - decay) x, then v = a x + b m; Σ v², of v as it is stored.

    If ``updates`` is zero, the average begins: m and v are x. If the gate is closed, m does not change, and v is
    computed from that m; otherwise ``updates`` is increased by one. v is written to ``out``, unless ``out`` is empty.
    ``updates`` is 0-d int64, the gate 0-d float64; returns a 0-d float64 tensor. With a = 1 and b = -σ, v is the
    direction of Friendly SAM (Li et al., 2024); with a = 0 and b = 1, the direction of VaSSO (Li & Giannakis, 2023).
    """
    begins, go = updates == 0, gate != 0
    total = torch.zeros((), dtype=torch.float64, device=updates.device)
    targets = runs(out, table) if len(out) else [None] * len(table)
    for m, x, to in zip(runs(averages, table), runs(vectors, table), targets, strict=True):
        moved = torch.where(begins, wide(x), decay * wide(m) + (1 - decay) * wide(x)).to(m.dtype)
        m.copy_(torch.where(go, moved, m))
        v = torch.where(begins, wide(x), a * wide(x) + b * wide(m)).to(m.dtype)
        total += v.double().square().sum()
        if to is not None:
            to.copy_(v)
    updates.add_(go.to(updates.dtype))
    return total


def posterior_ascent_(
    out: Tensors, precisions: Tensors, grads: Tensors, table: Tensor, gate: Tensor, beta2: float, damping: PerRun
) -> None:
    """out <- g/s, then s <- β₂ s + (1 - β₂)(√s |g| + damping) (Möllenhoff & Khan, 2023).

    s are the precisions, positive. If the gate (0-d float64) is closed, s does not change, but ``out`` is written.
    ``damping``, one number or one a run, is added to the square root of the curvature, in the units of s.
    """
    go = gate != 0
    lists = (runs(x, table) for x in (out, precisions, grads))
    for to, s, g, added in zip(*lists, per_run(damping, table), strict=True):
        before = wide(s)
        to.copy_((wide(g) / before).to(to.dtype))
        after = beta2 * before + (1 - beta2) * (root(before) * wide(g).abs() + added)
        s.copy_(torch.where(go, after.to(s.dtype), s))
