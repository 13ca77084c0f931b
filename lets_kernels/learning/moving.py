"""The base of radii that steps move: LETS learns from gradients, ``rho="auto"`` compares a step's two gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from lets_kernels.parts.direction import Direction
from lets_kernels.parts.passes import Gradients, Moment
from lets_kernels.parts.radius import Radius
from lets_kernels.parts.samples import Samples

Groups: TypeAlias = Sequence[dict[str, Any]]


class MovingRadius(Radius):
    """Base class of a radius ρ = exp(ν) that belongs to one optimizer, and is the same on all ranks.

    ``group["rho"]`` shows the radius as a 0-d tensor. Later steps replace this tensor and never change it.
    """

    moves = True
    #: True for one radius for each param group, False for one radius for all.
    per_group = False

    def __init__(self) -> None:
        self._metrics: dict[str, Tensor] = {}

    def _log(self, k: int) -> Tensor:
        """ν of one radius, 0-d."""
        raise NotImplementedError

    def _radii(self) -> Sequence[Tensor]:
        """Every ρ, 0-d."""
        raise NotImplementedError

    @property
    def shared(self) -> bool:
        return not self.per_group

    def value(self, index: int, group: dict[str, Any], moment: Moment) -> float | Tensor:
        group["rho"] = self._log(index if self.per_group else 0).exp()
        return group["rho"]

    def present(self, index: int, group: dict[str, Any]) -> float | Tensor:
        k = index if self.per_group else 0
        return self._log(k).exp() if k < len(self._radii()) else group["rho"]

    def _publish(self, groups: Groups) -> None:
        """Write its ρ into every group."""
        radii = self._radii()
        for index, group in enumerate(groups):
            group["rho"] = radii[index if self.per_group else 0]

    def metrics(self) -> dict[str, Tensor]:
        return self._metrics

    def check_passes(self, sync_perturbation: bool, direction: Direction, samples: Samples) -> None:
        """Raise ``ValueError`` where the radius cannot use the gradients of a step's two passes."""


@dataclass
class Observed:
    """The gradients of one pass, and its loss."""

    gradients: list[Gradients]  # an entry for each bucket
    loss: Tensor | None  # 0-d float64


@dataclass
class Summed:
    """What a pass has given to the gradient in ν, in place of its gradients; and its loss."""

    sums: list[Tensor]  # −η ḡᵀ H ε for each ν, of this rank: 0-d float64
    loss: Tensor | None  # 0-d float64
