"""Along the base optimizer's momentum: Momentum-SAM."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lets_kernels.base.state import Look, lying_as
from lets_kernels.parts.direction.base import Ascent, Direction, Perturbation
from lets_kernels.parts.passes import FirstPass
from lets_kernels.space.buckets import Runs

#: Options of a base optimizer that turn momentum on, with the momentum's name in the state.
_NAMES = {"momentum": "momentum_buffer", "betas": "exp_avg"}


class Momentum(Direction):
    """MSAM: ε = −ρ v/‖v‖, with v the base optimizer's momentum (Becker, Altrock & Risse, 2024, Algorithm 1).

    v is ``momentum_buffer`` in an optimizer with ``momentum`` (SGD, RMSprop), ``exp_avg`` in an optimizer with
    ``betas`` (Adam, AdamW, NAdam, RAdam, Adamax); the norm is over all parameters together. v is read, never written.
    The last steps went along −v. A parameter has no v before its first step, and does not move. No gradient at θ is
    needed, so a step takes one gradient, at θ + ε. State: none.
    """

    needs_gradient = False

    def check_base(self, base: Look) -> None:
        for group in base.groups:
            option = _option(group)
            value = group[option] if option else None
            if isinstance(value, (tuple, list)):
                value = value[0]
            if not value:
                raise ValueError(
                    f"{type(self).__name__} perturbs along the base optimizer's momentum, and {base.name} keeps none"
                    f"{f' with {option}={group[option]!r}' if option else ''}: take SGD or RMSprop with momentum=0.9, "
                    "or one of the Adam family with betas[0] > 0"
                )

    def prepare(self, first: FirstPass) -> Perturbation:
        numbers = [torch.full((), value, dtype=torch.float64, device=first.home) for value in (-1.0, 0.0, 1.0)]
        minus, gate = torch.stack(numbers[:2]), numbers[2]
        ascents, shares = [], []
        for runs in first.runs:
            b, (there, momenta) = runs.bucket, _momenta(runs, first)
            if not momenta:
                continue
            room, packed, table = first.room(there), b.pack(momenta), b.unscaled_table(there.indices)
            shares.append(b.parts * b.ops.grad_norm(packed, [], table, None, 0.0, 2.0))
            b.ops.combine_(room, packed, packed, table, minus.to(b.device), gate.to(b.device))
            ascents.append(Ascent.along(there, room))
        return Perturbation(ascents, first.total(shares))


def _option(group: Mapping[str, Any]) -> str | None:
    return next((option for option in _NAMES if option in group), None)


def _momenta(runs: Runs, first: FirstPass) -> tuple[Runs, list[Tensor]]:
    """The runs that have momentum, and their momentum tensors, with the memory layout of the runs.

    Raises:
        ValueError: the base optimizer has begun its state for them, without momentum.
    """
    name = _NAMES[_option(first.groups[runs.bucket.present[0]]) or "momentum"]
    found = first.base.tensors(runs, name)
    places = [j for j, v in enumerate(found) if v is not None]
    there = runs if len(places) == len(found) else runs.only(places)
    if not places and any(first.base.entry(p) and name not in first.base.entry(p) for p in runs.bucket.params):
        raise ValueError(
            f"{first.base.name} has taken steps and keeps no {name}, so there is no momentum to perturb along: take "
            "torch's SGD or RMSprop with momentum=0.9, or one of its Adam family"
        )
    return there, [lying_as(p, v) for p, v in zip(there.params, (v for v in found if v is not None), strict=True)]
