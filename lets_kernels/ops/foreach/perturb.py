"""Perturb and restore."""

import math

import torch
from torch import Tensor

from lets_kernels.ops import reference
from lets_kernels.ops.declared import ELEMENT_WISE, FISHER, UNSCALED
from lets_kernels.ops.foreach.shared import (
    FILTERS,
    alike,
    at,
    differ,
    filter_pieces,
    fits,
    lists,
    on_host,
    one,
    pieces,
    plan_of,
)
from lets_kernels.ops.reference.shared import PerRun, Tensors, wide

__all__ = ["perturb_", "restore_"]


def perturb_(
    params: Tensors, vectors: Tensors, saved: Tensor, dirty: Tensor, table: Tensor, filter_norms: Tensor | None,
    xi: PerRun, q: float, total: Tensor, rho: Tensor,
) -> None:  # fmt: skip
    """As :func:`lets_kernels.ops.reference.perturb_`; the product with ρ and the sum with θ are rounded once."""
    if not on_host(saved, dirty, total, rho):
        reference.perturb_(params, vectors, saved, dirty, table, filter_norms, xi, q, total, rho)
        return
    if rho.numel() != 1 or differ(xi):
        vectors = vectors if len(vectors) else [saved.clone()]  # the weights overwrite it part by part
        for part in alike(table, xi, rho.flatten().tolist()):
            numbers = part.numbers[0], q, total, rho.flatten()[part.places[0] if rho.numel() > 1 else 0]
            perturb_(part.of(params), part.of(vectors), saved, dirty, part.table, filter_norms, *numbers)
        dirty.fill_(1)
        return
    plan = plan_of(table)
    columns = [params, vectors, [saved]] if len(vectors) else [params, [saved]]
    if not (q == 2 and FISHER not in plan.kinds and fits(plan, saved.dtype, *columns)):
        reference.perturb_(params, vectors, saved, dirty, table, filter_norms, xi, q, total, rho)
        return
    if len(vectors):
        thetas, vs, olds = lists(plan, *columns)
    else:
        thetas, vs, olds = lists(plan, params, [saved.clone()], [saved])
    torch._foreach_copy_(olds, thetas)
    dirty.fill_(1)
    xi = one(xi)
    factor = (rho / total.sqrt()).to(wide(saved[:0]).dtype).item()
    if not (math.isfinite(factor) and factor):  # so it is also where the total is zero or not finite
        return
    if UNSCALED in plan.kinds and saved.element_size() >= 4:
        places = plan.kinds[UNSCALED]
        torch._foreach_add_(at(places, thetas), at(places, vs), alpha=factor)
    elif UNSCALED in plan.kinds:
        for _, (theta, v) in pieces(plan, UNSCALED, thetas, vs):
            torch._foreach_add_(theta, list(map(wide, v)), alpha=factor)  # in 16 bits the product would be rounded
    for _, (theta, v) in pieces(plan, ELEMENT_WISE, thetas, vs):
        t = torch._foreach_abs(list(map(wide, theta)))
        torch._foreach_add_(t, xi)
        moved = torch._foreach_mul(t, list(map(wide, v)))
        torch._foreach_mul_(moved, t)
        torch._foreach_add_(theta, moved, alpha=factor)
    if FILTERS in plan.kinds:
        assert filter_norms is not None
        scale = filter_norms + xi
        for place in plan.kinds[FILTERS]:
            for norms, to, along in filter_pieces(plan.rows[place], scale, thetas[place], vs[place]):
                to.add_((wide(along) * norms).mul_(norms), alpha=factor)


def restore_(params: Tensors, saved: Tensor, dirty: Tensor, table: Tensor) -> None:
    """As :func:`lets_kernels.ops.reference.restore_`."""
    plan = plan_of(table)
    if not (on_host(saved, dirty) and fits(plan, saved.dtype, params)):
        reference.restore_(params, saved, dirty, table)
        return
    if dirty.item():
        thetas, olds = lists(plan, params, [saved])
        torch._foreach_copy_(thetas, olds)
        dirty.fill_(0)
