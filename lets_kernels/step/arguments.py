"""Keyword arguments that no constructor of ours takes: they are the base optimizer's, or a mistake."""

import difflib
import inspect
from collections.abc import Iterable, Mapping

import torch

from lets_kernels.learning.learned import LearnedRadius

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def check_arguments(
    cls: type[torch.optim.Optimizer],
    base: type[torch.optim.Optimizer] | torch.optim.Optimizer,
    given: Iterable[str],
    called: Mapping[str, str],
) -> None:
    """``TypeError`` for the first of the ``given`` names that ``base`` does not take; it says which name was meant.

    ``called``: the words of ``cls`` for the names that other code has. A name that the base optimizer lists among its
    parameters is always the base optimizer's. If the base optimizer takes any name (``**kwargs``), only a name that is
    known to be meant for us is refused.
    """
    kind = base if isinstance(base, type) else type(base)
    try:
        parameters = inspect.signature(kind).parameters.values()
    except (TypeError, ValueError):  # no signature can be read: the optimizer itself says what it does not take
        return
    takes = [p.name for p in parameters if p.kind in _NAMED]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in given:
        if name not in takes:
            meant = _meant(cls, name, called)
            if meant or not takes_all:
                raise TypeError(f"{cls.__name__} has no argument {name!r}{meant or _nearest(cls, kind, name, takes)}")


def _meant(cls: type, name: str, called: Mapping[str, str]) -> str:
    """What is meant by a name that is known from elsewhere; empty for others."""
    if name in called:
        return f"; it is called {called[name]} here"
    if name in inspect.signature(LearnedRadius).parameters:
        return f"; it goes into the radius: rho=LearnedRadius(..., {name}=...)"
    return ""


def _nearest(cls: type, base: type, name: str, takes: list[str]) -> str:
    near = difflib.get_close_matches(name, [*_own(cls), *takes], n=1)
    return f"; did you mean {near[0]}?" if near else f", and {base.__name__} has none either"


def _own(cls: type) -> list[str]:
    """The names of the arguments of a method's class and of those it is derived from."""
    ours = [c for c in cls.__mro__[: cls.__mro__.index(torch.optim.Optimizer)] if "__init__" in vars(c)]
    each = [p for c in ours for p in inspect.signature(c).parameters.values()]
    return list(dict.fromkeys(p.name for p in each if p.kind in _NAMED))
