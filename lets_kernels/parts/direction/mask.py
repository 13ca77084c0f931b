"""Along some elements of the gradient only: ESAM's stochastic weights, and the masks of Sparse SAM."""

import math
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lets_kernels.parts.direction.base import Ascent, Direction, Perturbation, Scalable
from lets_kernels.parts.part import at_least_one, share
from lets_kernels.parts.passes import DRAWS, MASK, REGROWTH, FirstPass
from lets_kernels.space.buckets import Bucket
from lets_kernels.space.memory import refuse_while_capturing
from lets_kernels.space.shards import elements

GRANULARITIES = ("element", "tensor")
KINDS = ("fisher", "dynamic")
#: The highest key that an element can have.
_MOST = (1 << 63) - 1


class Dropped(Scalable):
    """ESAM's stochastic weight perturbation: each weight takes part with probability β, and then ε = ρ g/(β ‖g‖).

    Du et al., ICLR 2022. The norm is that of the whole gradient, so the mean of ε over the draws is SAM's. State: none;
    the choice is drawn again wherever it is used. In groups with ``adaptive=True`` it is ε = ρ T²g/(β ‖Tg‖) with ASAM's
    T, as in the authors' code.

    Args:
        beta: β in (0, 1]; 1 is SAM.
        granularity: what is chosen: single elements, ``"element"``, or whole tensors, ``"tensor"``, as in the authors'
            code.
        drawn_norm: ‖g‖ is that of the chosen tensors, as in the authors' code: ε then has the length ρ/β, however many
            were chosen. They choose at the end of the step before, so their first step has all tensors.

    Raises:
        ValueError: an argument is out of its range, or ``drawn_norm`` with single elements.

    Examples:
        >>> opt = SAM([w], SGD, rho=5.0, direction=Dropped(beta=1.0), lr=0.1)  # β = 1 is SAM
        >>> loss = closure()
        >>> with opt.perturbed():
        ...     print(w.data)
        tensor([6., 6.])
    """

    draws = True

    def __init__(self, beta: float = 0.5, granularity: str = "element", *, drawn_norm: bool = False) -> None:
        if not beta > 0:
            raise ValueError(f"beta must be in (0, 1], not {beta}: at 0 nothing is perturbed")
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, not {granularity!r}")
        if drawn_norm and granularity != "tensor":
            raise ValueError(f"drawn_norm=True goes with granularity='tensor', not with {granularity!r}")
        self.beta, self.granularity, self.drawn_norm = share(beta, "beta"), granularity, drawn_norm

    def not_capturable(self) -> str | None:
        if self.granularity == "tensor" and self.beta < 1:
            return "granularity='tensor' draws on the host which tensors take part"
        return None

    def prepare(self, first: FirstPass) -> Perturbation:
        if self.beta == 1 or self.granularity == "tensor":
            return self._tensors(first)
        ascents, shares = [], []
        for runs in first.runs:
            b, room = runs.bucket, first.room(runs)
            grads, table = runs.pack(runs.grads), b.unscaled_table(runs.indices)
            squared = b.parts * b.ops.masked_(room, grads, None, table, *first.draw(b, DRAWS), self.beta)
            ascent, share = self.scaled(Ascent.along(runs, room), grads, first.groups)
            ascents.append(ascent)
            shares.append(squared if share is None else share)
        return Perturbation(ascents, first.total(shares))

    def _tensors(self, first: FirstPass) -> Perturbation:
        ascents = []
        # Numbered by places in the groups, which are the same on ranks that lack a gradient, and for spread tensors.
        offsets = list(accumulate((len(group["params"]) for group in first.groups), initial=0))
        draws = first.random.uniforms(first.step, offsets[-1] if self.beta < 1 else 0, DRAWS)
        for runs in first.runs:
            b, chosen = runs.bucket, runs
            if self.beta < 1:
                places = [offsets[b.group_of[i]] + b.places[i] for i in runs.indices]
                chosen = runs.only([j for j, place in enumerate(places) if draws[place] < self.beta])
            if chosen.indices:
                ascents.append(self.ascent(chosen, first.groups))
        if self.drawn_norm:
            total = first.total([ascent.total() for ascent in ascents])
        elif any(runs.bucket.scaled for runs in first.runs):
            total = first.total([self.ascent(runs, first.groups).total() for runs in first.runs])
        else:
            total = first.squared_norm
        return Perturbation(ascents, total * self.beta**2, norm=total.sqrt())


