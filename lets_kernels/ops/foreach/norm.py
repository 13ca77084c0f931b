"""Norms, and the check that numbers are finite."""

import math
from collections.abc import Sequence

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
    joined,
    line,
    lists,
    on_host,
    one,
    piece_size,
    pieces,
    plan_of,
)
from lets_kernels.ops.reference.norm import largest, peaks_
from lets_kernels.ops.reference.shared import PerRun, Tensors, wide

__all__ = ["all_finite_", "filter_norms", "grad_norm", "largest", "peaks_"]

#: Numbers whose squares add up in the arithmetic type before float64 takes over, and the numbers that are worth it.
_ROW, _LARGE = 64, 1 << 12
#: Between these a sum of squares has neither overflown in float32 nor lost anything to squares that vanish.
_LEAST, _MOST = 1e-16, 1e38


def grad_norm(
    vectors: Tensors, params: Tensors, table: Tensor, filter_norms: Tensor | None, xi: PerRun, q: float
) -> Tensor:
    """As :func:`lets_kernels.ops.reference.grad_norm`.

    The squares of float32 vectors add up in float32 over rows of 64 numbers, and in float64 from there on. So the
    relative error is at most that of some twenty roundings, whatever the number of elements. If the sum says that
    squares may have left the range of float32, it is taken again in float64 from the start.
    """
    if not (len(vectors) and on_host(vectors[0])):
        return reference.grad_norm(vectors, params, table, filter_norms, xi, q)
    if differ(xi):
        parts = alike(table, xi)
        sums = [grad_norm(p.of(vectors), p.of(params), p.table, filter_norms, p.numbers[0], q) for p in parts]
        return torch.stack(sums).sum()
    xi = one(xi)
    plan, columns = plan_of(table), [vectors, params] if len(params) else [vectors]
    if not (q == 2 and FISHER not in plan.kinds and fits(plan, vectors[0].dtype, *columns)):
        return reference.grad_norm(vectors, params, table, filter_norms, xi, q)
    vs, *thetas = lists(plan, *columns)
    squares = _Squares()
    squares.add(at(plan.kinds.get(UNSCALED, []), vs))
    if ELEMENT_WISE in plan.kinds:
        for _, (v, theta) in pieces(plan, ELEMENT_WISE, vs, *thetas):
            scaled = torch._foreach_abs(list(map(wide, theta)))
            torch._foreach_add_(scaled, xi)
            torch._foreach_mul_(scaled, list(map(wide, v)))
            squares.add(scaled)
    if FILTERS in plan.kinds:
        assert filter_norms is not None
        scale = filter_norms + xi
        for place in plan.kinds[FILTERS]:
            for t, part in filter_pieces(plan.rows[place], scale, vs[place]):
                squares.add([wide(part) * t])
    total = squares.total()
    beyond = vectors[0].dtype != torch.float64 and not _LEAST < total.item() < _MOST and not total.isnan()
    if not beyond:
        return total
    return reference.grad_norm(vectors, params, table, filter_norms, xi, q)


class _Squares:
    """The sum of the squares of all numbers that it is given."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._small: list[Tensor] = []

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Take in tensors, in memory order, so that a sum has the same bits in every form of the argument."""
        numels = list(map(Tensor.numel, tensors))
        self._small += [x for x, numel in zip(tensors, numels, strict=True) if numel < _LARGE]
        for x in [x for x, numel in zip(tensors, numels, strict=True) if numel >= _LARGE]:
            if x.element_size() < 4:
                self._sums += [part.double().square_().sum() for part in line(x).split(piece_size())]
            else:
                x = line(x)
                end = x.numel() - x.numel() % _ROW
                norms = torch.linalg.vector_norm(x[:end].view(-1, _ROW), dim=1).double()
                self._sums.append(torch.dot(norms, norms))
                if end < x.numel():
                    self._small.append(x[end:])

    def total(self) -> Tensor:
        """0-d float64."""
        if self._small:
            self._sums.append(joined(self._small).square().sum())
        if len(self._sums) == 1:
            return self._sums[0]
        return torch.stack(self._sums).sum() if self._sums else torch.zeros((), dtype=torch.float64, device="cpu")


def filter_norms(params: Tensors, table: Tensor, out: Tensor) -> None:
    """As :func:`lets_kernels.ops.reference.filter_norms`."""
    plan = plan_of(table)
    if not (len(params) and on_host(params[0], out) and fits(plan, params[0].dtype, params)):
        reference.filter_norms(params, table, out)
        return
    (thetas,) = lists(plan, params)
    for place in plan.kinds.get(FILTERS, ()):
        for norms, theta in filter_pieces(plan.rows[place], out, thetas[place]):
            norms.copy_(theta.double().square().sum(dim=(0, 2)).sqrt_().view(-1, 1))


def all_finite_(values: Tensors, skipped: Tensor) -> Tensor:
    """As :func:`lets_kernels.ops.reference.all_finite_`."""
    if not on_host(skipped, *values):
        return reference.all_finite_(values, skipped)
    finite = all(math.isfinite(v.item()) for v in values)
    if not finite:
        skipped.add_(1)
    return torch.full((), float(finite), dtype=torch.float64, device=skipped.device)
