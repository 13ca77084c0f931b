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
    b = runs.bucket
    present = [entry.get(name) for entry in state.values()]
    key = name, runs.indices
    found = b.found_state.get(key)
    if found is not None and _same(found[0], present):
        whole = len(found[1]) == len(b.params) and not runs.copies
        if b.lie_here(found[1]) if whole else lies_as(found[1], runs.params):
            return found[1]
    elif found is not None:  # the state has been replaced: what other sets of runs had found there must not live on
        b.found_state.clear()
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
    b.found_state[key] = [entry.get(name) for entry in state.values()], tensors
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


def _same(old: Sequence[object], new: Sequence[object]) -> bool:
    return len(old) == len(new) and all(map(operator.is_, old, new))


class Look:
    """What a part of a method may see of a base optimizer: its class, its groups and its state, read only.

    Nothing here makes an entry, and no entry of a mapping can be replaced. The tensors are the base optimizer's own: a
    part may only read them, unless part and optimizer belong together, as in bSAM.

    Args:
        kind: the optimizer's class.
        groups: the param groups of the optimizer, or of a state that is about to be loaded.
        state: the state by parameter; leave it out to look at groups only.
    """

    def __init__(self, kind: type, groups: Sequence[Mapping[str, Any]], state: State | None = None) -> None:
        self.kind = kind
        self._groups = groups
        self._state: State = {} if state is None else state

    @classmethod
    def at(cls, base: torch.optim.Optimizer) -> "Look":
        """A look at an optimizer."""
        return cls(type(base), base.param_groups, base.state)

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
