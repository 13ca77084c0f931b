"""Along random numbers, or from a random start: Random SAM, R-SAM, and the posterior of Variational SAM."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lets_kernels.base.state import Look, lies_as
from lets_kernels.base.variational import VariationalSGD
from lets_kernels.ops.declared import UNSCALED
from lets_kernels.parts.direction.base import Ascent, Direction, Perturbation, filters_along
from lets_kernels.parts.part import not_negative, share
from lets_kernels.parts.passes import NOISE, FirstPass, SecondPass
from lets_kernels.space.buckets import Bucket, Runs
from lets_kernels.space.shards import WHOLE, elements, local

SCALES = ("variance", "std")


class Gaussian(Direction):
    """Random SAM: ε ~ N(0, ρ²/d · I) over all d parameters (Ujváry et al., 2022).

    No gradient at θ is needed, so a step takes one gradient, at θ + ε. State: none; ε is drawn again wherever it is
    used.

    Examples:
        >>> opt = SAM([w], SGD, rho=5.0, direction=Gaussian(), lr=0.1, seed=0)
        >>> loss = opt.step(closure)  # called once, at θ + ε
        >>> opt.metrics()["gradients"].item()
        1
    """

    needs_gradient = False
    draws = True

    def prepare(self, first: FirstPass) -> Perturbation:
        ascents, count = [], 0
        for runs in first.runs:
            b, room = runs.bucket, first.room(runs)
            table = b.unscaled_table(runs.indices)
            b.ops.noise_(room, [], [], table, None, *first.draw(b, NOISE), 0.0, 1.0)
            ascents.append(Ascent.along(runs, room))
            count += sum(elements(b.params[i]) for i in runs.indices)
        return Perturbation(ascents, torch.full((), float(count), dtype=torch.float64, device=first.home))


class RandomStart(Direction):
    """R-SAM: ε = ρ (δ₀ + λĝ₀)/‖δ₀ + λĝ₀‖ at θ, with ĝ₀ the gradient at θ + δ₀ (Liu et al., NeurIPS 2022).

    δ₀ ~ N(0, γ² diag(‖w_j‖)), with one ‖w_j‖ for each filter. Filters are the slices along the first dimension of
    weights with two or more dimensions (along the second for transposed convolutions, which only ``model=`` can tell);
    any other parameter is one filter. ε is that of Algorithm 1; the text of the paper's sensitivity section has
    λĝ₀/‖ĝ₀‖ in place of λĝ₀. State: none; δ₀ is drawn again wherever it is used. Two gradients a step. With
    ``first_step()`` or ``perturbed()``, put the first forward and backward into ``with opt.first_pass():``, which moves
    the weights to θ + δ₀.

    Args:
        gamma: γ ≥ 0; 0 is SAM. The defaults of γ and λ are ours. ‖δ₀‖ grows with the number of weights, so a γ that is
            too large drowns ĝ₀ in noise: with a million weights of 0.02, ‖δ₀‖ is about 800γ.
        lam: λ ≥ 0.
        noise_scale: ``"variance"``: γ²‖w_j‖ is the variance, as printed; ``"std"``: γ‖w_j‖ is the standard deviation.

    Raises:
        ValueError: an argument is out of its range.

    Examples:
        >>> opt = SAM([w], SGD, rho=5.0, direction=RandomStart(gamma=0.1, noise_scale="std"), lr=0.1, seed=0)
        >>> loss = opt.step(closure)  # enters first_pass() by itself
        >>> loss.item() != 8.5  # the first pass was made at θ + δ₀
        True
    """

    draws = True

    def __init__(self, gamma: float = 1e-4, lam: float = 1.0, noise_scale: str = "variance") -> None:
        if noise_scale not in SCALES:
            raise ValueError(f"noise_scale must be one of {', '.join(SCALES)}, not {noise_scale!r}")
        self.gamma, self.lam = not_negative(gamma, "gamma"), not_negative(lam, "lam")
        self.noise_scale = noise_scale

    @property
    def starts(self) -> bool:  # type: ignore[override]
        return self.gamma > 0

    def geometry(self, p: Tensor, name: str | None, group: dict[str, Any]) -> tuple[int, int]:
        filters = filters_along(p, self.filter_dim(p)) if p.dim() > 1 else (max(1, local(p).numel()), 1)
        return filters or (UNSCALED, 0)

    def filter_dim(self, p: Tensor) -> int:
        return super().filter_dim(p) if p.dim() > 1 else WHOLE

    def _scales(self, runs: Runs) -> Tensor | None:
        b = runs.bucket
        if b.filter_norms is not None:
            b.ops.filter_norms(runs.weights, runs.table, b.filter_norms)
            b.join_filters()
            if self.noise_scale == "variance":
                b.filter_norms.sqrt_()
        return b.filter_norms

    def start(self, runs: Runs, first: FirstPass) -> None:
        b, scales = runs.bucket, self._scales(runs)
        b.ops.noise_(first.room(runs), [], [], runs.table, scales, *first.draw(b, NOISE), 0.0, self.gamma)

    def prepare(self, first: FirstPass) -> Perturbation:
        ascents, shares = [], []
        for runs in first.runs:
            b = runs.bucket
            if not self.gamma:
                ascents.append(Ascent(runs, runs.grads, 0.0, 2.0, scaled=False))
                shares.append(ascents[-1].total())
                continue
            room, grads, scales = first.room(runs), runs.pack(runs.grads), self._scales(runs)
            draw = first.draw(b, NOISE)
            shares.append(b.parts * b.ops.noise_(room, grads, [], runs.table, scales, *draw, self.lam, self.gamma))
            ascents.append(Ascent.along(runs, room))
        return Perturbation(ascents, first.total(shares))


class Posterior(Direction):
    """Variational SAM: the first gradient at a sample of N(ω, 1/(Ns)), and ε = ρ g/s at the mean ω.

    bSAM: Möllenhoff & Khan, ICLR 2023. The precision s is state of the base optimizer
    (:class:`lets_kernels.base.variational.VariationalSGD`), but this direction updates it, since it has g:
    s ← β₂s + (1 − β₂)(√s|g| + δ + γ). Over micro-batches each has a sample of its own, and √s|g| is their mean.

    Args:
        data_size: N, the number of training examples; infinity samples ω itself.
        beta2: β₂.
        damping: γ. δ is the group's ``weight_decay``.
        update_first: True, the step divides by the new s, as in Algorithm 1; False, by the old one, and s follows if
            the step happens, as in the authors' code. That, and more than one micro-batch, holds the new s in memory
            until the step.

    Raises:
        ValueError: an argument is out of its range.

    Examples:
        >>> opt = BSAM([w], lr=0.1, data_size=float("inf"), damping=0.2)  # makes Posterior(float("inf"), 0.999, 0.2)
        >>> loss = opt.step(closure)  # N = ∞: the first pass is made at the mean itself
        >>> loss.item()
        8.5
    """

    draws = True
    remembers = True
    averages = True

    def __init__(self, data_size: float, beta2: float, damping: float, update_first: bool = True) -> None:
        if not data_size > 0:
            raise ValueError(f"data_size must be positive, not {data_size}: it is the number of training examples")
        self.data_size, self.beta2 = float(data_size), share(beta2, "beta2")
        self.damping, self.update_first = not_negative(damping, "damping"), bool(update_first)
        #: What waits for the step, by the number of the bucket.
        self._next: dict[int, _Waiting] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_next": {}}

    @property
    def starts(self) -> bool:  # type: ignore[override]
        return math.isfinite(self.data_size)

    def check_base(self, base: Look) -> None:
        if not issubclass(base.kind, VariationalSGD):
            raise ValueError(
                f"{type(self).__name__} moves the precisions of VariationalSGD, and {base.name} has none: "
                "BSAM(params, lr=..., data_size=...) puts the two together"
            )

    @staticmethod
    def _precisions(runs: Runs, first: FirstPass) -> list[Tensor]:
        found = [t for t in first.base.tensors(runs, "precision") if t is not None and not t.is_neg()]
        if len(found) < len(runs.indices) or not lies_as(found, runs.params):
            raise ValueError(
                "the precisions have another memory layout than the parameters: opt.load_state_dict(opt.state_dict())"
            )
        return found

    def start(self, runs: Runs, first: FirstPass) -> None:
        b = runs.bucket
        precisions, table = b.pack(self._precisions(runs, first)), b.unscaled_table(runs.indices)
        std = 1 / math.sqrt(self.data_size)
        b.ops.noise_(first.room(runs), [], precisions, table, None, *first.draw(b, NOISE, first.piece), 0.0, std)

    def prepare(self, first: FirstPass) -> Perturbation:
        finite, ascents = torch.isfinite(first.squared_norm), []
        waits = not self.update_first or first.pieces > 1
        if first.piece == 0:
            self._next = {}
        for runs in first.runs:
            b, room = runs.bucket, first.room(runs)
            if waits:
                flat, precisions = self._copied(b, first)
                moved = [flat]
            else:
                moved = b.pack(self._precisions(runs, first))
            table = b.unscaled_table(runs.indices)
            gate = finite.double().to(b.device)
            damping = {g: self.damping + float(first.groups[g]["weight_decay"]) for g in b.present}
            numbers = (self.beta2, b.by_run(damping, runs.indices))
            b.ops.posterior_ascent_(room, moved, runs.pack(runs.grads), table, gate, *numbers)
            if waits:
                self._gather(runs, flat, precisions, first)
            ascents.append(Ascent.along(runs, room))
        total = torch.where(finite & (first.squared_norm > 0), 1.0, torch.where(finite, 0.0, torch.nan)).double()
        return Perturbation(ascents, total, norm=first.squared_norm.sqrt())

    def conclude(self, second: SecondPass) -> None:
        waiting, self._next = self._next, {}
        if not second.perturbed or not waiting:
            return
        settle = partial(self._settle, waiting, second.gate)
        if self.update_first or not second.runs:
            settle()
        else:
            second.afterwards(settle)

    def _copied(self, b: Bucket, first: FirstPass) -> tuple[Tensor, list[Tensor]]:
        """The s of all parameters of a bucket: in a flat buffer of its own, and where it lies."""
        runs = b.all_runs()
        precisions, flat = self._precisions(runs, first), torch.zeros_like(b.saved)
        _copy(b, [flat], b.pack(precisions), runs.indices, first.squared_norm.new_ones(()))
        return flat, precisions

    def _gather(self, runs: Runs, flat: Tensor, precisions: list[Tensor], first: FirstPass) -> None:
        """Take the new s of one micro-batch into their mean. Of a parameter that has no gradient in it, s stays."""
        b = runs.bucket
        if first.pieces > 1:
            flat = flat.to(torch.promote_types(flat.dtype, torch.float32)) / first.pieces
        if b.index in self._next:
            self._next[b.index].indices.update(runs.indices)
            self._next[b.index].flat += flat
        else:
            self._next[b.index] = _Waiting(b, set(runs.indices), flat, precisions)

    def _settle(self, waiting: Mapping[int, "_Waiting"], gate: Tensor) -> None:
        """s becomes what the first gradients have made of it, where the gate is open."""
        for w in waiting.values():
            b, indices = w.bucket, tuple(sorted(w.indices))
            _copy(b, b.pack([w.precisions[i] for i in indices]), [w.flat.to(b.saved.dtype)], indices, gate)


@dataclass
class _Waiting:
    """What s becomes in the step that has been begun, of one bucket."""

    bucket: Bucket
    indices: set[int]  # the parameters that have had a gradient
    flat: Tensor
    precisions: list[Tensor]  # of all parameters: where the new s is to go


def _copy(b: Bucket, to: list[Tensor], x: list[Tensor], indices: tuple[int, ...], gate: Tensor) -> None:
    """to <- x, where the gate is open."""
    pair = torch.stack([torch.full((), a, dtype=torch.float64, device=b.device) for a in (1.0, 0.0)])
    b.ops.combine_(to, x, x, b.unscaled_table(indices), pair, gate.double().to(b.device))
