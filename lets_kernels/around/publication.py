"""Perturbed weights are never published: while weights are perturbed, saving, copying or loading the model fails."""

import functools
import itertools
import weakref
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle


class Refuses(Protocol):
    """The methods of an optimizer that this module needs."""

    def refuse_while_perturbed(self, what: str) -> None: ...


class _Hook:
    """A state_dict hook of one optimizer. In copies and pickles of the model, which belong to no optimizer, a callable
    that does nothing replaces it; it is from the standard library, so a pickled model loads without this package.
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
    """Hooks on the modules of a model. They refuse while the weights of one optimizer are perturbed.

    ``state_dict`` of the model and of every module in it refuses, and so do its callers (torch.distributed.checkpoint,
    a wrapper around the model). ``load_state_dict``, which the restore would undo, ``copy.deepcopy`` and pickle refuse
    too. The hooks do not see code that reads the parameters itself, or modules that were added after ``cover``.

    The hooks hold the optimizer weakly, and are removed with it.
    """

    def __init__(self, optimizer: Refuses) -> None:
        reference = weakref.ref(optimizer)
        self._saving = _Hook(reference, "state_dict() of the model")
        self._loading = _Hook(reference, "load_state_dict() of the model")
        self._covered: dict[int, weakref.ref[torch.nn.Module]] = {}
        self._handles: list[RemovableHandle] = []
        weakref.finalize(optimizer, _remove, self._handles).atexit = False

    def cover(self, model: torch.nn.Module | None) -> None:
        """Add the hooks to every module of the model that does not have them."""
        for module in () if model is None else model.modules():
            known = self._covered.get(id(module))
            if known is None or known() is not module:
                self._covered[id(module)] = weakref.ref(module)
                self._handles.append(module.register_state_dict_pre_hook(self._saving))
                self._handles.append(module.register_load_state_dict_pre_hook(self._loading))


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
