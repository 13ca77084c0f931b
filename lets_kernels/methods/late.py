"""Late SAM (Zhou et al., ICLR 2025)."""

from typing import Any

from lets_kernels.methods.catalogue import AS_SAM, Method
from lets_kernels.parts.radius import RadiusLike
from lets_kernels.parts.schedule import Tail
from lets_kernels.sam import SAM, BaseLike, Params


class LateSAM(SAM):
    """Steps of the base optimizer first, and SAM in the last steps of the training.

    Zhou et al., ICLR 2025, who find that SAM at the end alone reaches what SAM reaches throughout. The base optimizer
    keeps its state where SAM sets in; in the authors' script the momentum begins anew there. A learned radius stays as
    it is until then.

    Args:
        params, base_optimizer, rho, kwargs: as :class:`SAM`.
        steps: T, the number of steps of the whole training.
        fraction: f, the share of the steps that SAM takes, at the end. Near 1 it is a warm start for a large ρ.

    Raises:
        ValueError: ``steps`` is below 1, or ``fraction`` outside of [0, 1].

    Examples:
        >>> opt = LateSAM([w], SGD, rho=5.0, steps=4, fraction=0.25, lr=0.1)
        >>> for _ in range(4):  # three gradients in three steps, two in the last
        ...     loss = opt.step(closure)
        >>> opt.metrics()["gradients"].item()
        5
    """

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseLike,
        rho: RadiusLike = 0.05,
        *,
        steps: int,
        fraction: float = 0.125,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho, schedule=Tail(steps, fraction), **kwargs)


METHODS = (
    Method(LateSAM, "Late SAM", "Zhou et al., ICLR 2025", (Tail,))
    .whose(rho=AS_SAM, fraction="the paper's Figure 1: 25 of 200 epochs; the authors' script has 10 of 160")
    .row("Late SAM", "rho=0.05, steps=1000, lr=0.1", gradients="1 + f"),
)
