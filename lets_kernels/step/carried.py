"""The optimizer's own numbers inside its first param group, for tools that keep nothing else of a saved state.

``torch.distributed.checkpoint.state_dict`` takes "state" and "param_groups" out of a ``state_dict()`` and drops what
lies beside them. What it loads it writes into the state of an optimizer that exists, key by key, so the numbers stand
in one flat dict whose keys depend on how the optimizer was built, and not on how far it has come.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

#: The step that waits for its gradient: as large as the parameters, and cut as this rank's parameters are.
_WAITING = "pending"
#: For how many parameters something is kept. States of before that was counted lack it.
KEPT = "kept"
#: Options of an optimizer, which differ from one torch to the next.
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
    """The entry with the carried numbers in the place of its own, and no step that waits.

    Without ``KEPT`` where they have none of it.

    Raises:
        ValueError: numbers are missing, or there are others than this optimizer has.
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
