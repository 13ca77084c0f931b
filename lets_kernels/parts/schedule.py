"""Which steps perturb: the schedule part of a method."""

import math
from typing import Any

from lets_kernels.parts.part import Part, at_least_one, share
from lets_kernels.parts.passes import Moment


class Schedule(Part):
    """Base class. A schedule is asked once a step, before the weights are perturbed. If it looks at the gradient, it is
    asked again for a step that was given up and is begun again, since the gradient is a new one.

    A subclass has ``perturbs``, or ``decide`` if it needs more than the step's number.

    Examples:
        >>> class Middle(Schedule):  # steps 100 to 199 perturb
        ...     def perturbs(self, step):
        ...         return 100 <= step < 200
        >>> opt = SAM([w], SGD, schedule=Middle(), lr=0.1)
        >>> loss = opt.step(closure)  # a step of SGD
        >>> print(w.data)
        tensor([2.7000, 1.6000])
    """

    #: True if the answer is the same for every step, so that a step can be captured in a CUDA graph and replayed.
    capturable = False
    #: True if the schedule draws random numbers.
    draws = False
    #: True if the first gradient decides; it must then be taken at θ, and be the same on all ranks.
    looks_at_gradient = False

    def perturbs(self, step: int) -> bool:
        """True if step number ``step`` (from 0) perturbs; otherwise the step is along the first gradient."""
        raise NotImplementedError

    def decide(self, moment: Moment) -> bool:
        """Like :meth:`perturbs`, with the gradient and random numbers in ``moment``."""
        return self.perturbs(moment.step)


class Always(Schedule):
    """Every step perturbs (SAM: Foret et al., ICLR 2021, Algorithm 1).

    Examples:
        >>> opt = SAM([w], SGD, schedule=Always(), lr=0.1)  # the default
        >>> for _ in range(3):
        ...     loss = opt.step(closure)
        >>> opt.metrics()["gradients"].item()
        6
    """

    capturable = True

    def perturbs(self, step: int) -> bool:
        return True


class Every(Schedule):
    """Every k-th step perturbs, the first one among them (LookSAM: Liu et al., CVPR 2022).

    Args:
        k: at least 1, which is SAM.

    Raises:
        ValueError: k is below 1.

    Examples:
        >>> schedule = Every(3)
        >>> [schedule.perturbs(step) for step in range(5)]
        [True, False, False, True, False]
        >>> opt = SAM([w], SGD, schedule=schedule, lr=0.1)
    """

    def __init__(self, k: int = 5) -> None:
        self.k = at_least_one(k, "k")

    def perturbs(self, step: int) -> bool:
        return step % self.k == 0


class Tail(Schedule):
    """The last steps of the training perturb, the steps before them do not: late SAM (Zhou et al., ICLR 2025).

    With a share near 1 it is a warm start instead, for a large ρ that fails in the first steps: with ρ = 0.2 the demo's
    task (digits, 40 % wrong labels, three seeds) ends at 94.1 % with f = 0.8, at 15.5 % with f = 1.

    Args:
        steps: T, the number of steps of the whole training. Steps beyond it perturb as the last one does.
        fraction: f in [0, 1]; the last f T steps perturb, to the nearest whole number. 1 is SAM, 0 the base optimizer.

    Raises:
        ValueError: ``steps`` is below 1, or ``fraction`` outside of [0, 1].

    Examples:
        >>> schedule = Tail(steps=4, fraction=0.5)
        >>> [schedule.perturbs(step) for step in range(4)]
        [False, False, True, True]
        >>> opt = SAM([w], SGD, schedule=schedule, lr=0.1)
    """

    def __init__(self, steps: int, fraction: float = 0.125) -> None:
        self.steps, self.fraction = at_least_one(steps, "steps"), share(fraction, "fraction")
        self._perturbed = round(self.fraction * self.steps)

    def perturbs(self, step: int) -> bool:
        return self._perturbed > 0 and step >= self.steps - self._perturbed


SHAPES = ("constant", "linear", "trigonometric")


