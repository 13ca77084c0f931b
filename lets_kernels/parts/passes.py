"""What the parts of a method see of a step: its first and second gradients, and the sums over them."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lets_kernels.around.randomness import Randomness
from lets_kernels.base.state import Look, begun_state
from lets_kernels.space.buckets import Bucket, Runs
from lets_kernels.space.distributed import Replicas
from lets_kernels.space.memory import refuse_while_capturing
from lets_kernels.space.shards import is_spread, local, spread_as

#: One bucket's gradients, by the index of the parameter.
Gradients = dict[int, Tensor]
#: The prefix of the names of held tensors in a saved state, where the base optimizer's own names stand too.
PREFIX = "lets_kernels."
#: The name of the held tensor that has one byte for each element.
MASK = "mask"
#: The name of the weights before the last step. They stand in the buffer from which perturbations are undone.
BEFORE = "before"
#: The streams of random numbers of a bucket: its noise, the draws of its mask, and the elements that grow again.
NOISE, DRAWS, REGROWTH = range(3)
_STREAMS = 4


def by_index(runs: Runs) -> Gradients:
    """The gradients of a pass, by the parameter's place in its bucket."""
    return dict(zip(runs.indices, runs.grads, strict=True))


def add_up(values: Sequence[Tensor], home: torch.device) -> Tensor:
    """The sum of tensors of one shape from several devices; a 0-d zero if there are no tensors."""
    if not values:
        return torch.zeros((), dtype=torch.float64, device=home)
    if len(values) == 1:
        return values[0].to(home)
    return torch.stack([v.to(home) for v in values]).sum(dim=0)


class Held:
    """Tensors that a part keeps for every parameter from step to step, each as large as the parameter.

    They begin at zero. A saved state holds them together with the base optimizer's tensors, under names with a prefix.
    """

    def __init__(self) -> None:
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    def tensors(self, runs: Runs, name: str) -> list[Tensor]:
        """One tensor for each run, with the memory layout of the run.

        Raises:
            ValueError: a loaded tensor has another memory layout.
        """
        found = begun_state(runs, self.state, name)
        if found is None:  # the parameters have another layout by now: channels last, for example
            for i in runs.indices:
                p = runs.bucket.params[i]
                like = torch.zeros_like(p, memory_format=torch.preserve_format, requires_grad=False)
                self.state[p][name] = like.copy_(self.state[p][name])
            found = begun_state(runs, self.state, name)
        if found is None:
            raise ValueError(f"the state's {name} has another memory layout than the parameter; load the state again")
        return found

    def flat(self, bucket: Bucket, name: str) -> tuple[Tensor, list[Tensor]]:
        """``MASK`` or ``BEFORE`` of a bucket: one flat buffer, and one view of it for each parameter.

        The mask has one byte for each element, and begins at 1. The weights before the last perturbed step stand in the
        buffer from which perturbations are undone, so the next perturbation overwrites them; at first they are the
        present weights.
        """
        entries = [self.state[p] for p in bucket.params]
        found = bucket.flats.get(name)
        if found is not None and all(own.get(name) is view for own, view in zip(entries, found[1], strict=True)):
            return found
        refuse_while_capturing("the mask" if name == MASK else "the weights before the last step")
        flat = bucket.saved if name == BEFORE else torch.ones(bucket.size, dtype=torch.uint8, device=bucket.device)
        views = bucket.views(flat)
        for own, begin, view in zip(entries, bucket.memory if name == BEFORE else views, views, strict=True):
            view.copy_(local(own[name]) if name in own else begin)
            own[name] = view
        bucket.flats[name] = flat, views
        return flat, views

    def make(self, runs: Iterable[Runs], names: Iterable[str]) -> None:
        """Make the tensors now, for tools that load a state key by key."""
        wanted = sorted(set(names))
        for each in runs:
            for name in wanted:
                if name in (MASK, BEFORE):
                    self.flat(each.bucket, name)
                else:
                    self.tensors(each, name)

    def add_to(self, state: dict[Any, Any], indices: Mapping[int, int]) -> dict[Any, Any]:
        """Add these tensors to the saved state of the parameters; ``indices`` maps ids of parameters to keys of the
        state.

        A tensor of a spread parameter is spread too, so that tools save the parts of all ranks.
        """
        out = dict(state)
        for p, own in self.state.items():
            if id(p) in indices and own:
                key = indices[id(p)]
                whole = {
                    name: t if is_spread(t) or not is_spread(p) else spread_as(t.clone(), p) for name, t in own.items()
                }
                out[key] = {**out.get(key, {}), **{PREFIX + name: t for name, t in whole.items()}}
        return out

    @staticmethod
    def take_from(state: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[Any, dict[str, Tensor]]]:
        """Split a saved state into the base optimizer's entries and the held tensors, both by the same keys."""
        rest, held = {}, {}
        for key, entry in state.items():
            if not isinstance(entry, Mapping):
                rest[key] = entry
                continue
            mine = {str(n)[len(PREFIX) :]: t for n, t in entry.items() if str(n).startswith(PREFIX)}
            other = {n: t for n, t in entry.items() if not str(n).startswith(PREFIX)}
            if mine:
                held[key] = mine
            if other or not mine:
                rest[key] = other
        return rest, held

    def load(self, held: Mapping[Any, dict[str, Tensor]], params: Sequence[Tensor]) -> None:
        """Load what :meth:`take_from` found, in the parameters' dtypes; ``params`` is in the order of the keys."""
        self.state.clear()
        for key, own in held.items():
            p = params[int(key)]
            for name, value in own.items():
                if value.dtype == torch.uint8:  # a mask of this rank's part
                    self.state[p][name] = value
                    continue
                # Real pairs of complex numbers stay pairs.
                like = p if value.shape == p.shape else value.to(p.device)
                home = torch.zeros_like(like, memory_format=torch.preserve_format, requires_grad=False)
                self.state[p][name] = home.copy_(value)


