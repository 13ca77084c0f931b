"""Methods that look at each sample's loss: ESAM (Du et al., ICLR 2022), δ-SAM (Zhou et al., 2021)."""

from typing import Any

from lets_kernels.methods.catalogue import AS_SAM, OURS, Method
from lets_kernels.parts.direction import Dropped
from lets_kernels.parts.radius import RadiusLike
from lets_kernels.parts.samples import SelectedSamples, WeightedSamples
from lets_kernels.sam import SAM, BaseLike, Params


class ESAM(SAM):
    """Efficient SAM: a random part of the weights is perturbed, and a part of the samples gives the second gradient.

    Du et al., ICLR 2022: stochastic weight perturbation, and sharpness-sensitive data selection. A step takes one
    gradient of the batch, one gradient of a share γ of it, and one forward pass. ``step(closure)`` takes
    ``closure(subset=None)``, which returns the loss of each sample and leaves ``backward`` to the optimizer
    (:mod:`lets_kernels.parts.samples`); with the other call shapes, ``opt.samples.subset(before, after)`` chooses.
    ``adaptive=True`` is ASAM's T: ε = ρ T²g/(β ‖Tg‖).

    Args:
        params, base_optimizer, rho, kwargs: as :class:`SAM`.
        beta: β in (0, 1]; 1 perturbs all weights.
        gamma: γ in (0, 1]; 1 takes all samples. β = γ = 1 is SAM.
        granularity: ``"element"`` or ``"tensor"``; see :class:`~lets_kernels.Dropped`.
        drawn_norm: with ``"tensor"``, True divides by the norm of the chosen tensors only, as the authors' code does.

    Examples:
        >>> def losses(subset=None):  # of each sample; the optimizer zeroes and calls backward
        ...     chosen = slice(None) if subset is None else subset
        ...     return functional.cross_entropy(model(inputs[chosen]), targets[chosen], reduction="none")
        >>> opt = ESAM(model.parameters(), SGD, rho=0.05, gamma=0.25, lr=0.1)
        >>> opt.step(losses).shape  # the second gradient is that of two of the eight
        torch.Size([8])
    """

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseLike,
        rho: RadiusLike = 0.05,
        beta: float = 0.5,
        gamma: float = 0.5,
        *,
        granularity: str = "element",
        drawn_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        direction, samples = Dropped(beta, granularity, drawn_norm=drawn_norm), SelectedSamples(gamma)
        super().__init__(params, base_optimizer, rho, direction=direction, samples=samples, **kwargs)


class DeltaSAM(SAM):
    """δ-SAM: the ascent gradient weights the samples, so that one perturbation approximates one for each sample.

    Zhou et al., 2021 (arXiv 2112.08772). ``step(closure)`` takes ``closure(subset=None)``, which returns
    ``(losses, outputs)`` and leaves ``backward`` to the optimizer. The weights and the estimate of the gradient
    norms are ours: see :class:`~lets_kernels.WeightedSamples`.

    Args:
        params, base_optimizer, rho, kwargs: as :class:`SAM`.
        power: weights ∝ ‖g_i‖^power; 0 is SAM.

    Examples:
        >>> def losses(subset=None):  # of each sample, and the outputs; the optimizer zeroes and calls backward
        ...     chosen = slice(None) if subset is None else subset
        ...     outputs = model(inputs[chosen])
        ...     return functional.cross_entropy(outputs, targets[chosen], reduction="none"), outputs
        >>> opt = DeltaSAM(model.parameters(), SGD, rho=0.05, lr=0.1)
        >>> losses_at_theta, outputs = opt.step(losses)
    """

    def __init__(
        self, params: Params, base_optimizer: BaseLike, rho: RadiusLike = 0.05, power: float = -1.0, **kwargs: Any
    ) -> None:
        super().__init__(params, base_optimizer, rho, samples=WeightedSamples(power), **kwargs)


METHODS = (
    Method(ESAM, "ESAM", "Du et al., ICLR 2022", (Dropped, SelectedSamples))
    .whose(
        rho="the authors' code's, and SAM's",
        beta="the authors' commands', which have 0.6 too; their class has 1",
        gamma="the authors' commands'; their class has 1",
        granularity=f"{OURS}; the authors' code has 'tensor'",
        drawn_norm="as the paper's equations read; the authors' code has True",
    )
    .row(
        "ESAM",
        "rho=0.05, beta=0.5, gamma=0.5, lr=0.1",
        gradients="1 + γ, and a forward pass",
        remark="closure returns the loss of each sample",
    ),
    Method(DeltaSAM, "δ-SAM", "Zhou et al., 2021", (WeightedSamples,))
    .whose(rho=AS_SAM, power=OURS)
    .row("δ-SAM", "rho=0.05, lr=0.1", remark="closure returns (losses, outputs)"),
)
