"""Radii that the experiment needs and the package does not: a rival that learns nothing, and two controls."""

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lets_kernels import AutoRadius
from lets_kernels.parts.radius import Radius


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


class Shuffled(AutoRadius):
    """``rho="auto"`` whose headway is that of a step drawn from all so far: the same values, but not when they were."""

    def __init__(self, rho: float, seed: int) -> None:
        super().__init__(rho)
        self._draws, self._seen = random.Random(seed), list[Tensor]()

    def compare(
        self, products: Tensor, gate: Tensor, groups: Sequence[dict[str, Any]], memory: Tensor | None = None
    ) -> None:
        forward, size = products[:, 3], (products[:, 2] * products[:, 4]).sqrt()
        if bool(size > 0):
            self._seen.append(forward / size)
        if self._seen:
            products = products.clone()
            products[:, 3] = self._draws.choice(self._seen) * size
        super().compare(products, gate, groups, memory)


class RandomWalk(Radius):
    """log ρ moves by a normal number of deviation 0.05 a step, whatever the step shows."""

    moves = True

    def __init__(self, rho: float, seed: int) -> None:
        self.rho, self._draws, self._at = rho, random.Random(seed), (-1, rho)

    def value(self, index: int, group: dict[str, Any], step: int) -> float | Tensor:
        if step != self._at[0]:
            self._at = step, self._at[1] * math.exp(0.05 * self._draws.gauss(0.0, 1.0))
        group["rho"] = self._at[1]
        return group["rho"]
