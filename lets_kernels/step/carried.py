"""The optimizer's own numbers inside its first param group, for tools that save param groups but no extra entries.

``torch.distributed.checkpoint.state_dict`` takes "state" and "param_groups" out of a ``state_dict()`` and drops every
other entry. It loads key by key, into the state of an optimizer that exists. So the numbers stand in one flat dict,
whose keys depend on how the optimizer was built and not on how many steps it has taken.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

#: The step that waits for its gradient: as large as the parameters, and sharded like this rank's parameters.
_WAITING = "pending"
#: For how many parameters something is kept. States saved by versions that did not count this lack the entry.
KEPT = "kept"
#: Options of an optimizer, which differ between versions of torch.
_OPTIONS = ".param_groups."


def _items(entry: Any) -> Iterable[tuple[Any, Any]] | None:
    """What a dict, a list or a tuple holds; None for anything else."""
    if isinstance(entry, Mapping):
        return [(key, value) for key, value in entry.items() if key != _WAITING]
    return enumerate(entry) if isinstance(entry, (list, tuple)) else None


def _below(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def numbers(entry: Any, path: str = "") -> dict[str, Any]:
    """The numbers in an entry of nested dicts and lists, 0-d tensors among them, by their path: ``"radius.nu.0"``."""
    items = _items(entry)
    if items is None:
        is_number = isinstance(entry, (int, float)) or (isinstance(entry, Tensor) and entry.dim() == 0)
        return {path: entry} if is_number else {}
    found = {}
    for key, value in items:
        found.update(numbers(value, _below(path, key)))
    return found


def filled(entry: dict[str, Any], carried: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with the carried numbers in the place of its own, and without a waiting step.

    If the carried numbers have no ``KEPT``, the entry has none either.

    Raises:
        ValueError: numbers are missing, or there are numbers that this optimizer does not have.
    """
    if not isinstance(carried, Mapping):
        raise ValueError(f"the numbers that param_groups[0] carries are a {type(carried).__name__}, not a dict")
    if not any(str(path).startswith(f"{KEPT}.") for path in carried):
        entry = {name: value for name, value in entry.items() if name != KEPT}
    own = numbers(entry)
    lacks, beside = (
        sorted(path for path in there - here if _OPTIONS not in path)
        for there, here in ((own.keys(), carried.keys()), (carried.keys(), own.keys()))
    )
    if lacks or beside:
        found = [f"{what} {', '.join(paths)}" for what, paths in (("lacks", lacks), ("has", beside)) if paths]
        raise ValueError(
            f"the state is that of an optimizer with other parts: it {' and '.join(found)}; build the optimizer as the "
            "one that was saved, with the same radius and the same param groups"
        )
    return _filled(entry, carried, "")


def _filled(entry: Any, carried: Mapping[str, Any], path: str) -> Any:
    if isinstance(entry, Mapping):
        return {k: None if k == _WAITING else _filled(v, carried, _below(path, k)) for k, v in entry.items()}
    if isinstance(entry, (list, tuple)):
        return type(entry)(_filled(v, carried, _below(path, i)) for i, v in enumerate(entry))
    return carried.get(path, entry)
