"""Where to perturb: the direction part of a method.

Every direction here gives a perturbation of the form

    ε = ρ · T sign(Tv) |Tv|^(q-1) / (Σ |Tv|^q)^(1/p),    1/p + 1/q = 1,

over *all* parameters together, where v is a vector (the gradient), T a diagonal scaling and the sum the dual norm of
Foret et al. (ICLR 2021, Eq. 2). A gradient of exactly zero gives ε = 0. A new direction is a class with these members:
``q``, ``defaults`` (the group keys it reads, with their defaults), ``geometry`` and ``ascent``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lets_kernels.layout import ELEMENT_WISE, UNSCALED, Bucket
from lets_kernels.runs import Runs, is_dense
from lets_kernels.shards import local

_TRANSPOSED = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)


def check_xi(xi: float) -> float:
    """ξ as a float, or ``ValueError``."""
    if not (math.isfinite(xi) and xi >= 0):
        raise ValueError(f"xi must be a finite number >= 0, not {xi}")
    return float(xi)


@dataclass
class Ascent:
    """The perturbation of one bucket: what to scale by T, and how. ``vectors`` go with ``runs``, tensor by tensor."""

    runs: Runs
    vectors: list[Tensor]
    xi: float
    q: float

    @property
    def bucket(self) -> Bucket:
        return self.runs.bucket

    def _weights(self, saved: bool) -> list[Tensor]:
        if not self.bucket.element_wise:
            return []
        return [self.bucket.saved] if saved else self.runs.weights

    def total(self, saved: bool = False) -> Tensor:
        """This bucket's share of Σ |Tv|^q, for the mean over ranks: 0-d float64.

        ``saved``: T at the saved weights, not at the present ones.
        """
        b = self.bucket
        share = b.ops.grad_norm(
            self.runs.pack(self.vectors), self._weights(saved), self.runs.table, b.filter_norms, self.xi, self.q
        )
        return share * b.parts if b.parts != 1 else share

    def perturb(self, total: Tensor, rho: Tensor) -> None:
        """Save the weights of this bucket and add ε to them; ``total`` is the sum over all buckets."""
        b, r = self.bucket, self.runs
        vectors = r.pack(self.vectors)
        b.ops.perturb_(r.weights, vectors, b.saved, b.dirty, r.table, b.filter_norms, self.xi, self.q, total, rho)
        r.forget()
        r.write_back()

    def rho_grad(self, val: list[Tensor], train: list[Tensor], perturbed: list[Tensor]) -> Tensor:
        """As :meth:`total`: Σ (val - train) · perturbed² · T sign(Tv)|Tv|^(q-1), T at the saved weights."""
        b = self.bucket
        lists = (b.pack(each) for each in (val, train, perturbed, self.vectors))
        weights, table = self._weights(True), self.runs.table
        share = b.ops.rho_grad_diagonal(*lists, weights, table, b.filter_norms, self.xi, self.q)
        return share * b.parts if b.parts != 1 else share


class Direction:
    """Base class. By itself it is no direction: ``ascent`` must be given."""

    #: The exponent of the norm that is divided by; p = q / (q - 1) is the norm whose ball the perturbation fills.
    q: float = 2.0
    #: Keys that the direction reads from a param group, and what they are where the group does not say.
    defaults: Mapping[str, Any] = MappingProxyType({})

    def bind(self, model: torch.nn.Module | None) -> None:
        """Called before ``geometry`` whenever the tables are built, with what the optimizer got as ``model=``."""

    def geometry(self, p: Tensor, name: str | None, group: dict[str, Any]) -> tuple[int, int]:
        """How T scales this parameter: the ``row_length`` and ``row_count`` of the run table (lets_kernels.ops)."""
        return UNSCALED, 0

    def filter_dim(self, p: Tensor) -> int:
        """The dimension along which the filters of a parameter lie, for parameters that ``geometry`` scales by them."""
        return 0

    def ascent(self, runs: Runs, group: dict[str, Any]) -> Ascent:
        """The perturbation of one bucket, from the gradients in ``runs``."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a direction carries from step to step, under the same keys at any time.

        Nothing for one that looks at the gradient alone.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Gradient(Direction):
    """SAM: along the gradient, T = 1 (Foret et al., ICLR 2021, Eq. 2).

    Args:
        p: the norm in which the perturbation has length ρ, in (1, ∞]. 2 gives ε = ρ g/‖g‖, infinity ε = ρ sign(g).

    Raises:
        ValueError: p is not in (1, ∞].
    """

    def __init__(self, p: float = 2.0) -> None:
        if not p > 1:
            raise ValueError(f"p must be in (1, inf], not {p}: the dual exponent q = p/(p-1) must be finite")
        self.p = float(p)
        self.q = 1.0 if math.isinf(p) else p / (p - 1)

    def ascent(self, runs: Runs, group: dict[str, Any]) -> Ascent:
        return Ascent(runs, runs.grads, 0.0, self.q)


