"""LETS (Wang, Jiang, Fu, Zhang, ECML-PKDD 2024): SAM and ASAM with a learned radius.

LETS is a radius and can be used with every method: ``rho=LearnedRadius(...)``. The two presets follow the paper, with
one exception: Adam at 1e-2 steps ν = log ρ, since the paper's plain SGD at 1e-4 moves ρ by some 1e-11 in hundreds of
steps (:class:`LearnedRadius` has the numbers). From a first ρ of 0.2 on, training never leaves its first plateau, as
with a fixed radius of that size; use ``rho_warmup=`` then. ``SAM(rho="auto")`` needs no first radius, and two gradients
a step.
"""

from typing import Any

from lets_kernels.learning.learned import LearnedRadius
from lets_kernels.methods.asam import ASAM
from lets_kernels.methods.catalogue import Method
from lets_kernels.parts.direction import Adaptive
from lets_kernels.parts.radius import Radius
from lets_kernels.sam import SAM, BaseLike, Params


def _learned(rho: Any, plain: str) -> LearnedRadius:
    if (isinstance(rho, str) and rho == "auto") or (isinstance(rho, Radius) and not isinstance(rho, LearnedRadius)):
        raise ValueError(
            f"LETS{plain} learns its radius as the paper does, from a first radius, a number: for another kind of "
            f"radius use {plain}(rho='auto'), or {plain} with the radius that you mean"
        )
    return rho if isinstance(rho, LearnedRadius) else LearnedRadius(rho)


class LETSSAM(SAM):
    """LETS-SAM: ``SAM(params, base_optimizer, rho=LearnedRadius(rho))``.

    Args:
        params, base_optimizer, kwargs: as :class:`SAM`.
        rho: the first radius ρ_0 > 0, or a :class:`LearnedRadius` with other settings.

    Examples:
        >>> opt = LETSSAM([w], SGD, rho=0.05, lr=0.1)
        >>> loss = closure()
        >>> with opt.perturbed():
        ...     loss = closure()
        >>> opt.step()
        >>> opt.radius_step(closure, closure)  # the loss of a training batch, and of one held out, at the new weights
        >>> opt.rho.item() != 0.05  # it has moved
        True
    """

    def __init__(
        self, params: Params, base_optimizer: BaseLike, rho: float | LearnedRadius = 0.05, **kwargs: Any
    ) -> None:
        super().__init__(params, base_optimizer, _learned(rho, "SAM"), **kwargs)


class LETSASAM(ASAM):
    """LETS-ASAM: ``ASAM(params, base_optimizer, rho=LearnedRadius(rho), filterwise=True)`` (T as in LETS Eq. 7).

    Args:
        params, base_optimizer, xi, filterwise, scale_bias, kwargs: as :class:`ASAM`.
        rho: as :class:`LETSSAM`.

    Examples:
        >>> opt = LETSASAM(model.parameters(), SGD, rho=LearnedRadius(0.5, validation="next"), model=model, lr=0.1)
        >>> for _ in range(3):  # no validation closure: the next step's batch takes its place
        ...     loss = opt.step(batch)
        >>> opt.rho.item() != 0.5
        True
    """

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseLike,
        rho: float | LearnedRadius = 0.5,
        xi: float = 0.01,
        *,
        filterwise: bool = True,
        scale_bias: bool = True,
        **kwargs: Any,
    ) -> None:
        learned = _learned(rho, "ASAM")
        super().__init__(params, base_optimizer, learned, xi, filterwise=filterwise, scale_bias=scale_bias, **kwargs)


#: Four gradients: at θ and θ + ε, then the training's and the validation's after the step, one after the other.
_LEARNS: dict[str, Any] = {
    "gradients": "4",
    "holds": True,
    "gradients_at_once": 3,
    "remark": "`step(closure, val_closure)`",
}
METHODS = (
    Method(LETSSAM, "LETS-SAM", "Wang et al., ECML-PKDD 2024", (LearnedRadius,))
    .whose(rho="as SAM, to begin with; the paper tries 0.01 to 2")
    .row("LETS-SAM", "rho=0.05, lr=0.1", **_LEARNS),
    Method(LETSASAM, "LETS-ASAM", "Wang et al., ECML-PKDD 2024", (Adaptive, LearnedRadius))
    .whose(
        rho="as ASAM, to begin with; the paper tries 0.01 to 2",
        xi="as ASAM",
        filterwise="the paper's, Eq. 7",
        scale_bias="as ASAM",
    )
    .row("LETS-ASAM", "rho=0.5, lr=0.1", **_LEARNS),
)