@dataclass
class FirstPass:
    """The first gradients of a step, and the sums over all parameters and ranks that a direction needs."""

    runs: list[Runs]  # the runs of the buckets that take part
    groups: Sequence[dict[str, Any]]
    step: int
    home: torch.device  # where the scalars of a step meet
    replicas: Replicas | None  # None: each rank goes along its own gradient
    random: Randomness
    held: Held
    base: Look  # the base optimizer's class, groups and state, read only
    keeps: bool  # the vectors of the perturbation are needed after it
    ascent: int = 0  # which ascent of the step this is, from 0: the later ones have their gradients at θ + ε
    #: What a direction with several ascents keeps from one to the next, by the index of the bucket: a flat buffer each.
    carried: dict[int, Tensor] = field(default_factory=dict)
    _squared: Tensor | None = None

    def total(self, shares: Sequence[Tensor]) -> Tensor:
        """The sum of the buckets' shares over all ranks: 0-d float64. Shares include the factor ``parts``."""
        total = add_up(shares, self.home)
        return total if self.replicas is None else self.replicas.mean(total)

    def highest(self, values: Sequence[Tensor]) -> Tensor:
        """The largest of the buckets' values over all ranks: 0-d float64, infinite if a value is not finite."""
        top = torch.zeros((), dtype=torch.float64, device=self.home)
        if values:
            found = torch.stack([v.to(self.home) for v in values])
            top = torch.where(torch.isfinite(found).all(), found.max(), torch.inf)
        for group in self.replicas.groups if self.replicas is not None else ():
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        return top

    @property
    def squared_norm(self) -> Tensor:
        """‖g‖², over all parameters and ranks: 0-d float64, computed once."""
        if self._squared is None:
            self._squared = self.total([squared(r) for r in self.runs])
        return self._squared

    def room(self, runs: Runs) -> list[Tensor]:
        """A flat buffer for the vectors of a bucket. It takes new memory only if the vectors are to be kept."""
        b = runs.bucket
        return [torch.empty_like(b.saved)] if self.keeps else [b.saved]

    def draw(self, bucket: Bucket, purpose: int) -> tuple[Tensor, int]:
        """The ops' arguments ``random`` and ``stream`` for one of the streams of a bucket."""
        return self.random.at(bucket.device, bucket.part), bucket.index * _STREAMS + purpose


