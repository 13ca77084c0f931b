"""ASAM (Kwon et al., ICML 2021)."""

from types import MappingProxyType
from typing import Any

from lets_kernels.methods.catalogue import CODE, OURS, Method
from lets_kernels.parts.direction import Adaptive
from lets_kernels.parts.radius import RadiusLike
from lets_kernels.sam import SAM, BaseLike, Params


class ASAM(SAM):
    """Adaptive SAM: ε = ρ T²g/‖Tg‖ (Kwon et al., ICML 2021, §3).

    Args:
        params, base_optimizer, kwargs: as :class:`SAM`.
        rho: the radius, in the space that T scales.
        xi: ξ of T = |θ| + ξ; a group may have its own.
        filterwise: T = ‖filter‖ + ξ for convolution filters (LETS, 2024, Eq. 7); see :class:`Adaptive`.
        scale_bias: False for T = 1 on biases; see :class:`Adaptive`.

    Examples:
        >>> opt = ASAM([w], SGD, rho=5.0, xi=0.0, lr=0.1)  # T = |θ|: a weight of zero stays where it is
        >>> loss = opt.step(closure)
        >>> print(w.data)
        tensor([1.5789, 0.2713])
    """

    called = MappingProxyType({"eta": "xi"})

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseLike,
        rho: RadiusLike = 0.5,
        xi: float = 0.01,
        *,
        filterwise: bool = False,
        scale_bias: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho, direction=Adaptive(xi, filterwise, scale_bias), **kwargs)


METHODS = (
    Method(ASAM, "ASAM", "Kwon et al., ICML 2021", (Adaptive,))
    .whose(
        rho=CODE,
        xi=f"{CODE} (η there)",
        filterwise=OURS,
        scale_bias="ours, as the paper's equation reads; the authors' code has False",
    )
    .row("ASAM", "rho=0.5, xi=0.01, lr=0.1")
    .row(
        "ASAM, filter-wise",
        "rho=0.5, filterwise=True, lr=0.1",
        remark="transposed convolutions need `model=`",
        paper="LETS, Eq. 7",
    ),
)
