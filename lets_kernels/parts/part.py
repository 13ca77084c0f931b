"""What parts have in common: state from step to step, and checks of the numbers in their arguments.

A number out of its range raises a ``ValueError`` that names the argument.
"""

import math
from collections.abc import Sequence
from typing import Any


class Part:
    """Base class of directions, schedules and descents."""

    #: Names of the tensors that the part keeps for every parameter from step to step.
    held: Sequence[str] = ()

    def state_dict(self) -> dict[str, Any]:
        """Everything else that the part keeps from step to step. The keys are the same at any time.

        The optimizer keeps the step number itself.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def not_negative(value: float, name: str) -> float:
    """Check that the value is a finite number ≥ 0; returns it as a float."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, not {value}")
    return float(value)


def share(value: float, name: str) -> float:
    """Check that the value is a number in [0, 1]; returns it as a float."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], not {value}")
    return float(value)


def at_least_one(value: int, name: str) -> int:
    """Check that the value is an integer ≥ 1; returns it."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
    return int(value)
