"""Along which gradient to step: the descent part of a method."""

import torch
from torch import Tensor

from lets_kernels.parts.part import Part, not_negative
from lets_kernels.parts.passes import SecondPass


class Descent(Part):
    """Base class. By itself it steps along the second gradient.

    ``look`` is called before it is known whether the step may happen, ``choose`` after. Both are called on every step;
    on a step that does not perturb, the second gradient is the gradient at θ.
    """

    #: True if the step must keep the first gradients until ``choose`` is called.
    holds_first = False
    #: True if ``choose`` needs ``second.first_squared_norm``, for which no gradient is held.
    needs_first_norm = False
    #: True if ``choose`` needs ``second.gathered``, where the direction has several ascents.
    gathers = False
    #: The factor of the second gradient in the gradient of the step, for the diagonal ρ-gradient of LETS.
    slope = 1.0

    @property
    def looks_back(self) -> bool:
        """True if the step depends on the first gradients otherwise than by ε."""
        return self.holds_first or self.needs_first_norm

    def look(self, second: SecondPass) -> Tensor | None:
        """Compute the sums that ``choose`` needs. Returns ‖ĝ‖² over all parameters and ranks if the sums contain it."""
        return None

    def choose(self, second: SecondPass) -> None:
        """Replace the gradients of ``second.runs`` by the vector along which the base optimizer is to step."""


