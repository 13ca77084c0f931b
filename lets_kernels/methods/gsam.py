"""Methods that step along both gradients: GSAM (Zhuang et al., ICLR 2022), the penalty of Zhao et al. (ICML 2022)."""

from types import MappingProxyType
from typing import Any

from lets_kernels.methods.catalogue import AS_SAM, CODE, OURS, STARTS, Method
from lets_kernels.parts.descent import NormPenalty, SurrogateGap
from lets_kernels.parts.direction import RandomStart
from lets_kernels.parts.radius import RadiusLike
from lets_kernels.sam import SAM, BaseLike, Params


class GSAM(SAM):
    """Steps along ĝ − α g⊥, where g⊥ is the part of g orthogonal to ĝ: the gap ĥ = L(θ + ε) − L(θ) shrinks too.

    Zhuang et al., ICLR 2022, call ĥ the surrogate gap. In the paper ρ falls with the learning rate: pass
    ``rho=LearningRateRadius(rho_max, rho_min)`` for that.

    Args:
        params, base_optimizer, rho, kwargs: as :class:`SAM`.
        alpha: α ≥ 0; 0 is SAM.

    Examples:
        >>> opt = GSAM([w], SGD, rho=5.0, alpha=0.5, lr=0.1)  # g = (3, 4), ĝ = (6, 12), g⊥ = (0.8, -0.4)
        >>> loss = opt.step(closure)
        >>> print(w.data)
        tensor([2.4400, 0.7800])
    """

    called = MappingProxyType({"gsam_alpha": "alpha", "rho_scheduler": "rho"})

    def __init__(
        self, params: Params, base_optimizer: BaseLike, rho: RadiusLike = 0.05, alpha: float = 0.4, **kwargs: Any
    ) -> None:
        super().__init__(params, base_optimizer, rho, descent=SurrogateGap(alpha), **kwargs)


class RGSAM(SAM):
    """GSAM with R-SAM's perturbation: the first gradient is taken at a random point θ + δ₀.

    Liu et al., NeurIPS 2022. The noise is drawn again wherever it is used. Put the first pass into
    ``with opt.first_pass():``, unless ``step(closure)`` makes it.

    Args:
        params, base_optimizer, rho, kwargs: as :class:`SAM`.
        alpha: as :class:`GSAM`.
        gamma, lam, noise_scale: as :class:`RSAM`.

    Examples:
        >>> opt = RGSAM([w], SGD, rho=5.0, alpha=0.5, gamma=0.0, lr=0.1)  # γ = 0 is GSAM
        >>> with opt.first_pass():  # the weights are at θ + δ₀ within
        ...     loss = closure()
        >>> with opt.perturbed():
        ...     loss = closure()
        >>> opt.step()
        >>> print(w.data)
        tensor([2.4400, 0.7800])
    """

    called = MappingProxyType({"gsam_alpha": "alpha", "rho_scheduler": "rho"})

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseLike,
        rho: RadiusLike = 0.05,
        alpha: float = 0.4,
        *,
        gamma: float = 1e-4,
        lam: float = 1.0,
        noise_scale: str = "variance",
        **kwargs: Any,
    ) -> None:
        direction, descent = RandomStart(gamma, lam, noise_scale), SurrogateGap(alpha)
        super().__init__(params, base_optimizer, rho, direction=direction, descent=descent, **kwargs)


class GradientNormPenalty(SAM):
    """Steps along (1 − α) g + α ĝ: the gradient of L + λ‖∇L‖ with λ = αρ (Zhao et al., ICML 2022).

    The authors' recipes, however, step along (1 − α) g/‖g‖ + α ĝ: ``normalized=True``.

    Args:
        params, base_optimizer, rho, kwargs: as :class:`SAM`.
        alpha: α ≥ 0; 1 is SAM, 0 the base optimizer.
        normalized: see :class:`~lets_kernels.NormPenalty`.

    Examples:
        >>> opt = GradientNormPenalty([w], SGD, rho=5.0, alpha=0.5, lr=0.1)  # g = (3, 4), ĝ = (6, 12)
        >>> loss = opt.step(closure)
        >>> print(w.data)
        tensor([2.5500, 1.2000])
    """

    called = MappingProxyType(
        {"r": "rho", "norm_perturbations": "normalized", "sync_perturbations": "sync_perturbation"}
    )

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseLike,
        rho: RadiusLike = 0.05,
        alpha: float = 0.8,
        *,
        normalized: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho, descent=NormPenalty(alpha, normalized=normalized), **kwargs)


METHODS = (
    Method(GSAM, "GSAM", "Zhuang et al., ICLR 2022", (SurrogateGap,))
    .whose(
        rho="SAM's; the authors' CIFAR example has 2.0, adaptive",
        alpha=f"{OURS}; 0.6 is in use for ViTs, 0.2 in the authors' CIFAR example",
    )
    .row("GSAM", "rho=0.05, alpha=0.4, lr=0.1", holds=True)
    .row("GSAM, ρ by learning rate", "rho=LearningRateRadius(rho_max=0.05, rho_min=0.01), lr=0.1", holds=True),
    Method(RGSAM, "R-GSAM", "Liu et al., NeurIPS 2022", (RandomStart, SurrogateGap))
    .whose(rho=AS_SAM, alpha="as GSAM", gamma="as R-SAM", lam="as R-SAM", noise_scale="as R-SAM")
    .row("R-GSAM", "rho=0.05, alpha=0.4, gamma=1e-4, lr=0.1", holds=True, remark=STARTS),
    Method(GradientNormPenalty, "Gradient-norm penalty", "Zhao et al., ICML 2022", (NormPenalty,))
    .whose(
        rho=f"{CODE}, for ImageNet; 0.1 for CIFAR",
        alpha=CODE,
        normalized="as the paper's equations read; the authors' code has True",
    )
    .row("Gradient-norm penalty", "rho=0.05, alpha=0.8, lr=0.1", holds=True),
)
