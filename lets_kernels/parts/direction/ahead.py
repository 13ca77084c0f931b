"""Along the gradient of the step before, taken ahead of the weights: SAMPa."""

import torch
from torch import Tensor

from lets_kernels.base.state import Look, lying_as
from lets_kernels.parts.direction.base import Ascent, Direction, Perturbation
from lets_kernels.parts.passes import FirstPass
from lets_kernels.space.buckets import Runs

#: The name of the held tensor.
_HELD = "ahead"


class Ahead(Direction):
    """SAMPa: ε = ρ a/‖a‖, with a the first gradient of the step before (Xie, Pethick & Cevher, NeurIPS 2024).

    With a schedule it is that of the last step that perturbed.

    The first gradient of a step is taken ahead of θ, at y = θ − η a, where a step of gradient descent along a would
    lead; it is the next step's a. So no pass of a step waits for the other. Over SGD y is θ − η (a + λ_w θ + μ m), with
    its weight decay λ_w and its momentum m, as in the authors' code. Before the first step a = 0.

    A first gradient that is not finite skips the step, and a stays; with ``check_finite=False`` it leaves the weights
    where they are for the second pass, and a all the same. A finite one is kept even if its step is given up
    or skipped later. State: a, one parameter-sized buffer.

    Examples:
        >>> opt = SAM([w], SGD, rho=5.0, direction=Ahead(), lr=0.1)
        >>> loss = opt.step(closure)  # no gradient of a step before: ε = 0, and y = θ
        >>> print(w.data)
        tensor([2.7000, 1.6000])
    """

    starts = True
    remembers = True
    held = (_HELD,)

    def check_base(self, base: Look) -> None:
        if any("lr" not in group for group in base.groups):
            raise ValueError(
                f"{type(self).__name__} looks ahead by the learning rate, and {base.name}'s groups have no 'lr': take "
                "an optimizer whose groups have one"
            )

    def start(self, runs: Runs, first: FirstPass) -> None:
        b, room = runs.bucket, first.room(runs)[0]
        before, views = first.held.tensors(runs, _HELD), b.views(room, runs.indices)
        momenta = dict(enumerate(first.base.tensors(runs, "momentum_buffer")))
        gate = torch.ones((), dtype=torch.float64, device=b.device)
        for g, places in runs.by_group():
            group, some = first.groups[g], runs.only(places)
            table, out = b.unscaled_table(some.indices), b.pack([views[j] for j in places])
            minus, momentum, decay = -group["lr"], 0.0, 0.0
            if issubclass(first.base.kind, torch.optim.SGD):
                momentum, decay = group["momentum"], group["weight_decay"]
            pair = _numbers(minus, minus * decay, b.device)
            b.ops.combine_(out, b.pack([before[j] for j in places]), some.weights, table, pair, gate)
            moving = {j: lying_as(runs.params[j], m) for j in places if (m := momenta[j]) is not None}
            if moving and momentum:
                some, out = runs.only(list(moving)), b.pack([views[j] for j in moving])
                pair = _numbers(1.0, minus * momentum, b.device)
                b.ops.combine_(out, out, b.pack(list(moving.values())), b.unscaled_table(some.indices), pair, gate)

    def prepare(self, first: FirstPass) -> Perturbation:
        finite = torch.isfinite(first.squared_norm)
        one = torch.ones_like(first.squared_norm)
        keep = torch.stack([one, 0 * one])
        ascents, shares = [], []
        for runs in first.runs:
            b, room = runs.bucket, first.room(runs)
            before, table = b.pack(first.held.tensors(runs, _HELD)), b.unscaled_table(runs.indices)
            shares.append(b.parts * b.ops.grad_norm(before, [], table, None, 0.0, 2.0))
            pair = keep.to(b.device)
            b.ops.combine_(room, before, before, table, pair, one.to(b.device))
            b.ops.combine_(before, runs.pack(runs.grads), before, table, pair, finite.double().to(b.device))
            ascents.append(Ascent.along(runs, room))
        total = torch.where(finite, first.total(shares), torch.nan)
        return Perturbation(ascents, total)


def _numbers(a: float | Tensor, b: float | Tensor, device: torch.device) -> Tensor:
    """A pair of coefficients; a learning rate that is a tensor stays on its device until it is copied."""
    pair = torch.empty(2, dtype=torch.float64, device=device)
    pair[0], pair[1] = a, b
    return pair
