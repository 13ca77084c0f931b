"""Norms, and the check that numbers are finite."""

import torch
from torch import Tensor

from lets_kernels.ops.reference.shared import PerRun, Tensors, per_run, runs, scaling, wide

__all__ = ["all_finite_", "filter_norms", "grad_norm", "largest", "peaks_"]


def grad_norm(
    vectors: Tensors, params: Tensors, table: Tensor, filter_norms: Tensor | None, xi: PerRun, q: float
) -> Tensor:
    """Σ |Tv|^q over all elements (Foret et al., 2021, Eq. 2; Kwon et al., 2021, §3): the q-th power of the norm of Tv.

    The run table determines T, with xi = ξ (η of the Fisher information): one number, or one a run. ``params`` may be
    empty if no T is |θ| + ξ, and ``filter_norms`` may be None if there are no filters. Returns a 0-d float64 tensor,
    which is not finite if an element of v is not.

    Raises:
        RuntimeError: q is below 1 (compiled and Triton backends), or the lists do not fit the table.
    """
    thetas = runs(params, table) if len(params) else [None] * len(table)
    total = torch.zeros((), dtype=torch.float64, device=vectors[0].device if len(vectors) else None)
    rows = zip(table.tolist(), per_run(xi, table), strict=True)
    for v, theta, (row, own_xi) in zip(runs(vectors, table), thetas, rows, strict=True):
        scaled = wide(v) * scaling(theta, filter_norms, row, own_xi, v)
        total += scaled.double().abs().pow(q).sum()
    return total


def filter_norms(params: Tensors, table: Tensor, out: Tensor) -> None:
    """out <- ‖c‖, the Euclidean norm of every filter c of θ (LETS: Wang et al., 2024, Eq. 7), in the order of the run
    table.

    ``out`` is flat, float32 (float64 for float64 parameters), one number a filter, in the units of the weights. Nothing
    is written for runs without filters. The sum of squares is taken in float64.
    """
    for theta, (_, _, length, count, start) in zip(runs(params, table), table.tolist(), strict=True):
        if length > 0:
            filters = theta.double().reshape(-1, count, length)
            out[start : start + count] = filters.square().sum(dim=(0, 2)).sqrt()


def all_finite_(values: Tensors, skipped: Tensor) -> Tensor:
    """1 if all values are finite; otherwise 0, and ``skipped`` is increased by one. A gate that no host reads.

    ``values`` are any number of 0-d float64 tensors, ``skipped`` is 0-d int64. Returns a 0-d float64 tensor.
    """
    finite = torch.stack([v.isfinite() for v in values]).all()
    skipped.add_((~finite).to(skipped.dtype))
    return finite.double()


def largest(vectors: Tensors, table: Tensor) -> Tensor:
    """max |v|, NaN if an element is NaN, 0 without elements: 0-d float64, in the units of v.

    The direction at p = 1, and near it, goes by it (Foret et al., 2021, Eq. 2, in the limit).
    """
    highest = torch.zeros((), dtype=torch.float64, device=vectors[0].device if len(vectors) else None)
    for v in runs(vectors, table):
        if v.numel():
            highest = torch.maximum(highest, v.double().abs().max())
    return highest


def peaks_(out: Tensors, vectors: Tensors, table: Tensor, largest: Tensor) -> Tensor:
    """out <- sign(v) where |v| is the largest, 0 elsewhere (Foret et al., 2021, Eq. 2, p → 1); returns their number."""
    count = torch.zeros((), dtype=torch.float64, device=largest.device)
    for to, v in zip(runs(out, table), runs(vectors, table), strict=True):
        peak = v.double().abs() == largest
        to.copy_(torch.where(peak, v.sign(), torch.zeros_like(v)))
        count += peak.sum()
    return count
