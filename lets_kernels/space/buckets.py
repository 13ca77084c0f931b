"""Buckets of parameters, their runs, and the tables that the ops read.

Parameters of one device and dtype form a bucket, whatever their groups: an index space in which parameter i owns
``[start_i, start_i + numel_i)``, with starts padded to 16 elements. State that the package owns (saved weights, filter
norms) is one flat buffer for each bucket. The parameters stay where they are unless ``flatten`` moves them into one
buffer. The options of their groups reach the ops as one number for all runs, or one a run.
"""

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import increment_version

from lets_kernels import ops
from lets_kernels.ops.declared import ELEMENT_WISE, UNSCALED
from lets_kernels.ops.layouts import layout_of
from lets_kernels.ops.memory import capturing, is_dense
from lets_kernels.space.memory import is_lent, refuse_while_capturing, uploaded
from lets_kernels.space.shards import (
    filter_groups,
    is_apart,
    is_spread,
    local,
    local_gradient,
    part_of,
    parts,
    whole_gradient,
)

_grad = operator.attrgetter("grad")

PADDING = 16
_TABLES = 64

T = TypeVar("T")

# (filter_length, filter_count) of one parameter, as the ops' run table wants it: how T scales the parameter.
Geometry = Callable[[Tensor, str | None, dict[str, Any]], tuple[int, int]]
Groups = Sequence[Mapping[str, Any]]
#: One number for all runs, or one a run.
PerRun = float | list[float]


@dataclass(frozen=True)
class Member:
    """A parameter, and where it stands in the param groups."""

    param: Tensor
    name: str | None
    group: int
    place: int  # in the group


@dataclass
class Runs:
    """The parameters of a bucket that take part in one pass, with their gradients, in the order of the bucket.

    ``params`` and ``grads`` are dense, and agree in strides and dtype for each run. If the user's tensors do not, these
    are copies, and ``write_back`` writes the weights back into the parameters.
    """

    bucket: "Bucket"
    indices: tuple[int, ...]
    params: list[Tensor]
    grads: list[Tensor]
    copies: list[tuple[int, Tensor]] = field(default_factory=list)  # index of a parameter, and its dense copy
    squares: Tensor | None = None  # Σ g², if an op has computed it already: 0-d float64
    _packed: tuple[list[Tensor], list[Tensor]] | None = None

    @property
    def table(self) -> Tensor:
        return self.bucket.table(self.indices)

    @property
    def weights(self) -> list[Tensor]:
        """The ops' argument for the parameters: one tensor for each run, or the one buffer that holds all of them."""
        b = self.bucket
        if b.flat is not None and not self.copies:
            return [b.flat]
        return b.pack(self.params)

    def pack(self, tensors: list[Tensor]) -> list[Tensor]:
        """Like :meth:`Bucket.pack`, but packs a list once for several ops, until ``forget`` is called."""
        if self._packed is None or self._packed[0] is not tensors:
            self._packed = tensors, self.bucket.pack(tensors)
        return self._packed[1]

    def forget(self) -> None:
        """Drop the packed lists. Called before other code runs, which may move the tensors."""
        self._packed = None

    def only(self, places: list[int]) -> "Runs":
        """Some of these runs, by their places in this object."""
        params = [self.params[j] for j in places]
        indices, grads = tuple(self.indices[j] for j in places), [self.grads[j] for j in places if self.grads]
        copies = [pair for pair in self.copies if pair[0] in indices]
        return Runs(self.bucket, indices, params, grads, copies)

    def option(self, groups: Groups, name: str) -> PerRun:
        """An option of the runs' groups: one number if they agree on it, otherwise one a run."""
        b = self.bucket
        if len(b.present) == 1:
            return float(groups[b.present[0]][name])
        return b.by_run({g: float(groups[g][name]) for g in b.present}, self.indices)

    def by_group(self) -> list[tuple[int, list[int]]]:
        """The groups that have runs here, each with the places of its runs in this object."""
        group = self.bucket.group_of
        found: dict[int, list[int]] = {}
        for j, i in enumerate(self.indices):
            found.setdefault(group[i], []).append(j)
        return list(found.items())

    def return_gradients(self) -> None:
        """Put these gradients into the parameters' ``grad``, for a step along them."""
        for i, g in zip(self.indices, self.grads, strict=True):
            p = self.bucket.params[i]
            p.grad = whole_gradient(g, p)

    def renew(self) -> None:
        """Read the copies of weights anew, after other code has changed the parameters."""
        memory = self.bucket.memory if self.copies else []
        for i, copy in self.copies:
            copy.copy_(memory[i].detach())

    def write_back(self) -> None:
        """After an op wrote the weights: write copies back, and tell autograd that the parameters have changed."""
        b = self.bucket
        memory = b.memory if self.copies else []
        for i, copy in self.copies:
            memory[i].detach().copy_(copy)
        increment_version(b.params if len(self.indices) == len(b.params) else [b.params[i] for i in self.indices])


