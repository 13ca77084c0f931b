"""The gradient in the radius (LETS)."""

import torch
from torch import Tensor

from lets_kernels.ops.reference.shared import PerRun, Tensors, dual, per_run, runs, scaling, wide

__all__ = ["rho_grad_diagonal", "rho_grad_secant"]


def rho_grad_diagonal(
    val: Tensors, train: Tensors, perturbed: Tensors, vectors: Tensors, params: Tensors, table: Tensor,
    filter_norms: Tensor | None, xi: PerRun, q: float,
) -> Tensor:  # fmt: skip
    """(val - train)ᵀ H T sign(Tv)|Tv|^(q-1) with the curvature H = diag(ĝ²) (LETS: Wang et al., 2024).

    ``val`` and ``train`` are the gradients of the two losses after the step (no ``train``: zero), ``perturbed`` is ĝ
    and ``vectors`` v. The result is not yet divided by the norm of Tv, nor multiplied by the learning rate. Returns a
    0-d float64 tensor; all terms are products in float64.
    """
    thetas = runs(params, table) if len(params) else [None] * len(table)
    units = []
    rows = zip(table.tolist(), per_run(xi, table), strict=True)
    for v, theta, (row, own_xi) in zip(runs(vectors, table), thetas, rows, strict=True):
        t = scaling(theta, filter_norms, row, own_xi, v)
        scaled = t * wide(v)
        units.append((t * dual(scaled, q)).double() if q in (1, 2) else t * dual(scaled.double(), q))
    curved = [h.double().square() * unit for h, unit in zip(runs(perturbed, table), units, strict=True)]
    return _outer_product(val, train, curved, table)


def rho_grad_secant(val: Tensors, train: Tensors, perturbed: Tensors, first: Tensors, table: Tensor) -> Tensor:
    """(val - train)ᵀ (ĝ - g): as :func:`rho_grad_diagonal` with the curvature of the secant, H ε = ĝ - g.

    ``first`` is g, the gradient at θ, and ``perturbed`` is ĝ, the gradient at θ + ε. Without ``train`` the training
    gradient is zero. Returns a 0-d float64 tensor; the differences are taken in float64.
    """
    pairs = zip(runs(perturbed, table), runs(first, table), strict=True)
    return _outer_product(val, train, [h.double() - g.double() for h, g in pairs], table)


def _outer_product(val: Tensors, train: Tensors, inner: list[Tensor], table: Tensor) -> Tensor:
    """(val - train)^T inner over all runs, in float64; without `train`, train is zero."""
    trains = runs(train, table) if len(train) else [None] * len(table)
    total = torch.zeros((), dtype=torch.float64, device=val[0].device if len(val) else None)
    for a, b, x in zip(runs(val, table), trains, inner, strict=True):
        outer = a.double() if b is None else a.double() - b.double()
        total += (outer * x).sum()
    return total
