"""The state that users and tools read: the base optimizer's, and beside it what the parts keep for every parameter.

Both stay where they are: what is kept cannot stand in the base optimizer's own entries, since many optimizers take any
entry for a complete one. Here nothing is stored; reading and writing go to the one or the other, by the name.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lets_kernels.checks import shaped_as
from lets_kernels.parts.passes import PREFIX, Held
from lets_kernels.space.shards import is_spread, spread_as


class JoinedEntry(MutableMapping[str, Any]):
    """What is kept for one parameter: the base optimizer's names, and the parts' names with their prefix.

    The tensors are those that the next step works with. For a spread parameter they are spread, over the same memory.
    """

    def __init__(self, whole: "JoinedState", p: Tensor) -> None:
        self._whole, self._p = whole, p
        #: Both, once they have been taken out of the state: an entry that somebody holds stays what it was.
        self._apart: tuple[MutableMapping[str, Any], dict[str, Tensor]] | None = None

    def _own(self) -> Mapping[str, Any]:
        return self._whole.base.state.get(self._p, {}) if self._apart is None else self._apart[0]

    def _kept(self) -> dict[str, Tensor]:
        return self._whole.held.state.get(self._p, {}) if self._apart is None else self._apart[1]

    def detach(self) -> None:
        """The parameter's entry is about to be taken out of the state."""
        self._apart = self._whole.base.state.get(self._p, {}), self._whole.held.state.get(self._p, {})

    def __getitem__(self, name: str) -> Any:
        if not _is_kept(name):
            return self._own()[name]
        found = self._kept().get(name[len(PREFIX) :])
        if found is None:
            raise KeyError(name)
        return found if is_spread(found) else spread_as(found, self._p)

    def __setitem__(self, name: str, value: Any) -> None:
        if _is_kept(name):
            self._whole.check(self._p, name, value)
            kept = self._whole.held.state[self._p] if self._apart is None else self._apart[1]
            kept[name[len(PREFIX) :]] = value
        elif self._apart is not None:
            self._apart[0][name] = value
        else:
            self._whole.base.state.setdefault(self._p, {})[name] = value

    def __delitem__(self, name: str) -> None:
        if _is_kept(name):
            self[name]  # KeyError with the whole name
            del self._kept()[name[len(PREFIX) :]]
        elif self._apart is not None:
            del self._apart[0][name]
        elif self._p in self._whole.base.state:
            del self._whole.base.state[self._p][name]
        else:
            raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._own(), *(PREFIX + name for name in self._kept())])

    def __len__(self) -> int:
        return len(self._own()) + len(self._kept())

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is a plain dict."""
        return dict, (dict(self),)


class JoinedState(MutableMapping[Any, Any]):
    """The state of all parameters, for ``SAM.state``; like torch's, it has an entry for whatever is asked for.

    Args:
        base: the base optimizer.
        held: what the parts keep.
        names: the names of what they may keep.
    """

    def __init__(self, base: torch.optim.Optimizer, held: Held, names: Iterable[str]) -> None:
        self.base, self.held, self._names = base, held, tuple(names)
        self._live: WeakValueDictionary[Tensor, JoinedEntry] = WeakValueDictionary()

    def __getitem__(self, key: Any) -> Any:
        own = self.base.state.get(key)
        if not isinstance(key, Tensor) or not (own is None or isinstance(own, MutableMapping)):
            return self.base.state[key]  # an optimizer that keeps something else
        found = self._live.get(key)
        if found is None:
            found = self._live[key] = JoinedEntry(self, key)
        return found

    def get(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            return default
        return self[key]

    def pop(self, key: Any, *default: Any) -> Any:
        if key not in self:
            if default:
                return default[0]
            raise KeyError(key)
        found = self[key]
        del self[key]
        return found

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def __setitem__(self, key: Any, entry: Any) -> None:
        rest, kept = self._split({key: entry})
        for state, found in ((self.base.state, rest), (self.held.state, kept)):
            state.pop(key, None)
            state.update(found)

    def __delitem__(self, key: Any) -> None:
        if key not in self:
            raise KeyError(key)
        live = self._live.pop(key, None)
        if live is not None:
            live.detach()
        self.base.state.pop(key, None)
        self.held.state.pop(key, None)

    def __contains__(self, key: object) -> bool:
        return key in self.base.state or bool(self.held.state.get(key, {}))  # type: ignore[call-overload]

    def __iter__(self) -> Iterator[Any]:
        return iter([*self.base.state, *(p for p, own in self.held.state.items() if own and p not in self.base.state)])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        """Whether the base optimizer has state: torch's tools make an optimizer's state if there is none."""
        return bool(self.base.state)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is what torch's optimizers have: a ``defaultdict`` of dicts."""
        return defaultdict, (dict, {k: dict(v) if isinstance(v, JoinedEntry) else v for k, v in self.items()})

    def replace(self, state: Mapping[Any, Any]) -> None:
        """Take another state in the place of this one; what it lacks begins anew.

        Raises:
            ValueError: it has a kept tensor that no part knows, or one of another shape. Nothing has been replaced.
        """
        rest, kept = self._split(state)
        self.base.state = state if isinstance(state, defaultdict) and not kept else defaultdict(dict, rest)
        self.held.state.clear()
        self.held.state.update(kept)

    def check(self, p: Tensor, name: str, value: Any) -> None:
        """``ValueError`` if no part keeps a tensor of this name, or not of this shape."""
        if name[len(PREFIX) :] not in self._names:
            known = ", ".join(PREFIX + each for each in self._names)
            raise ValueError(f"no part of this optimizer keeps a {name!r}; it keeps {known}")
        if not shaped_as(value, p):
            raise ValueError(f"{name!r} must be a tensor of the parameter's shape, {tuple(p.shape)}, not {value!r}")

    def _split(self, state: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[Any, dict[str, Tensor]]]:
        rest, kept = Held.take_from(state)
        for p, own in kept.items():
            for name, value in own.items():
                self.check(p, PREFIX + name, value)
        return rest, kept


def _is_kept(name: object) -> bool:
    return isinstance(name, str) and name.startswith(PREFIX)
