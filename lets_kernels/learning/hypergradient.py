"""The gradient of LETS's objective in ν = log ρ (Wang et al., ECML-PKDD 2024), from the gradients of one step.

With g at θ_t, ĝ at θ_t + ε, ḡ_tr and ḡ_vl at θ_{t+1} and the learning rate η,

    ∂F/∂ν = −η · w · (ḡ_vl − ḡ_tr)ᵀ H ε_t,    ε_t = ρ ε̂_t,

where H is the curvature: ``diagonal`` takes diag(ĝ²) as the paper does, ``secant`` takes H ε_t = ĝ − g, since the step
has both gradients already. The derivation treats the base optimizer's step as −η ĝ.

∂F/∂ν is linear in ḡ_vl and in ḡ_tr, so each of them is summed alone, −η ḡᵀ H ε, and can be dropped before the other one
is computed: at most three gradients are there at once, g, ĝ and one of these.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lets_kernels.ops.memory import is_dense
from lets_kernels.parts.direction import Ascent
from lets_kernels.parts.passes import Gradients
from lets_kernels.space.buckets import Bucket, Runs
from lets_kernels.space.distributed import Replicas


def _listed(gradients: list[Gradients], k: int, like: Gradients) -> list[Tensor]:
    """The gradients of bucket ``k`` in the order of ``like``, zeros for missing ones."""
    return [gradients[k][i] if i in gradients[k] else torch.zeros_like(p) for i, p in like.items()]


def placed(gradients: list[Gradients], buckets: list[Bucket]) -> list[Gradients]:
    """The gradients, moved to the devices of their buckets."""
    pairs = zip(gradients, buckets, strict=True)
    return [{i: g.to(bucket.device) for i, g in each.items()} for each, bucket in pairs]


def fit(gradients: list[Gradients], buckets: list[Bucket]) -> bool:
    """True if these gradients, from a loaded state, can belong to the buckets' parameters."""
    return len(gradients) == len(buckets) and all(map(_alike, gradients, buckets))


def _alike(gradients: Gradients, bucket: Bucket) -> bool:
    """True for the same sizes and dtype and, if the parameter is dense, the same order in memory."""
    memory = bucket.memory
    if any(i >= len(memory) for i in gradients):
        return False
    pairs = [(g, memory[i]) for i, g in gradients.items()]
    return all(
        g.shape == p.shape and g.dtype == p.dtype and (g.stride() == p.stride() or not is_dense(p)) for g, p in pairs
    )


def _params(runs: Runs) -> Gradients:
    """The parameters of the runs, by their places in the bucket."""
    return dict(zip(runs.indices, runs.params, strict=True))


#: A param group, and its share of a sum: 0-d float64.
Share = tuple[int, Tensor]
_LISTS = ("first", "perturbed", "stepped")


