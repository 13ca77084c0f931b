"""SAMPa (Xie, Pethick & Cevher, NeurIPS 2024)."""

from types import MappingProxyType
from typing import Any

from lets_kernels.methods.catalogue import CODE, STARTS, Method
from lets_kernels.parts.descent import NormPenalty
from lets_kernels.parts.direction import Ahead
from lets_kernels.parts.part import share
from lets_kernels.parts.radius import RadiusLike
from lets_kernels.sam import SAM, BaseLike, Params


class SAMPa(SAM):
    """SAM whose two gradients do not wait for each other: ε goes along a gradient that the step before has found.

    Xie, Pethick & Cevher, NeurIPS 2024. The first pass is made at y, ahead of θ (see :class:`~lets_kernels.Ahead`), the
    second at θ + ε, and the step goes along (1 − λ) ĝ + λ g_y. Their code makes both passes at once, on two devices:
    examples/sampa_two_devices.py does so with this class. In one process they come one after the other, so that it
    costs what SAM costs.

    In the paper ĝ is the gradient of the batch of which ε knows: that of the step before, where g_y is that of the new
    batch. A closure that is called twice can do so, and so can the other shapes::

        with opt.first_pass():
            loss(new_batch).backward()
        opt.first_step(zero_grad=True)
        loss(old_batch).backward()  # of the step before; in the first step the new one
        opt.second_step(zero_grad=True)

    With the same batch in both passes, ε is that of another batch than ĝ, as in asynchronous SAM (Jo, Lim & Lee, 2025),
    whose older gradient is one at θ: the example has that, too. SAMPa so, tried on the demo's task (digits, 40 % wrong
    labels, three seeds), reaches 92.3 %, where SAM at 0.1 reaches 96.4 and SGD 87.2. In docs/comparison.md it is as in
    the paper.

    Args:
        params, base_optimizer, kwargs: as :class:`SAM`.
        rho: ρ, the length of ε.
        lam: λ in [0, 1]; 0 is the paper's SAMPa, without the share of g_y.

    Raises:
        ValueError: λ is outside of [0, 1], or the base optimizer has no learning rate.

    Examples:
        >>> opt = SAMPa([w], SGD, rho=5.0, lam=0.2, lr=0.1)
        >>> with opt.first_pass():  # of the new batch, at y; in the first step y = θ
        ...     loss = closure()
        >>> with opt.perturbed():  # the batch of the step before; in the first step ε = 0
        ...     loss = closure()
        >>> opt.step()
        >>> print(w.data)
        tensor([2.7000, 1.6000])
    """

    called = MappingProxyType({"og": "lam"})

    def __init__(
        self, params: Params, base_optimizer: BaseLike, rho: RadiusLike = 0.1, lam: float = 0.2, **kwargs: Any
    ) -> None:
        descent = NormPenalty(1 - share(lam, "lam"))
        super().__init__(params, base_optimizer, rho, direction=Ahead(), descent=descent, **kwargs)


METHODS = (
    Method(SAMPa, "SAMPa", "Xie et al., NeurIPS 2024", (Ahead, NormPenalty))
    .whose(rho=f"{CODE}, in its script", lam=f"{CODE}, in its script")
    .row("SAMPa", "rho=0.1, lam=0.2, lr=0.1", state=1.0, holds=True, remark=STARTS),
)
