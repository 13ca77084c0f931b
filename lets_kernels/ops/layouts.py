"""How the tensors of a list lie, and whether others lie so: read in C where the compiled library and torch allow it."""

import contextlib
import functools
import importlib
from collections.abc import Hashable
from typing import Any, Protocol

from torch import Tensor

from lets_kernels.ops.memory import is_fake


class Layout(Protocol):
    """The strides, numbers of elements, dtype and device of tensors."""

    def addresses(self, tensors: list[Tensor]) -> Hashable | None:
        """What stands for the addresses of other tensors, to be compared; None if one of them lies otherwise."""


class _Plain:
    """A :class:`Layout` by calls of Python, and for tensors without memory (fake, or on the meta device)."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._strides, self._numels = list(map(Tensor.stride, tensors)), list(map(Tensor.numel, tensors))
        self._kinds = {(t.dtype, t.device) for t in tensors[:1]}

    def addresses(self, tensors: list[Tensor]) -> Hashable | None:
        try:
            if list(map(Tensor.stride, tensors)) != self._strides or list(map(Tensor.numel, tensors)) != self._numels:
                return None
        except (RuntimeError, TypeError):  # a sparse tensor has no strides, and None is no tensor
            return None
        if {(t.dtype, t.device) for t in tensors} != self._kinds:
            return None
        return () if any(map(is_fake, tensors)) else tuple(map(Tensor.data_ptr, tensors))


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
