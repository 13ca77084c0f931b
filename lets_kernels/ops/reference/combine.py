"""Two vectors: their inner products, and linear combinations of them."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lets_kernels.ops.reference.shared import Tensors, runs, wide

__all__ = ["combine_", "displacement_dots", "dots"]


def dots(x: Tensors, y: Tensors, table: Tensor) -> Tensor:
    """x·x, x·y and y·y over all runs: float64, of shape [3], in the units of x and y.

    Products and sums are those of float64. GSAM takes its projection from them (Zhuang et al., 2022, Algorithm 1).
    """
    return _products(runs(x, table), runs(y, table), x[0].device if len(x) else None)


def displacement_dots(grads: Tensors, params: Tensors, saved: Tensor, table: Tensor) -> Tensor:
    """g·g, g·Δ and Δ·Δ over all runs, where Δ = θ - saved is the move of the last step: float64, of shape [3].

    Δ is taken in the arithmetic type, in the units of the weights; products and sums are those of float64. Ours:
    ``rho="auto"`` asks by it whether steps still go downhill.
    """
    pairs = zip(runs(params, table), runs([saved], table), strict=True)
    return _products(runs(grads, table), (wide(theta) - wide(old) for theta, old in pairs), saved.device)


def _products(xs: Iterable[Tensor], ys: Iterable[Tensor], device: torch.device | None) -> Tensor:
    """The three sums over pairs of runs."""
    total = torch.zeros(3, dtype=torch.float64, device=device)
    for x, y in zip(xs, ys, strict=True):
        a, b = x.double(), y.double()
        total += torch.stack([(a * a).sum(), (a * b).sum(), (b * b).sum()])
    return total


def combine_(out: Tensors, x: Tensors, y: Tensors, table: Tensor, coefficients: Tensor, gate: Tensor) -> None:
    """out <- a x + b y, if the gate is open (0-d float64, not 0); ``out`` may be x or y itself.

    ``coefficients`` holds a and b, float64 of shape [2], rounded to the arithmetic type.
    """
    for to, u, v in zip(runs(out, table), runs(x, table), runs(y, table), strict=True):
        a, b = coefficients.to(wide(u).dtype).unbind()
        to.copy_(torch.where(gate != 0, (a * wide(u) + b * wide(v)).to(to.dtype), to))
