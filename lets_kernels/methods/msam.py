"""Momentum-SAM (Becker, Altrock & Risse, 2024)."""

from typing import Any

from lets_kernels.methods.catalogue import Method
from lets_kernels.parts.direction import Momentum
from lets_kernels.parts.radius import RadiusLike
from lets_kernels.sam import SAM, BaseLike, Params


class MSAM(SAM):
    """ε = −ρ v/‖v‖ along the base optimizer's momentum v: one gradient a step.

    Becker, Altrock & Risse, 2024 (arXiv 2401.12033), Algorithm 1. The perturbation goes on in the direction of the last
    steps. Before the first step v = 0, so the first step is the base optimizer's. The closure is called once, and
    returns the loss at θ + ε. The other call shapes have no first backward: ``opt.first_step()``, forward, backward,
    ``opt.second_step()``. Between steps the weights are θ; the authors' code leaves them at θ + ε.

    Where paper and code (MarlonBecker/MSAM) differ, this class follows the paper: weight decay uses θ, but the code's
    SGD uses θ + ε. The code's AdamW decays after the step, torch's AdamW before it.

    Args:
        params, base_optimizer, kwargs: as :class:`SAM`. The base optimizer must have momentum: see
            :class:`~lets_kernels.Momentum`.
        rho: ρ, the length of ε; 0 is the base optimizer. Useful values are larger than SAM's.

    Raises:
        ValueError: the base optimizer, or one of its groups, has no momentum.

    Examples:
        >>> opt = MSAM([w], SGD, rho=3.0, lr=0.1, momentum=0.9)
        >>> for _ in range(2):  # one gradient a step; in the first there is no momentum yet, and ε = 0
        ...     loss = opt.step(closure)
        >>> opt.metrics()["gradients"].item()
        2
    """

    def __init__(self, params: Params, base_optimizer: BaseLike, rho: RadiusLike = 3.0, **kwargs: Any) -> None:
        super().__init__(params, base_optimizer, rho, direction=Momentum(), **kwargs)


METHODS = (
    Method(MSAM, "MSAM", "Becker et al., 2024", (Momentum,))
    .whose(
        rho="the authors' CIFAR and ImageNet commands' (ViT's configuration has 10, the classes in the code 0.3 "
        "for SGD and 1 for AdamW)"
    )
    .row("MSAM", "rho=3.0, lr=0.1, momentum=0.9", gradients="1", remark="a base optimizer with momentum"),
)
