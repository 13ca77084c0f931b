"""The optimizers of an experiment, by name: ``sgd``, ``auto``, any method of the package, with ``@`` and a radius."""

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lets_kernels import ASAM, LETSSAM, SAM, AutoRadius, LearnedRadius
from lets_kernels.experiment.recipes import Recipe
from lets_kernels.methods import catalogue


@dataclass(frozen=True)
class Setting:
    """What an optimizer is built for; ``steps`` are those of the whole training, ``per_epoch`` those of an epoch."""

    recipe: Recipe
    model: nn.Module
    steps: int
    per_epoch: int
    seed: int

    def base(self) -> Optimizer:
        """The recipe's base optimizer, alone."""
        base: Any = self.recipe.base
        made: Optimizer = base(self.model.parameters(), lr=self.recipe.lr, **self.recipe.options)
        return made


@dataclass(frozen=True)
class Method:
    """How a method makes its optimizer.

    Args:
        label: in tables.
        gradients: that a step takes, for the estimate of the time; a mean where steps differ.
        build: from a setting and ρ.
        rho: the radius, or the first one; None for a base optimizer alone.
        moves: the radius changes in training, by itself.
    """

    label: str
    gradients: float
    build: Callable[[Setting, Any], Optimizer]
    rho: float | None = None
    moves: bool = False


def _inside(kind: type[SAM], radius: Callable[[float], Any] = float, **options: Any) -> Callable[[Setting, Any], SAM]:
    """The base optimizer inside this kind of SAM, with the package's defaults, and its number of steps if it asks."""
    asked = inspect.signature(kind).parameters

    def build(s: Setting, rho: float) -> SAM:
        own = dict(options)
        if "steps" in asked and asked["steps"].default is inspect.Parameter.empty:
            own["steps"] = s.steps
        if "interval" in asked and asked["interval"].default is None:
            own["interval"] = s.per_epoch
        made: Any = kind
        found: SAM = made(s.model.parameters(), s.base(), rho=radius(rho), seed=s.seed, model=s.model, **own)
        return found

    return build


@cache
def methods() -> dict[str, Method]:
    """By name, without a radius: the base optimizer, our own radii, LETS's variants, and then the catalogue."""

    def lets(label: str, gradients: int, **options: Any) -> Method:
        return Method(label, gradients, _inside(LETSSAM, partial(LearnedRadius, **options)), 0.05, True)

    named = {
        "base": Method("base optimizer", 1, lambda s, rho: s.base()),
        "auto": Method('SAM rho="auto"', 2, _inside(SAM, AutoRadius), 0.005, True),
        "asam-auto": Method('ASAM rho="auto"', 2, _inside(ASAM, AutoRadius), 0.005, True),
        "lets-sam-gap": lets("LETS-SAM, gap", 4, metric="gap"),
        "lets-sam-loss": lets("LETS-SAM, validation loss", 3, metric="validation_loss"),
        "lets-sam-secant": lets("LETS-SAM, secant", 4, curvature="secant"),
    }
    for method in catalogue.methods():
        if not method.own_base:
            gradients, moves = _number(method.rows[0].gradients), LearnedRadius in method.parts
            build = _inside(method.cls)
            named.setdefault(method.key, Method(method.name, gradients, build, method.values["rho"], moves))
    return named


def _number(gradients: str) -> float:
    """The catalogue's words, where a number alone does not say it: half more for a share, else as many as SAM takes."""
    if re.fullmatch(r"\d+", gradients):
        return float(gradients)
    return {"1 + 1/k": 1.2, "1 + p": 1.5, "1 to 2": 1.5, "1 + f": 1.1, "1 + k": 3.0}.get(gradients, 1.5)


def label(name: str, recipes: Iterable[Recipe]) -> str:
    """A method's name in a table of these recipes; of the base optimizer alone, its class."""
    return "/".join(dict.fromkeys(r.base.__name__ for r in recipes)) if name == "base" else method(name).label


def method(name: str) -> Method:
    """A method by its name, such as ``sam@0.1``.

    Raises:
        ValueError: there is none of this name, or the radius is no number above 0.
    """
    kind, _, radius = name.partition("@")
    if kind not in methods():
        raise ValueError(f"no method {kind!r}; there are {', '.join(methods())}, with a radius as in sam@0.1")
    found = methods()[kind]
    if not radius:
        return found
    try:
        rho = float(radius)
    except ValueError:
        rho = 0.0
    if found.rho is None or not 0 < rho < float("inf"):
        takes = "takes no radius" if found.rho is None else "takes a radius above 0"
        raise ValueError(f"{name!r}: {kind} {takes}")
    about = "from" if found.moves else "ρ ="
    return replace(found, label=f"{found.label}, {about} {rho:g}", rho=rho)
