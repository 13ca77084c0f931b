"""What the demo compares: the same SGD alone, and inside SAM, ASAM, LETS-SAM and LETS-ASAM; the others by name."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from lets_kernels import (
    AESAM,
    ASAM,
    BSAM,
    ESAM,
    GSAM,
    LETSASAM,
    LETSSAM,
    RGSAM,
    RSAM,
    RST,
    SAM,
    AELookSAM,
    DeltaSAM,
    FisherSAM,
    FriendlySAM,
    GradientNormPenalty,
    LearnedRadius,
    LookSAM,
    RandomSAM,
    SparseSAM,
    VaSSO,
)

TRAIN_SIZE = 1280


@dataclass(frozen=True)
class Settings:
    """What all runs share. The radii are the papers' defaults; a learned radius starts where the fixed one stays."""

    epochs: int = 40
    noise: float = 0.4  # share of the training labels that are wrong
    batch_size: int = 64
    lr: float = 0.01  # cosine-annealed to zero
    momentum: float = 0.9
    weight_decay: float = 5e-4
    rho: float = 0.05  # SAM, LETS-SAM, and whatever is not in METHODS
    asam_rho: float = 0.5  # ASAM, LETS-ASAM
    radius_lr: float = 0.03  # of Adam on log(rho); the default, 0.01, moves it little in 800 steps
    radius_lr_end: float = 0.05  # share of radius_lr that is left after the last epoch
    backend: str = "auto"

    @property
    def sgd(self) -> dict[str, Any]:
        """The arguments of the base optimizer."""
        return {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}

    @property
    def steps_per_epoch(self) -> int:
        return -(-TRAIN_SIZE // self.batch_size)


Parameters = Iterable[Parameter]


@dataclass(frozen=True)
class Method:
    """A row of the table: how to build the optimizer, and how many gradients it takes for a step, on average."""

    label: str
    gradients: float
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


def other(kind: type[SAM], **options: Any) -> Callable[[Parameters, Settings], Optimizer]:
    """SGD inside a method of this kind, with SAM's radius; everything else as its paper has it."""
    return lambda params, s: kind(params, SGD, rho=s.rho, backend=s.backend, **options, **s.sgd)


def adaptive_policy(kind: type[SAM]) -> Callable[[Parameters, Settings], Optimizer]:
    return lambda params, s: other(kind, steps=s.epochs * s.steps_per_epoch)(params, s)


def sparse_sam(params: Parameters, settings: Settings) -> Optimizer:
    return other(SparseSAM, interval=settings.steps_per_epoch)(params, settings)


def bsam(params: Parameters, settings: Settings) -> Optimizer:
    # Its momentum is an average, (1 - momentum) times that of SGD, so the same step needs a larger lr.
    return BSAM(
        params,
        rho=settings.rho,
        lr=settings.lr / (1 - settings.momentum),
        data_size=TRAIN_SIZE,
        beta1=settings.momentum,
        weight_decay=settings.weight_decay,
        backend=settings.backend,
    )


#: What the demo runs unless told otherwise.
METHODS = {
    "sgd": Method("SGD", 1, sgd),
    "sam": Method("SAM", 2, sam),
    "lets-sam-diagonal": Method("LETS-SAM diagonal", 4, lambda p, s: lets_sam(p, s, "diagonal")),
    "lets-sam-secant": Method("LETS-SAM secant", 4, lambda p, s: lets_sam(p, s, "secant")),
    "asam": Method("ASAM", 2, asam),
    "lets-asam-diagonal": Method("LETS-ASAM diagonal", 4, lambda p, s: lets_asam(p, s, "diagonal")),
    "lets-asam-secant": Method("LETS-ASAM secant", 4, lambda p, s: lets_asam(p, s, "secant")),
}

#: What it runs if it is named.
OTHERS = {
    "rst": Method("RST", 1.5, other(RST)),
    "looksam": Method("LookSAM", 1.2, other(LookSAM)),
    "ae-sam": Method("AE-SAM", 1.5, adaptive_policy(AESAM)),
    "ae-looksam": Method("AE-LookSAM", 1.5, adaptive_policy(AELookSAM)),
    "gsam": Method("GSAM", 2, other(GSAM)),
    "r-sam": Method("R-SAM", 2, other(RSAM)),
    "r-gsam": Method("R-GSAM", 2, other(RGSAM)),
    "gradient-norm-penalty": Method("Gradient-norm penalty", 2, other(GradientNormPenalty)),
    "random-sam": Method("Random SAM", 1, other(RandomSAM)),
    "friendly-sam": Method("Friendly SAM", 2, other(FriendlySAM)),
    "vasso": Method("VaSSO", 2, other(VaSSO)),
    "fisher-sam": Method("Fisher SAM", 2, other(FisherSAM)),
    "sparse-sam": Method("Sparse SAM", 2, sparse_sam),
    "esam": Method("ESAM", 1.5, other(ESAM)),
    "delta-sam": Method("δ-SAM", 2, other(DeltaSAM)),
    "bsam": Method("bSAM", 2, bsam),
}

ALL = {**METHODS, **OTHERS}
