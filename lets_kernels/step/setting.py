"""The settings with which an optimizer was built, and which parts go together."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lets_kernels.around.network import Network
from lets_kernels.learning.auto import AutoRadius
from lets_kernels.learning.learned import LearnedRadius
from lets_kernels.learning.moving import MovingRadius
from lets_kernels.parts.descent import Descent
from lets_kernels.parts.direction import Direction
from lets_kernels.parts.length import Length
from lets_kernels.parts.radius import Radius
from lets_kernels.parts.samples import Samples
from lets_kernels.parts.schedule import Schedule
from lets_kernels.space.distributed import ALONE, Replicas


@dataclass(frozen=True)
class Setting:
    """The parts of the method, and the options. None is replaced later; parts and network keep their own state."""

    direction: Direction
    schedule: Schedule
    descent: Descent
    radius: Radius
    length: Length
    samples: Samples
    network: Network
    replicas: Replicas
    backend: str
    flatten: bool
    check_finite: bool
    rho_warmup: int
    #: The keys that we add to groups, each with its value for groups that do not set it.
    group_keys: Mapping[str, Any]

    #: The radius, if it is one that learns from gradients; and the radius, if it compares a step's two gradients.
    learning: LearnedRadius | None = field(init=False)
    comparing: AutoRadius | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "learning", self.radius if isinstance(self.radius, LearnedRadius) else None)
        object.__setattr__(self, "comparing", self.radius if isinstance(self.radius, AutoRadius) else None)

    @property
    def model(self) -> torch.nn.Module | None:
        return self.network.model

    @property
    def held(self) -> tuple[str, ...]:
        """What the parts keep for every parameter from step to step, by name."""
        return tuple(sorted({*self.direction.held, *self.descent.held, *self.radius.held}))

    def rho_share(self, step: int) -> float:
        """The share of the radius that step number ``step`` uses: below 1 while ``rho_warmup`` lasts."""
        return 1.0 if step >= self.rho_warmup else (step + 1) / self.rho_warmup

    def check(self) -> None:
        """``ValueError`` where two parts of an optimizer, or a part and an option, contradict each other."""
        direction, schedule, descent = self.direction, self.schedule, self.descent
        synced = self.network.sync_perturbation
        length = self.length
        names = {part: type(part).__name__ for part in (direction, schedule, descent, length)}
        if isinstance(self.radius, MovingRadius):
            self.radius.check_passes(synced, direction, self.samples)
        if self.rho_warmup and self.comparing is not None:
            raise ValueError("rho='auto' begins small by itself: leave rho_warmup out")
        if not direction.needs_gradient:
            for part, wanted in (
                (descent, descent.looks_back),
                (schedule, schedule.looks_at_gradient),
                (length, not length.fixed),
            ):
                if wanted:
                    raise ValueError(
                        f"{names[part]} needs a first gradient, and {names[direction]} takes none: a step has one pass "
                        "only"
                    )
            if not synced or self.network.same_rng:
                option = "same_rng=True" if self.network.same_rng else "sync_perturbation=False"
                raise ValueError(
                    f"{option} is about the first of two passes, and {names[direction]} takes one; leave it out"
                )
        if self.network.same_rng and not self.samples.second_is_whole:
            raise ValueError(
                f"same_rng=True with {type(self.samples).__name__}: the forward pass that selects samples uses up the "
                "numbers that the second pass would draw again; leave it out"
            )
        if direction.starts and schedule.looks_at_gradient:
            raise ValueError(
                f"{names[schedule]} decides by the gradient at theta, and {names[direction]} takes the first one at "
                "moved weights: take another schedule"
            )
        if not synced and self.replicas.asked == ALONE:
            raise ValueError("sync_perturbation=False: if one rank skips a step, all must skip it; leave 'alone' out")
        if not synced and not schedule.capturable:
            raise ValueError(
                f"sync_perturbation=False with {names[schedule]}: a step that does not perturb would go along each "
                "rank's own gradient; perturb at every step (schedule=Always()), or leave it out"
            )
        for one, remembers in ((direction, direction.remembers), (length, length.remembers)):
            if not synced and remembers:
                raise ValueError(
                    f"sync_perturbation=False with {names[one]}: it would keep an average, a sum or a mask of each "
                    "rank's own first gradients, but replicas must hold the same one, and a saved state can hold only "
                    "one; leave it out"
                )
        if direction.ascents > 1 and (not synced or self.samples.per_sample):
            what = type(self.samples).__name__ if synced else "sync_perturbation=False"
            raise ValueError(
                f"{names[direction]} takes {direction.ascents} gradients before the last one, and {what} goes with one "
                "alone: leave one of the two out"
            )
        if not synced and descent.looks_back:
            raise ValueError(
                f"sync_perturbation=False with {names[descent]}: it would combine each rank's own first gradient with "
                "the mean of the second ones, and replicas would drift apart; leave it out"
            )
