"""Two vectors: their inner products, and linear combinations of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lets_kernels.ops.reference.shared import runs, wide


def dots(x: Sequence[Tensor], y: Sequence[Tensor], table: Tensor) -> Tensor:
    """x·x, x·y and y·y over all runs: float64, of shape [3]."""
    total = torch.zeros(3, dtype=torch.float64, device=x[0].device if len(x) else None)
    for u, v in zip(runs(x, table), runs(y, table), strict=True):
        a, b = u.double(), v.double()
        total += torch.stack([(a * a).sum(), (a * b).sum(), (b * b).sum()])
    return total


def combine_(
    out: Sequence[Tensor],
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    table: Tensor,
    coefficients: Tensor,
    gate: Tensor,
) -> None:
    """out <- a x + b y, where the gate is open; ``coefficients`` holds a and b. ``out`` may be x or y itself."""
    for to, u, v in zip(runs(out, table), runs(x, table), runs(y, table), strict=True):
        a, b = coefficients.to(wide(u).dtype).unbind()
        to.copy_(torch.where(gate != 0, (a * wide(u) + b * wide(v)).to(to.dtype), to))
