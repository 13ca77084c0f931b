"""Whether to perturb at a step: the schedule part of a method."""

from typing import Any


class Schedule:
    """Base class. A schedule is asked once a step, before the weights are perturbed."""

    #: True if every step gets the same answer, so that a step can be captured in a CUDA graph and replayed.
    capturable = False

    def perturbs(self, step: int) -> bool:
        """True if step number ``step`` (from 0) perturbs; else it steps along the first gradient."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a schedule carries from step to step, under the same keys at any time.

        The step number itself is kept by the optimizer.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Always(Schedule):
    """Every step perturbs (SAM: Foret et al., ICLR 2021, Algorithm 1)."""

    capturable = True

    def perturbs(self, step: int) -> bool:
        return True
