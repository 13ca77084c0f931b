"""The state tensors that an optimizer keeps for its parameters: its owner begins them, others only look at them.

Looking must not make an entry, since an empty entry does harm: plain SGD would save a buffer that it never has, and
torch's RMSprop takes any present entry for a complete one.
"""

import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lets_kernels.base.rehearsal import rehearse
from lets_kernels.ops.layouts import held, holds
from lets_kernels.space.buckets import Runs
from lets_kernels.space.memory import refuse_while_capturing
from lets_kernels.space.shards import local

State = Mapping[Tensor, dict[str, Any]]
_dtype = operator.attrgetter("dtype")
_REMEMBERED = 16


def begun_state(runs: Runs, state: State, name: str) -> list[Tensor] | None:
    """One state tensor for each run. A missing tensor begins at zero, as the averages of SGD and Adam do.

    Only the owner of the state may call this. To look at the state use :class:`Look`.

    Returns None if a tensor has another memory layout than its parameter. Looking the parameters up is slow in Python,
    so the tensors are remembered, and used again as long as the state holds the same objects.
    """
    found = _found(runs, state, name)
    if found is not None and (runs.bucket.lie_here(found) if _whole(runs) else lies_as(found, runs.params)):
        return found
    return _begin(runs, state, name)


def packed_state(runs: Runs, state: State, name: str) -> list[Tensor] | None:
    """:func:`begun_state`, packed for the ops."""
    b = runs.bucket
    if _whole(runs):
        found = _found(runs, state, name)
        addresses = None if found is None else b.addresses(found)
        if found is not None and addresses is not None:
            return b.pack(found, addresses)
    begun = begun_state(runs, state, name)
    return None if begun is None else b.pack(begun)


def _key(runs: Runs, name: str) -> tuple[str, tuple[int, ...]]:
    return name, runs.indices


def _whole(runs: Runs) -> bool:
    return len(runs.indices) == len(runs.bucket.params) and not runs.copies


def _found(runs: Runs, state: State, name: str) -> list[Tensor] | None:
    """What was found last time, if the state still holds it."""
    b = runs.bucket
    found = b.found_state.get(_key(runs, name))
    if found is None:
        return None
    if not holds(state, name, found[0]):  # it has been replaced: what other sets of runs found there must not live on
        b.found_state.clear()
        return None
    return found[1]


def _begin(runs: Runs, state: State, name: str) -> list[Tensor] | None:
    b = runs.bucket
    tensors = []
    for i, p in zip(runs.indices, runs.params, strict=True):
        own = state[b.params[i]]
        if own.get(name) is None:
            refuse_while_capturing(f"the optimizer's {name}")
            like = b.params[i] if b.apart else p
            own[name] = torch.zeros_like(like, memory_format=torch.preserve_format, requires_grad=False)
        if own[name].is_conj() or own[name].is_neg():  # its memory holds the numbers with the other sign
            refuse_while_capturing(f"the optimizer's {name}")
            own[name] = own[name].resolve_conj().resolve_neg()
        tensors.append(local(own[name]))
    if not lies_as(tensors, runs.params):
        return None
    if len(b.found_state) >= _REMEMBERED:  # many sets of runs: they change from step to step
        b.found_state.clear()
    b.found_state[_key(runs, name)] = held(state, name), tensors
    return tensors


def lies_as(tensors: list[Tensor], params: list[Tensor]) -> bool:
    """True if the tensors have the parameters' memory layout. Asked anew each time, since ``.data`` may be replaced."""
    if not tensors:
        return True
    return (
        list(map(Tensor.numel, tensors)) == list(map(Tensor.numel, params))
        and list(map(Tensor.stride, tensors)) == list(map(Tensor.stride, params))
        and set(map(_dtype, tensors)) == {params[0].dtype}
        and set(map(Tensor.get_device, tensors)) == {params[0].get_device()}
    )


def lying_as(p: Tensor, v: Tensor) -> Tensor:
    """The tensor itself if it has the parameter's memory layout, otherwise a copy that has it."""
    if lies_as([v], [p]) and not v.is_neg():
        return v
    return torch.empty_like(p, memory_format=torch.preserve_format, requires_grad=False).copy_(v)


class Look:
    """What a part of a method may see of a base optimizer: its class, its groups and its state, read only.

    Nothing here makes an entry, and no entry of a mapping can be replaced. The tensors are the base optimizer's own: a
    part may only read them, unless part and optimizer belong together, as in bSAM.

    Args:
        kind: the optimizer's class.
        groups: the param groups of the optimizer, or of a state that is about to be loaded.
        state: the state by parameter; leave it out to look at groups only.
        optimizer: the optimizer itself, if its next step is to be asked for.
    """

    def __init__(
        self,
        kind: type,
        groups: Sequence[Mapping[str, Any]],
        state: State | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.kind = kind
        self._groups = groups
        self._state: State = {} if state is None else state
        self._optimizer = optimizer

    @classmethod
    def at(cls, base: torch.optim.Optimizer) -> "Look":
        """A look at an optimizer."""
        return cls(type(base), base.param_groups, base.state, base)

    @property
    def name(self) -> str:
        """The name of the optimizer's class, for errors."""
        return self.kind.__name__

    @property
    def groups(self) -> list[Mapping[str, Any]]:
        """The param groups, read only."""
        return [MappingProxyType(dict(group)) for group in self._groups]

    def entry(self, p: Tensor) -> Mapping[str, Any]:
        """The state of a parameter, read only; empty if there is none."""
        return MappingProxyType(self._state.get(p, {}))

    def tensors(self, runs: Runs, name: str) -> list[Tensor | None]:
        """One state tensor, or None, for each run: this rank's part, complex numbers as pairs, as it lies in memory."""
        entries = [self._state.get(runs.bucket.params[i], {}) for i in runs.indices]
        return [local(own[name]) if isinstance(own.get(name), Tensor) else None for own in entries]

    def next_step(self, passes: Sequence[Runs], into: Sequence[list[Tensor]]) -> None:
        """Where the optimizer's step along the gradients in ``passes`` would go: −Δθ/lr, without weight decay.

        Written ``into`` one tensor for each run: see :func:`~lets_kernels.base.rehearsal.rehearse`, which takes the
        optimizer's own step on copies of what it has.
        """
        assert self._optimizer is not None
        rehearse(self._optimizer, passes, into)
