"""The state tensors that an optimizer keeps for its parameters: beginning them, for their owner, and looking at them.

The two are apart since an entry that a look would leave behind is not harmless: plain SGD would save a buffer that it
never has, and torch's RMSprop takes an entry that is there for one that is whole.
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


def begun_state(runs: Runs, state: State, name: str) -> list[Tensor] | None:
    """One state tensor a run; where there is none it begins: zeros, as SGD's and Adam's averages do, are put there.

    For the owner of the state. Whoever only wants to know what is there takes a :class:`Look`.

    None if one of them lies otherwise in memory than its parameter. Looking the parameters up is slow in Python, so the
    tensors are remembered, and taken again as long as the state holds the very same ones.
    """
    b = runs.bucket
    present = [entry.get(name) for entry in state.values()]
    found = b.found_state.get(name)
    if found is not None and found[0] == runs.indices and _same(found[1], present) and lies_as(found[2], runs.params):
        return found[2]
    tensors = []
    for i, p in zip(runs.indices, runs.params, strict=True):
        own = state[b.params[i]]
        if own.get(name) is None:
            refuse_while_capturing(f"the optimizer's {name}")
            like = b.params[i] if b.apart else p
            own[name] = torch.zeros_like(like, memory_format=torch.preserve_format, requires_grad=False)
        if own[name].is_conj() or own[name].is_neg():  # what is written to its memory has another sign when it is read
            refuse_while_capturing(f"the optimizer's {name}")
            own[name] = own[name].resolve_conj().resolve_neg()
        tensors.append(local(own[name]))
    if not lies_as(tensors, runs.params):
        return None
    b.found_state[name] = runs.indices, [entry.get(name) for entry in state.values()], tensors
    return tensors


def lies_as(tensors: list[Tensor], params: list[Tensor]) -> bool:
    """True if the tensors lie in memory as the parameters do; what has a ``.data`` can be changed at any time."""
    if not tensors:
        return True
    return (
        list(map(Tensor.numel, tensors)) == list(map(Tensor.numel, params))
        and list(map(Tensor.stride, tensors)) == list(map(Tensor.stride, params))
        and set(map(_dtype, tensors)) == {params[0].dtype}
        and set(map(Tensor.get_device, tensors)) == {params[0].get_device()}
    )


def _same(old: Sequence[object], new: Sequence[object]) -> bool:
    return len(old) == len(new) and all(map(operator.is_, old, new))


class Look:
    """A base optimizer as a part of a method may see it: its class, its groups and its state, read only.

    Nothing here makes an entry, and what a mapping holds cannot be replaced through it. The tensors are the base
    optimizer's own: they are to be read, unless the part and the optimizer belong together, as bSAM's do.

    Args:
        kind: the optimizer's class.
        groups: its param groups; of a state that is about to be loaded, those in it.
        state: its state by parameter; left out where groups alone are to be looked at.
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
        """What the optimizer's class is called, for errors."""
        return self.kind.__name__

    @property
    def groups(self) -> list[Mapping[str, Any]]:
        """The param groups, read only."""
        return [MappingProxyType(dict(group)) for group in self._groups]

    def entry(self, p: Tensor) -> Mapping[str, Any]:
        """The state of a parameter, read only; empty where there is none."""
        return MappingProxyType(self._state.get(p, {}))

    def tensors(self, runs: Runs, name: str) -> list[Tensor | None]:
        """One state tensor a run, as it lies there (of this rank's part, complex numbers as pairs), or None."""
        entries = [self._state.get(runs.bucket.params[i], {}) for i in runs.indices]
        return [local(own[name]) if isinstance(own.get(name), Tensor) else None for own in entries]
