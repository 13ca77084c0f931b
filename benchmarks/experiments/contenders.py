"""The contenders: how each makes its optimizer. A new one is one more line in ``FAMILIES``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from benchmarks.experiments.radii import RandomWalk, Shuffled
from benchmarks.experiments.tasks import Task
from lets_kernels import ASAM, LETSSAM, SAM, AutoRadius, LearnedRadius, LossEquated, ScheduledRadius
from lets_kernels.parts.radius import Radius

RHO = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
ADAPTIVE_RHO = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
STARTS = (0.005, 0.02, 0.05, 0.2, 0.5, 1.0)
RISES = (0.01, 0.03, 0.1)
RAMP = 0.2  # share of the steps over which a ramp rises


@dataclass(frozen=True)
class Setting:
    """What a contender builds its optimizer for. ``steps`` are its own."""

    task: Task
    model: nn.Module
    steps: int
    seed: int

    def base(self) -> Optimizer:
        return self.task.base(self.model.parameters(), lr=self.task.lr, **self.task.base_options)

    def sam(self, rho: float | Radius, kind: type[SAM] = SAM, **options: Any) -> SAM:
        """The base optimizer inside SAM or another method of the package."""
        return kind(self.model.parameters(), self.base(), rho=rho, seed=self.seed, model=self.model, **options)


Build = Callable[[Setting, float], Optimizer]


@dataclass(frozen=True)
class Family:
    """Contenders that differ in one number.

    Args:
        gradients: that a step takes; 2T gradients are 2T/``gradients`` steps.
        values: the number, one contender each.
        meaning: ``"radius"`` or another ``"setting"``, which somebody has to choose: reported are the best one of a
            task, and the best over all tasks; or ``"start"``, which should not matter: their mean, and the worst.
    """

    name: str
    gradients: int
    build: Build
    values: tuple[float, ...] = ()
    meaning: str = "start"

    def names(self) -> list[str]:
        return [f"{self.name}@{value:g}" for value in self.values] or [self.name]


def _ramp(s: Setting, rho: float) -> SAM:
    return s.sam(ScheduledRadius.linear(0.0, rho, max(1, round(RAMP * s.steps))))


FAMILIES = {
    family.name: family
    for family in (
        Family("base", 1, lambda s, _: s.base()),
        Family("sam", 2, lambda s, rho: s.sam(rho), RHO, "radius"),
        Family("sam-ramp", 2, _ramp, RHO, "radius"),
        Family("asam", 2, lambda s, rho: s.sam(rho, ASAM), ADAPTIVE_RHO, "radius"),
        Family("loss-equated", 2, lambda s, rise: s.sam(rise, length=LossEquated(rho_max=0.2)), RISES, "setting"),
        Family("auto", 2, lambda s, rho: s.sam(AutoRadius(rho)), STARTS),
        Family("auto-asam", 2, lambda s, rho: s.sam(AutoRadius(rho), ASAM), (0.005,)),
        Family("auto-shuffled", 2, lambda s, rho: s.sam(Shuffled(rho, seed=s.seed)), (0.005,)),
        Family("random-walk", 2, lambda s, rho: s.sam(RandomWalk(rho, seed=s.seed)), STARTS),
        Family("lets-next", 2, lambda s, rho: s.sam(LearnedRadius(rho, validation="next", curvature="secant")), STARTS),
        Family("lets-paper", 4, lambda s, rho: s.sam(rho, LETSSAM), STARTS),
        Family("lets-warmup", 4, lambda s, rho: s.sam(rho, LETSSAM, rho_warmup=round(RAMP * s.steps)), STARTS),
    )
}


@dataclass(frozen=True)
class Contender:
    """One member of a family."""

    name: str
    family: Family
    value: float

    def steps(self, task: Task) -> int:
        return max(1, round(2 * task.steps / self.family.gradients))

    def build(self, setting: Setting) -> Optimizer:
        return self.family.build(setting, self.value)


CONTENDERS = {
    name: Contender(name, family, value)
    for family in FAMILIES.values()
    for name, value in zip(family.names(), family.values or (0.0,), strict=True)
}


def chosen(patterns: list[str]) -> list[str]:
    """Contenders by name or by family, in the order of ``CONTENDERS``; ``ValueError`` for what is neither."""
    unknown = [p for p in patterns if p not in CONTENDERS and p not in FAMILIES]
    if unknown:
        raise ValueError(f"no contender {', '.join(unknown)}; there are {', '.join(FAMILIES)}, or one such as sam@0.1")
    return [name for name, one in CONTENDERS.items() if name in patterns or one.family.name in patterns]
