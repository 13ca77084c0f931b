"""The gradient in the radius (LETS): piece by piece, in float64."""

import torch
from torch import Tensor

from lets_kernels.ops import reference
from lets_kernels.ops.declared import UNSCALED
from lets_kernels.ops.foreach.shared import ALL, Plan, fits, joined, lists, on_host, pieces, plan_of
from lets_kernels.ops.reference.shared import PerRun, Tensors

__all__ = ["rho_grad_diagonal", "rho_grad_secant"]


def rho_grad_diagonal(
    val: Tensors, train: Tensors, perturbed: Tensors, vectors: Tensors, params: Tensors, table: Tensor,
    filter_norms: Tensor | None, xi: PerRun, q: float,
) -> Tensor:  # fmt: skip
    """As :func:`lets_kernels.ops.reference.rho_grad_diagonal`."""
    plan, columns = plan_of(table), [val, perturbed, vectors, *([train] if len(train) else [])]
    if not (q == 2 and list(plan.kinds) == [UNSCALED] and _ours(plan, columns)):
        return reference.rho_grad_diagonal(val, train, perturbed, vectors, params, table, filter_norms, xi, q)
    found = []
    for _, (a, h, v, *b) in pieces(plan, ALL, *lists(plan, *columns)):
        outer = joined(a) - joined(b[0]) if b else joined(a)
        found.append((outer * joined(h).square() * joined(v)).sum())
    return torch.stack(found).sum()


def rho_grad_secant(val: Tensors, train: Tensors, perturbed: Tensors, first: Tensors, table: Tensor) -> Tensor:
    """As :func:`lets_kernels.ops.reference.rho_grad_secant`."""
    plan, columns = plan_of(table), [val, perturbed, first, *([train] if len(train) else [])]
    if not _ours(plan, columns):
        return reference.rho_grad_secant(val, train, perturbed, first, table)
    found = []
    for _, (a, h, g, *b) in pieces(plan, ALL, *lists(plan, *columns)):
        outer = joined(a) - joined(b[0]) if b else joined(a)
        found.append((outer * (joined(h) - joined(g))).sum())
    return torch.stack(found).sum()


def _ours(plan: Plan, columns: list[Tensors]) -> bool:
    return len(columns[0]) > 0 and on_host(columns[0][0]) and fits(plan, columns[0][0].dtype, *columns)
