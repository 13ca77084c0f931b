"""Methods that go along SAM's direction, and how far the norm of the gradient says: LE-SAM, USAM, LightSAM."""

from types import MappingProxyType
from typing import Any

from lets_kernels.methods.catalogue import AS_SAM, CODE, OURS, Method
from lets_kernels.parts.length import Accumulated, LossEquated, Unified
from lets_kernels.parts.radius import RadiusLike, ScheduledRadius
from lets_kernels.sam import SAM, BaseLike, Params


class LESAM(SAM):
    """ε = ρ_t g/‖g‖ with ρ_t = min(σ_t/‖g‖, ρ_max): the linearised loss rises by σ_t at every step.

    LE-SAM (loss-equated SAM): Wang, Liu, Xie & Gao, ICML 2026. ``rho`` stands for σ, in the units of the loss, so
    ``opt.rho`` shows σ, and ``metrics()["applied_rho"]`` shows ρ_t. A learned radius learns σ.

    Args:
        params, base_optimizer, kwargs: as :class:`SAM`.
        rho: σ ≥ 0, or a radius that gives it. On the demo's task (digits, 40 % wrong labels) 0.1 reaches 96.1 %, as the
            best fixed ρ does, and 0.2 collapses.
        rho_max: ρ_max, for steps with a small gradient.
        steps: the number of steps of the whole training. Then σ_t rises linearly from 0 over the share ``warmup`` of
            them, and falls to 0 along half a cosine over the share ``decay`` at the end, as in the authors' script,
            which changes σ once an epoch. None: σ stays as it is.
        warmup, decay: shares of ``steps``.

    Raises:
        TypeError: ``steps`` with a radius that is no number.
        ValueError: a number is out of its range.

    Examples:
        >>> opt = LESAM([w], SGD, rho=0.5, rho_max=0.3, lr=0.1)  # σ = 0.5, in the units of the loss
        >>> loss = opt.step(closure)
        >>> print(round(opt.metrics()["applied_rho"].item(), 4))  # σ/‖g‖
        0.1
    """

    called = MappingProxyType({"sigma": "rho"})

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseLike,
        rho: RadiusLike = 0.1,
        rho_max: float = 0.3,
        *,
        steps: int | None = None,
        warmup: float = 0.05,
        decay: float = 0.2,
        **kwargs: Any,
    ) -> None:
        if steps is not None:
            if not isinstance(rho, (int, float)):
                raise TypeError(f"steps goes with a number for rho, not with {rho!r}: leave one of the two out")
            rho = ScheduledRadius.trapezoid(rho, steps, warmup=warmup, decay=decay)
        super().__init__(params, base_optimizer, rho, length=LossEquated(rho_max), **kwargs)


class USAM(SAM):
    """ε = ρ (1 − λ + λ/‖g‖) g: at λ = 1 it is SAM, at λ = 0 USAM, which does not normalise the gradient.

    USAM: Andriushchenko & Flammarion, ICML 2022. The family: Oikonomou & Loizou, ICLR 2025. At λ = 0 the unit of ρ is
    that of a learning rate, and ε vanishes with the gradient.

    Args:
        params, base_optimizer, rho, kwargs: as :class:`SAM`.
        lam: λ in [0, 1].

    Examples:
        >>> opt = USAM([w], SGD, rho=1.0, lam=0.0, lr=0.1)  # ε = ρ g = (3, 4)
        >>> loss = opt.step(closure)
        >>> print(w.data)
        tensor([2.4000, 0.8000])
    """

    called = MappingProxyType({"lambd": "lam"})

    def __init__(
        self, params: Params, base_optimizer: BaseLike, rho: RadiusLike = 0.05, lam: float = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(params, base_optimizer, rho, length=Unified(lam), **kwargs)


class LightSAM(SAM):
    """ε = ρ g/√u with u ← u + ‖g‖²: the perturbation shrinks about as one over the root of the number of steps.

    The ascent of LightSAM-I (Cheng et al., 2025, arXiv 2505.24399), which is AdaGrad-Norm's. The paper gives the
    descent a step size of the same kind; here the base optimizer is any, with its own learning rate.

    Args:
        params, base_optimizer, kwargs: as :class:`SAM`.
        rho: ρ, the length of the first perturbation.
        eps: ϵ, with u = ϵ² at the start.

    Examples:
        >>> opt = LightSAM([w], SGD, rho=0.5, lr=0.0)  # lr = 0, so all gradients are alike
        >>> for _ in range(4):
        ...     loss = opt.step(closure)
        >>> opt.metrics()["applied_rho"].item()  # ρ/√4
        0.25
    """

    def __init__(
        self, params: Params, base_optimizer: BaseLike, rho: RadiusLike = 0.5, eps: float = 1e-8, **kwargs: Any
    ) -> None:
        super().__init__(params, base_optimizer, rho, length=Accumulated(eps), **kwargs)


METHODS = (
    Method(LESAM, "LE-SAM", "Wang et al., ICML 2026", (LossEquated,))
    .whose(
        rho=f"{CODE}, in its class (its script has 0.35, with a warm-up)",
        rho_max=f"{CODE}, in its script (its class has 0.05, its CIFAR-100 command 999)",
        steps="none: σ stays",
        warmup=f"{CODE}, in its script: 10 of 200 epochs",
        decay=f"{CODE}, in its script: the last 40 of 200 epochs",
    )
    .row("LE-SAM", "rho=0.1, rho_max=0.3, lr=0.1", remark="`rho` is σ, a rise of the loss")
    .row("LE-SAM, σ scheduled", "rho=0.1, rho_max=0.3, steps=1000, lr=0.1", remark="the same"),
    Method(USAM, "USAM", "Andriushchenko & Flammarion, ICML 2022", (Unified,))
    .whose(rho=AS_SAM, lam=OURS)
    .row("USAM, unified with SAM", "rho=0.05, lam=0.5, lr=0.1", paper="Oikonomou & Loizou, ICLR 2025")
    .row("USAM", "rho=0.05, lam=0.0, lr=0.1"),
    Method(LightSAM, "LightSAM", "Cheng et al., 2025", (Accumulated,))
    .whose(rho=OURS, eps=OURS)
    .row("LightSAM", "rho=0.5, lr=0.1", remark="the ascent of LightSAM-I"),
)
