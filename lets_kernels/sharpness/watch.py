"""Sharpness and the generalisation gap while a model trains."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lets_kernels.sharpness.objective import Objective


@dataclass(frozen=True)
class Gap:
    """The generalisation gap, test − train, and the two mean losses it is made of."""

    train: float
    test: float

    @property
    def value(self) -> float:
        return self.test - self.train


def generalisation_gap(train: Objective, test: Objective) -> Gap:
    """Mean losses on training and on test data at the present weights: one forward pass over each."""
    return Gap(train.loss(), test.loss())


@dataclass
class Watch:
    """Measures every so many steps, and records what it found and what it cost: call it after each training step.

    Args:
        measures: by name, what to measure: functions without arguments that return a number.
        every: steps from one record to the next. The first record is at the first call, so a watch that is called once
            before training has the start, too.

    Attributes:
        records: a dict for each measurement: "step" (calls before it), the names of the measures, and "seconds".

    Raises:
        ValueError: ``every`` is less than 1, or a measure has the name of a record's own entry.
    """

    measures: Mapping[str, Callable[[], float]]
    every: int = 1
    records: list[dict[str, float]] = field(default_factory=list)
    _calls: int = 0
    _began: float | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}")
        taken = {"step", "seconds"} & set(self.measures)
        if taken:
            raise ValueError(f"a measure cannot be called {taken.pop()!r}: each record has an entry of that name")

    def __call__(self) -> None:
        """A step has been taken."""
        step, self._calls = self._calls, self._calls + 1
        start = time.perf_counter()
        self._began = start if self._began is None else self._began
        if step % self.every == 0:
            found = {name: float(measure()) for name, measure in self.measures.items()}
            self.records.append({"step": step, **found, "seconds": time.perf_counter() - start})

    @property
    def share(self) -> float:
        """Which share of the time since the first call went into measuring."""
        if self._began is None:
            return 0.0
        return sum(record["seconds"] for record in self.records) / (time.perf_counter() - self._began)
