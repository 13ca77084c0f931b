"""What parts have in common: what they carry from step to step, and the ranges of the numbers that they take.

A number out of its range is a ``ValueError`` that names the argument.
"""

import math
from collections.abc import Sequence
from typing import Any


class Part:
    """Base class of directions, schedules and descents."""

    #: What it keeps for every parameter from step to step, by name.
    held: Sequence[str] = ()

    def state_dict(self) -> dict[str, Any]:
        """What else it carries from step to step, under the same keys at any time.

        The step number itself is kept by the optimizer.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def not_negative(value: float, name: str) -> float:
    """A finite number ≥ 0, as a float."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, not {value}")
    return float(value)


def share(value: float, name: str) -> float:
    """A number in [0, 1], as a float."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], not {value}")
    return float(value)


def at_least_one(value: int, name: str) -> int:
    """A count from 1."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
    return int(value)
