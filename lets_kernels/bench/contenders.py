"""Who takes the step: this package, the SAM that most code uses, the best of eager PyTorch, and installed packages."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lets_kernels.bench import eager
from lets_kernels.ops.declared import OPS
from lets_kernels.sam import SAM

_MOVED = {op.name: len(op.moved[0]) for op in OPS}  # parameter-sized reads and writes


class Stepper(Protocol):
    """A contender on its parameters; it reads gradients from ``p.grad``."""

    def first_step(self) -> object: ...

    def second_step(self) -> object: ...


@dataclass(frozen=True)
class Base:
    """A base optimizer of torch.

    Attributes:
        options: its arguments.
        moved: parameter-sized reads and writes of its step, fused.
        foreach_moved: those of its foreach step, if that is taken for bfloat16: torch 2.13's fused SGD on CPUs computes
            a wrong step there. None: fused for every dtype.
        groups: into how many param groups the parameters are split, the first into the first, and so on in turn.
    """

    name: str
    kind: type[torch.optim.Optimizer]
    options: dict[str, float]
    moved: int
    foreach_moved: int | None = None
    groups: int = 1

    def fused(self, dtype: torch.dtype) -> bool:
        return dtype != torch.bfloat16 or self.foreach_moved is None

    def how(self, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments, and with them which of torch's implementations steps."""
        return {**self.options, "fused" if self.fused(dtype) else "foreach": True}

    def of(self, tensor: int) -> dict[str, float]:
        """The options of this tensor: each group has its own learning rate, from all to half of that of the first,
        and its own weight decay, from once to twice that.
        """
        at = tensor % self.groups / self.groups
        scaled = {"lr": self.options["lr"] * (1 - at / 2), "weight_decay": self.options["weight_decay"] * (1 + at)}
        return {**self.options, **scaled}

    def split(self, params: Sequence[Tensor]) -> list[dict[str, Any]]:
        """The parameters in groups, with the options of each; no group is empty."""
        count = min(self.groups, len(params))
        return [{"params": list(params[i :: self.groups]), **self.of(i)} for i in range(count)]

    def __call__(self, params: Sequence[Tensor]) -> torch.optim.Optimizer:
        return self.kind(self.split(params), **self.how(params[0].dtype))


#: SGD's foreach step: ĝ + λθ 3, μm 2, and two sums of 3.
SGD = Base("SGD", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}, _MOVED["restore_sgd_"], 11)
ADAMW = Base("AdamW", torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 1e-2}, _MOVED["restore_adamw_"])


@dataclass(frozen=True)
class Contender:
    """One way to take a step.

    Attributes:
        make: from parameters, base optimizer and radius.
        what: a line for the reader.
        moved: parameter-sized reads and writes of a step without those of the base optimizer's; None: not known.
        bases: the names of the base optimizers it goes with.
        ours: whether it is this package.
        fuses: whether the base optimizer's step is in its own code, not in torch's.
    """

    name: str
    make: Callable[[list[Tensor], Base, float], Stepper]
    what: str
    moved: int | None
    ours: bool = False
    fuses: bool = False
    bases: tuple[str, ...] = field(default=(SGD.name, ADAMW.name))


def ours(**options: Any) -> Callable[[list[Tensor], Base, float], Stepper]:
    def make(params: list[Tensor], base: Base, rho: float) -> Stepper:
        given: dict[str, Any] = {**base.options, **options}
        return SAM(base.split(params), base.kind, rho, **given)

    return make


def compiled(params: list[Tensor], base: Base, rho: float) -> Stepper:
    return eager.Compiled(params, rho, **base.options)


def packaged(params: list[Tensor], base: Base, rho: float) -> Stepper:
    kind = importlib.import_module("pytorch_optimizer").SAM
    return kind(params, base_optimizer=base.kind, rho=rho, **base.how(params[0].dtype))


DEFAULT = "lets_kernels"
LOOP = "per-tensor loop"
_NORM, _PERTURB = _MOVED["grad_norm"], _MOVED["perturb_"]

#: The finite check reads ĝ once more. The loop writes and reads 1·g and 1·g·scale as well: its T is a factor even where
#: it is one. Copies are two, a sum of two tensors three. Those come last that are left out first.
CONTENDERS = [
    Contender(DEFAULT, ours(), "this package as it comes", _NORM + _PERTURB + _NORM, True, True),
    Contender(
        LOOP,
        eager.PerTensor,
        "a stand-in, written here, for the one-file SAM that most code copies (davda54/sam): a Python loop a pass",
        12,
    ),
    Contender("foreach", eager.Foreach, "torch's lists of tensors, with kept buffers: weights copied away and back", 8),
    Contender(
        "foreach, swapped",
        eager.ForeachSwap,
        "perturbed weights in a second list of tensors, to which p.data points for the second pass",
        4,
    ),
    Contender(
        f"{DEFAULT}, flatten=True",
        ours(flatten=True),
        "this package with the parameters in one buffer",
        _NORM + _PERTURB + _NORM,
        True,
        True,
    ),
    Contender(
        f"{DEFAULT}, check_finite=False",
        ours(check_finite=False),
        "this package without a look at the second gradient for NaN and inf",
        _NORM + _PERTURB,
        True,
        True,
    ),
]
PACKAGE = Contender("pytorch_optimizer", packaged, "pytorch_optimizer.SAM, the installed package", None)
COMPILED = Contender(
    "torch.compile",
    compiled,
    "both passes and SGD's arithmetic, compiled",
    5,
    fuses=True,
    bases=(SGD.name,),
)


def installed(full: bool) -> tuple[list[Contender], list[str]]:
    """Everyone that can take part here, and a line for each that cannot."""
    found, missing = list(CONTENDERS), []
    if importlib.util.find_spec("pytorch_optimizer") is None:
        missing.append("pytorch_optimizer is not installed, so its SAM takes no part: pip install pytorch_optimizer")
    else:
        found.append(PACKAGE)
    if full:
        found.append(COMPILED)
    else:
        missing.append("torch.compile'd eager code takes part with --full: compiling takes minutes")
    return found, missing
