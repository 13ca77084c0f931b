"""Radii that the experiment needs and the package does not: two controls."""

import math
import random
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lets_kernels import AutoRadius
from lets_kernels.parts.passes import Moment
from lets_kernels.parts.radius import Radius


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

    def value(self, index: int, group: dict[str, Any], moment: Moment) -> float | Tensor:
        if moment.step != self._at[0]:
            self._at = moment.step, self._at[1] * math.exp(0.05 * self._draws.gauss(0.0, 1.0))
        group["rho"] = self._at[1]
        return group["rho"]