class Bucket:
    """Parameters of one device and dtype, as one index space. ``groups`` are the param groups of ``members``."""

    def __init__(
        self,
        members: Sequence[Member],
        index: int,
        groups: Sequence[dict[str, Any]],
        geometry: Geometry,
        backend: str,
        flatten: bool,
    ) -> None:
        refuse_while_capturing("the tables of the parameters")
        #: The user's parameters. The kernels see their local parts, complex numbers as real pairs: see :attr:`memory`.
        self.params = params = [member.param for member in members]
        self.spread, self.parts, self.part = any(map(is_spread, params)), parts(params[0]), part_of(params[0])
        self.apart = any(map(is_apart, params))
        memory = self.memory
        self.index = index
        #: The group of each parameter, and its place in that group; and the groups that have parameters here.
        self.group_of, self.places = [m.group for m in members], [m.place for m in members]
        self.present = sorted(set(self.group_of))
        self.dtype, self.device = memory[0].dtype, memory[0].device
        self.backend, self.ops = ops.choose(backend, self.device)
        self.flat: Tensor | None = None
        self._saved: Tensor | None = None
        self.dirty = torch.zeros((), dtype=torch.int64, device=self.device)
        self._tables: dict[tuple[int, ...], Tensor] = {}
        self._numbers: tuple[tuple[float, ...], Tensor] | None = None
        #: On the device, where they choose among numbers: the place of each parameter's group in ``present``, and the
        #: indices of runs.
        self._lines: Tensor | None = None
        self._chosen: dict[tuple[int, ...], Tensor] = {}
        if len(self.present) > 1:
            lines = {g: line for line, g in enumerate(self.present)}
            self._lines = uploaded([lines[g] for g in self.group_of], torch.int64, self.device)
        #: The base optimizer's state tensors of these parameters, as base/state.py found them last, by name and runs.
        self.found_state: dict[tuple[str, tuple[int, ...]], tuple[list[Tensor | None], list[Tensor]]] = {}
        #: Flat buffers of the parts' own state, and the views of the buffers that the state holds (passes.py).
        self.flats: dict[str, tuple[Tensor, list[Tensor]]] = {}

        rows: list[tuple[int, ...]] = []
        self.size = self.filters = 0
        #: The places of the norms of a parameter's filters, by its index; and those whose elements are on other ranks.
        self._filters_of: dict[int, slice] = {}
        self._elsewhere: list[slice] = []
        for member, part in zip(members, memory, strict=True):
            length, count = geometry(member.param, member.name, groups[member.group])
            first = 0
            if length > 0:
                first, self.filters = self.filters, self.filters + count
                self._filters_of[len(rows)] = slice(first, self.filters)
                if not part.numel():  # the ops have nothing to read here, but the rank still takes part in the sums
                    self._elsewhere.append(self._filters_of[len(rows)])
                    length, count, first = ELEMENT_WISE, 0, 0
            rows.append((self.size, part.numel(), length, count, first))
            self.size += -(-part.numel() // PADDING) * PADDING
        self._rows = torch.tensor(rows, dtype=torch.int64, device="cpu")
        self.element_wise = any(row[2] == ELEMENT_WISE for row in rows)
        self.scaled = any(row[2] != UNSCALED for row in rows)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.filter_norms = torch.empty(self.filters, dtype=wide, device=self.device) if self.filters else None
        #: Filters that several ranks hold together: the group of these ranks, and the places of the norms.
        self._split_filters: dict[dist.ProcessGroup, list[slice]] = {}

        self._all = tuple(range(len(self.params)))
        self._all_dense = all(map(is_dense, memory))
        if flatten and self.apart:
            raise ValueError("flatten=True goes with real parameters that are no DTensors; leave it out")
        if flatten and self._all_dense:
            self._flatten()
            memory = self.memory
        self._shapes, self._strides = [p.shape for p in memory], [p.stride() for p in memory]
        self.numels = [p.numel() for p in memory]
        self._layout = layout_of(memory)
        self._addresses = self._layout.addresses(memory)
        #: True if a parameter got other memory since the last check for shared memory.
        self.moved = False

    def _flatten(self) -> None:
        self.flat = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for p, home in zip(self.params, self.views(self.flat), strict=True):
            home.copy_(p.detach())
            p.data = home

    @property
    def memory(self) -> list[Tensor]:
        """The memory of the parameters on this rank; looked up anew each time, since sharding may move it."""
        return [local(p) for p in self.params] if self.apart else self.params

    def split_filters(self, filter_dim: Callable[[Tensor], int]) -> None:
        """Find the filters that are cut over ranks; ``filter_dim`` gives the dimension along which filters lie."""
        for i, place in self._filters_of.items():
            for group in filter_groups(self.params[i], filter_dim(self.params[i])):
                self._split_filters.setdefault(group, []).append(place)

    def join_filters(self) -> None:
        """Turn norms of parts of filters into norms of whole filters: one all-reduce for each group of ranks."""
        norms = self.filter_norms
        for place in self._elsewhere:
            assert norms is not None
            norms[place] = 0
        for group, places in self._split_filters.items():
            assert norms is not None
            squares = torch.cat([norms[place] for place in places]).double().square()
            dist.all_reduce(squares, group=group)
            for place, whole in zip(places, squares.sqrt().split([p.stop - p.start for p in places]), strict=True):
                norms[place] = whole

    @property
    def saved(self) -> Tensor:
        """The weights before the perturbation: one flat buffer, made when first needed."""
        if self._saved is None:
            refuse_while_capturing("the copy of the weights")
            self._saved = torch.empty(self.size, dtype=self.dtype, device=self.device)
        return self._saved

    def pack(self, tensors: list[Tensor], addresses: Hashable | None = None) -> list[Tensor]:
        """The list in the backend's cheapest form, to be used before any of its tensors can be moved.

        ``addresses``: what :meth:`addresses` has just said of these tensors, if it was asked.
        """
        return self.ops.pack(tensors, self.dirty, addresses)

    def addresses(self, tensors: list[Tensor]) -> Hashable | None:
        """What stands for the addresses of one tensor for each parameter; None if one lies otherwise than it."""
        return self._layout.addresses(tensors)

    def table(self, indices: tuple[int, ...]) -> Tensor:
        """The run table of these parameters; made once for every set."""
        if len(self._tables) > _TABLES:  # many sets: they change from step to step with layer drop or experts
            self._tables.clear()
        if indices not in self._tables:
            self._tables[indices] = self._rows[list(indices)].contiguous()
        return self._tables[indices]

    def unscaled_table(self, indices: tuple[int, ...]) -> Tensor:
        """Like :meth:`table`, with T = 1 everywhere."""
        key = (UNSCALED, *indices)
        if key not in self._tables:
            table = self.table(indices).clone()
            table[:, 2], table[:, 3:] = UNSCALED, 0
            self._tables[key] = table
        return self._tables[key]

    def by_run(self, values: Mapping[int, T], indices: tuple[int, ...]) -> T | list[T]:
        """Values of the groups that are present here: one for all of these runs if all are the same, or one a run."""
        first = values[self.present[0]]
        if len(self.present) == 1 or all(values[g] is first or values[g] == first for g in self.present):
            return first
        own = self.group_of
        return [values[own[i]] for i in indices]

    def numbers(self, values: Mapping[int, float | Tensor]) -> Tensor:
        """Numbers of the groups in the form that the ops take: float64 on the bucket's device, 0-d if the groups agree,
        otherwise one for each of the bucket's parameters. Floats are made into tensors anew only if they have changed.

        In a captured step the graph makes the numbers: the graph must not read a tensor that a later step replaces, and
        a later step must not use a tensor that only a replay fills.
        """
        if len(self.present) == 1:
            return self._number(values[self.present[0]])
        own = [values[g] for g in self.present]
        if not all(map(operator.is_, own, repeat(own[0]))):
            floats = not any(map(isinstance, own, repeat(Tensor)))
            if not floats or own.count(own[0]) < len(own):
                return self._numbers_of(own, floats)
        return self._number(own[0])

    def _number(self, value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(self.device, torch.float64)
        if capturing():
            return torch.full((), value, dtype=torch.float64, device=self.device)
        if self._numbers is None or self._numbers[0] != (value,):
            self._numbers = (value,), torch.full((), value, dtype=torch.float64, device=self.device)
        return self._numbers[1]

    def _numbers_of(self, values: list[float | Tensor], floats: bool) -> Tensor:
        """Values of the groups that are present, one for each parameter."""
        assert self._lines is not None
        if not floats or capturing():
            filled = [
                v if isinstance(v, Tensor) else torch.full((), v, dtype=torch.float64, device=self.device)
                for v in values
            ]
            return torch.stack([v.to(self.device, torch.float64) for v in filled]).index_select(0, self._lines)
        key = tuple(map(float, values))
        if self._numbers is None or self._numbers[0] != key:
            each = dict(zip(self.present, key, strict=True))
            self._numbers = key, uploaded([each[g] for g in self.group_of], torch.float64, self.device)
        return self._numbers[1]

    def of_runs(self, numbers: Tensor, indices: tuple[int, ...]) -> Tensor:
        """Out of what :meth:`numbers` returned, what these runs need."""
        if numbers.dim() == 0 or len(indices) == len(self.params):
            return numbers
        if indices not in self._chosen:
            if len(self._chosen) >= _TABLES:
                self._chosen.clear()
            refuse_while_capturing("the places of the parameters that take part")
            self._chosen[indices] = uploaded(indices, torch.int64, self.device)
        return numbers.index_select(0, self._chosen[indices])

    def is_current(self) -> bool:
        """False once a parameter was re-typed, moved, resized or re-strided (or, where flattened, re-pointed)."""
        memory = self.memory
        found = self._layout.addresses(memory)
        if found is None:
            return False
        if found != self._addresses:
            if self.flat is not None or any(map(Tensor.is_neg, memory)):  # p.data = x.conj().imag
                return False
            self._addresses, self.moved = found, True
        return True

    def lie_here(self, tensors: list[Tensor]) -> bool:
        """True if the tensors, one for each parameter, have the parameters' memory layout, dtype and device."""
        return self.addresses(tensors) is not None

    def gather(self, own: bool = False, whole: bool = False, current: bool = False) -> Runs:
        """The runs of the parameters that have a gradient.

        Args:
            own: the gradients are kept beyond the next backward. A gradient in memory that the next backward may write
                again, such as a view of a DistributedDataParallel bucket, is copied.
            whole: a missing gradient counts as zero.
            current: the caller has just checked where the parameters lie.

        Raises:
            TypeError: a sparse gradient.
            RuntimeError: a parameter has another layout or memory than when the tables were made.
        """
        if not current:
            self.refuse_what_moved()
        runs = self._gather(whole)
        # A write to a DTensor does not change the version of its part, so it would not be noticed.
        if own and (self.spread or any(map(is_lent, runs.grads))):
            runs.grads = [g.clone() if self.spread or is_lent(g) else g for g in runs.grads]
        return runs

    def _gather(self, whole: bool) -> Runs:
        memory = self.memory
        grads: list[Any]  # tensors, or None
        addresses: Hashable | None
        if self._all_dense and not (whole or self.apart):
            grads, addresses = self._layout.gradients(self.params)
            if addresses is not None:
                return self._runs_of_all(memory, grads, addresses)
        else:
            grads = list(map(_grad, self.params))
        if whole:
            grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, self.params, strict=True)]
        if self.apart:
            pairs = zip(grads, self.params, strict=True)
            grads = [g if g is None else local_gradient(g, p) for g, p in pairs]
        if self._all_dense:
            addresses = self.addresses(grads)  # None if a gradient is missing, or sparse
            if addresses is not None and not any(map(Tensor.is_neg, grads)):
                return self._runs_of_all(memory, grads, addresses)
        return self._gather_some(memory, grads)

    def _runs_of_all(self, memory: list[Tensor], grads: list[Tensor], addresses: Hashable) -> Runs:
        return Runs(self, self._all, memory, grads, _packed=(grads, self.pack(grads, addresses)))

    def _gather_some(self, memory: list[Tensor], grads: list[Tensor | None]) -> Runs:
        """Like :meth:`gather`, if some gradients are missing or a tensor has to be copied to be dense."""
        runs = Runs(self, (), [], [])
        indices = []
        for i, (p, g) in enumerate(zip(memory, grads, strict=True)):
            if g is None:
                continue
            if g.layout is not torch.strided:
                raise TypeError(
                    f"a gradient of layout {g.layout} (shape {tuple(g.shape)}) cannot give a perturbation of all "
                    "weights; build the embedding with sparse=False"
                )
            indices.append(i)
            weights: Tensor = p
            if not is_dense(p):
                weights = p.detach().clone(memory_format=torch.contiguous_format)
                runs.copies.append((i, weights))
            # Kernels read memory, and the memory of a lazily negated tensor holds the numbers with the other sign.
            if g.stride() != weights.stride() or g.dtype is not self.dtype or g.is_neg():
                g = torch.empty_like(weights, memory_format=torch.preserve_format).copy_(g.detach())
            runs.params.append(weights)
            runs.grads.append(g)
        runs.indices = tuple(indices)
        return runs

    def all_runs(self) -> Runs:
        """The runs of all parameters, without gradients."""
        self.refuse_what_moved()
        runs, memory = Runs(self, self._all, self.memory, []), self.memory
        if not self._all_dense:
            runs.params = [
                p if is_dense(p) else p.detach().clone(memory_format=torch.contiguous_format) for p in memory
            ]
            pairs = zip(memory, runs.params, strict=True)
            runs.copies = [(i, dense) for i, (p, dense) in enumerate(pairs) if dense is not p]
        return runs

    def views(self, flat: Tensor, indices: Sequence[int] | None = None) -> list[Tensor]:
        """The runs' stretches of a flat buffer, each with the shape and the memory layout of its parameter."""
        memory, starts = self.memory, self._rows[:, 0].tolist()
        found = []
        for i in self._all if indices is None else indices:
            p = memory[i]
            like = p if is_dense(p) else torch.empty(p.shape, device="meta")
            found.append(flat.as_strided(p.shape, like.stride(), starts[i]))
        return found

    def refuse_what_moved(self) -> None:
        """Check the parameters, before anything is read or written with these tables.

        Raises:
            RuntimeError: a parameter was re-typed, moved, resized or re-strided (or, where flattened, re-pointed).
        """
        if self.is_current():
            return
        for p, shape, stride in zip(self.memory, self._shapes, self._strides, strict=True):
            now, before = _kind(p), (self.dtype, self.device, shape, stride)
            if p.is_neg():
                found = "given memory that is lazily negated (p.data = ...); give it p.data.resolve_neg()"
                break
            if now != before:
                what = "resized" if p.shape != shape else "changed"
                found = f"{what} between the passes of a step: it is now {_described(*now)}, and was "
                found += _described(*before)
                break
        else:
            found = "taken out of the buffer of flatten=True between the passes of a step (p.data = ...)"
        raise RuntimeError(f"a parameter was {found}. This step is given up; do that between steps")

    def restore(self, runs: Runs) -> None:
        """Bring back the saved weights of these runs, if they are perturbed. Bit-exact; waits for nothing.

        Writes to the parameters' present memory, and rounds the weights to the present dtype.

        Raises:
            RuntimeError: a parameter has another shape by now. It is not written, but the other parameters are.
        """
        if not self.is_current():
            self._restore_what_moved(runs)
            return
        if self.apart:  # the runs hold views of the parameters' former memory
            memory, copies = self.memory, dict(runs.copies)
            runs.params = [copies.get(i, memory[i]) for i in runs.indices]
        self.ops.restore_(runs.weights, self.saved, self.dirty, runs.table)
        runs.write_back()

    def _restore_what_moved(self, runs: Runs) -> None:
        memory, starts = self.memory, self._rows[:, 0].tolist()
        resized = [i for i in runs.indices if memory[i].shape != self._shapes[i]]
        for i in (i for i in runs.indices if i not in resized):
            shape, stride, p = self._shapes[i], self._strides[i], memory[i].detach()
            if not is_dense(torch.empty_strided(shape, stride, device="meta")):
                stride = torch.empty(shape, device="meta").stride()
            home = self.saved.as_strided(shape, stride, starts[i]).to(p.device, p.dtype)
            p.copy_(torch.where(self.dirty.to(p.device) != 0, home, p))
            increment_version([self.params[i]])
        for i in resized:
            raise RuntimeError(
                f"a parameter was resized while it is perturbed: it is now {_described(*_kind(memory[i]))}; the others "
                f"are restored. Give it a tensor of shape {tuple(self._shapes[i])} again (p.data = ...) and call "
                "restore()"
            )
        self.dirty.zero_()


def _kind(p: Tensor) -> tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...]]:
    return p.dtype, p.device, p.shape, p.stride()


def _described(dtype: torch.dtype, device: torch.device, shape: torch.Size, stride: tuple[int, ...]) -> str:
    return f"{dtype} of shape {tuple(shape)} with strides {tuple(stride)} on {device}"
