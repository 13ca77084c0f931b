"""How far to perturb, found during training: ``rho="auto"``.

With some more reads of buffers that are in memory anyway, a step gives two measurements: how much its perturbation
changed the gradient, and whether the gradient still points along the step before:

    κ = ‖ĝ − g‖/‖g‖,    m = ‖ĝ − g‖/max(‖g‖, ‖ĝ‖),    c = −g·Δ/(‖g‖ ‖Δ‖),    Δ = θ_t − θ_{t−1}.

While steps still make headway (c > 0), a large radius only slows them. If steps overshoot (c < 0: training bounces
between the walls of a valley, or fits noise), a large radius helps, and the more steps overshoot the more it helps. So
the radius aims at a change of the gradient that depends on c. All these numbers are without a unit: the scale of the
loss, of the weights and of a direction's T has no influence, nor has the number of steps.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lets_kernels.checks import check_numbers
from lets_kernels.learning.learned import CurvatureWarning
from lets_kernels.learning.moving import Groups, MovingRadius
from lets_kernels.parts.direction import Direction
from lets_kernels.parts.passes import BEFORE
from lets_kernels.parts.radius import ConstantRadius, Radius, RadiusLike, check_rho, radii
from lets_kernels.parts.samples import Samples


@dataclass(frozen=True)
class AutoConstants:
    """The constants of :class:`AutoRadius`; docs/radius.md says how much each of them matters.

    Raises:
        ValueError: a constant is no positive finite number, or a decay is not below 1.

    Examples:
        >>> constants = AutoConstants(change=0.3)  # twice the default: a larger radius where steps make no headway
        >>> opt = SAM([w], SGD, rho=AutoRadius(constants=constants), lr=0.1)
        >>> opt.radius.constants.change
        0.3
    """

    change: float = 0.15  # κ* at c = 0
    slope: float = 20.0  # by how much log κ* falls if c rises by 1
    most_headway: float = 0.1  # from this c on κ* falls no further, so that no perturbation is lost in rounding
    most_change: float = 0.6  # above this m the radius falls, whatever c is
    rate: float = 0.15  # the share of the wanted change of ν that a step makes
    bound: float = 2.0  # on the wanted change of ν, before the rate
    headway_decay: float = 0.98  # decay of the average of c, at the highest learning rate so far
    length_decay: float = 0.9  # decay of the average of log κ − ν
    start: int = 10  # number of first steps, which look for the scale of ρ
    start_change: float = 0.1  # the κ that these first steps aim at
    start_bound: float = 3.0  # on the change of ν in each of these first steps

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"{field.name} must be a positive finite number, not {value!r}")
            if field.name.endswith("decay") and value >= 1:
                raise ValueError(f"{field.name} must be below 1, not {value!r}")


#: ν stays between the logarithms of these two: if the loss has no curvature, no κ tells ν where to stop.
_LEAST, _MOST = 1e-6, 1e2
#: Stands for log κ if the perturbation did not change the gradient.
_NOTHING = -50.0


class AutoRadius(MovingRadius):
    """ρ = exp(ν) without a number to choose, with two gradients a step: ``rho="auto"``. It is ours; there is no paper.

    In the first steps, t < 10, ν moves so that κ becomes 0.1, whatever the first radius was:
    ν ← ν + clip(log(0.1/κ)/(1 + t), ±3). Then, with averages c̄ of c and ℓ̄ of log κ − ν,

        ν ← ν + 0.15 clip(min(log 0.15 − 20 min(c̄, 0.1) − ℓ̄ − ν, log(0.6/m)), ±2).

    The decay of c̄ is 0.98^(η/η_max) a step, so that c̄ changes less and less as the learning rate η falls to zero. A
    step that is skipped, or does not perturb, changes nothing. Everything happens on the device; nothing waits.

    The first gradient is kept through the second pass. The weights before the last step are kept too, in the buffer
    from which perturbations are undone; the state dict holds them (one tensor as large as each parameter). A step reads
    four parameter-sized buffers more than a step with a fixed radius, or three if T = 1.

    ``metrics()`` has ``relative_change`` (m), ``headway`` (c̄) and ``aimed_rho``, the radius at which the rule aims.

    Args:
        rho: the radius of the first step; it matters only for that step.
        per_group: one radius for each param group, from the products of the group's own gradients.
        constants: the constants of the rule; the defaults were chosen once, for all tasks together.

    Raises:
        ValueError: ``rho`` is not above 0. When the optimizer is built: the direction takes no first gradient, or there
            is ``rho_warmup`` or ``sync_perturbation=False``.

    Examples:
        >>> opt = SAM([w], SGD, rho="auto", lr=0.1)  # AutoRadius()
        >>> loss = opt.step(closure)
        >>> opt.rho.item() > 0.005  # in the first steps it moves fast, to where a perturbation changes the gradient
        True
        >>> sorted(opt.radius.metrics())
        ['aimed_rho', 'headway', 'relative_change']
    """

    held = (BEFORE,)

    #: The numbers that are remembered for each radius, in the order of the columns of :attr:`memory`.
    COLUMNS = ("log_rho", "steps", "length", "headway", "headway_weight", "highest_lr")

    def __init__(self, rho: float = 0.005, *, per_group: bool = False, constants: AutoConstants | None = None) -> None:
        super().__init__()
        self.rho = check_rho(rho)
        if not self.rho > 0:
            raise ValueError(f"rho, the radius of the first step, must be above 0, not {rho}")
        self.per_group, self.constants = per_group, constants or AutoConstants()
        self._memory = torch.zeros(0, len(self.COLUMNS), dtype=torch.float64, device="cpu")

    # ---- the radius ------------------------------------------------------------------------------------------------

    def check_groups(self, groups: Groups) -> None:
        super().check_groups(groups)
        known = {self.rho, *(float(nu) for nu in self._memory[:, 0].exp())}
        if any(float(group["rho"]) not in known for group in groups):
            raise ValueError("a group has its own rho, but rho='auto' finds it: leave it out of the group")

    def bind(self, groups: Groups, device: torch.device) -> None:
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
                "rho='auto' compares a step's two gradients, and this direction takes one: give rho a number"
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
        """The remembered numbers, float64 of shape [radii, columns]."""
        return self._memory

    def _log(self, k: int) -> Tensor:
        return self._memory[k, 0]

    def _radii(self) -> Sequence[Tensor]:
        return self._memory[:, 0].exp().unbind()

    def not_capturable(self) -> str | None:
        return None

    # ---- the rule --------------------------------------------------------------------------------------------------

    def compare(self, products: Tensor, gate: Tensor, groups: Groups, memory: Tensor | None = None) -> None:
        """Move the radius by what one step shows.

        Args:
            products: ĝ·ĝ, g·ĝ, g·g, g·Δ and Δ·Δ over all ranks, float64 of shape [radii, 5]. Δ is the move of the
                weights since the last step that perturbed, zero if that is not known.
            gate: 0-d, zero if the step is skipped; then nothing may change.
            groups: the param groups.
            memory: what the first rank remembers, which every rank takes over before it moves.
        """
        if memory is not None and memory is not self._memory:
            self._memory.copy_(memory)
        lrs = [group.get("lr", 1.0) for group in (groups if self.per_group else groups[:1])]
        new, metrics = self._next(products, torch.stack(radii(lrs)).to(self._memory.device))
        ok = torch.isfinite(new).all(dim=1, keepdim=True) & (gate != 0)
        self._memory.copy_(torch.where(ok, new, self._memory))
        self._metrics = metrics
        self._publish(groups)

    def _next(self, products: Tensor, lr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The remembered numbers after a step, and the numbers to report. Products that are not finite do not count."""
        c = self.constants
        nu, t, length, headway, weight, highest = self._memory.unbind(dim=1)
        perturbed, across, first, forward, moved = products.unbind(dim=1)
        squared = (perturbed - 2 * across + first).clamp(min=0)
        log_kappa = (squared / first).log().div(2).clamp(min=_NOTHING)
        log_change = (squared / torch.maximum(perturbed, first)).log().div(2).clamp(min=_NOTHING)

        length = torch.where(t == 0, log_kappa - nu, c.length_decay * length + (1 - c.length_decay) * (log_kappa - nu))
        highest, starts = torch.maximum(highest, lr), t < c.start
        kept = c.headway_decay ** torch.where(highest > 0, lr / highest, 0.0)
        kept = torch.where((moved > 0) & ~starts, kept, 1.0)
        weight = kept * weight + (1 - kept)
        present = torch.where(moved > 0, -forward / (first * moved).sqrt(), 0.0)
        headway = headway + (present - headway) * ((1 - kept) / weight.clamp(min=1e-300))

        aimed = math.log(c.change) - c.slope * headway.clamp(max=c.most_headway) - length
        up = torch.minimum(aimed - nu, math.log(c.most_change) - log_change).clamp(-c.bound, c.bound)
        found = ((math.log(c.start_change) - log_kappa) / (1 + t)).clamp(-c.start_bound, c.start_bound)
        nu = (nu + torch.where(starts, found, c.rate * up)).clamp(math.log(_LEAST), math.log(_MOST))

        seen = {"relative_change": log_change.exp(), "headway": headway, "aimed_rho": aimed.exp()}
        metrics = {name: value if self.per_group else value[0] for name, value in seen.items()}
        return torch.stack([nu, t + 1, length, headway, weight, highest], dim=1), metrics

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Under each name of :attr:`COLUMNS`, a list of 0-d tensors, one for each radius."""
        columns = self._memory.clone().unbind(dim=1)
        return {name: list(column.unbind()) for name, column in zip(self.COLUMNS, columns, strict=True)}

    def check_state_dict(self, state: dict[str, Any]) -> None:
        super().check_state_dict(state)
        for name in self.COLUMNS:
            check_numbers(state[name], len(self._memory), f"the radius: {name}")

    def load_state_dict(self, state: dict[str, Any], groups: Groups) -> None:
        for index, name in enumerate(self.COLUMNS):
            for row, value in enumerate(state[name]):
                self._memory[row, index] = value
        self._publish(groups)


def as_radius(rho: RadiusLike) -> Radius:
    """The radius that ``rho`` stands for in a constructor.

    Raises:
        TypeError: ``rho`` is neither a number nor a radius nor ``"auto"``.
        ValueError: ``rho`` is a number that cannot be a radius.
    """
    if isinstance(rho, Radius):
        return rho
    return AutoRadius() if isinstance(rho, str) and rho == "auto" else ConstantRadius(rho)