@dataclass
class Moment:
    """What a schedule and a radius can use of the present step."""

    step: int  # from 0
    random: Randomness
    first: FirstPass | None  # None if there is no first gradient yet
    loss: Tensor | None = None  # of the first pass on this rank, 0-d, if the optimizer has seen it

    def uniform(self) -> float:
        """A random number in [0, 1): the same on all ranks, and again the same if the step is taken again."""
        return self.random.uniform(self.step, 0)

    def squared_norm(self) -> float:
        """‖g‖² over all parameters and ranks. Waits for the device; ``first.squared_norm`` does not."""
        assert self.first is not None
        return float(self.first.squared_norm)


def displacements(runs: Iterable[Runs], held: Held, count: int, home: torch.device) -> Tensor:
    """This rank's shares of g·Δ and Δ·Δ, for the mean over ranks. Δ is how far the weights have moved.

    They are counted from the last step that perturbed. Returns float64 of shape [count, 2]: one line for each param
    group, or one for all if ``count`` is 1. Leaves Σ g², which the same read gives, in ``Runs.squares``.
    """
    by_group = torch.zeros(count, 2, dtype=torch.float64, device=home)
    for each in runs:
        b, squares = each.bucket, []
        held.flat(b, BEFORE)  # lets the weights before the last step stand in b.saved
        for line, some in by_line(each, count):
            table = b.unscaled_table(some.indices)
            found = b.ops.displacement_dots(some.pack(some.grads), some.weights, b.saved, table)
            squares.append(found[0])
            by_group[line] += b.parts * found[1:].to(home)
        each.squares = add_up(squares, b.device)
    return by_group


def by_line(runs: Runs, count: int) -> list[tuple[int, Runs]]:
    """The runs whose sums go into one of ``count`` lines: all into one, or those of each param group into its own."""
    if count == 1:
        return [(0, runs)]
    if len(runs.bucket.present) == 1:
        return [(runs.bucket.present[0], runs)]
    return [(group, runs.only(places)) for group, places in runs.by_group()]


def squared(runs: Runs) -> Tensor:
    """This rank's share of ‖g‖² of one bucket, for the mean over ranks: 0-d float64."""
    b, found = runs.bucket, runs.squares
    if found is None:
        found = b.ops.grad_norm(runs.pack(runs.grads), [], b.unscaled_table(runs.indices), None, 0.0, 2.0)
        runs.squares = found
    return b.parts * found


