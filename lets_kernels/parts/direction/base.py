"""Where to perturb: what every direction is.

A direction gives a perturbation of the form

    ε = ρ · T sign(Tv) |Tv|^(q-1) / (Σ |Tv|^q)^(1/p),    1/p + 1/q = 1,

over *all* parameters together, where v is a vector (the gradient), T a diagonal scaling and the sum the dual norm of
Foret et al. (ICLR 2021, Eq. 2). A gradient of exactly zero gives ε = 0. A new direction along something that lies in
memory is a class with ``q``, ``defaults`` (the group keys it reads, with their defaults), ``geometry`` and ``ascent``;
one that first has to make its vectors has ``prepare``, and writes them where the weights will be saved. One that goes
by the base optimizer's state reads it in ``first.base``, and says in ``check_base`` what it can go with. One that is
divided by no norm gives a ``total`` of 1, 0 for no gradient, NaN for one that is not finite, and says its ``norm``:
:class:`~lets_kernels.Posterior` is one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lets_kernels.base.state import Look
from lets_kernels.ops.declared import UNSCALED
from lets_kernels.ops.memory import is_dense
from lets_kernels.parts.part import Part, not_negative
from lets_kernels.parts.passes import FirstPass
from lets_kernels.space.buckets import Bucket, Runs
from lets_kernels.space.shards import local


def check_xi(xi: float) -> float:
    """ξ as a float, or ``ValueError``."""
    return not_negative(xi, "xi")


#: Whose filters lie along the second dimension of the weights.
_TRANSPOSED = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)


def filters_along(p: Tensor, dim: int) -> tuple[int, int] | None:
    """``filter_length`` and ``filter_count`` of the run table, for filters along a dimension; None for an empty one."""
    p = local(p)
    if p.dim() == 0:
        return 1, 1
    if p.shape[dim] == 0:
        return None
    if p.numel() == 0:  # filters whose elements all lie on other ranks
        return 1, p.shape[dim]
    # In the memory of a dense tensor the index along a dimension is (offset / stride) mod size.
    stride = p.stride(dim) if is_dense(p) else math.prod(p.shape[dim + 1 :])
    return (p.numel(), 1) if p.shape[dim] == 1 else (stride, p.shape[dim])


@dataclass
class Ascent:
    """The perturbation of one bucket: what to scale by T, and how.

    ``vectors`` go with ``runs``, tensor by tensor. There are none where they stand in the bucket's copy of the weights,
    which ``perturb`` makes; they are then gone.
    """

    runs: Runs
    vectors: list[Tensor]
    xi: float
    q: float
    scaled: bool = True  # False: T = 1, whatever the table says

    @classmethod
    def along(cls, runs: Runs, flat: list[Tensor]) -> "Ascent":
        """Along vectors in one flat buffer, T = 1: those of :meth:`FirstPass.room`."""
        in_saved = flat[0] is runs.bucket.saved
        return cls(runs, [] if in_saved else runs.bucket.views(flat[0], runs.indices), 0.0, 2.0, scaled=False)

    @property
    def table(self) -> Tensor:
        b, indices = self.runs.bucket, self.runs.indices
        return b.table(indices) if self.scaled else b.unscaled_table(indices)

    @property
    def bucket(self) -> Bucket:
        return self.runs.bucket

    def _weights(self, saved: bool) -> list[Tensor]:
        if not (self.scaled and self.runs.bucket.element_wise):
            return []
        return [self.bucket.saved] if saved else self.runs.weights

    def total(self, saved: bool = False) -> Tensor:
        """This bucket's share of Σ |Tv|^q, for the mean over ranks: 0-d float64.

        ``saved``: T at the saved weights, not at the present ones.
        """
        b, r = self.runs.bucket, self.runs
        share = r.squares if self.vectors is r.grads and self.q == 2 and not (self.scaled and b.scaled) else None
        if share is None:
            vectors = r.pack(self.vectors)
            share = b.ops.grad_norm(vectors, self._weights(saved), self.table, b.filter_norms, self.xi, self.q)
        return share * b.parts if b.parts != 1 else share

    def perturb(self, total: Tensor, rho: Tensor) -> None:
        """Save the weights of this bucket and add ε to them; ``total`` is the sum over all buckets."""
        b, r = self.runs.bucket, self.runs
        vectors = r.pack(self.vectors)
        b.ops.perturb_(r.weights, vectors, b.saved, b.dirty, self.table, b.filter_norms, self.xi, self.q, total, rho)
        r.forget()
        r.write_back()

    def rho_grad(self, val: list[Tensor], train: list[Tensor], perturbed: list[Tensor]) -> Tensor:
        """As :meth:`total`: Σ (val - train) · perturbed² · T sign(Tv)|Tv|^(q-1), T at the saved weights."""
        b = self.bucket
        v, t, h, g = map(b.pack, (val, train, perturbed, self.vectors))
        share = b.ops.rho_grad_diagonal(v, t, h, g, self._weights(True), self.table, b.filter_norms, self.xi, self.q)
        return share * b.parts if b.parts != 1 else share


@dataclass
class Perturbation:
    """The perturbation of all buckets that take part: ε is ρ times their vectors over a power of ``total``."""

    ascents: list[Ascent]
    total: Tensor  # Σ |Tv|^q, over all parameters and ranks: 0-d float64. No weight moves where it is 0 or not finite
    norm: Tensor | None = None  # the dual norm of Tv, where it is not total^(1/q)


class Direction(Part):
    """Base class. By itself it is no direction: ``ascent`` or ``prepare`` must be given."""

    #: The exponent of the norm that is divided by; p = q / (q - 1) is the norm whose ball the perturbation fills.
    q: float = 2.0
    #: Keys that the direction reads from a param group, and what they are where the group does not say.
    defaults: Mapping[str, Any] = MappingProxyType({})

    #: False for a direction that is known without a gradient at θ: a step then has one pass, at the perturbed weights.
    needs_gradient = True
    #: True if the first gradients are taken beside θ, where ``start`` says.
    starts = False
    #: True if it draws random numbers.
    draws = False
    #: True if first gradients change what it keeps from step to step, wherever that stands.
    remembers = False
    #: The ids of the weights of transposed convolutions in the model.
    _transposed: frozenset[int] = frozenset()

    def check_base(self, base: Look) -> None:
        """Refuse a base optimizer that this direction cannot go with: ``ValueError``, whose message names the way out.

        Called when the optimizer is built, with the whole group when one is added, and with the groups of a state
        before that is loaded. It goes by ``base.kind`` and ``base.groups``: of state there need be none yet.
        """

    def not_capturable(self) -> str | None:
        """Why a step cannot be captured in a CUDA graph, or None: what the host decides in it a replay would repeat."""
        return None

    def bind(self, model: torch.nn.Module | None) -> None:
        """Called before ``geometry`` whenever the tables are built, with what the optimizer got as ``model=``."""
        modules = model.modules() if model is not None else ()
        self._transposed = frozenset(id(m.weight) for m in modules if isinstance(m, _TRANSPOSED))

    def geometry(self, p: Tensor, name: str | None, group: dict[str, Any]) -> tuple[int, int]:
        """How T scales this parameter: ``filter_length`` and ``filter_count`` of the run table (lets_kernels.ops)."""
        return UNSCALED, 0

    def filter_dim(self, p: Tensor) -> int:
        """The dimension along which the filters of a parameter lie, for parameters that ``geometry`` scales by them.

        The first; the second of transposed convolutions, which only the model can tell. ``shards.WHOLE`` for a
        parameter that is a single filter.
        """
        return 1 if id(p) in self._transposed else 0

    def ascent(self, runs: Runs, group: dict[str, Any]) -> Ascent:
        """The perturbation of one bucket, from the gradients in ``runs``."""
        raise NotImplementedError

    def prepare(self, first: FirstPass) -> Perturbation:
        """The perturbation of all buckets, from the gradients in ``first.runs``."""
        ascents, shares = [], []
        for runs in first.runs:
            ascent = self.ascent(runs, first.groups[runs.bucket.group])
            ascents.append(ascent)
            shares.append(ascent.total())
        return Perturbation(ascents, first.total(shares))

    def start(self, runs: Runs, first: FirstPass) -> None:
        """Write δ, by which the weights of a bucket move for the first pass, where ``first.room`` says."""
        raise NotImplementedError
