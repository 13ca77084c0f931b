"""Methods that perturb at random: R-SAM (Liu et al., NeurIPS 2022), Random SAM (Ujváry et al., 2022)."""

from typing import Any

from lets_kernels.methods.catalogue import AS_SAM, OURS, PAPER, STARTS, Method
from lets_kernels.parts.direction import Gaussian, RandomStart
from lets_kernels.parts.radius import RadiusLike
from lets_kernels.sam import SAM, BaseLike, Params


class RSAM(SAM):
    """ε = ρ (δ₀ + λĝ₀)/‖δ₀ + λĝ₀‖, where ĝ₀ is the gradient at θ + δ₀ and δ₀ is random, with one scale a filter.

    Liu et al., NeurIPS 2022. δ₀ is drawn again wherever it is used. The first pass is made at θ + δ₀: with
    ``first_step()`` or ``perturbed()``, put the first pass into ``with opt.first_pass():``.

    Args:
        params, base_optimizer, rho, kwargs: as :class:`SAM`.
        gamma: γ ≥ 0, the size of δ₀; 0 is SAM.
        lam: λ ≥ 0.
        noise_scale: ``"variance"`` as printed, or ``"std"``; see :class:`~lets_kernels.RandomStart`.

    Examples:
        >>> opt = RSAM([w], SGD, rho=5.0, gamma=0.1, lr=0.1, seed=0)
        >>> with opt.first_pass():
        ...     print(closure().item() != 8.5)  # the weights are at θ + δ₀ here
        True
        >>> with opt.perturbed():
        ...     loss = closure()
        >>> opt.step()
    """

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseLike,
        rho: RadiusLike = 0.05,
        gamma: float = 1e-4,
        lam: float = 1.0,
        *,
        noise_scale: str = "variance",
        **kwargs: Any,
    ) -> None:
        direction = RandomStart(gamma, lam, noise_scale)
        super().__init__(params, base_optimizer, rho, direction=direction, **kwargs)


class RandomSAM(SAM):
    """ε ~ N(0, ρ²/d · I): steps along the gradient at a random point about ρ away (Ujváry et al., 2022).

    One gradient a step, at θ + ε: the closure is called once, and returns the loss there. The other call shapes have no
    first backward: ``opt.first_step()``, forward, backward, ``opt.second_step()``.

    Args:
        params, base_optimizer, kwargs: as :class:`SAM`.
        rho: ρ, the root of the mean squared length of ε.

    Examples:
        >>> opt = RandomSAM([w], SGD, rho=5.0, lr=0.1, seed=0)
        >>> with opt.perturbed():  # no first backward: ε is random
        ...     print(closure().item() != 8.5)
        True
        >>> opt.step()
        >>> opt.metrics()["gradients"].item()
        1
    """

    def __init__(self, params: Params, base_optimizer: BaseLike, rho: RadiusLike = 0.05, **kwargs: Any) -> None:
        super().__init__(params, base_optimizer, rho, direction=Gaussian(), **kwargs)


METHODS = (
    Method(RSAM, "R-SAM", "Liu et al., NeurIPS 2022", (RandomStart,))
    .whose(rho=AS_SAM, gamma=OURS, lam=OURS, noise_scale=f"{PAPER}, as printed")
    .row("R-SAM", "rho=0.05, gamma=1e-4, lr=0.1", remark=STARTS),
    Method(RandomSAM, "Random SAM", "Ujváry et al., 2022", (Gaussian,))
    .whose(rho=AS_SAM)
    .row("Random SAM", "rho=0.05, lr=0.1", gradients="1"),
)