@dataclass
class SecondPass:
    """The gradients from which the base optimizer's step is made."""

    runs: list[Runs]  # with the second gradients; on a step that does not perturb they are taken at θ
    first: list[Gradients]  # one for every bucket; empty unless the descent holds the first gradients
    perturbed: bool
    home: torch.device
    replicas: Replicas
    held: Held
    keeps: bool  # the gradients themselves are needed after the step
    gate: Tensor
    offsets: Sequence[int]  # the place of each bucket's first parameter among all parameters; last, their number
    groups: Sequence[Mapping[str, Any]]  # the base optimizer's
    first_squared_norm: Tensor | None = None  # ‖g‖² of a step that perturbs, if the descent needs it: 0-d float64
    #: The sums of the gradients at all points θ + ε before the last one, if the descent gathers them: one for every
    #: bucket; empty if there was but one such point.
    gathered: list[Gradients] = field(default_factory=list)
    #: Vectors along which the weights move after the base optimizer's step, and a factor of the learning rate.
    _apart: tuple[list[list[Tensor]], float] | None = None
    _compared: Tensor | None = None
    _squared: Tensor | None = None

    @property
    def squared_norm(self) -> Tensor:
        """‖ĝ‖², over all parameters and ranks: 0-d float64, computed once, before the gradients are replaced."""
        if self._squared is None and self._compared is not None:
            self._squared = self._compared[0, 0]
        elif self._squared is None:
            self._squared = self.replicas.mean(add_up([squared(runs) for runs in self.runs], self.home))
        return self._squared

    def compared(self) -> Tensor:
        """ĝ·ĝ, ĝ·g and g·g over all buckets and ranks: float64 of shape [1, 3], made once a step."""
        if self._compared is None:
            self._compared = self.products([self.firsts(runs) for runs in self.runs])
        return self._compared

    def compared_by_groups(self, count: int, more: Tensor, riders: Tensor) -> tuple[Tensor, Tensor]:
        """Like :meth:`compared`, with one line for each of ``count`` param groups (one line for all, if ``count`` is
        1).

        Args:
            count: the number of lines.
            more: other sums of this rank, float64 of shape [count, any], whose means over ranks are taken too.
            riders: float64 numbers of any shape, for which the first rank's count; the same all-reduce carries them.

        Returns:
            The products and the means of ``more``, float64 of shape [count, 3 + any]; and the first rank's ``riders``.
        """
        by_group = torch.zeros(count, 3, dtype=torch.float64, device=self.home)
        for runs in self.runs:
            b = runs.bucket
            for line, some in by_line(runs, count):
                found = b.ops.dots(b.pack(some.grads), b.pack(self.firsts(some)), b.unscaled_table(some.indices))
                by_group[line] += b.parts * found.to(self.home)
        by_group = torch.cat([by_group, more], dim=1)
        if self.replicas.groups:
            sums, first = self.replicas.agree(list(by_group.flatten().unbind()), list(riders.flatten().unbind()))
            by_group, riders = torch.stack(sums).view_as(by_group), torch.stack(first).view_as(riders)
        self._compared = by_group[:, :3].sum(dim=0, keepdim=True)
        return by_group, riders

    def firsts(self, runs: Runs) -> list[Tensor]:
        """The first gradients in the order of the runs; zeros for a parameter that had none."""
        own = self.first[runs.bucket.index]
        pairs = zip(runs.indices, runs.grads, strict=True)
        return [own[i] if i in own else torch.zeros_like(g) for i, g in pairs]

    def products(self, others: Sequence[list[Tensor]], per_tensor: bool = False) -> Tensor:
        """x·x, x·y and y·y, where x are the gradients of ``runs`` and y the ``others``, over all buckets and ranks.

        Returns:
            float64 of shape [1, 3]; with ``per_tensor`` one line for each parameter of ``runs``, in their order.
        """
        found, places = [], []
        for runs, other in zip(self.runs, others, strict=True):
            b = runs.bucket
            pieces = [((i,), [g], [o]) for i, g, o in zip(runs.indices, runs.grads, other, strict=True)]
            for indices, x, y in pieces if per_tensor else [(runs.indices, runs.grads, other)]:
                found.append(b.parts * b.ops.dots(b.pack(x), b.pack(y), b.unscaled_table(indices)).to(self.home))
            places += [self.offsets[b.index] + i for i in runs.indices]
        if not per_tensor:
            total = add_up(found, self.home) if found else torch.zeros(3, dtype=torch.float64, device=self.home)
            return self.replicas.mean(total[None])
        if found and len(found) == self.offsets[-1]:
            return self.replicas.mean(torch.stack(found))
        # Of the same size on every rank.
        by_place = torch.zeros(self.offsets[-1], 3, dtype=torch.float64, device=self.home)
        if found:
            by_place[places] = torch.stack(found)
        return self.replicas.mean(by_place)[places]

    def numbers(self, a: float, b: float) -> Tensor:
        """Coefficients that the host knows, for :meth:`combine`."""
        filled = [torch.full((), value, dtype=torch.float64, device=self.home) for value in (a, b)]
        return torch.stack(filled)[None]

    def targets(self, runs: Runs) -> list[Tensor]:
        """Tensors into which a descent may write the vector that it makes of a bucket's gradients."""
        shared = len({g.data_ptr() for g in runs.grads if g.numel()}) < sum(g.numel() > 0 for g in runs.grads)
        return [torch.empty_like(g) for g in runs.grads] if self.keeps or shared else runs.grads

    def combine(self, outs: Sequence[list[Tensor]], others: Sequence[list[Tensor]], coefficients: Tensor) -> None:
        """out <- a x + b y, where the gate is open; x are the gradients of ``runs``.

        Args:
            outs: the results, one list for each of ``runs``.
            others: y, one list for each of ``runs``.
            coefficients: a and b, float64 of shape [k, 2], with k as :meth:`products` returned.
        """
        pairs = list(coefficients.unbind())
        whole = len(pairs) == 1
        for runs, out, other in zip(self.runs, outs, others, strict=True):
            b = runs.bucket
            gate = self.gate.to(b.device)
            if whole:
                lists = (b.pack(out), b.pack(runs.grads), b.pack(other))
                b.ops.combine_(*lists, b.unscaled_table(runs.indices), pairs[0].to(b.device), gate)
                continue
            for i, to, g, o in zip(runs.indices, out, runs.grads, other, strict=True):
                b.ops.combine_([to], [g], [o], b.unscaled_table((i,)), pairs.pop(0).to(b.device), gate)

    def step_along(self, others: Sequence[list[Tensor]], coefficients: Tensor) -> None:
        """Let the base optimizer step along a x + b y; arguments as in :meth:`combine`."""
        outs = [self.targets(runs) for runs in self.runs]
        self.combine(outs, others, coefficients)
        for runs, out in zip(self.runs, outs, strict=True):
            runs.grads = out

    def step_apart(self, others: list[list[Tensor]], factor: float) -> None:
        """Let the base optimizer step along y, and :meth:`follow_ups` along x − y; x and y as in :meth:`combine`.

        Raises:
            ValueError: a group has no learning rate.
        """
        if any("lr" not in group for group in self.groups):
            raise ValueError(
                "a part of the step goes by the learning rate, and the base optimizer's groups have no 'lr'"
            )
        outs = [self.targets(runs) for runs in self.runs]
        self.combine(outs, others, self.numbers(1.0, -1.0))
        for runs, other in zip(self.runs, others, strict=True):
            runs.grads = other
        self._apart = outs, factor

    def follow_ups(self) -> list[Callable[[], None]]:
        """What is to be done after the base optimizer's step, for each of ``runs``; nothing without :meth:`step_apart`.

        θ ← θ − factor · lr · (x − y), where the gate is open. If the gradients are kept, they are y + factor (x − y)
        afterwards: the vector along which the whole step went.
        """
        if self._apart is None:
            return []
        vectors, factor = self._apart
        return [partial(self._follow, *pair, factor) for pair in zip(self.runs, vectors, strict=True)]

    def _follow(self, runs: Runs, own: list[Tensor], factor: float) -> None:
        b = runs.bucket
        gate = self.gate.to(b.device)
        for group, places in runs.by_group():
            move = -factor * self.groups[group]["lr"]
            if not isinstance(move, Tensor) and move == 0:
                continue  # a sum with zeros would make 0.0 of -0.0
            part = runs.only(places)
            part.renew()
            pair = self.numbers(1.0, 0.0)[0].to(b.device)
            pair[1] = move  # a tensor, if the learning rate is one: nothing waits for it
            lists = (part.weights, part.weights, b.pack([own[j] for j in places]))
            b.ops.combine_(*lists, b.unscaled_table(part.indices), pair, gate)
            part.write_back()
        if self.keeps:
            pair, packed = self.numbers(1.0, factor)[0].to(b.device), b.pack(own)
            b.ops.combine_(packed, b.pack(runs.grads), packed, b.unscaled_table(runs.indices), pair, gate)
            runs.grads = own
