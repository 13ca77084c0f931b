"""Methods with a moving average of gradients: Friendly SAM (Li et al., 2024), VaSSO (Li & Giannakis, 2023)."""

from types import MappingProxyType
from typing import Any

from lets_kernels.methods.catalogue import CODE, Method
from lets_kernels.parts.direction import Friendly, Smoothed
from lets_kernels.parts.radius import RadiusLike
from lets_kernels.sam import SAM, BaseLike, Params


class FriendlySAM(SAM):
    """ε along d = g − σm, where m is a moving average of the gradients: d lacks the part that all batches share.

    Li et al., CVPR 2024. The order of the two updates is the one in the authors' code, unless ``update_first`` is True.
    ``adaptive=True`` is ASAM's T along d: ε = ρ T²d/‖Td‖.

    Args:
        params, base_optimizer, rho, kwargs: as :class:`SAM`.
        sigma: σ ≥ 0; 0 is SAM.
        decay: λ in (0, 1).
        update_first: see :class:`~lets_kernels.Friendly`.

    Examples:
        >>> opt = FriendlySAM([w], SGD, rho=5.0, lr=0.1)
        >>> loss = opt.step(closure)  # d of the first step is g: SAM's step; later on it lacks what all batches share
        >>> print(w.data)
        tensor([2.4000, 0.8000])
    """

    called = MappingProxyType({"lmbda": "decay"})

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseLike,
        rho: RadiusLike = 0.05,
        sigma: float = 1.0,
        decay: float = 0.9,
        *,
        update_first: bool = False,
        **kwargs: Any,
    ) -> None:
        direction = Friendly(sigma, decay, update_first=update_first)
        super().__init__(params, base_optimizer, rho, direction=direction, **kwargs)


class VaSSO(SAM):
    """Variance-suppressed SAM: ε = ρ d/‖d‖ along the moving average d ← (1 − θ)d + θg.

    Li & Giannakis, NeurIPS 2023.

    Args:
        params, base_optimizer, rho, kwargs: as :class:`SAM`.
        theta: θ in (0, 1]; 1 is SAM.

    Examples:
        >>> opt = VaSSO([w], SGD, rho=5.0, theta=0.5, lr=0.1)
        >>> loss = opt.step(closure)  # d₀ = g: SAM's step; later steps perturb along the average
        >>> print(w.data)
        tensor([2.4000, 0.8000])
    """

    def __init__(
        self, params: Params, base_optimizer: BaseLike, rho: RadiusLike = 0.05, theta: float = 0.9, **kwargs: Any
    ) -> None:
        super().__init__(params, base_optimizer, rho, direction=Smoothed(theta), **kwargs)


METHODS = (
    Method(FriendlySAM, "Friendly SAM", "Li et al., CVPR 2024", (Friendly,))
    .whose(
        rho=f"{CODE}, in its class (its script has 0.2)",
        sigma=CODE,
        decay=f"{CODE}, in its class (its script has 0.95, one of its logs 0.6, both with ρ = 0.2)",
        update_first=f"{CODE}; the paper's text has the other order",
    )
    .row("Friendly SAM", "rho=0.05, sigma=1.0, lr=0.1", state=1.0),
    Method(VaSSO, "VaSSO", "Li & Giannakis, NeurIPS 2023", (Smoothed,))
    .whose(rho=CODE, theta=f"{CODE}; the paper tunes it between 0.2 and 0.9")
    .row("VaSSO", "rho=0.05, theta=0.9, lr=0.1", state=1.0),
)
