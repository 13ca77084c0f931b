"""SAM with several ascents a step: multi-step SAM, and Lookbehind (Mordido et al., ICML 2024)."""

from types import MappingProxyType
from typing import Any

from lets_kernels.methods.catalogue import AS_SAM, CODE, OURS, Method
from lets_kernels.parts.descent import Gathered
from lets_kernels.parts.direction import MultiStep
from lets_kernels.parts.radius import RadiusLike
from lets_kernels.sam import SAM, BaseLike, Params


class MultiStepSAM(SAM):
    """SAM with k ascents a step: k + 1 gradients, each of the first k at the point that the ascent before it reached.

    Foret et al. (ICLR 2021, appendix) take several steps of projected ascent; Kim et al. (2023, arXiv 2302.10181) and
    others find that they rarely generalise better than one; so does the demo's task (digits, 40 % wrong labels, three
    seeds), where k = 2 reaches 94.2 %, SAM 94.1 and SGD 87.2. ``step(closure)`` calls the closure k + 1 times. In the
    other call shapes ``first_step()`` or ``perturbed()`` comes after each of the first k backwards::

        loss(model).backward()
        opt.first_step(zero_grad=True)
        while opt.ascents_left:
            loss(model).backward()
            opt.first_step(zero_grad=True)
        loss(model).backward()
        opt.second_step(zero_grad=True)

    Args:
        params, base_optimizer, rho, kwargs: as :class:`SAM`.
        k: the number of ascents; 1 is SAM.
        renormalize: True keeps ε at the length ρ; False lets it grow by ρ at each ascent. See
            :class:`~lets_kernels.MultiStep`.

    Raises:
        ValueError: k is below 1; or with k > 1 an option that goes with one ascent, such as
            ``sync_perturbation=False``.

    Examples:
        >>> opt = MultiStepSAM([w], SGD, rho=5.0, k=2, lr=0.1)
        >>> loss = opt.step(closure)  # three gradients
        >>> opt.metrics()["gradients"].item()
        3
    """

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseLike,
        rho: RadiusLike = 0.05,
        k: int = 2,
        *,
        renormalize: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho, direction=MultiStep(k, renormalize=renormalize), **kwargs)


class Lookbehind(SAM):
    """k ascents of ρ each, and a step along α times the sum of the gradients at the k points they reach.

    Mordido, Malviya, Baratin & Chandar, ICML 2024. The call shapes are those of :class:`MultiStepSAM`. The authors'
    code takes a step of the base optimizer for each of the k gradients; here they are one step, which is the same for
    SGD without momentum and weight decay. It computes every ascent's gradient twice, so it takes 2k gradients; and with
    ASAM it takes T anew at each point, where this class takes it at θ. On the demo's task the defaults reach 95.6 %.

    Args:
        params, base_optimizer, kwargs: as :class:`SAM`.
        rho: ρ, the length of each ascent; ε is up to kρ long.
        k: the number of ascents; with α = 1, k = 1 is SAM.
        alpha: α. The step is up to αk times as long as SAM's.

    Raises:
        ValueError: as :class:`MultiStepSAM`; or α is negative or not finite.

    Examples:
        >>> opt = Lookbehind([w], SGD, rho=5.0, k=1, alpha=0.5, lr=0.1)
        >>> loss = opt.step(closure)  # half of SAM's step
        >>> print(w.data)
        tensor([2.7000, 1.4000])
    """

    called = MappingProxyType({"k_steps": "k"})

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseLike,
        rho: RadiusLike = 0.05,
        k: int = 2,
        alpha: float = 0.5,
        **kwargs: Any,
    ) -> None:
        direction = MultiStep(k, renormalize=False)
        super().__init__(params, base_optimizer, rho, direction=direction, descent=Gathered(alpha), **kwargs)


METHODS = (
    Method(MultiStepSAM, "multi-step SAM", "Foret et al., ICLR 2021", (MultiStep,))
    .whose(rho=AS_SAM, k=OURS, renormalize=OURS)
    .row("multi-step SAM", "rho=0.05, k=2, lr=0.1", gradients="1 + k", gradients_at_once=2),
    Method(Lookbehind, "Lookbehind", "Mordido et al., ICML 2024", (MultiStep, Gathered))
    .whose(rho=AS_SAM, k=OURS, alpha=f"{CODE}, in its class")
    .row("Lookbehind", "rho=0.05, k=2, alpha=0.5, lr=0.1", gradients="1 + k", gradients_at_once=3),
)
