"""What the demo compares: SGD alone, and the same SGD inside SAM with each kind of radius; other methods by name."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from lets_kernels import ASAM, BSAM, LETSASAM, LETSSAM, SAM, AutoRadius, LearnedRadius, SparseSAM
from lets_kernels.methods import catalogue
from lets_kernels.parts.radius import RadiusLike

TRAIN_SIZE = 1280
RADII = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
STARTS = (0.005, 0.05, 0.5)  # first radii for a radius that moves; rho="auto" begins with the first


@dataclass(frozen=True)
class Settings:
    """The settings that all trainings share."""

    epochs: int = 30
    seeds: int = 2  # trainings of each method and radius, with the seeds 0, 1, ...
    noise: float = 0.4  # share of the training labels that are wrong
    batch_size: int = 64
    lr: float = 0.01  # cosine-annealed to zero
    momentum: float = 0.9
    weight_decay: float = 5e-4
    radii: tuple[float, ...] = ()  # these replace each method's own
    backend: str = "auto"

    @property
    def sgd(self) -> dict[str, Any]:
        """The arguments of the base optimizer."""
        return {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}

    @property
    def steps_per_epoch(self) -> int:
        return -(-TRAIN_SIZE // self.batch_size)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


Parameters = Iterable[Parameter]
Build = Callable[[Parameters, Settings, Any], Optimizer]  # the last argument is the radius; None for SGD


@dataclass(frozen=True)
class Method:
    """How to build the optimizer, and its first radii, unless the command line gives others (SGD has none)."""

    label: str
    build: Build
    radii: tuple[float, ...] = (0.05,)


def sgd(params: Parameters, settings: Settings, rho: None) -> Optimizer:
    return SGD(params, **settings.sgd)


def inside(kind: type[SAM], radius: Callable[[float], RadiusLike] = float, **options: Any) -> Build:
    """SGD inside a method of this kind; every argument that is not given here is the package's default."""
    return lambda params, s, rho: kind(params, SGD, rho=radius(rho), backend=s.backend, **options, **s.sgd)


def as_described(kind: type[SAM]) -> Build:
    """SGD inside a method of which only the constructor is known; if it takes ``steps``, it gets them."""
    steps = inspect.signature(kind).parameters.get("steps")
    if steps is not None and steps.default is steps.empty:
        return lambda params, s, rho: inside(kind, steps=s.steps)(params, s, rho)
    return inside(kind)


def sparse_sam(params: Parameters, settings: Settings, rho: float) -> Optimizer:
    return inside(SparseSAM, interval=settings.steps_per_epoch)(params, settings, rho)


def bsam(params: Parameters, settings: Settings, rho: float) -> Optimizer:
    # Its momentum is an average, (1 - momentum) times that of SGD, so the same step needs a larger lr.
    return BSAM(
        params,
        rho=rho,
        lr=settings.lr / (1 - settings.momentum),
        data_size=TRAIN_SIZE,
        beta1=settings.momentum,
        weight_decay=settings.weight_decay,
        backend=settings.backend,
    )


secant = partial(LearnedRadius, curvature="secant")

#: What the demo trains by default.
METHODS = {
    "sgd": Method("SGD", sgd, ()),
    "sam": Method("SAM", inside(SAM), RADII),
    "sam-auto": Method('SAM rho="auto"', inside(SAM, AutoRadius), STARTS),
    "lets-sam": Method("LETS-SAM", inside(LETSSAM), STARTS),
}

#: Methods that the demo gives arguments for which their constructors have defaults.
SPECIAL = {SparseSAM: sparse_sam, BSAM: bsam}

#: Replaces a larger default radius: in so small a network even SAM fails with a radius from 1.0 on.
LARGEST = 0.5

#: What the demo trains if named: other radii, and then every method of the package, from its default radius.
OTHERS = {
    "lets-sam-secant": Method("LETS-SAM secant", inside(LETSSAM, secant)),
    "asam-auto": Method('ASAM rho="auto"', inside(ASAM, AutoRadius), (0.5,)),
    "lets-asam-secant": Method("LETS-ASAM secant", inside(LETSASAM, secant), (0.5,)),
    **{
        m.key: Method(m.name, SPECIAL.get(m.cls) or as_described(m.cls), (min(m.values["rho"], LARGEST),))
        for m in catalogue.methods()
        if m.key not in METHODS
    },
}

ALL = {**METHODS, **OTHERS}

Task = tuple[str, float | None, int]  # method, first radius, seed


def tasks(methods: list[str], settings: Settings) -> list[Task]:
    """The trainings, the longest first, so that no process idles at the end; names in the order of ALL."""
    return [
        (name, rho, seed)
        for seed in range(settings.seeds)
        for name in reversed(methods)
        for rho in (ALL[name].radii and (settings.radii or ALL[name].radii)) or (None,)
    ]
