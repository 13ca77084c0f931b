"""The base class of directions, and the perturbation that they make.

A direction gives a perturbation of the form

    ε = ρ · T sign(Tv) |Tv|^(q-1) / (Σ |Tv|^q)^(1/p),    1/p + 1/q = 1,

over *all* parameters together, where v is a vector (the gradient), T a diagonal scaling and the sum the dual norm of
Foret et al. (ICLR 2021, Eq. 2). A gradient of exactly zero gives ε = 0. A new direction along something that lies in
memory is a class with ``q``, ``defaults`` (the group keys it reads, with their defaults), ``geometry`` and ``ascent``.
A direction that first has to make its vectors has ``prepare``, and writes them where the weights will be saved. A
direction that uses the base optimizer's state reads it in ``first.base``, and refuses unsuitable base optimizers in
``check_base``. A direction that divides by no norm (such as :class:`~lets_kernels.Posterior`) gives a ``total`` of 1, 0
without a gradient, or NaN for a gradient that is not finite, and sets ``norm``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lets_kernels.base.state import Look
from lets_kernels.ops.declared import ELEMENT_WISE, UNSCALED
from lets_kernels.ops.memory import is_dense
from lets_kernels.parts.part import Part, not_negative
from lets_kernels.parts.passes import FirstPass
from lets_kernels.space.buckets import Bucket, Groups, PerRun, Runs
from lets_kernels.space.shards import local


def check_xi(xi: float) -> float:
    """ξ as a float, or ``ValueError``."""
    return not_negative(xi, "xi")


#: The modules whose filters lie along the second dimension of the weights.
_TRANSPOSED = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)


def filters_along(p: Tensor, dim: int) -> tuple[int, int] | None:
    """``filter_length`` and ``filter_count`` of the run table, for filters along a dimension; None for an empty one."""
    p = local(p)
    if p.dim() == 0:
        return 1, 1
    if p.shape[dim] == 0:
        return None
    if p.numel() == 0:  # all elements of the filters lie on other ranks
        return 1, p.shape[dim]
    # In a dense tensor the index along a dimension is (offset / stride) mod size.
    stride = p.stride(dim) if is_dense(p) else math.prod(p.shape[dim + 1 :])
    return (p.numel(), 1) if p.shape[dim] == 1 else (stride, p.shape[dim])


@dataclass
class Ascent:
    """The perturbation of one bucket: its vectors, and how T scales them.

    ``vectors`` has one tensor for each of ``runs``. It is empty if the vectors stand in the bucket's copy of the
    weights; ``perturb`` makes that copy, and overwrites them.
    """

    runs: Runs
    vectors: list[Tensor]
    xi: PerRun
    q: float
    scaled: bool = True  # False means T = 1, whatever the table says

    @classmethod
    def along(cls, runs: Runs, flat: list[Tensor]) -> "Ascent":
        """The ascent along the vectors in the flat buffer of :meth:`FirstPass.room`, with T = 1."""
        in_saved = flat[0] is runs.bucket.saved
        return cls(runs, [] if in_saved else runs.bucket.views(flat[0], runs.indices), 0.0, 2.0, scaled=False)

    def only(self, places: list[int]) -> "Ascent":
        """The perturbation of some of the runs, by their places."""
        xi = [self.xi[j] for j in places] if isinstance(self.xi, list) else self.xi
        return replace(self, runs=self.runs.only(places), vectors=[self.vectors[j] for j in places], xi=xi)

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

        ``saved``: takes T at the saved weights and not at the present ones.
        """
        b, r = self.runs.bucket, self.runs
        share = r.squares if self.vectors is r.grads and self.q == 2 and not (self.scaled and b.scaled) else None
        if share is None:
            vectors = r.pack(self.vectors)
            share = b.ops.grad_norm(vectors, self._weights(saved), self.table, b.filter_norms, self.xi, self.q)
        return share * b.parts if b.parts != 1 else share

    def perturb(self, total: Tensor, rho: Tensor) -> None:
        """Save the weights of this bucket and add ε to them.

        Args:
            total: the sum over all buckets.
            rho: the radius, as :meth:`Bucket.numbers` gives it.
        """
        b, r = self.runs.bucket, self.runs
        vectors, rho = r.pack(self.vectors), b.of_runs(rho, r.indices)
        b.ops.perturb_(r.weights, vectors, b.saved, b.dirty, self.table, b.filter_norms, self.xi, self.q, total, rho)
        r.forget()
        r.write_back()

    def rho_grad(self, outer: list[Tensor], perturbed: list[Tensor]) -> Tensor:
        """Like :meth:`total`, but Σ outer · perturbed² · T sign(Tv)|Tv|^(q-1), with T at the saved weights."""
        b = self.bucket
        o, h, v = map(b.pack, (outer, perturbed, self.vectors))
        share = b.ops.rho_grad_diagonal(o, [], h, v, self._weights(True), self.table, b.filter_norms, self.xi, self.q)
        return share * b.parts if b.parts != 1 else share


