"""Along the gradient: SAM in every norm, ASAM, and the geometry of the Fisher information."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lets_kernels.ops.declared import ELEMENT_WISE, FISHER, UNSCALED
from lets_kernels.parts.direction.base import Ascent, Direction, Perturbation, check_xi, filters_along
from lets_kernels.parts.part import not_negative
from lets_kernels.parts.passes import FirstPass
from lets_kernels.space.buckets import Groups, Runs

#: From this exponent q on, |g|^q of a small or a large float32 may underflow or overflow even in float64.
_HIGH = 6.0


class Gradient(Direction):
    """SAM: along the gradient, T = 1 (Foret et al., ICLR 2021, Eq. 2).

    Args:
        p: the norm in which the perturbation has length ρ, in [1, ∞]. 2 gives ε = ρ g/‖g‖, infinity ε = ρ sign(g). At 1
            only the element with the largest |g| moves, by ρ. If several elements are the largest, they share ρ, which
            is the limit of the equation.

    Raises:
        ValueError: p is not in [1, ∞].

    Examples:
        >>> opt = SAM([w], SGD, rho=5.0, direction=Gradient(p=float("inf")), lr=0.1)
        >>> loss = closure()
        >>> with opt.perturbed():  # ε = ρ sign(g)
        ...     print(w.data)
        tensor([8., 7.])
    """

    def __init__(self, p: float = 2.0) -> None:
        if not p >= 1:
            raise ValueError(f"p must be in [1, inf], not {p}: below 1 it is no norm")
        self.p = float(p)
        self.q = 2.0 if p == 1 else 1.0 if math.isinf(p) else p / (p - 1)

    def ascent(self, runs: Runs, groups: Groups) -> Ascent:
        return Ascent(runs, runs.grads, 0.0, self.q)

    def prepare(self, first: FirstPass) -> Perturbation:
        """At p = 1 and near it, uses the largest |g|, since high powers of smaller elements would underflow.

        At 1 the vectors are the signs of the elements with the largest |g|, zero elsewhere; the total is the square of
        their number, so ε = ρ sign / number. Near 1 the vectors are g divided by the largest |g|, which gives the ε of
        g.
        """
        if self.q < _HIGH and self.p != 1:
            return super().prepare(first)
        each = [(r, r.bucket, r.pack(r.grads), r.bucket.unscaled_table(r.indices)) for r in first.runs]
        top = first.highest([b.ops.largest(grads, table) for _, b, grads, table in each])
        scale = torch.stack([torch.where(top > 0, 1 / top, 0.0), torch.zeros_like(top)]) if self.p > 1 else None
        ascents, shares = [], []
        for r, b, grads, table in each:
            room = first.room(r)
            if scale is None:
                found = b.ops.peaks_(room, grads, table, top.to(b.device))
            else:
                b.ops.combine_(room, grads, grads, table, scale.to(b.device), torch.ones_like(top).to(b.device))
                found = b.ops.grad_norm(room, [], table, None, 0.0, self.q)
            shares.append(b.parts * found)
            ascents.append(replace(Ascent.along(r, room), q=self.q))
        total = first.total(shares)
        if scale is None:
            total = torch.where(top > 0, total.square(), 0.0)
        total = torch.where(torch.isfinite(top), total, torch.nan)
        return Perturbation(ascents, total, norm=top if scale is None else top * total.pow(1 / self.q))


class Adaptive(Direction):
    """ASAM: ε = ρ T²g/‖Tg‖ (Kwon et al., ICML 2021, §3), element-wise or filter-wise (LETS, 2024, Eq. 7).

    A group with ``adaptive=False`` is perturbed along the plain gradient. There is one norm, over all groups.

    Args:
        xi: ξ in T = |θ| + ξ; the default for groups without their own ``xi``. At 0 a weight of zero never moves.
        filterwise: T = ‖filter‖ + ξ for the filters of weights with three or more dimensions: the slices along the
            first dimension, or along the second for transposed convolutions, which only ``model=`` can tell. All other
            weights stay element-wise.
        scale_bias: False leaves biases unscaled (T = 1), as the authors' code does. Biases are the parameters without
            "weight" in their name. If the optimizer knows no names (pass ``model=`` or ``named_parameters()``), biases
            are the parameters with at most one dimension.

    Raises:
        ValueError: ξ is negative or not finite.

    Examples:
        >>> opt = SAM([w], SGD, rho=5.0, direction=Adaptive(xi=0.0), lr=0.1)
        >>> loss = closure()
        >>> with opt.perturbed():  # ε = ρ T²g/‖Tg‖ with T = (3, 2), g = (3, 4)
        ...     print(w.data)
        tensor([14.2111,  8.6436])
    """

    def __init__(self, xi: float = 0.01, filterwise: bool = False, scale_bias: bool = True) -> None:
        self.filterwise, self.scale_bias = filterwise, scale_bias
        self.defaults = {"adaptive": True, "xi": check_xi(xi)}

    def geometry(self, p: Tensor, name: str | None, group: dict[str, Any]) -> tuple[int, int]:
        bias = p.dim() <= 1 if name is None else "weight" not in name
        if not group["adaptive"] or (bias and not self.scale_bias):
            return UNSCALED, 0
        if not self.filterwise or p.dim() < 3 or p.numel() == 0:
            return ELEMENT_WISE, 0
        return filters_along(p, self.filter_dim(p)) or (ELEMENT_WISE, 0)

    def ascent(self, runs: Runs, groups: Groups) -> Ascent:
        b = runs.bucket
        if b.filter_norms is not None:
            b.ops.filter_norms(runs.weights, runs.table, b.filter_norms)
            b.join_filters()
        return Ascent(runs, runs.grads, runs.option(groups, "xi"), self.q)


class Fisher(Direction):
    """Fisher SAM: ε = ρ F⁻¹g/√(gᵀF⁻¹g), with F⁻¹ = 1/(1 + η_F g²) (Kim et al., ICML 2022).

    The Fisher information F is diagonal, and computed from the gradient of the batch. ε has ASAM's form with
    T = (1 + η_F g²)^(-1/2). LETS's ``direction="algorithm1"`` computes F from the gradient that it uses.

    Args:
        eta: η_F ≥ 0; 0 is SAM. The default is ours.

    Raises:
        ValueError: η_F is negative or not finite.

    Examples:
        >>> opt = SAM([w], SGD, rho=5.0, direction=Fisher(eta=0.0), lr=0.1)  # η = 0 is SAM
        >>> loss = opt.step(closure)
        >>> print(w.data)
        tensor([2.4000, 0.8000])
    """

    def __init__(self, eta: float = 1.0) -> None:
        self.eta = not_negative(eta, "eta")

    def geometry(self, p: Tensor, name: str | None, group: dict[str, Any]) -> tuple[int, int]:
        return (FISHER, 0) if self.eta else (UNSCALED, 0)

    def ascent(self, runs: Runs, groups: Groups) -> Ascent:
        return Ascent(runs, runs.grads, self.eta, self.q)
