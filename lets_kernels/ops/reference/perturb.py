"""Perturb and restore."""

import torch
from torch import Tensor

from lets_kernels.ops.reference.shared import PerRun, Tensors, dual, each_radius, per_run, runs, scaling, wide

__all__ = ["perturb_", "restore_"]


def perturb_(
    params: Tensors, vectors: Tensors, saved: Tensor, dirty: Tensor, table: Tensor, filter_norms: Tensor | None,
    xi: PerRun, q: float, total: Tensor, rho: Tensor,
) -> None:  # fmt: skip
    """θ <- θ + ρ T sign(Tv)|Tv|^(q-1) / total^(1/p) with 1/p + 1/q = 1 (Foret et al., 2021, Eq. 2; LETS Eq. 7).

    ``total`` is Σ |Tv|^q from :func:`grad_norm`, over all buckets and ranks: 0-d float64. ``rho`` is the radius
    ‖T⁻¹ε‖_p (in the units of the weights if T = 1), float64: 0-d, or one number a run, as ξ is. The weights are saved
    bit for bit in ``saved``, one flat buffer, and ``dirty`` becomes 1. Without ``vectors``, v stands in ``saved``, and
    the weights overwrite it.

    If the total is zero or not finite, or the perturbation's length overflows or vanishes, the weights do not change.
    """
    thetas, swapped = runs(params, table), not len(vectors)
    directions = [v.clone() for v in runs([saved], table)] if swapped else runs(vectors, table)
    for theta, old in zip(thetas, runs([saved], table), strict=True):
        old.copy_(theta)
    dirty.fill_(1)
    usable = torch.isfinite(total) & (total > 0)
    # For q other than 2 and 1, divide by the norm before taking the power, which could underflow.
    lengths = each_radius(rho / total.sqrt() if q == 2 else rho, table)
    shrink = total.pow(-1 / q) if q not in (1, 2) else torch.ones_like(total)
    numbers = zip(per_run(xi, table), lengths, strict=True)
    for theta, v, row, (own_xi, length) in zip(thetas, directions, table.tolist(), numbers, strict=True):
        t = scaling(theta, filter_norms, row, own_xi, v)
        factor, inner = length.to(wide(v).dtype), shrink.to(wide(v).dtype)
        scaled = t * wide(v) if q in (1, 2) else inner * (t * wide(v))
        ascended = wide(theta) + factor * (t * dual(scaled, q))
        moves = usable & (factor != 0) & factor.isfinite() & inner.isfinite()
        theta.copy_(torch.where(moves, ascended.to(theta.dtype), theta))


def restore_(params: Tensors, saved: Tensor, dirty: Tensor, table: Tensor) -> None:
    """θ <- saved if ``dirty`` is not 0, bit for bit; then ``dirty`` is set to 0. :func:`perturb_` writes both.

    ``saved`` is one flat buffer in the dtype of the weights, ``dirty`` 0-d int64. SAM takes its step from these weights
    (Foret et al., 2021, Algorithm 1).
    """
    for theta, old in zip(runs(params, table), runs([saved], table), strict=True):
        theta.copy_(torch.where(dirty != 0, old, theta))
    dirty.fill_(0)
