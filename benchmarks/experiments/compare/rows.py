"""Who is compared: every row of the catalogue as its line constructs it, and SGD and SAM at its best ρ beside them."""

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import lets_kernels
from benchmarks.experiments.tasks import Task
from lets_kernels import SAM
from lets_kernels.methods import catalogue
from lets_kernels.methods.catalogue import Method

RADII = (0.02, 0.05, 0.1, 0.2, 0.5)
SGD, TWICE, BEST = "SGD", "SGD, twice the steps", "SAM, best ρ"
NAMES = {name: getattr(lets_kernels, name) for name in lets_kernels.__all__}


@dataclass(frozen=True)
class Setting:
    """What an optimizer is built for: ``samples`` is the size of the training set, ``steps`` the row's own number."""

    task: Task
    model: nn.Module
    samples: int
    steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples // self.task.batch_size)


@dataclass(frozen=True)
class Row:
    """One line of the comparison.

    Args:
        call: how it is constructed, with the defaults that count there: another call is another run.
        build: the optimizer; the number is ρ for a row that looks for its best one, and None for the others.
        times: its steps, in multiples of the task's.
        radii: among which ρ is chosen.
    """

    name: str
    call: str
    build: Callable[[Setting, float | None], Optimizer]
    times: int = 1
    radii: tuple[float, ...] = ()


def rows() -> dict[str, Row]:
    """By name: SGD with as many steps, and as many gradients, as SAM; SAM at its best ρ; then the catalogue."""
    found = [
        Row(SGD, "SGD", lambda s, _: base(s)),
        Row(TWICE, "SGD", lambda s, _: base(s), times=2),
        Row(BEST, "SAM(params, SGD, rho=rho)", lambda s, rho: _with(SAM, s, rho=rho), radii=RADII),
        *(_row(method, row) for method in catalogue.methods() for row in method.rows),
    ]
    return {row.name: row for row in found}


def base(s: Setting) -> Optimizer:
    return s.task.base(s.model.parameters(), lr=s.task.lr, **s.task.base_options)


def _row(method: Method, row: catalogue.Row) -> Row:
    defaults = ", ".join(f"{name}={value!r}" for name, value in method.values.items())
    call = f"{method.line(row)}; {defaults}"
    return Row(row.name, call, lambda s, _: _with(method.cls, s, **_arguments(method, row)))


def _arguments(method: Method, row: catalogue.Row) -> dict[str, Any]:
    """The keyword arguments of the row's line."""
    call = ast.parse(method.line(row), mode="eval").body
    assert isinstance(call, ast.Call)
    scope = {**NAMES, "torch": torch}
    return {str(k.arg): eval(compile(ast.Expression(k.value), "<row>", "eval"), scope) for k in call.keywords}


def _with(cls: type[SAM], s: Setting, **written: Any) -> SAM:
    """The arguments as written, but for those that the task knows: learning rate, momentum, steps, samples."""
    takes = inspect.signature(cls).parameters
    known: dict[str, Any] = {"lr": s.task.lr, **s.task.base_options}
    if "base_optimizer" in takes:
        first: tuple[Any, ...] = (s.model.parameters(), s.task.base)
    else:
        # A momentum that is an average, (1 - momentum) times that of SGD, wants a larger lr for the same step.
        first, momentum = (s.model.parameters(),), known.pop("momentum", 0.0)
        known |= {"lr": s.task.lr / (1 - momentum), **({"beta1": momentum} if "beta1" in takes else {})}
    if "steps" in written:
        known["steps"] = s.steps
    if "interval" in takes:
        known["interval"] = s.steps_per_epoch
    if "data_size" in takes:
        known["data_size"] = s.samples
    return cls(*first, **{**written, **known}, seed=s.seed, model=s.model)
