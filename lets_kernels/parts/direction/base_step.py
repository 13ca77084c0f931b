"""Along the step that the base optimizer would take."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lets_kernels.base.state import lying_as
from lets_kernels.parts.direction.base import Ascent, Direction, Perturbation
from lets_kernels.parts.passes import FirstPass
from lets_kernels.space.buckets import Runs


class BaseStep(Direction):
    """ε = ρ u/‖u‖, against the step −lr·u that the base optimizer would take along g, for any base optimizer.

    u is what the base optimizer would make of the first gradient g in its present state: with plain SGD g itself, which
    is SAM; with momentum μ the momentum with g in it, μm + g; with Adam m̂/(√v̂ + ϵ) with g in both averages; with Lion
    a sign; with Muon the orthogonalised momentum of each matrix, times what Muon multiplies the learning rate by for a
    shape. The norm is over all parameters together. u leaves out the learning rates, so that a group's ρ alone says how
    far it moves, and ``weight_decay``, since ε is to go up the loss and decay is no part of it. (Decay that is coupled,
    as in SGD, is in the momentum of former steps. Decay by another name is in u.) Nothing of the base optimizer
    changes. State: none. Two gradients a step.

    That ε comes from another optimizer than normalised SGD is an idea of optax (``optax.contrib.sam``,
    ``adv_optimizer``), whose ascent has a state of its own, by default new for each step. Along the state of the base
    optimizer is ours. Muon's part alone, the orthogonalised g without momentum, is in public code under the name of
    SpecSAM, with a radius for each matrix.

    With torch's SGD u costs no memory. Any other optimizer takes its step on copies of weights, gradients and state
    while ε is found, which takes the time of a step. Torch's own take it for an eighth of the parameters at a time;
    others, which may look at all parameters, for all at once, and need as much memory again as these three. Such an
    optimizer may keep what it likes in its groups, its state and its attributes; other things that its step changes
    (a ``torch.Generator``, say), it changes twice. For weights of 16 bits the copies are in float32. On accelerators
    the host waits where that step does: Adam reads its step counts unless it is ``capturable`` or ``fused``.

    Examples:
        >>> opt = SAM([w], SGD, rho=5.0, direction=BaseStep(), lr=0.1, momentum=0.9)
        >>> loss = opt.step(closure)
        >>> w.detach()  # there is no momentum yet, so the first step is SAM's
        tensor([2.4000, 0.8000])
    """

    def not_capturable(self) -> str | None:
        return "the base optimizer's step is tried on copies, and the host makes them at every step"

    def prepare(self, first: FirstPass) -> Perturbation:
        if first.base.kind is torch.optim.SGD:
            return self._along_sgd(first)
        rooms = [first.room(runs) for runs in first.runs]
        pairs = list(zip(first.runs, rooms, strict=True))
        first.base.next_step(first.runs, [runs.bucket.views(room[0], runs.indices) for runs, room in pairs])
        ascents = [Ascent.along(runs, room) for runs, room in pairs]
        shares = [_squared(runs, room) for runs, room in pairs]
        # A step may make a finite number of a gradient that is not: a sign does.
        total = torch.where(torch.isfinite(first.squared_norm), first.total(shares), torch.nan)
        return Perturbation(ascents, total)

    def _along_sgd(self, first: FirstPass) -> Perturbation:
        """With SGD's u as a sum of g and the momentum; without momentum along g where it lies, as SAM."""
        ascents, shares = [], []
        for runs in first.runs:
            if not any(first.groups[g]["momentum"] for g in runs.bucket.present):
                ascents.append(Ascent(runs, runs.grads, 0.0, 2.0, scaled=False))
                shares.append(ascents[-1].total())
                continue
            room = first.room(runs)
            for group, places in runs.by_group():
                _combine_sgd(runs.only(places), first.groups[group], first, room)
            ascents.append(Ascent.along(runs, room))
            shares.append(_squared(runs, room))
        return Perturbation(ascents, first.total(shares))


def _squared(runs: Runs, room: list[Tensor]) -> Tensor:
    """This rank's share of ‖u‖² of one bucket."""
    b = runs.bucket
    return b.parts * b.ops.grad_norm(room, [], b.unscaled_table(runs.indices), None, 0.0, 2.0)


def _combine_sgd(runs: Runs, group: Mapping[str, Any], first: FirstPass, room: list[Tensor]) -> None:
    """Write u of the runs of one group: m' = μm + (1 − d)g, or g at first; u = m', with Nesterov g + μm'."""
    mu, nesterov = float(group["momentum"]), bool(group["nesterov"])
    found = first.base.tensors(runs, "momentum_buffer") if mu else [None] * len(runs.indices)
    for begun in (False, True):
        places = [j for j, m in enumerate(found) if (m is not None) == begun]
        if not places:
            continue
        some = runs.only(places)
        momenta = [
            lying_as(p, m) for p, m in zip(some.params, (found[j] for j in places), strict=True) if m is not None
        ]
        of_g, of_m = (1 - float(group["dampening"]), mu) if begun else (1.0, 0.0)
        if nesterov:
            of_g, of_m = 1 + mu * of_g, mu * of_m
        numbers = [torch.full((), x, dtype=torch.float64, device=first.home) for x in (of_g, of_m, 1.0)]
        b, grads = runs.bucket, some.pack(some.grads)
        lists = (room, grads, b.pack(momenta) if begun else grads)
        pair, gate = torch.stack(numbers[:2]).to(b.device), numbers[2].to(b.device)
        b.ops.combine_(*lists, b.unscaled_table(some.indices), pair, gate)