@dataclass
class Trial:
    """One step's perturbation and the gradients around it.

    ``ascents`` holds the perturbations. ``lr`` and ``rho`` have an entry for each param group, every other list has one
    for each bucket. ``rho`` is the length of ε; where it is not the radius, ``lr`` contains ∂ log length/∂ log radius.
    """

    buckets: list[Bucket]
    ascents: list[Ascent]
    first: list[Gradients]
    perturbed: list[Gradients]
    stepped: list[Gradients]  # along these the base optimizer stepped: ĝ, or what the descent made of it
    total: Tensor
    lr: list[Any]
    rho: list[Tensor]
    gate: Tensor
    slope: float = 1.0  # the factor of the second gradient in ``stepped``
    captured: bool = False  # the step is part of a CUDA graph
    #: The second gradients and their versions: no code may change them until the radius has learned.
    versions: list[tuple[Tensor, int]] = field(default_factory=list)

    def _parted(self, runs: Runs, per_group: bool) -> list[tuple[int, list[int]]]:
        """The runs by their groups, each time a group and the places of runs. Groups with one learning rate stand
        together, unless there is a radius ``per_group``: otherwise they have one radius.
        """
        found: dict[object, tuple[int, list[int]]] = {}
        for group, places in runs.by_group():
            lr = self.lr[group]
            alone = per_group or isinstance(lr, Tensor)
            found.setdefault((alone, group if alone else lr), (group, []))[1].extend(places)
        return list(found.values())

    def secant(self, there: list[Gradients], per_group: bool = False) -> list[Share]:
        """−η ḡᵀ(d − g) of each group, for the mean over ranks. Groups stand together if they can, unless ``per_group``.

        ḡ, ``there``, are the gradients of one loss at θ_{t+1}. d is the vector along which the base optimizer stepped:
        ĝ, or the vector that the descent computed from ĝ; that vector is g if ρ = 0. The sum is over all tensors, also
        those that were not perturbed, since their gradients have changed too.
        """
        out = []
        for bucket, first, stepped in zip(self.buckets, self.first, self.stepped, strict=True):
            k, both = bucket.index, tuple(i for i in first if i in stepped)
            for group, places in self._parted(Runs(bucket, both, [], []), per_group):
                indices = tuple(both[j] for j in places)
                like = {i: first[i] for i in indices}
                outer = bucket.pack(_listed(there, k, like))
                d, g = (bucket.pack([source[i] for i in indices]) for source in (stepped, first))
                share = bucket.ops.rho_grad_secant(outer, [], d, g, bucket.table(indices))
                out.append((group, -self.lr[group] * bucket.parts * share))
        return out

    def along(self, gradients: list[Gradients], replicas: Replicas) -> "Trial":
        """The trial with the ε̂ of these gradients, T at θ_t, in place of that of g, which it no longer holds."""
        ascents = []
        for a in self.ascents:
            vectors = _listed(gradients, a.bucket.index, _params(a.runs))
            ascents.append(replace(a, runs=replace(a.runs, grads=[]), vectors=vectors))
        parts = [a.total(saved=True).to(self.total.device) for a in ascents]
        total = replicas.mean(torch.stack(parts).sum() if parts else torch.zeros_like(self.total))
        return replace(self, ascents=ascents, first=[{} for _ in self.first], total=total)

    def diagonal(self, there: list[Gradients], per_group: bool = False) -> list[Share]:
        """−η ḡᵀ diag(ĝ²) ρ ε̂ of each group, for the mean over ranks; ḡ and groups as in :meth:`secant`.

        ε̂ is that of the perturbation that was applied, or what :meth:`along` has put in its place.
        """
        out = []
        for a in self.ascents:
            k = a.bucket.index
            # Where ĝ is missing it is zero, and an op without tensors would not know its dtype.
            both = a.only([j for j, i in enumerate(a.runs.indices) if i in self.perturbed[k]])
            for group, places in self._parted(both.runs, per_group):
                part = both.only(places)
                outer = _listed(there, k, _params(part.runs))
                share = part.rho_grad(outer, [self.perturbed[k][i] for i in part.runs.indices])
                near = self.total.to(a.bucket.device)
                length = torch.where(near > 0, self.rho[group].to(near.device) / near.pow((a.q - 1) / a.q), 0.0)
                out.append((group, -self.lr[group] * self.slope * length * share))
        return out

    def detached(self) -> "Trial":
        """A trial with its own copies of the gradients: the user may change the gradients after the step."""
        copies: dict[int, Tensor] = {}

        def own(gradients: list[Gradients]) -> list[Gradients]:
            for g in (g for each in gradients for g in each.values() if id(g) not in copies):
                copies[id(g)] = g.clone()
            return [{i: copies[id(g)] for i, g in each.items()} for each in gradients]

        return replace(self, perturbed=own(self.perturbed), stepped=own(self.stepped), versions=[])

    @staticmethod
    def fits(state: dict[str, Any], buckets: list[Bucket]) -> bool:
        """True if the buckets hold the parameters of a packed trial, by their places in the groups."""
        for entry in state["ascents"]:
            if entry["bucket"] >= len(buckets):
                return False
            bucket, group = buckets[entry["bucket"]], entry["group"]
            groups = group if isinstance(group, list) else [group] * len(entry["places"])  # of a bucket for each group
            if (bucket.group_of, bucket.places) != (groups, entry["places"]):
                return False
            vectors = dict(zip(entry["indices"], entry["vectors"], strict=False))  # empty for a secant
            if not _alike(vectors, bucket) or any(i >= len(bucket.params) for i in entry["indices"]):
                return False
            saved, norms = entry["saved"], entry["filter_norms"]
            if bucket.element_wise and (saved is None or saved.shape != (bucket.size,)):
                return False
            if bucket.filter_norms is not None and (norms is None or norms.shape != bucket.filter_norms.shape):
                return False
        return all(fit(state[name], buckets) for name in _LISTS)

    def pack(self) -> dict[str, Any]:
        """Everything that ``unpack`` needs, as tensors, numbers, lists and dicts that torch.save can store."""
        ascents = [
            {
                "bucket": a.bucket.index,
                "indices": list(a.runs.indices),
                "group": a.bucket.group_of,
                "places": a.bucket.places,
                "vectors": [v.clone() for v in a.vectors],  # the direction may hold the same memory, as complex numbers
                "xi": a.xi,
                "q": a.q,
                "scaled": a.scaled,
                "saved": a.bucket.saved.clone() if a.bucket.element_wise else None,
                "filter_norms": None if a.bucket.filter_norms is None else a.bucket.filter_norms.clone(),
            }
            for a in self.ascents
        ]
        rest = {name: getattr(self, name) for name in (*_LISTS, "total", "lr", "rho", "gate", "slope")}
        return {"ascents": ascents, **rest}

    @classmethod
    def unpack(cls, state: dict[str, Any], buckets: list[Bucket]) -> "Trial":
        """The trial again, over buckets of the same parameters, on their devices.

        The saved weights of the buckets become those of the trial.
        """
        ascents = []
        for entry in state["ascents"]:
            bucket, indices = buckets[entry["bucket"]], tuple(entry["indices"])
            vectors, memory = [v.to(bucket.device) for v in entry["vectors"]], bucket.memory
            runs = Runs(bucket, indices, [memory[i] for i in indices], vectors)
            ascents.append(Ascent(runs, vectors, entry["xi"], entry["q"], entry["scaled"]))
            if bucket.element_wise:
                bucket.saved.copy_(entry["saved"])
            if bucket.filter_norms is not None:
                bucket.filter_norms.copy_(entry["filter_norms"])
        lists: dict[str, Any] = {name: placed(state[name], buckets) for name in _LISTS}
        return cls(
            buckets=buckets,
            ascents=ascents,
            **lists,
            total=state["total"].to(buckets[0].device),
            lr=state["lr"],
            rho=[rho.to(buckets[0].device) for rho in state["rho"]],
            gate=state["gate"].to(buckets[0].device),
            slope=float(state["slope"]),
        )
