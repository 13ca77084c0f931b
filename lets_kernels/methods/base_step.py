"""SAM along the step that the base optimizer would take, after optax (2023)."""

from typing import Any

from lets_kernels.methods.catalogue import AS_SAM, Method
from lets_kernels.parts.direction import BaseStep
from lets_kernels.parts.radius import RadiusLike
from lets_kernels.sam import SAM, BaseLike, Params


class BaseStepSAM(SAM):
    """ε = ρ u/‖u‖, against the step −lr·u that the base optimizer would take along the first gradient.

    With plain SGD it is SAM. With AdamW, Lion or Muon the ascent is in the geometry of the descent: see
    :class:`~lets_kernels.BaseStep` for u, for what it costs, and for what of it is optax's (``optax.contrib.sam`` with
    an ``adv_optimizer``, DeepMind, 2023) and what is ours. The base optimizer then steps along ĝ from the same state.

    ``torch.optim.Muon`` takes matrices only. Give the other parameters to a second optimizer, in a SAM of its own:
    ``first_step()`` of both follows the first backward, ``second_step()`` of both the second. Each then has its own
    norm and its own radius.

    Args:
        params, base_optimizer, kwargs: as :class:`SAM`. Any torch optimizer that steps without a closure.
        rho: ρ, the length of ε.

    Raises:
        RuntimeError: in a step, if the base optimizer's own fails on copies.

    Examples:
        >>> opt = BaseStepSAM([w], torch.optim.AdamW, rho=2**0.5, lr=0.1)
        >>> loss = closure()
        >>> opt.first_step(zero_grad=True)
        True
        >>> w.detach().round(decimals=4)  # Adam's first step goes by signs, so this is one up in each weight
        tensor([4., 3.])
        >>> opt.restore()
    """

    def __init__(self, params: Params, base_optimizer: BaseLike, rho: RadiusLike = 0.05, **kwargs: Any) -> None:
        super().__init__(params, base_optimizer, rho, direction=BaseStep(), **kwargs)


METHODS = (
    Method(BaseStepSAM, "Base-step SAM", "after optax, 2023", (BaseStep,))
    .whose(rho=AS_SAM)
    .row(
        "Base-step SAM",
        "rho=0.05, lr=0.1, momentum=0.9",
        remark="any base optimizer; all but SGD are copied with weights and gradients while ε is found",
    ),
)
