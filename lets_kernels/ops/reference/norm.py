"""Norms, and whether they are finite."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lets_kernels.ops.reference.shared import runs, scaling, wide

__all__ = ["all_finite_", "filter_norms", "grad_norm", "largest", "peaks_"]


def grad_norm(
    vectors: Sequence[Tensor],
    params: Sequence[Tensor],
    table: Tensor,
    filter_norms: Tensor | None,
    xi: float,
    q: float,
) -> Tensor:
    thetas = runs(params, table) if len(params) else [None] * len(table)
    total = torch.zeros((), dtype=torch.float64, device=vectors[0].device if len(vectors) else None)
    for v, theta, row in zip(runs(vectors, table), thetas, table.tolist(), strict=True):
        scaled = wide(v) * scaling(theta, filter_norms, row, xi, v)
        total += scaled.double().abs().pow(q).sum()
    return total


def filter_norms(params: Sequence[Tensor], table: Tensor, out: Tensor) -> None:
    for theta, (_, _, row_length, row_count, row_start) in zip(runs(params, table), table.tolist(), strict=True):
        if row_length > 0:
            filters = theta.double().reshape(-1, row_count, row_length)
            out[row_start : row_start + row_count] = filters.square().sum(dim=(0, 2)).sqrt()


def all_finite_(values: Sequence[Tensor], skipped: Tensor) -> Tensor:
    finite = torch.stack([v.isfinite() for v in values]).all()
    skipped.add_((~finite).to(skipped.dtype))
    return finite.double()


def largest(vectors: Sequence[Tensor], table: Tensor) -> Tensor:
    """max |v|, which is NaN where an element is: 0-d float64, 0 of no elements."""
    highest = torch.zeros((), dtype=torch.float64, device=vectors[0].device if len(vectors) else None)
    for v in runs(vectors, table):
        if v.numel():
            highest = torch.maximum(highest, v.double().abs().max())
    return highest


def peaks_(out: Sequence[Tensor], vectors: Sequence[Tensor], table: Tensor, largest: Tensor) -> Tensor:
    """sign(v) where |v| is the largest, else 0 (Foret et al., 2021, Eq. 2, as p goes to 1); how many there are."""
    count = torch.zeros((), dtype=torch.float64, device=largest.device)
    for to, v in zip(runs(out, table), runs(vectors, table), strict=True):
        peak = v.double().abs() == largest
        to.copy_(torch.where(peak, v.sign(), torch.zeros_like(v)))
        count += peak.sum()
    return count