class Adaptive(Direction):
    """ASAM: ε = ρ T²g/‖Tg‖ (Kwon et al., ICML 2021, §3), element-wise or filter-wise (LETS, 2024, Eq. 7).

    A group whose ``adaptive`` is False is perturbed along the plain gradient; the norm is one over all groups.

    Args:
        xi: ξ in T = |θ| + ξ; the default for groups without their own ``xi``. At 0 a weight of zero never moves.
        filterwise: T = ‖filter‖ + ξ for the filters of weights with three or more dimensions: the rows along the
            first one, or along the second for transposed convolutions, which only ``model=`` can tell. Everything
            else stays element-wise.
        scale_bias: False leaves biases unscaled (T = 1), as the authors' code does: parameters without "weight" in
            their name or, where the optimizer knows no names (pass ``model=`` or ``named_parameters()``), of at most
            one dimension.

    Raises:
        ValueError: ξ is negative or not finite.
    """

    def __init__(self, xi: float = 0.01, filterwise: bool = False, scale_bias: bool = True) -> None:
        self.filterwise, self.scale_bias = filterwise, scale_bias
        self.defaults = {"adaptive": True, "xi": check_xi(xi)}
        self._transposed: frozenset[int] = frozenset()

    def bind(self, model: torch.nn.Module | None) -> None:
        modules = model.modules() if model is not None else ()
        self._transposed = frozenset(id(m.weight) for m in modules if isinstance(m, _TRANSPOSED))

    def geometry(self, p: Tensor, name: str | None, group: dict[str, Any]) -> tuple[int, int]:
        bias = p.dim() <= 1 if name is None else "weight" not in name
        if not group["adaptive"] or (bias and not self.scale_bias):
            return UNSCALED, 0
        if not self.filterwise or p.dim() < 3 or p.numel() == 0:
            return ELEMENT_WISE, 0
        dim, p = self.filter_dim(p), local(p)
        if p.shape[dim] == 0:
            return ELEMENT_WISE, 0
        if p.numel() == 0:  # filters whose elements all lie on other ranks
            return 1, p.shape[dim]
        # In the memory of a dense tensor the index along a dimension is (offset / stride) mod size.
        stride = p.stride(dim) if is_dense(p) else math.prod(p.shape[dim + 1 :])
        return (p.numel(), 1) if p.shape[dim] == 1 else (stride, p.shape[dim])

    def filter_dim(self, p: Tensor) -> int:
        return 1 if id(p) in self._transposed else 0

    def ascent(self, runs: Runs, group: dict[str, Any]) -> Ascent:
        b = runs.bucket
        if b.filter_norms is not None:
            b.ops.filter_norms(runs.weights, runs.table, b.filter_norms)
            b.join_filters()
        return Ascent(runs, runs.grads, float(group["xi"]), self.q)
