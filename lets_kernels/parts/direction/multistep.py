"""Several ascents a step: each from the gradient at the point that the last one reached."""

from dataclasses import replace

import torch
from torch import Tensor

from lets_kernels.parts.direction.base import Ascent, Perturbation, Scalable
from lets_kernels.parts.part import at_least_one
from lets_kernels.parts.passes import FirstPass


class MultiStep(Scalable):
    """k ascents: ε_j goes along v_j = Σ_{i<j} g_i/‖g_i‖, where g_i is the gradient at θ + ε_i, and ε₀ = 0.

    A step takes k + 1 gradients. In groups with ``adaptive=True`` it goes along T² Σ g_i/‖Tg_i‖, with ASAM's T at θ.
    Keeps v, a parameter-sized buffer, from ascent to ascent. A parameter that the last gradient before a perturbation
    does not reach stays at θ in it.

    Args:
        k: the number of ascents; 1 is SAM.
        renormalize: True gives every ε_j the length ρ (of T⁻¹ε_j, if adaptive). False adds ρ at each ascent,
            ε_j = ρ v_j, so the last one is up to kρ long: multi-step SAM in Mordido et al. (ICML 2024, Fig. 2), and
            with ρ/k in the place of ρ that of Kim et al. (2023).

    Raises:
        ValueError: k is below 1.
    """

    def __init__(self, k: int = 2, *, renormalize: bool = True) -> None:
        self.ascents = at_least_one(k, "k")
        self.renormalize = renormalize

    def prepare(self, first: FirstPass) -> Perturbation:
        found = super().prepare(first)
        if self.ascents == 1:
            return found
        one = torch.ones_like(found.total)
        inverse = torch.where(found.total == 0, 0.0, found.total.rsqrt())
        # Past an infinite gradient 1/‖g‖ is 0, and a step from it must not be taken all the same.
        pair = torch.stack([one, torch.where(torch.isfinite(found.total), inverse, torch.nan)])
        summed = [self._add(ascent, first, pair, one) for ascent in found.ascents]
        if first.ascent == 0:
            return found
        shares = [ascent.total() for ascent in summed]
        total = first.total(shares)
        if not self.renormalize:
            finite = torch.where(torch.isfinite(total), (total > 0).double(), torch.nan)
            return Perturbation(summed, finite, norm=total.sqrt())
        return Perturbation(summed, total)

    @staticmethod
    def _add(ascent: Ascent, first: FirstPass, pair: Tensor, gate: Tensor) -> Ascent:
        """v + g/‖Tg‖ in the place of v; returns the ascent along it."""
        runs, b = ascent.runs, ascent.bucket
        flat = first.carried.get(b.index)
        if flat is None:
            flat = first.carried[b.index] = torch.zeros_like(b.saved)
        sums = b.views(flat, runs.indices)
        packed = b.pack(sums)
        lists = (packed, packed, runs.pack(runs.grads))
        b.ops.combine_(*lists, b.unscaled_table(runs.indices), pair.to(b.device), gate.to(b.device))
        return replace(ascent, vectors=sums)
