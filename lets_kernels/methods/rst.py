"""RST, also called SS-SAM (Zhao et al., 2022)."""

from collections.abc import Iterable
from typing import Any

import torch

from lets_kernels.methods.page import AS_SAM, OURS, Method, Row
from lets_kernels.parts.radius import RadiusLike
from lets_kernels.parts.schedule import Bernoulli
from lets_kernels.sam import SAM


class RST(SAM):
    """Randomised sharpness-aware training: a SAM step with probability p, else a step of the base optimizer.

    Zhao et al., 2022 (RST; also published as SS-SAM). For the shapes of its schedules see
    :class:`~lets_kernels.Bernoulli`.

    Args:
        params, base_optimizer, rho, kwargs: as :class:`SAM`.
        p: the probability, of the first step where there is an ``end``.
        end, steps, shape: a probability that changes over training; see :class:`~lets_kernels.Bernoulli`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer,
        rho: RadiusLike = 0.05,
        p: float = 0.5,
        *,
        end: float | None = None,
        steps: int | None = None,
        shape: str = "constant",
        **kwargs: Any,
    ) -> None:
        schedule = Bernoulli(p, end=end, steps=steps, shape=shape)
        super().__init__(params, base_optimizer, rho, schedule=schedule, **kwargs)


METHODS = (
    Method(
        RST,
        "RST",
        key="rst",
        paper="Zhao et al., 2022",
        parts=(Bernoulli,),
        defaults={
            "rho": AS_SAM,
            "p": OURS,
            "end": "none: p stays",
            "steps": "none: a p that changes needs it",
            "shape": "p stays",
        },
        rows=(Row("RST / SS-SAM", "rho=0.05, p=0.5, lr=0.1", gradients="1 + p"),),
    ),
)