class Perturbed(Descent):
    """Along the gradient at the perturbed weights (SAM: Foret et al., ICLR 2021, Algorithm 1)."""


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a/b, or 0 if b is zero."""
    return torch.where(b > 0, a / b, 0.0)


class SurrogateGap(Descent):
    """GSAM: along ĝ − α g⊥, where g⊥ = g − (⟨g, ĝ⟩/‖ĝ‖²) ĝ (Zhuang et al., ICLR 2022).

    g⊥ is the part of the first gradient that is orthogonal to the second, over all parameters together. Keeps the first
    gradients until the step. The diagonal ρ-gradient of LETS sees only the change of ĝ, not the change of g⊥.

    Args:
        alpha: α ≥ 0; 0 is SAM. 0.6 is in use for ViTs.

    Raises:
        ValueError: α is negative or not finite.
    """

    holds_first = True

    def __init__(self, alpha: float = 0.4) -> None:
        self.alpha = not_negative(alpha, "alpha")
        self._products: Tensor | None = None

    def look(self, second: SecondPass) -> Tensor | None:
        self._products = None  # drops the products of a step that was given up after ``look``
        if not (second.perturbed and self.alpha):
            return None
        self._products = second.compared()
        return self._products[0, 0]

    def choose(self, second: SecondPass) -> None:
        products, self._products = self._products, None
        if products is None:
            return
        squared, across, _ = products.unbind(dim=1)
        a = 1 + self.alpha * _ratio(across, squared)
        firsts = [second.firsts(runs) for runs in second.runs]
        second.step_along(firsts, torch.stack([a, torch.full_like(a, -self.alpha)], dim=1))


class Renormalized(Descent):
    """Along (‖g‖/‖ĝ‖) ĝ, which is as long as the first gradient: stable SAM (Tan et al., JMLR 2025).

    Norms are over all parameters together. Only ‖g‖ is kept until the step, not g. If ĝ is zero, so is the step. The
    ρ-gradient of LETS does not see how the factor depends on ρ, and the diagonal takes the factor for 1.
    """

    needs_first_norm = True

    def look(self, second: SecondPass) -> Tensor | None:
        return second.squared_norm if second.perturbed else None

    def choose(self, second: SecondPass) -> None:
        if second.perturbed:
            assert second.first_squared_norm is not None
            factor = _ratio(second.first_squared_norm, second.squared_norm).sqrt()
            coefficients = torch.stack([factor, torch.zeros_like(factor)])[None]
            second.step_along([runs.grads for runs in second.runs], coefficients)


class NormPenalty(Descent):
    """Along (1 − α) g + α ĝ, which penalises the norm of the gradient (Zhao et al., ICML 2022).

    The penalty's weight is λ = αρ. Keeps the first gradients until the step.

    Args:
        alpha: α; 1 is SAM, 0 the base optimizer.
        normalized: along (1 − α) g/‖g‖ + α ĝ, as the authors' code does unless told otherwise. This is not the gradient
            of the penalised loss: its first part has the same length at every step. On a step that does not perturb,
            along g.

    Raises:
        ValueError: α is negative or not finite.
    """

    holds_first = True

    def __init__(self, alpha: float = 0.8, *, normalized: bool = False) -> None:
        self.alpha = self.slope = not_negative(alpha, "alpha")
        self.normalized = normalized
        self._products: Tensor | None = None

    def look(self, second: SecondPass) -> Tensor | None:
        self._products = None  # drops the products of a step that was given up after ``look``
        if not (second.perturbed and self.normalized and self.alpha != 1):
            return None
        self._products = second.compared()
        return self._products[0, 0]

    def choose(self, second: SecondPass) -> None:
        products, self._products = self._products, None
        if second.perturbed and self.alpha != 1:
            coefficients = second.numbers(self.alpha, 1 - self.alpha)
            if products is not None:
                coefficients[:, 1] *= _ratio(torch.ones_like(products[:, 2]), products[:, 2].sqrt())
            second.step_along([second.firsts(runs) for runs in second.runs], coefficients)


class Decoupled(Descent):
    """Along g, and the weights then move by −η α (ĝ − g) outside of the base optimizer: WSAM (Yue et al., KDD 2023).

    η is the group's learning rate, and the base optimizer neither averages nor scales that part of the step. With SGD
    without momentum it is :class:`NormPenalty`; a momentum μ makes the other part 1/(1 − μ) times as large. Keeps the
    first gradients until the step. Where the step is not fused, an interrupt between its parts leaves the first one.

    Args:
        alpha: α; 0 is the base optimizer.

    Raises:
        ValueError: α is negative or not finite.
    """

    holds_first = True

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = self.slope = not_negative(alpha, "alpha")

    def choose(self, second: SecondPass) -> None:
        if second.perturbed:
            second.step_apart([second.firsts(runs) for runs in second.runs], self.alpha)


class Gathered(Descent):
    """Along α (ĝ₁ + … + ĝ_k), the gradients at all the points that k ascents reach: Lookbehind (ICML 2024).

    Mordido, Malviya, Baratin & Chandar step along each of them in turn, θ_j = θ_{j−1} − η ĝ_j from θ₀ = θ, and then go
    back to θ + α (θ_k − θ). With SGD without momentum that is one step along α Σ ĝ_j, which is made here for any base
    optimizer. On a step that does not perturb, along g. Keeps the sum from ascent to ascent.

    LETS sees the last gradient's share of the step only.

    Args:
        alpha: α; in (0, 1] in the paper, where 1 lets all k steps count whole.

    Raises:
        ValueError: α is negative or not finite.
    """

    gathers = True

    def __init__(self, alpha: float = 0.5) -> None:
        self.alpha = self.slope = not_negative(alpha, "alpha")

    def choose(self, second: SecondPass) -> None:
        if not second.perturbed or (self.alpha == 1 and not second.gathered):
            return
        earlier = [second.gathered[runs.bucket.index] if second.gathered else {} for runs in second.runs]
        others = [
            [sums[i] if i in sums else torch.zeros_like(g) for i, g in zip(runs.indices, runs.grads, strict=True)]
            for runs, sums in zip(second.runs, earlier, strict=True)
        ]
        second.step_along(others, second.numbers(self.alpha, self.alpha))


class Reuse(Descent):
    """LookSAM: a step that perturbs finds g_v, and the steps after it use g_v again (Liu et al., CVPR 2022).

    A step that perturbs goes along ĝ and keeps g_v = ĝ − (⟨g, ĝ⟩/‖g‖²) g, the part of ĝ that is orthogonal to g. A step
    that does not perturb goes along g + α (‖g‖/‖g_v‖) g_v. Products and norms are over all parameters together. State:
    g_v, one parameter-sized buffer.

    Args:
        alpha: α ≥ 0.
        per_tensor: products and norms are those of each parameter alone, as in public re-implementations. Needs many
            small launches, one for each parameter.

    Raises:
        ValueError: α is negative or not finite.
    """

    holds_first = True
    held = ("orthogonal",)

    def __init__(self, alpha: float = 0.7, *, per_tensor: bool = False) -> None:
        self.alpha, self.per_tensor = not_negative(alpha, "alpha"), per_tensor
        self._products: Tensor | None = None

    def _others(self, second: SecondPass) -> list[list[Tensor]]:
        if second.perturbed:
            return [second.firsts(runs) for runs in second.runs]
        return [second.held.tensors(runs, "orthogonal") for runs in second.runs]

    def look(self, second: SecondPass) -> Tensor | None:
        self._products = second.products(self._others(second), self.per_tensor)
        return self._products[:, 0].sum()

    def choose(self, second: SecondPass) -> None:
        products, self._products = self._products, None
        assert products is not None
        squared, across, other = products.unbind(dim=1)
        ones, others = torch.ones_like(squared), self._others(second)
        if second.perturbed:
            outs = [second.held.tensors(runs, "orthogonal") for runs in second.runs]
            second.combine(outs, others, torch.stack([ones, -_ratio(across, other)], dim=1))
        else:
            second.step_along(others, torch.stack([ones, self.alpha * _ratio(squared, other).sqrt()], dim=1))
