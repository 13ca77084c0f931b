"""How far to perturb: the radius part of a method, constant or scheduled. Radii that move are in learning/."""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lets_kernels.parts.part import at_least_one, share
from lets_kernels.parts.passes import Moment


class RadiusWarning(UserWarning):
    """A radius does not move, or the gradients it uses do not tell what it needs.

    Examples:
        >>> opt = LETSSAM([w], SGD, rho=0.05, lr=0.1)
        >>> loss = closure()
        >>> with opt.perturbed():
        ...     loss = closure()
        >>> opt.step()
        >>> opt.radius_step(closure, closure)  # ten steps without it, and the warning says that ρ has not moved
    """


def check_rho(rho: Any) -> float:
    """ρ as a float; ``TypeError`` if ρ is no number, ``ValueError`` if ρ is negative or not finite."""
    if type(rho) is not float and (not isinstance(rho, (Real, Tensor)) or isinstance(rho, bool)):
        raise TypeError(f"rho must be a number, a Radius or 'auto', not {rho!r}")
    value = float(rho)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"rho must be a finite number >= 0, not {value}")
    return value


def radii(values: Sequence[float | Tensor]) -> list[Tensor]:
    """Several ρ as 0-d float64 tensors on one device: the first accelerator among theirs. Nothing waits for it."""
    away = [v.device for v in values if isinstance(v, Tensor) and v.device.type != "cpu"]
    device = away[0] if away else torch.device("cpu")
    return [
        v.detach().to(device, torch.float64).reshape(())
        if isinstance(v, Tensor) and v.device.type != "cpu"
        else torch.full((), float(v), dtype=torch.float64, device=device)
        for v in values
    ]


