"""The flattened parameter space: buckets of parameters, their runs, and the tables that the ops read.

Parameters of one group, device and dtype form a bucket: an index space in which parameter i owns
``[start_i, start_i + numel_i)``, starts padded to 16 elements. State that the package owns (saved weights, filter
norms) is one flat buffer a bucket. The parameters stay where they lie unless ``flatten`` moves them into one buffer.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lets_kernels import ops

PADDING = 16
_TABLES = 64
UNSCALED, ELEMENT_WISE = -1, 0

# (row_length, row_count) of one parameter, as the ops' run table wants it: how T scales the parameter.
Geometry = Callable[[Tensor, str | None, dict[str, Any]], tuple[int, int]]


def is_dense(t: Tensor) -> bool:
    """True if the elements fill one stretch of memory without holes or overlaps, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(t.stride(), t.shape, strict=True) if si != 1):
        if stride != expected:
            return t.numel() == 0
        expected *= size
    return True


def check_parameter(p: Tensor, where: str) -> None:
    """Refuse what no method can perturb.

    Raises:
        TypeError: the dtype has no gradient, or no kernels (complex, 8-bit); the message names the way out.
        ValueError: elements share memory (an expanded tensor).
    """
    if p.dtype not in ops.DTYPES:
        what = "hold its real and imaginary part as two parameters" if p.is_complex() else "keep it out of the groups"
        raise TypeError(f"{where}: a parameter of dtype {p.dtype} cannot be perturbed; {what}")
    if p.numel() and any(size > 1 and stride == 0 for size, stride in zip(p.shape, p.stride(), strict=True)):
        raise ValueError(f"{where}: an expanded parameter shares memory between elements; pass p.clone()")