class Bernoulli(Schedule):
    """A step perturbs with probability p: RST, randomised sharpness-aware training (Zhao et al., 2022).

    All ranks decide alike, and resumed training decides as if it had never been interrupted.

    Args:
        p: the probability at the first step.
        end, steps: if ``shape`` is not ``"constant"``, the probability goes from ``p`` to ``end`` in ``steps`` steps,
            and stays there.
        shape: ``"constant"``, ``"linear"``, or ``"trigonometric"`` (along half a cosine). The bounds of the paper's
            schedules are arguments here: ``p`` and ``end``.

    Raises:
        ValueError: a probability outside [0, 1], or arguments that contradict the shape.

    Examples:
        >>> schedule = Bernoulli(0.2, end=0.6, steps=100, shape="linear")
        >>> print([round(schedule.probability(step), 2) for step in (0, 50, 100, 200)])
        [0.2, 0.4, 0.6, 0.6]
        >>> opt = SAM([w], SGD, schedule=schedule, lr=0.1, seed=0)
    """

    draws = True

    def __init__(
        self, p: float = 0.5, *, end: float | None = None, steps: int | None = None, shape: str = "constant"
    ) -> None:
        if shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, not {shape!r}")
        if (shape == "constant") != (end is None and steps is None):
            raise ValueError("end and steps go with shape='linear' or 'trigonometric', which need both")
        self.p = share(p, "p")
        share(p if end is None else end, "end")
        if shape != "constant" and (end is None or steps is None or steps < 1):
            raise ValueError(f"shape={shape!r} needs end, and steps of at least 1")
        self.end, self.steps, self.shape = end, steps, shape

    def probability(self, step: int) -> float:
        """The probability that step number ``step`` (from 0) perturbs."""
        if self.end is None or self.steps is None:
            return self.p
        done = min(step / self.steps, 1.0)
        if self.shape == "trigonometric":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.p + (self.end - self.p) * done

    def decide(self, moment: Moment) -> bool:
        return moment.uniform() < self.probability(moment.step)


class NormThreshold(Schedule):
    """Perturb if the gradient is large: AE-SAM (Jiang et al., ICLR 2023).

    μ ← δμ + (1 − δ)‖g‖² and σ² ← δσ² + (1 − δ)(‖g‖² − μ)², from zero; the step perturbs if ‖g‖² ≥ μ + cσ, where
    c = (t/T)λ₁ + (1 − t/T)λ₂. The host decides, so each step waits once for the norm. The paper leaves open whether μ
    and σ include the present gradient: here they do. They leave out a gradient that is not finite. They include a
    finite gradient also if its step is given up or skipped later.

    Args:
        steps: T, the number of steps after which c stays at λ₁.
        lambda1, lambda2: λ₁ and λ₂; with -1 and 1 the share of perturbed steps rises over training.
        delta: δ in [0, 1).

    Raises:
        ValueError: an argument is out of its range.

    Examples:
        >>> opt = SAM([w], SGD, schedule=NormThreshold(steps=100), lr=0.1)  # AE-SAM
        >>> loss = opt.step(closure)
        >>> sorted(opt.schedule.state_dict())
        ['mean', 'variance']
    """

    looks_at_gradient = True

    def __init__(self, steps: int, lambda1: float = -1.0, lambda2: float = 1.0, delta: float = 0.9) -> None:
        self.steps = at_least_one(steps, "steps")
        if not 0 <= delta < 1:
            raise ValueError(f"delta must be in [0, 1), not {delta}")
        if not (math.isfinite(lambda1) and math.isfinite(lambda2)):
            raise ValueError(f"lambda1 and lambda2 must be finite, not {lambda1} and {lambda2}")
        self.lambda1, self.lambda2, self.delta = float(lambda1), float(lambda2), float(delta)
        self._mean = self._variance = 0.0

    def decide(self, moment: Moment) -> bool:
        squared = moment.squared_norm()
        if not math.isfinite(squared):
            return False
        self._mean = self.delta * self._mean + (1 - self.delta) * squared
        self._variance = self.delta * self._variance + (1 - self.delta) * (squared - self._mean) ** 2
        done = min(moment.step / self.steps, 1.0)
        c = done * self.lambda1 + (1 - done) * self.lambda2
        return squared >= self._mean + c * math.sqrt(self._variance)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean, "variance": self._variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mean, self._variance = float(state["mean"]), float(state["variance"])