class Radius:
    """Base class: gives each group its ρ at every step.

    Examples:
        >>> class Halving(Radius):
        ...     rho = 0.8
        ...     def value(self, index, group, moment):
        ...         group["rho"] = self.rho / 2**moment.step
        ...         return group["rho"]
        >>> opt = SAM([w], SGD, rho=Halving(), lr=0.1)
        >>> for _ in range(3):
        ...     loss = opt.step(closure)
        >>> opt.rho.item()
        0.2
    """

    #: True for a radius that steps move: it belongs to one optimizer, and is the same on all ranks.
    moves = False
    #: True if the radius learns from closures called at the new weights; ``step`` then takes a validation closure.
    learns = False
    #: The ``rho`` that the constructor of an optimizer writes into groups without their own.
    rho: float = 0.0
    #: True once an optimizer has taken the radius.
    bound = False
    #: Names of the tensors that are kept for the radius, for every parameter from step to step.
    held: Sequence[str] = ()

    def check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Raise what ``bind`` would raise, and change nothing; ``groups`` are all groups, old and new."""
        for group in groups:
            check_rho(group["rho"])

    def bind(self, groups: Sequence[dict[str, Any]], device: torch.device) -> None:
        """Called when groups are set or added; each group has its ``rho``."""
        self.check_groups(groups)

    def value(self, index: int, group: dict[str, Any], moment: Moment) -> float | Tensor:
        """ρ of one group at the present step: a float, or a 0-d tensor on any device.

        ``moment`` has the step's number and, on the device, the first gradients with ‖g‖² and the loss.
        """
        raise NotImplementedError

    def present(self, index: int, group: dict[str, Any]) -> float | Tensor:
        """ρ of one group after the last step, for ``SAM.rho``; does not wait for the device."""
        return group["rho"]

    def not_capturable(self) -> str | None:
        """Why a step with this radius cannot be captured in a CUDA graph, in words; None if it can be."""
        return f"{type(self).__name__} may give another rho at every step, and a graph keeps the first"

    def to(self, device: torch.device) -> None:
        """The parameters have moved to a device: move the radius's tensors there too."""

    @property
    def shared(self) -> bool:
        """True if all groups have the same radius by construction."""
        return False

    def metrics(self) -> dict[str, Tensor]:
        return {}

    # State.

    def make_state(self) -> None:
        """Make now what a first step would add to ``state_dict``, for tools that load a state key by key."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ``ValueError`` if ``load_state_dict`` could not take this state; changes nothing."""
        if not isinstance(state, dict) or state.keys() != self.state_dict().keys():
            raise ValueError(f"the state is that of another kind of radius than {type(self).__name__}")

    def load_state_dict(self, state: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None: ...


#: What optimizers take for ``rho``: a number ≥ 0, a radius, or ``"auto"`` for :class:`lets_kernels.AutoRadius`.
RadiusLike: TypeAlias = float | Literal["auto"] | Radius


class ConstantRadius(Radius):
    """ρ is the group's: ``group["rho"]`` may be changed at any time, by hand or by a scheduler of your own.

    It may be a 0-d tensor. A tensor on an accelerator is read there, so nothing waits for it, and its value is not
    checked; only the norm of the gradient is. A captured CUDA graph follows what is written into the tensor; a float is
    fixed in the graph.

    Examples:
        >>> opt = SAM([w], SGD, rho=ConstantRadius(0.05), lr=0.1)  # what rho=0.05 makes
        >>> opt.param_groups[0]["rho"] = 0.1
        >>> opt.rho.item()
        0.1
    """

    def __init__(self, rho: float) -> None:
        self.rho = check_rho(rho)

    def value(self, index: int, group: dict[str, Any], moment: Moment) -> float | Tensor:
        rho = group["rho"]
        if isinstance(rho, Tensor) and rho.device.type != "cpu":
            return rho.detach().reshape(())
        return check_rho(rho)

    def not_capturable(self) -> str | None:
        return None


class ScheduledRadius(Radius):
    """ρ as a function of the step number, the same for all groups.

    Args:
        schedule: takes the step number (from 0; the optimizer counts and saves it) and returns ρ ≥ 0. It runs on the
            host, so a step with it cannot be captured in a CUDA graph: write ρ into a tensor on the device instead
            (:class:`ConstantRadius`).

    Examples:
        >>> opt = SAM([w], SGD, rho=ScheduledRadius.linear(0.0, 0.1, steps=2), lr=0.1)
        >>> seen = []
        >>> for _ in range(4):
        ...     loss = opt.step(closure)
        ...     seen.append(opt.rho.item())
        >>> seen
        [0.0, 0.05, 0.1, 0.1]
    """

    def __init__(self, schedule: Callable[[int], float]) -> None:
        self.schedule = schedule
        self.rho = self._present = check_rho(schedule(0))

    def check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        super().check_groups(groups)
        if any(float(group["rho"]) not in (self.rho, self._present) for group in groups):
            raise ValueError("a group has its own rho, but a scheduled radius is the same for all groups")

    def value(self, index: int, group: dict[str, Any], moment: Moment) -> float | Tensor:
        group["rho"] = self._present = check_rho(self.schedule(moment.step))
        return self._present

    def not_capturable(self) -> str | None:
        return "ScheduledRadius computes rho on the host; write it into group['rho'], a tensor on the device, instead"

    def load_state_dict(self, state: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
        self._present = float(groups[0]["rho"])

    @classmethod
    def linear(cls, start: float, end: float, steps: int) -> "ScheduledRadius":
        """From ``start`` to ``end`` in equal parts over ``steps`` steps, ``end`` from then on."""
        return cls(_Ramp(check_rho(start), check_rho(end), steps, cosine=False))

    @classmethod
    def cosine(cls, start: float, end: float, steps: int) -> "ScheduledRadius":
        """From ``start`` to ``end`` along half a cosine over ``steps`` steps, ``end`` from then on."""
        return cls(_Ramp(check_rho(start), check_rho(end), steps, cosine=True))

    @classmethod
    def trapezoid(cls, rho: float, steps: int, *, warmup: float = 0.05, decay: float = 0.2) -> "ScheduledRadius":
        """Up to ``rho`` in equal parts, constant, and down to 0 along half a cosine; 0 from then on.

        The first step has one part, not 0.

        Args:
            rho: the radius between the two.
            steps: the number of steps of the whole training.
            warmup: the share of ``steps`` for the rise, in [0, 1].
            decay: the share of ``steps`` for the fall; with ``warmup`` at most 1.

        Raises:
            ValueError: a share is outside of [0, 1], or both together are more than 1.
        """
        return cls(_Trapezoid(check_rho(rho), steps, warmup, decay))


class LearningRateRadius(Radius):
    """ρ linear in the learning rate η: ρ_min + (ρ_max − ρ_min)(η − η_min)/(η_max − η_min) (GSAM: Zhuang et al., 2022).

    Each group uses its own ``lr``, which a scheduler of the base optimizer moves. A learning rate outside of the bounds
    gives the ρ of the nearer bound.

    Args:
        rho_max: ρ at the learning rate ``lr_max``.
        rho_min: ρ at ``lr_min``.
        lr_max: None takes each group's ``initial_lr``, or its learning rate when the optimizer is built.
        lr_min: the smallest learning rate.

    Raises:
        ValueError: a bound is negative or not finite, or ``lr_max`` is not above ``lr_min``.

    Examples:
        >>> opt = SAM([w], SGD, rho=LearningRateRadius(rho_max=0.1), lr=0.1)
        >>> opt.param_groups[0]["lr"] = 0.05  # as a scheduler would
        >>> loss = opt.step(closure)
        >>> opt.rho.item()
        0.05
    """

    def __init__(
        self, rho_max: float = 0.05, rho_min: float = 0.0, *, lr_max: float | None = None, lr_min: float = 0.0
    ) -> None:
        self.rho_max, self.rho_min = check_rho(rho_max), check_rho(rho_min)
        self.lr_max, self.lr_min, self.rho = lr_max, float(lr_min), self.rho_max
        self._highest: list[float] = []
        self._present: dict[int, float] = {}  # ρ of each group, as it shows it now

    def check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        super().check_groups(groups)
        for group in groups:
            rho = group["rho"]
            if not isinstance(rho, Tensor) and float(rho) not in (self.rho, *self._present.values()):
                raise ValueError("a group has its own rho, but this radius computes it from the learning rate")
            if "lr" not in group:
                raise ValueError("LearningRateRadius needs the learning rate: the base optimizer's groups have no 'lr'")

    def bind(self, groups: Sequence[dict[str, Any]], device: torch.device) -> None:
        super().bind(groups, device)
        for group in groups[len(self._highest) :]:
            top = float(group.get("initial_lr", group["lr"]) if self.lr_max is None else self.lr_max)
            if top <= self.lr_min:
                raise ValueError(f"lr_max must be above lr_min, but is {top}, and lr_min is {self.lr_min}")
            self._highest.append(top)

    def value(self, index: int, group: dict[str, Any], moment: Moment) -> float | Tensor:
        lr, top = group["lr"], self._highest[index]
        done: float | Tensor
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            done = ((lr.detach().double().reshape(()) - self.lr_min) / (top - self.lr_min)).clamp(0.0, 1.0)
        else:
            done = min(max((float(lr) - self.lr_min) / (top - self.lr_min), 0.0), 1.0)
        group["rho"] = self.rho_min + (self.rho_max - self.rho_min) * done
        if not isinstance(done, Tensor):
            self._present[index] = group["rho"]
        return group["rho"]

    def not_capturable(self) -> str | None:
        return "LearningRateRadius computes rho from the learning rate on the host; write it into group['rho'] instead"

    def state_dict(self) -> dict[str, Any]:
        return {"lr_max": list(self._highest)}

    def check_state_dict(self, state: dict[str, Any]) -> None:
        super().check_state_dict(state)
        found = state["lr_max"]
        if not isinstance(found, (list, tuple)) or len(found) != len(self._highest):
            raise ValueError(f"the state does not hold one lr_max for each of {len(self._highest)} groups")

    def load_state_dict(self, state: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
        self._highest = [float(value) for value in state["lr_max"]]
        self._present = {i: float(group["rho"]) for i, group in enumerate(groups)}


class _Ramp:
    """A schedule that can be pickled."""

    def __init__(self, start: float, end: float, steps: int, cosine: bool) -> None:
        at_least_one(steps, "steps")
        self.start, self.end, self.steps, self.cosine = start, end, steps, cosine

    def __call__(self, step: int) -> float:
        done = min(step / self.steps, 1.0)
        if self.cosine:
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


class _Trapezoid:
    """A schedule that can be pickled."""

    def __init__(self, rho: float, steps: int, warmup: float, decay: float) -> None:
        self.rho, self.steps = rho, at_least_one(steps, "steps")
        self.rise, self.fall = share(warmup, "warmup") * steps, share(decay, "decay") * steps
        if self.rise + self.fall > steps:
            raise ValueError(f"warmup and decay must be at most 1 together, not {warmup} and {decay}")

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return 0.0
        left = (self.steps - step) / self.fall if self.fall else 1.0
        down = (1 - math.cos(math.pi * min(left, 1.0))) / 2
        return self.rho * min((step + 1) / self.rise if self.rise else 1.0, 1.0) * down
