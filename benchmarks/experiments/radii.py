"""Radii that the experiment needs and the package does not: the rival that equates the loss and learns nothing."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lets_kernels.radius import Radius


class LossEquated(Radius):
    """ρ = min(σ/‖g‖, ρ_max): the perturbation along g raises the loss by σ, to first order, at every step.

    For SAM's own direction (Foret et al., 2021) with one device; it reads the first gradients where they lie.

    Args:
        rise: σ, in the units of the loss.
        rho_max: what a gradient that vanishes would be perturbed by.
    """

    moves = True

    def __init__(self, rise: float, rho_max: float) -> None:
        self.rise, self.rho_max, self.rho = rise, rho_max, rho_max
        self._groups: Sequence[dict[str, Any]] = ()

    def bind(self, groups: Sequence[dict[str, Any]], device: torch.device) -> None:
        super().bind(groups, device)
        self._groups = groups

    def value(self, index: int, group: dict[str, Any], step: int) -> float | Tensor:
        """All groups have one ρ; a norm that is not finite gives zero, and its step is skipped."""
        grads = [p.grad for g in self._groups for p in g["params"] if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        group["rho"] = min(self.rise / norm, self.rho_max) if norm > 0 else self.rho_max if norm == 0 else 0.0
        return group["rho"]
