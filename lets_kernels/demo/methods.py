"""What the demo compares: the same SGD alone, and inside SAM, ASAM, LETS-SAM and LETS-ASAM."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from lets_kernels import ASAM, LETSASAM, LETSSAM, SAM, LearnedRadius


@dataclass(frozen=True)
class Settings:
    """What all runs share. The radii are the papers' defaults; a learned radius starts where the fixed one stays."""

    epochs: int = 40
    noise: float = 0.4  # share of the training labels that are wrong
    batch_size: int = 64
    lr: float = 0.01  # cosine-annealed to zero
    momentum: float = 0.9
    weight_decay: float = 5e-4
    rho: float = 0.05  # SAM, LETS-SAM
    asam_rho: float = 0.5  # ASAM, LETS-ASAM
    radius_lr: float = 0.03  # of Adam on log(rho); the default, 0.01, moves it little in 800 steps
    radius_lr_end: float = 0.05  # share of radius_lr that is left after the last epoch
    backend: str = "auto"

    @property
    def sgd(self) -> dict[str, Any]:
        """The arguments of the base optimizer."""
        return {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}


Parameters = Iterable[Parameter]


@dataclass(frozen=True)
class Method:
    """A row of the table: how to build the optimizer, and how many gradients it takes for a step."""

    label: str
    gradients: int
    build: Callable[[Parameters, Settings], Optimizer]


def sgd(params: Parameters, settings: Settings) -> Optimizer:
    return SGD(params, **settings.sgd)


def sam(params: Parameters, settings: Settings) -> Optimizer:
    return SAM(params, SGD, rho=settings.rho, backend=settings.backend, **settings.sgd)


def asam(params: Parameters, settings: Settings) -> Optimizer:
    return ASAM(params, SGD, rho=settings.asam_rho, backend=settings.backend, **settings.sgd)


def lets_sam(params: Parameters, settings: Settings, curvature: str) -> Optimizer:
    radius = LearnedRadius(settings.rho, curvature=curvature, lr=settings.radius_lr)
    return LETSSAM(params, SGD, rho=radius, backend=settings.backend, **settings.sgd)


def lets_asam(params: Parameters, settings: Settings, curvature: str) -> Optimizer:
    # Element-wise, as ASAM is: a radius means the same in both.
    radius = LearnedRadius(settings.asam_rho, curvature=curvature, lr=settings.radius_lr)
    return LETSASAM(params, SGD, rho=radius, filterwise=False, backend=settings.backend, **settings.sgd)


METHODS = {
    "sgd": Method("SGD", 1, sgd),
    "sam": Method("SAM", 2, sam),
    "lets-sam-diagonal": Method("LETS-SAM diagonal", 4, lambda p, s: lets_sam(p, s, "diagonal")),
    "lets-sam-secant": Method("LETS-SAM secant", 4, lambda p, s: lets_sam(p, s, "secant")),
    "asam": Method("ASAM", 2, asam),
    "lets-asam-diagonal": Method("LETS-ASAM diagonal", 4, lambda p, s: lets_asam(p, s, "diagonal")),
    "lets-asam-secant": Method("LETS-ASAM secant", 4, lambda p, s: lets_asam(p, s, "secant")),
}