def capturing() -> bool:
    """True while the work of the current stream goes into a CUDA graph instead of running."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_while_capturing(what: str) -> None:
    """``RuntimeError`` for memory that a graph would make anew, with what it holds, at every replay."""
    if capturing():
        raise RuntimeError(
            f"{what} would be made inside the CUDA graph that is being captured: take a step or two in the same way "
            "before the capture, as torch's examples do on a side stream"
        )


@dataclass
class Runs:
    """The parameters of a bucket that take part in one pass, with their gradients, in the order of the bucket.

    ``params`` and ``grads`` are dense and agree in strides and dtype, run by run; where the user's do not, they are
    copies, and ``write_back`` brings the weights home.
    """

    bucket: "Bucket"
    indices: tuple[int, ...]
    params: list[Tensor]
    grads: list[Tensor]
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _packed: tuple[list[Tensor], list[Tensor]] | None = None

    @property
    def table(self) -> Tensor:
        return self.bucket.table(self.indices)

    @property
    def weights(self) -> list[Tensor]:
        """What the ops take for the parameters: one tensor a run, or the one buffer that holds them all."""
        b = self.bucket
        if b.flat is not None and not self.copies:
            return [b.flat]
        sizes = b.numels if len(self.indices) == len(b.params) else [b.numels[i] for i in self.indices]
        if list(map(Tensor.numel, self.params)) != sizes:  # the ops would write past the end of what became smaller
            raise RuntimeError("a parameter was resized between the passes of a step; do that between steps")
        return b.pack(self.params)

    def pack(self, tensors: list[Tensor]) -> list[Tensor]:
        """As :meth:`Bucket.pack`, once for several ops in a row on the same list; ``forget`` ends the row."""
        if self._packed is None or self._packed[0] is not tensors:
            self._packed = tensors, self.bucket.pack(tensors)
        return self._packed[1]

    def forget(self) -> None:
        """Before other code runs, which may move the tensors."""
        self._packed = None

    def write_back(self) -> None:
        """After an op wrote the weights: copies go home, and autograd learns that the parameters have changed."""
        for home, copy in self.copies:
            home.copy_(copy)
        b = self.bucket
        increment_version(b.params if len(self.indices) == len(b.params) else [b.params[i] for i in self.indices])


class Bucket:
    """Parameters of one group, device and dtype, as one index space."""

    def __init__(
        self,
        params: Sequence[Tensor],
        names: Sequence[str | None],
        index: int,
        group: int,
        options: dict[str, Any],
        geometry: Geometry,
        backend: str,
        flatten: bool,
    ) -> None:
        refuse_while_capturing("the tables of the parameters")
        self.params = list(params)
        self.index, self.group = index, group
        #: Where the parameters stand in their group.
        self.places = list(range(len(self.params)))
        self.dtype, self.device = params[0].dtype, params[0].device
        self.backend, self.ops = ops.choose(backend, self.device)
        self.flat: Tensor | None = None
        self._saved: Tensor | None = None
        self.dirty = torch.zeros((), dtype=torch.int64, device=self.device)
        self._tables: dict[tuple[int, ...], Tensor] = {}
        self._scalar: tuple[float, Tensor] | None = None
        #: The optimizer's state tensors of these parameters, as the fused steps found them (fused.py).
        self.found_state: dict[str, tuple[tuple[int, ...], list[Tensor | None], list[Tensor]]] = {}

        rows, self.size, self.filters = [], 0, 0
        for p, name in zip(params, names, strict=True):
            length, count = geometry(p, name, options)
            rows.append((self.size, p.numel(), length, count, self.filters if length > 0 else 0))
            self.size += -(-p.numel() // PADDING) * PADDING
            self.filters += count if length > 0 else 0
        self._rows = torch.tensor(rows, dtype=torch.int64, device="cpu")
        self.element_wise = any(row[2] == ELEMENT_WISE for row in rows)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.filter_norms = torch.empty(self.filters, dtype=wide, device=self.device) if self.filters else None

        self._all = tuple(range(len(self.params)))
        self._all_dense = all(map(is_dense, params))
        if flatten and self._all_dense:
            self._flatten()
        self._device_index = params[0].get_device()
        self._strides = [p.stride() for p in params]
        self.numels = [p.numel() for p in params]
        self._addresses: list[int] = [p.data_ptr() for p in params] if self.flat is not None else []

    def _flatten(self) -> None:
        self.flat = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for p, (start, *_) in zip(self.params, self._rows.tolist(), strict=True):
            home = self.flat.as_strided(p.size(), p.stride(), start)
            home.copy_(p.detach())
            p.data = home

    @property
    def saved(self) -> Tensor:
        """The weights before the perturbation: one flat buffer, made when first needed."""
        if self._saved is None:
            refuse_while_capturing("the copy of the weights")
            self._saved = torch.empty(self.size, dtype=self.dtype, device=self.device)
        return self._saved

    def pack(self, tensors: list[Tensor]) -> list[Tensor]:
        """A list as the backend takes it at the least cost, for use before any tensor of it can be moved."""
        return self.ops.pack(tensors, self.dirty)

    def table(self, indices: tuple[int, ...]) -> Tensor:
        """The run table of these parameters; made once for every set."""
        if len(self._tables) > _TABLES:  # sets that change from step to step: layer drop, experts
            self._tables.clear()
        if indices not in self._tables:
            self._tables[indices] = self._rows[list(indices)].contiguous()
        return self._tables[indices]

    def unscaled_table(self, indices: tuple[int, ...]) -> Tensor:
        """As :meth:`table`, with T = 1 everywhere."""
        key = (UNSCALED, *indices)
        if key not in self._tables:
            table = self.table(indices).clone()
            table[:, 2], table[:, 3:] = UNSCALED, 0
            self._tables[key] = table
        return self._tables[key]

    def scalar(self, value: float | Tensor) -> Tensor:
        """A number as the ops take it: 0-d float64 on the bucket's device, made anew only where it has changed.

        In a captured step it is made by the graph: neither may the graph read what a later step replaces, nor a later
        step find what only a replay fills.
        """
        if isinstance(value, Tensor):
            return value.to(self.device, torch.float64)
        if capturing():
            return torch.full((), value, dtype=torch.float64, device=self.device)
        if self._scalar is None or self._scalar[0] != value:
            self._scalar = value, torch.full((), value, dtype=torch.float64, device=self.device)
        return self._scalar[1]

    def is_current(self) -> bool:
        """False once a parameter was re-typed, moved, resized or re-strided (or, where flattened, re-pointed)."""
        return (
            [p.stride() for p in self.params] == self._strides
            and list(map(Tensor.numel, self.params)) == self.numels
            and {p.dtype for p in self.params} == {self.dtype}
            and {p.get_device() for p in self.params} == {self._device_index}
            and (self.flat is None or [p.data_ptr() for p in self.params] == self._addresses)
        )

    def gather(self) -> Runs:
        """The runs of the parameters that have a gradient.

        Raises:
            TypeError: a sparse gradient.
        """
        grads = [p.grad for p in self.params]
        if self._all_dense and not any(map(operator.is_, grads, repeat(None))):
            found = cast(list[Tensor], grads)
            try:
                strides = list(map(Tensor.stride, found))
            except RuntimeError:  # a sparse gradient has none
                strides = []
            same = strides == self._strides and list(map(Tensor.numel, found)) == self.numels
            if same and {g.dtype for g in found} == {self.dtype}:
                return Runs(self, self._all, self.params, found)
        return self._gather_some(grads)

    def _gather_some(self, grads: list[Tensor | None]) -> Runs:
        """As :meth:`gather`, where some gradients are missing or something has to be copied to lie dense."""
        runs = Runs(self, (), [], [])
        indices = []
        for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is None:
                continue
            if p.numel() != self.numels[i]:
                raise RuntimeError("a parameter was resized between the passes of a step; do that between steps")
            if g.layout is not torch.strided:
                raise TypeError(
                    f"a gradient of layout {g.layout} (shape {tuple(g.shape)}) cannot give a perturbation of all "
                    "weights; build the embedding with sparse=False"
                )
            indices.append(i)
            weights: Tensor = p
            if not is_dense(p):
                weights = p.detach().clone(memory_format=torch.contiguous_format)
                runs.copies.append((p.detach(), weights))
            if g.stride() != weights.stride() or g.dtype is not self.dtype:
                g = torch.empty_like(weights, memory_format=torch.preserve_format).copy_(g.detach())
            runs.params.append(weights)
            runs.grads.append(g)
        runs.indices = tuple(indices)
        return runs

    def restore(self, runs: Runs) -> None:
        """Bring back the saved weights of these runs, if they are perturbed. Bit-exact; waits for nothing."""
        self.ops.restore_(runs.weights, self.saved, self.dirty, runs.table)
        runs.write_back()


class ParameterSpace:
    """All buckets of an optimizer's groups; rebuilt when the groups or their parameters are no longer the same."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        names: dict[int, str],
        geometry: Geometry,
        backend: str,
        flatten: bool,
    ) -> None:
        self._key = self._signature(groups)
        self.buckets: list[Bucket] = []
        for index, group in enumerate(groups):
            kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for p in group["params"]:
                check_parameter(p, f"param_groups[{index}]")
                if p.requires_grad:
                    kinds.setdefault((p.device, p.dtype), []).append(p)
            own = dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
            for members in kinds.values():
                labels = [own.get(id(p), names.get(id(p))) for p in members]
                bucket = Bucket(members, labels, len(self.buckets), index, group, geometry, backend, flatten)
                places = {id(p): place for place, p in enumerate(group["params"])}
                bucket.places = [places[id(p)] for p in members]
                self.buckets.append(bucket)

    @staticmethod
    def _signature(groups: Sequence[dict[str, Any]]) -> list[Any]:
        return [(list(map(id, g["params"])), [p.requires_grad for p in g["params"]], g.get("adaptive")) for g in groups]

    def is_current(self, groups: Sequence[dict[str, Any]]) -> bool:
        return self._key == self._signature(groups) and all(b.is_current() for b in self.buckets)
