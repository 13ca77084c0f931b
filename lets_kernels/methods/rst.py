"""RST, also called SS-SAM (Zhao et al., 2022)."""

from typing import Any

from lets_kernels.methods.catalogue import AS_SAM, OURS, Method
from lets_kernels.parts.radius import RadiusLike
from lets_kernels.parts.schedule import Bernoulli
from lets_kernels.sam import SAM, BaseLike, Params


class RST(SAM):
    """Randomised sharpness-aware training: a SAM step with probability p, otherwise a step of the base optimizer.

    Zhao et al., 2022 (RST; also published as SS-SAM). For the shapes of its schedules see
    :class:`~lets_kernels.Bernoulli`.

    Args:
        params, base_optimizer, rho, kwargs: as :class:`SAM`.
        p: the probability; if there is an ``end``, the probability at the first step.
        end, steps, shape: for a probability that changes over training; see :class:`~lets_kernels.Bernoulli`.

    Examples:
        >>> opt = RST([w], SGD, rho=5.0, p=1.0, end=0.0, steps=100, shape="linear", lr=0.1)  # less and less often
        >>> loss = opt.step(closure)
        >>> opt.schedule.probability(step=50)
        0.5
    """

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseLike,
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
    Method(RST, "RST", "Zhao et al., 2022", (Bernoulli,))
    .whose(rho=AS_SAM, p=OURS, end="none: p stays", steps="none: a p that changes needs it", shape="p stays")
    .row("RST / SS-SAM", "rho=0.05, p=0.5, lr=0.1", gradients="1 + p"),
)
