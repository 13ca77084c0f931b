"""Methods with a moving average of gradients: Friendly SAM (Li et al., 2024), VaSSO (Li & Giannakis, 2023)."""

from collections.abc import Iterable
from typing import Any

import torch

from lets_kernels.parts.direction import Friendly, Smoothed
from lets_kernels.parts.radius import RadiusLike
from lets_kernels.sam import SAM


class FriendlySAM(SAM):
    """ε along d = g − σm, with m a moving average of the gradients: without the part that all batches share.

    Li et al., CVPR 2024. State: m, one parameter-sized buffer. Two gradients a step. σ = 1 and λ = 0.9 are
    the paper's; the order of the two updates is that of the authors' code unless ``update_first``.

    Args:
        params, base_optimizer, rho, kwargs: as :class:`SAM`.
        sigma: σ ≥ 0; 0 is SAM.
        decay: λ in (0, 1).
        update_first: see :class:`~lets_kernels.Friendly`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer,
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

    Li & Giannakis, NeurIPS 2023. State: d, one parameter-sized buffer. Two gradients a step. ρ = 0.05;
    the paper takes θ between 0.2 and 0.9.

    Args:
        params, base_optimizer, rho, kwargs: as :class:`SAM`.
        theta: θ in (0, 1]; 1 is SAM.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer,
        rho: RadiusLike = 0.05,
        theta: float = 0.9,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho, direction=Smoothed(theta), **kwargs)
