"""Perturbed weights are never published: what saves, copies or loads the model refuses while they stand."""

import functools
import itertools
import weakref
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle


class Refuses(Protocol):
    """An optimizer, as far as this module knows it."""

    def refuse_while_perturbed(self, what: str) -> None: ...


class _Hook:
    """A state_dict hook of one optimizer. In copies and pickles of the model a callable that does nothing stands for
    it: they belong to no optimizer, and it is the standard library's, so a pickled model loads without this package.
    """

    def __init__(self, optimizer: "weakref.ref[Refuses]", what: str) -> None:
        self._optimizer, self._what = optimizer, what

    def _refuse(self, what: str) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer.refuse_while_perturbed(what)

    def __call__(self, *_: Any) -> None:
        self._refuse(self._what)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        self._refuse("copying the model")
        return functools.partial(itertools.chain)

    def __reduce__(self) -> tuple[Any, ...]:
        self._refuse("pickling the model")
        return functools.partial, (itertools.chain,)


class Publication:
    """Hooks on the modules of a model that refuse while the weights of one optimizer are perturbed.

    ``state_dict`` of the model and of every module in it refuses, and with it whatever calls that
    (torch.distributed.checkpoint, a wrapper around the model); so do ``load_state_dict``, which the restore would undo,
    ``copy.deepcopy`` and pickle. Not seen are those who read the parameters themselves, and modules that were added
    after ``cover``.

    The optimizer is held weakly, and takes its hooks along when it goes.
    """

    def __init__(self, optimizer: Refuses) -> None:
        reference = weakref.ref(optimizer)
        self._saving = _Hook(reference, "state_dict() of the model")
        self._loading = _Hook(reference, "load_state_dict() of the model")
        self._covered: dict[int, weakref.ref[torch.nn.Module]] = {}
        self._handles: list[RemovableHandle] = []
        weakref.finalize(optimizer, _remove, self._handles).atexit = False

    def cover(self, model: torch.nn.Module | None) -> None:
        """Hang the hooks on every module of the model that does not have them."""
        for module in () if model is None else model.modules():
            known = self._covered.get(id(module))
            if known is None or known() is not module:
                self._covered[id(module)] = weakref.ref(module)
                self._handles.append(module.register_state_dict_pre_hook(self._saving))
                self._handles.append(module.register_load_state_dict_pre_hook(self._loading))


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
