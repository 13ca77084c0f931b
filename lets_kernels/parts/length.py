"""How long ε is for a given ρ: the length part of a method. By itself ε is as long as ρ says."""

from typing import Any

import torch
from torch import Tensor

from lets_kernels.parts.part import Part, not_negative, share


class Length(Part):
    """Base class, and the length of SAM's ε: ρ, whatever the gradient (Foret et al., ICLR 2021, Eq. 2).

    A subclass gives ε another length, computed from ρ and from the norm of the gradient, on the device where that is.
    It sets ``fixed = False`` and has ``of``; ``begin`` if it keeps something from step to step. Any radius may stand
    for ρ: a number, a schedule, ``"auto"``, or one that LETS learns. The latter moves along ∂F/∂log ρ, so the length
    must be proportional to ρ, or ``slope`` must say where it is not.

    The norm is that of the vector along which the weights move, over all parameters and ranks: ‖g‖ for SAM, ‖Tg‖ for
    ASAM, the dual norm ‖g‖_q in the norm p. In all these ε of length ℓ raises the linearised loss by ℓ times the norm.

    Examples:
        >>> class Half(Length):
        ...     fixed = False
        ...     def of(self, rho, norm):
        ...         return rho / 2 * torch.ones_like(norm)
        >>> opt = SAM([w], SGD, rho=5.0, length=Half(), lr=0.1)
        >>> loss = opt.step(closure)
        >>> opt.metrics()["applied_rho"].item()
        2.5
    """

    #: True if the length is ρ itself.
    fixed = True
    #: True if first gradients change what is kept from step to step.
    remembers = False

    def begin(self, norm: Tensor) -> None:
        """Called once a step that perturbs, before ``of``; ``norm`` is float64, 0-d, and may not be finite."""

    def of(self, rho: float | Tensor, norm: Tensor) -> float | Tensor:
        """The length of ε of one group with the radius ρ: 0-d."""
        return rho

    def slope(self, length: Tensor) -> Tensor:
        """∂ log ℓ/∂ log ρ at a length that :meth:`of` gave: 0-d, like it."""
        return torch.ones_like(length)


class LossEquated(Length):
    """ℓ = min(σ/‖g‖, ρ_max): the linearised loss rises by σ, which stands for ρ (LE-SAM: Wang et al., ICML 2026).

    A learned radius learns σ, and does not move while ℓ is at ρ_max. If the norm is not finite, ℓ is 0.

    Args:
        rho_max: the largest ℓ, for steps with a small gradient.

    Raises:
        ValueError: ``rho_max`` is negative or not finite.

    Examples:
        >>> length = LossEquated(rho_max=0.3)
        >>> print(length.of(0.5, torch.tensor(5.0)), length.of(0.5, torch.tensor(0.01)))
        tensor(0.1000) tensor(0.3000)
        >>> opt = SAM([w], SGD, rho=0.5, length=length, lr=0.1)
    """

    fixed = False

    def __init__(self, rho_max: float = 0.3) -> None:
        self.rho_max = not_negative(rho_max, "rho_max")

    def of(self, rho: float | Tensor, norm: Tensor) -> float | Tensor:
        return (rho / norm).nan_to_num(0.0).clamp(max=self.rho_max)

    def slope(self, length: Tensor) -> Tensor:
        return (length < self.rho_max).to(length.dtype)


class Unified(Length):
    """ℓ = ρ ((1 − λ)‖g‖ + λ), between USAM, ε = ρ g at λ = 0, and SAM, ε = ρ g/‖g‖ at λ = 1.

    USAM: Andriushchenko & Flammarion, ICML 2022, who leave out the normalisation; unified with SAM by Oikonomou and
    Loizou, 2025. ρ is then measured in other units: at λ = 0 in those of a learning rate.

    Args:
        lam: λ in [0, 1].

    Raises:
        ValueError: λ is outside of [0, 1].

    Examples:
        >>> opt = SAM([w], SGD, rho=1.0, length=Unified(lam=0.5), lr=0.1)
        >>> loss = opt.step(closure)
        >>> opt.metrics()["applied_rho"].item()  # (‖g‖ + 1)/2
        3.0
    """

    fixed = False

    def __init__(self, lam: float = 0.5) -> None:
        self.lam = share(lam, "lam")

    def of(self, rho: float | Tensor, norm: Tensor) -> float | Tensor:
        return rho * ((1 - self.lam) * torch.where(torch.isfinite(norm), norm, 0.0) + self.lam)


class Accumulated(Length):
    """ℓ = ρ ‖g‖/√u with u ← u + ‖g‖², from u = ϵ²: ε = ρ g/√u (LightSAM-I: Cheng et al., 2025, AdaGrad-Norm).

    After t steps with gradients of like size ℓ is about ρ/√t. The paper replaces the base optimizer's learning rate by
    a sum over ĝ in the same way; here the base optimizer steps as it is. u counts the finite first gradients of all
    steps that perturb, also of steps that are given up or skipped later. State: one number.

    Args:
        eps: ϵ ≥ 0.

    Raises:
        ValueError: ϵ is negative or not finite.

    Examples:
        >>> opt = SAM([w], SGD, rho=0.5, length=Accumulated(), lr=0.1)
        >>> loss = opt.step(closure)
        >>> opt.metrics()["applied_rho"].item()  # the first perturbation has the length ρ
        0.5
    """

    fixed = False
    remembers = True

    def __init__(self, eps: float = 1e-8) -> None:
        self.eps = not_negative(eps, "eps")
        self._sum = torch.full((), self.eps**2, dtype=torch.float64, device="cpu")

    def begin(self, norm: Tensor) -> None:
        self._sum = self._sum.to(norm.device)
        squared = norm.square()
        self._sum += torch.where(torch.isfinite(squared), squared, 0.0)

    def of(self, rho: float | Tensor, norm: Tensor) -> float | Tensor:
        return rho * torch.where(torch.isfinite(norm) & (norm > 0), norm / self._sum.sqrt(), 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self._sum.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sum.fill_(float(state["sum"]))
