"""What sets the radius of a number of runs, row by row: a number, a ramp, or the package's own AutoRadius."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from benchmarks.experiments.contenders import ADAPTIVE_RHO, RAMP, RHO
from lets_kernels import AutoConstants, AutoRadius


class Fixed:
    """ρ, or a radius that rises to it over a share ``ramp`` of the steps."""

    def __init__(self, rho: float, ramp: float = 0.0) -> None:
        self._rho, self._ramp = rho, ramp

    def begin(self, runs: int, steps: int) -> None:
        self._runs, self._rise = runs, max(1.0, self._ramp * steps)

    def rho(self, step: int) -> Tensor:
        return torch.full((self._runs,), self._rho * min(1.0, (step + 1) / self._rise), dtype=torch.float64)

    def compare(self, products: Tensor, lr: float) -> None: ...


class Auto:
    """An AutoRadius whose param groups are the runs; see there for ``products``.

    Args:
        rho: the first radius.
        by_lr: False hides the learning rate from it, so that what it averages fades equally fast at every step.
        constants: those of AutoConstants that are to be others.
    """

    def __init__(self, rho: float = 0.005, by_lr: bool = True, **constants: Any) -> None:
        self._first, self._by_lr, self._constants = rho, by_lr, AutoConstants(**constants)

    def begin(self, runs: int, steps: int) -> None:
        self.radius = AutoRadius(self._first, per_group=True, constants=self._constants)
        self._groups: list[dict[str, Any]] = [{"rho": self._first, "lr": 1.0} for _ in range(runs)]
        self.radius.bind(self._groups, torch.device("cpu"))

    def rho(self, step: int) -> Tensor:
        return self.radius.memory[:, 0].exp()

    def compare(self, products: Tensor, lr: float) -> None:
        for group in self._groups:
            group["lr"] = lr if self._by_lr else 1.0
        self.radius.compare(products, torch.ones(()), self._groups)


Rule = Fixed | Auto
Rules = dict[str, Callable[[], Rule]]


def _fixed(grid: tuple[float, ...]) -> Rules:
    return {f"fixed {rho:g}": lambda rho=rho: Fixed(rho) for rho in grid}


def _variants() -> Rules:
    """One constant at a time, half and twice as large; of a decay, how much it forgets at a step."""
    found: Rules = {}
    for field in fields(AutoConstants):
        for times in (0.5, 2.0):
            value = times * field.default if not field.name.endswith("decay") else 1 - times * (1 - field.default)
            value = round(value, 6) if field.name != "start" else int(value)
            found[f"{field.name} {value:g}"] = lambda name=field.name, value=value: Auto(**{name: value})
    for value in (0.5, 0.75):
        found[f"most_change {value:g}"] = lambda value=value: Auto(most_change=value)
    found["without the headway"] = lambda: Auto(slope=1e-9)
    found["without the cap"] = lambda: Auto(most_change=1e9)
    found["without the learning rate"] = lambda: Auto(by_lr=False)
    found["first radius 0.05"] = lambda: Auto(0.05)
    return found


RULE = "the rule"
#: The rule, and from a first radius 200 times as large.
OURS: Rules = {RULE: Auto, "first radius 1": lambda: Auto(1.0)}
REFERENCES = _fixed(RHO)
ADAPTIVE_REFERENCES = _fixed(ADAPTIVE_RHO)
RAMPS: Rules = {f"ramp to {rho:g}": lambda rho=rho: Fixed(rho, RAMP) for rho in (0.1, 0.2)}
VARIANTS = _variants()
