"""What a step asks of every tensor of a list: how it lies, its gradient, whether it is the one of the last step.

Asked in C where the compiled library and torch allow it, otherwise in Python, with the same answers.
"""

import contextlib
import functools
import importlib
import operator
from collections.abc import Hashable, Mapping
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Parameter

from lets_kernels.ops.memory import is_fake

_dtype, _device = operator.attrgetter("dtype"), operator.attrgetter("device")
_grad = operator.attrgetter("grad")
_requires_grad = operator.attrgetter("requires_grad")
#: The classes of most tensors; those of torch's tracers are of another.
_OF_MEMORY = {Tensor, Parameter}


class Layout(Protocol):
    """The strides, numbers of elements, dtype and device of tensors."""

    def addresses(self, tensors: list[Tensor]) -> Hashable | None:
        """What stands for the addresses of other tensors, to be compared; None if one of them lies otherwise."""

    def gradients(self, params: list[Tensor]) -> tuple[list[Any], Hashable | None]:
        """The gradients of parameters, and their addresses: None if one is missing, lies otherwise, or is negated."""


class _Plain:
    """A :class:`Layout` by calls of Python, and for tensors without memory (fake, or on the meta device)."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._strides, self._numels = list(map(Tensor.stride, tensors)), list(map(Tensor.numel, tensors))
        self._dtypes, self._devices = set(map(_dtype, tensors[:1])), set(map(_device, tensors[:1]))

    def addresses(self, tensors: list[Tensor]) -> Hashable | None:
        try:
            if list(map(Tensor.stride, tensors)) != self._strides or list(map(Tensor.numel, tensors)) != self._numels:
                return None
        except (RuntimeError, TypeError):  # a sparse tensor has no strides, and None is no tensor
            return None
        if set(map(_dtype, tensors)) != self._dtypes or set(map(_device, tensors)) != self._devices:
            return None
        others = set(map(type, tensors)) - _OF_MEMORY
        return () if others and any(map(is_fake, tensors)) else tuple(map(Tensor.data_ptr, tensors))

    def gradients(self, params: list[Tensor]) -> tuple[list[Any], Hashable | None]:
        grads = list(map(_grad, params))
        found = self.addresses(grads)
        return grads, None if found is None or any(map(Tensor.is_neg, grads)) else found


@functools.cache
def _compiled() -> Any:
    """The compiled library if it reads lists with this torch, otherwise None."""
    try:
        library = importlib.import_module("lets_kernels._C")
    except ImportError:
        return None
    return library if library.reads_lists() else None


def layout_of(tensors: list[Tensor]) -> Layout:
    """The layout of strided tensors of one dtype and device."""
    compiled = _compiled()
    if compiled is not None and not any(map(is_fake, tensors)):
        with contextlib.suppress(ValueError):  # without memory, or on a device that has no place in DLPack
            found: Layout = compiled.Layout(tensors)
            return found
    return _Plain(tensors)


def gradients(params: list[Tensor]) -> list[Tensor]:
    """The gradients of the parameters that have one and are trained."""
    compiled = _compiled()
    if compiled is not None:
        found: list[Tensor] = compiled.gradients(params)
        return found
    grads = [p.grad for p in params if p.requires_grad]
    return [g for g in grads if g is not None]


def unchanged(params: list[Tensor], known: list[Tensor], trained: list[bool]) -> bool:
    """True if these are the known tensors, each with the ``requires_grad`` that it had."""
    compiled = _compiled()
    if compiled is not None:
        return bool(compiled.unchanged(params, known, trained))
    same = len(params) == len(known) and all(map(operator.is_, params, known))
    return same and list(map(_requires_grad, params)) == trained


def holds(state: Mapping[Any, Any], name: str, known: list[Any]) -> bool:
    """True if the entries of a state hold these objects under a name; None stands for one that is missing."""
    compiled = _compiled()
    if compiled is not None and isinstance(state, dict):
        return bool(compiled.holds(state, name, known))
    return len(state) == len(known) and all(map(operator.is_, held(state, name), known))


def held(state: Mapping[Any, Any], name: str) -> list[Any]:
    """What the entries of a state hold under a name, None where it is missing."""
    return [entry.get(name) for entry in state.values()]


def mark_gradients(params: list[Tensor], name: str) -> bool:
    """Write the version of each of :func:`gradients` into an attribute of it; False if one is no plain ``Tensor``."""
    compiled = _compiled()
    if compiled is not None:
        return bool(compiled.mark_gradients(params, name))
    for g in gradients(params):
        if type(g) is not Tensor:
            return False
        setattr(g, name, g._version)
    return True
