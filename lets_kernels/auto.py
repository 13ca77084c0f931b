"""How far to perturb, found while training: ``rho="auto"``."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lets_kernels.direction import Direction
from lets_kernels.learned import CurvatureWarning
from lets_kernels.radius import ConstantRadius, Radius, RadiusLike, check_rho
from lets_kernels.samples import Samples
from lets_kernels.saved import check_numbers


@dataclass(frozen=True)
class AutoConstants:
    """The constants of :class:`AutoRadius`, with what they are for; docs/radius.md says how much each matters.

    Raises:
        ValueError: one is not a positive finite number.
    """

    change: float = 0.55  # relative change of the gradient that is aimed at
    prior: float = 0.22  # radius along the gradient that is aimed at
    weight: float = 2.0  # of that radius, where the change has a weight of one
    rate: float = 0.15  # of ν, a step
    bound: float = 2.0  # on what ν is asked to move by, before the rate
    start: float = 10.0  # steps that look for the scale
    start_change: float = 0.1  # κ that they look for
    start_bound: float = 3.0  # on a step of ν among them
    growth: float = 0.5  # share of a growing length scale by which the radius grows
    growth_bound: float = 1.2
    memory: float = 0.9  # decay of the average of the length scale
    most_change: float = 0.7  # relative change above which the radius falls
    early_change: float = 0.6  # κ above which it falls early
    early: float = 0.3  # share of the steps that are early

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"{field.name} must be a positive finite number, not {value!r}")


class AutoRadius(Radius):
    learns = False
    moves = True
    compares = True

    #: What is remembered of a radius, in the order of :attr:`memory`.
    COLUMNS = ("log_rho", "steps", "trend", "mean_trend")

    def __init__(
        self,
        steps: int = 1000,
        *,
        rho: float = 0.005,
        per_group: bool = False,
        constants: AutoConstants | None = None,
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be the number of steps of the training, at least 1, not {steps!r}")
        if not (check_rho(rho) > 0):
            raise ValueError(f"rho, the radius of the first step, must be above 0, not {rho}")
        self.steps, self.rho, self.per_group = steps, check_rho(rho), per_group
        self.constants = constants or AutoConstants()
        self._memory = torch.zeros(0, len(self.COLUMNS), dtype=torch.float64, device="cpu")
        self._metrics: dict[str, Tensor] = {}

    # ---- the radius ------------------------------------------------------------------------------------------------

    def check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        super().check_groups(groups)
        known = {self.rho, *(float(v) for v in self._memory[:, 0].exp())} if len(self._memory) else {self.rho}
        if any(float(group["rho"]) not in known for group in groups):
            raise ValueError("a group has its own rho, but rho='auto' finds it: leave it out of the group")

    def bind(self, groups: Sequence[dict[str, Any]], device: torch.device) -> None:
        self.check_groups(groups)
        missing = (len(groups) if self.per_group else 1) - len(self._memory)
        if missing > 0:
            new = torch.zeros(missing, len(self.COLUMNS), dtype=torch.float64, device=device)
            new[:, 0] = math.log(self.rho)
            self._memory = torch.cat([self._memory.to(device), new])
        self._publish(groups)

    def check_passes(self, sync_perturbation: bool, direction: Direction, samples: Samples) -> None:
        if not direction.needs_gradient:
            raise ValueError(
                "rho='auto' compares a step's two gradients, and this direction takes one: give it a number"
            )
        if not sync_perturbation:
            raise ValueError(
                "rho='auto' compares two gradients of the whole batch, and with sync_perturbation=False the first is "
                "one rank's: leave one of the two out"
            )
        if direction.starts or not (samples.first_is_whole and samples.second_is_whole):
            warnings.warn(
                "rho='auto' takes the difference of the two gradients for what the perturbation changes, and in this "
                "method they differ in more than that (where or from which samples they are taken): the radius may "
                "come out too small. Give rho a number instead",
                CurvatureWarning,
                stacklevel=2,
            )

    def to(self, device: torch.device) -> None:
        self._memory = self._memory.to(device)

    @property
    def memory(self) -> Tensor:
        return self._memory

    @property
    def shared(self) -> bool:
        return not self.per_group

    def _row(self, group: int) -> int:
        return group if self.per_group else 0

    def _publish(self, groups: Sequence[dict[str, Any]]) -> None:
        radii = self._memory[:, 0].exp().unbind()
        for index, group in enumerate(groups):
            group["rho"] = radii[self._row(index)]

    def value(self, index: int, group: dict[str, Any], step: int) -> float | Tensor:
        group["rho"] = self._memory[self._row(index), 0].exp()
        return group["rho"]

    def present(self, index: int, group: dict[str, Any]) -> float | Tensor:
        row = self._row(index)
        return self._memory[row, 0].exp() if row < len(self._memory) else group["rho"]

    def not_capturable(self) -> str | None:
        return None

    def metrics(self) -> dict[str, Tensor]:
        return self._metrics

    # ---- the rule --------------------------------------------------------------------------------------------------

    def compare(self, products: Tensor, unit: Tensor, gate: Tensor, groups: Sequence[dict[str, Any]]) -> None:
        new, self._metrics = self._next(products, unit)
        ok = torch.isfinite(new).all(dim=1, keepdim=True) & (gate != 0)
        self._memory.copy_(torch.where(ok, new, self._memory))
        self._publish(groups)

    def _next(self, products: Tensor, unit: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        c = self.constants
        nu, t, trend, mean = self._memory.unbind(dim=1)
        perturbed, across, first = products.unbind(dim=1)
        squared = (perturbed - 2 * across + first).clamp(min=0)
        log_kappa = (squared / first).log() / 2
        log_change = (squared / torch.maximum(perturbed, first)).log() / 2
        length = log_kappa - nu  # log of the gradient's relative change by a radius of 1
        trend = torch.where(t == 0, length, c.memory * trend + (1 - c.memory) * length)
        up = (math.log(c.change) - log_change + c.weight * (math.log(c.prior) - nu - unit.log())) / (1 + c.weight)

        seeking = t < c.start
        k = torch.minimum(up, math.log(c.start_change) - log_kappa)
        found = (k / (1 + t)).clamp(-c.start_bound, c.start_bound)

        later = t - c.start  # steps of which `mean` is the mean
        mean = torch.where(seeking, trend, mean + (trend - mean) / (later + 1))
        up = up + (c.growth * (trend - mean)).clamp(max=c.growth_bound)
        up = torch.minimum(up, math.log(c.most_change) - log_change)
        early = torch.where(t < c.early * self.steps, math.log(c.early_change) - nu - trend, torch.inf)
        up = torch.minimum(up, early)
        nu = nu + torch.where(seeking, found, c.rate * up.clamp(-c.bound, c.bound))
        metrics = {"relative_change": log_change.exp(), "cosine": across / (perturbed * first).sqrt()}
        return torch.stack([nu, t + 1, trend, mean], dim=1), {
            name: value[0] if len(value) == 1 else value for name, value in metrics.items()
        }

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A list of 0-d tensors, one for each radius, under each name of :attr:`COLUMNS`."""
        return {
            name: [value.clone() for value in column.unbind()]
            for name, column in zip(self.COLUMNS, self._memory.unbind(dim=1), strict=True)
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        super().check_state_dict(state)
        for name in self.COLUMNS:
            check_numbers(state[name], len(self._memory), name)

    def load_state_dict(self, state: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
        columns = [torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in state[name]]) for name in self.COLUMNS]
        self._memory.copy_(torch.stack(columns, dim=1))
        self._publish(groups)


def as_radius(rho: RadiusLike) -> Radius:
    """What ``rho`` stands for in a constructor.

    Raises:
        TypeError: it is neither a number nor a radius nor ``"auto"``.
        ValueError: it is a number that is no radius.
    """
    if isinstance(rho, Radius):
        return rho
    return AutoRadius() if isinstance(rho, str) and rho == "auto" else ConstantRadius(rho)
