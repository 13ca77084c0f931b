"""Stable SAM (Tan et al., JMLR 2025)."""

from typing import Any

from lets_kernels.methods.catalogue import AS_SAM, Method
from lets_kernels.parts.descent import Renormalized
from lets_kernels.parts.radius import RadiusLike
from lets_kernels.sam import SAM, BaseLike, Params


class StableSAM(SAM):
    """The step goes along (‖g‖/‖ĝ‖) ĝ: SAM's direction, and the length of the gradient at θ.

    Stable SAM (SSAM): Tan, Zhang, Liu, Wang & Hao, JMLR 2025. It has no number of its own. A base
    optimizer that divides by the size of gradients, such as Adam, feels only how the factor changes from step to step.

    Args:
        params, base_optimizer, rho, kwargs: as :class:`SAM`.

    Examples:
        >>> opt = StableSAM([w], SGD, rho=5.0, lr=0.1)
        >>> loss = opt.step(closure)
        >>> print(round((w.data - torch.tensor([3.0, 2.0])).norm().item(), 4))  # lr ‖g‖, with ‖g‖ = 5
        0.5
    """

    def __init__(self, params: Params, base_optimizer: BaseLike, rho: RadiusLike = 0.05, **kwargs: Any) -> None:
        super().__init__(params, base_optimizer, rho, descent=Renormalized(), **kwargs)


METHODS = (
    Method(StableSAM, "Stable SAM", "Tan et al., JMLR 2025", (Renormalized,))
    .whose(rho=AS_SAM)
    .row("Stable SAM", "rho=0.05, lr=0.1"),
)