class Masked(Direction):
    r"""Sparse SAM: ε = ρ (g/‖g‖) ⊙ mask, with the norm of the whole gradient (Mi et al., NeurIPS 2022).

    The mask keeps a share 1 - s of all elements, exactly, over all tensors and ranks together; random numbers decide
    between equal values. The device selects the mask, in 64 passes over the gradient with one copy of the mask, before
    the first perturbation and then every ``interval`` steps. Such a step waits once for the device; if its gradient is
    not finite, the next step selects. A selected mask stays if the step is given up. Parameters without a gradient at
    that time take no part in the selection, and are not masked until the next selection.

    - ``"fisher"``: keeps the elements with the largest Fisher information, Σ g² over n samples. A step uses the square
      of its batch's gradient; :meth:`SparseSAM.update_mask` uses the gradients of n samples one by one, as the paper
      does.
    - ``"dynamic"``: random at first. Each later selection drops the kept elements with the smallest absolute gradient,
      and draws as many other elements to grow again. The dropped share falls along half a cosine from ``drop`` to zero.

    State: the mask, one byte an element. Two gradients a step.

    Args:
        sparsity: s in [0, 1), the share that is not perturbed; 0 is SAM.
        kind: ``"fisher"`` or ``"dynamic"``.
        interval: steps between two selections. None: only the first selection, and those of ``update_mask``. The paper
            counts epochs.
        drop, steps: the first dropped share and the length of training, for ``"dynamic"``, which needs ``steps``.

    Raises:
        ValueError: an argument is out of its range.

    Examples:
        >>> opt = SAM([w], SGD, rho=5.0, direction=Masked(sparsity=0.5), lr=0.1)
        >>> loss = closure()
        >>> with opt.perturbed():  # ε = ρ (0, g₂)/‖g‖
        ...     print(w.data)
        tensor([3., 6.])
    """

    draws = True
    held = (MASK,)
    remembers = True

    def __init__(
        self,
        sparsity: float = 0.5,
        kind: str = "fisher",
        interval: int | None = None,
        *,
        drop: float = 0.5,
        steps: int | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), not {sparsity}: at 1 nothing is perturbed")
        if interval is not None:
            at_least_one(interval, "interval")
        if kind == "dynamic" and (steps is None or steps < 1):
            raise ValueError("kind='dynamic' needs steps, the length of training: its drop rate falls to zero")
        self.sparsity, self.kind, self.interval = float(sparsity), kind, interval
        self.drop, self.steps = share(drop, "drop"), steps
        self._selected = 0  # how often a mask was selected

    def not_capturable(self) -> str | None:
        if self.sparsity and self.interval is not None:
            return f"interval={self.interval}: the host decides whether the mask is selected anew"
        return None

    def prepare(self, first: FirstPass) -> Perturbation:
        masks = [first.held.flat(runs.bucket, MASK)[0] for runs in first.runs]
        due = self._due(first.step)
        if due:
            refuse_while_capturing("the mask")
        if due and math.isfinite(float(first.squared_norm)):
            self.select(first, [runs.pack(runs.grads) for runs in first.runs])
        ascents, shares = [], []
        for runs, mask in zip(first.runs, masks, strict=True):
            b, room = runs.bucket, first.room(runs)
            grads, table = runs.pack(runs.grads), b.unscaled_table(runs.indices)
            shares.append(b.parts * b.ops.masked_(room, grads, mask, table, *first.draw(b, DRAWS), 1.0))
            ascents.append(Ascent.along(runs, room))
        return Perturbation(ascents, first.squared_norm if due else first.total(shares))

    def _due(self, step: int) -> bool:
        if not self.sparsity:
            return False
        return not self._selected or (self.interval is not None and step % self.interval == 0)

    def select(self, first: FirstPass, vectors: list[list[Tensor]]) -> None:
        """Select the mask anew, by one list of vectors for each of ``first.runs``."""
        chosen = _Selection(first)
        size = sum(elements(runs.bucket.params[i]) for runs in first.runs for i in runs.indices)
        kept = max(1, round((1 - self.sparsity) * size))
        if self.kind == "fisher" or not self._selected:
            chosen.set(-1, 2, kept, vectors if self.kind == "fisher" else None)
        else:
            rate = self.drop * (1 + math.cos(math.pi * min(first.step / (self.steps or 1), 1.0))) / 2
            count = min(round(rate * kept), size - kept)
            chosen.set(1, 2, kept - count, vectors)
            chosen.set(0, 3, count)
        chosen.set(1, 0)
        chosen.set(2, 1)
        chosen.set(3, 1)
        chosen.keep()
        self._selected += 1

    def state_dict(self) -> dict[str, Any]:
        return {"selected": self._selected}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._selected = int(state["selected"])


# A bucket and the arguments of its ops: the vectors, the mask, the run table, and the random numbers.
_Arguments = tuple[Bucket, list[Tensor], Tensor, Tensor, tuple[Tensor, int]]


class _Selection:
    """Selects elements with the highest keys among those with one value of the mask, over all buckets and ranks.

    It marks elements in copies of the masks: an interrupt must leave no marks in a mask that is used or saved later.
    """

    def __init__(self, first: FirstPass) -> None:
        self._first = first
        self._own = [first.held.flat(runs.bucket, MASK)[0] for runs in first.runs]
        self._masks = [mask.clone() for mask in self._own]

    def _threshold(self, each: list[_Arguments], count: int | None, member: int) -> Tensor:
        """The lowest threshold with at most ``count`` elements above, by bisection: 0-d int64. -1 without a count."""
        low = torch.full((), -1, dtype=torch.int64, device=self._first.home)
        if count is None:
            return low
        high = torch.full_like(low, _MOST)
        for _ in range(64):
            middle = (low >> 1) + (high >> 1) + (low & high & 1)  # the mean; high - low would overflow
            found = self._first.total(
                [b.parts * b.ops.count_above(v, m, t, middle.to(m.device), *draw, member) for b, v, m, t, draw in each]
            )
            above = found > count + 0.5
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return high

    def set(self, member: int, value: int, count: int | None = None, vectors: list[list[Tensor]] | None = None) -> None:
        """Set the mask to ``value`` where it is ``member``: everywhere, or at the ``count`` highest keys there."""
        each: list[_Arguments] = []
        for i, (runs, mask) in enumerate(zip(self._first.runs, self._masks, strict=True)):
            b, purpose = runs.bucket, REGROWTH if vectors is None else DRAWS
            draw = self._first.draw(b, purpose)
            each.append((b, [] if vectors is None else vectors[i], mask, b.unscaled_table(runs.indices), draw))
        threshold = self._threshold(each, count, member)
        for b, v, mask, table, draw in each:
            b.ops.select_(mask, v, table, threshold.to(mask.device), *draw, member, value)

    def keep(self) -> None:
        """Write the copies into the masks."""
        for mask, chosen in zip(self._own, self._masks, strict=True):
            mask.copy_(chosen)