@dataclass
class Perturbation:
    """The perturbation of all buckets that take part: ε is ρ times the scaled vectors, over a power of ``total``."""

    ascents: list[Ascent]
    total: Tensor  # Σ |Tv|^q over all parameters and ranks: 0-d float64. If it is 0 or not finite, no weight moves
    norm: Tensor | None = None  # the dual norm of Tv, if it is not total^(1/q)


class Direction(Part):
    """Base class. A subclass must define ``ascent`` or ``prepare``."""

    #: The exponent of the norm in the denominator. ε reaches the border of the ball of the norm p = q / (q - 1).
    q: float = 2.0
    #: Keys that the direction reads from a param group, with their values for groups that do not set them.
    defaults: Mapping[str, Any] = MappingProxyType({})

    #: False if the direction needs no gradient at θ: a step then has one pass, at the perturbed weights.
    needs_gradient = True
    #: How many gradients a step takes before the last one: from each, ``prepare`` finds the next ε.
    ascents = 1
    #: True if the first gradients are taken at θ + δ, with δ from ``start``.
    starts = False
    #: True if the direction draws random numbers.
    draws = False
    #: True if first gradients change what the direction keeps from step to step, wherever it is kept.
    remembers = False
    #: The ids of the weights of the model's transposed convolutions.
    _transposed: frozenset[int] = frozenset()

    def check_base(self, base: Look) -> None:
        """Refuse a base optimizer that does not suit this direction: ``ValueError``, whose message names the way out.

        Called when the optimizer is built; when a group is added, with the whole group; and before a state is loaded,
        with the state's groups. It looks at ``base.kind`` and ``base.groups``, since there may be no state yet.
        """

    def not_capturable(self) -> str | None:
        """Why a step cannot be captured in a CUDA graph, or None: a replay would repeat what the host has decided."""
        return None

    def bind(self, model: torch.nn.Module | None) -> None:
        """Called before ``geometry`` whenever the tables are built, with the optimizer's ``model=``."""
        modules = model.modules() if model is not None else ()
        self._transposed = frozenset(id(m.weight) for m in modules if isinstance(m, _TRANSPOSED))

    def geometry(self, p: Tensor, name: str | None, group: dict[str, Any]) -> tuple[int, int]:
        """How T scales this parameter: ``filter_length`` and ``filter_count`` of the run table (lets_kernels.ops)."""
        return UNSCALED, 0

    def filter_dim(self, p: Tensor) -> int:
        """The dimension along which the filters of a parameter lie, for parameters whose T has one number a filter.

        It is the first dimension, or the second for transposed convolutions, which only the model can tell. It is
        ``shards.WHOLE`` for a parameter that is a single filter.
        """
        return 1 if id(p) in self._transposed else 0

    def ascent(self, runs: Runs, groups: Groups) -> Ascent:
        """The perturbation of one bucket, from the gradients in ``runs``.

        Their options in ``groups``, the param groups, are ``runs.option(groups, name)``.
        """
        raise NotImplementedError

    def prepare(self, first: FirstPass) -> Perturbation:
        """The perturbation of all buckets, from the gradients in ``first.runs``."""
        ascents, shares = [], []
        for runs in first.runs:
            ascent = self.ascent(runs, first.groups)
            ascents.append(ascent)
            shares.append(ascent.total())
        return Perturbation(ascents, first.total(shares))

    def start(self, runs: Runs, first: FirstPass) -> None:
        """Write δ into ``first.room``. The weights of the bucket move by δ for the first pass."""
        raise NotImplementedError


class Scalable(Direction):
    """A direction along vectors v that it makes, and in groups with ``adaptive=True`` along T²v, with T = |θ| + ξ.

    ASAM's T (Kwon et al., ICML 2021, §3), element-wise; ξ is 0 unless a group has its own ``xi``.
    """

    defaults: Mapping[str, Any] = MappingProxyType({"adaptive": False, "xi": 0.0})

    def geometry(self, p: Tensor, name: str | None, group: dict[str, Any]) -> tuple[int, int]:
        return (ELEMENT_WISE if group["adaptive"] else UNSCALED), 0

    def ascent(self, runs: Runs, groups: Groups) -> Ascent:
        return Ascent(runs, runs.grads, runs.option(groups, "xi"), self.q)

    @staticmethod
    def scaled(ascent: Ascent, counted: list[Tensor], groups: Groups) -> tuple[Ascent, Tensor | None]:
        """The ascent with T, and its bucket's share of ‖Tv‖²; None for that where no group of the bucket is adaptive.

        ``counted``: the v of the norm, packed; those of the ascent may stand in the copy of the weights.
        """
        r, b = ascent.runs, ascent.bucket
        if not b.scaled:
            return ascent, None
        whole = replace(ascent, xi=r.option(groups, "xi"), scaled=True)
        return whole, b.parts * b.ops.grad_norm(counted, r.weights, whole.table, b.filter_norms, whole.xi, whole.q)
