"""Whether a saved state has the layout of an optimizer's, and what parts keep for every parameter; see checks.py."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lets_kernels.checks import refuse, shaped_as


def check_layout(state_dict: Any) -> None:
    """A state of the layout in which torch's optimizers save theirs."""
    what = "state_dict"
    if not isinstance(state_dict, Mapping):
        refuse(what, f"is a {type(state_dict).__name__}, not a dict")
    for name, kind, known in (("state", Mapping, "a dict"), ("param_groups", (list, tuple), "a list")):
        if name not in state_dict:
            refuse(what, f"lacks {name}")
        if not isinstance(state_dict[name], kind):
            refuse(f"{what}[{name!r}]", f"is a {type(state_dict[name]).__name__}, not {known}")
    for index, group in enumerate(state_dict["param_groups"]):
        found = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(found, (list, tuple)) or not all(isinstance(key, Hashable) for key in found):
            refuse(f"{what}['param_groups'][{index}]", "has no list of params")


def check_held(held: Mapping[Any, Mapping[str, Any]], params: Sequence[Tensor], names: Iterable[str]) -> None:
    """What parts keep for parameters: tensors of their sizes, under names that these parts have."""
    names = set(names)
    for key, own in held.items():
        if not isinstance(key, int) or not 0 <= key < len(params):
            refuse(f"the state of parameter {key!r}", "goes with no parameter here")
        for name, value in own.items():
            if name not in names:
                refuse(f"the state of parameter {key}", f"has a {name}, which no part of this optimizer keeps")
            if not shaped_as(value, params[key]):
                refuse(f"the {name} of parameter {key}", "is no tensor of the parameter's shape")


def check_kept(
    held: Mapping[Any, Mapping[str, Any]], names: Iterable[str], kept: Mapping[str, int] | None, begun: bool, what: str
) -> None:
    """What a part keeps is there: a state that lost it on its way would go on wrongly, in silence.

    ``kept`` has the number of parameters for which it kept each name when the state was saved. None for states of
    before that was counted: then there must be one of each if the part had begun.
    """
    for name in names:
        count = int(begun) if kept is None else kept[name]
        found = sum(name in own for own in held.values())
        if found < count:
            whose = f"{count - found} of {count} parameters" if found else "every parameter"
            refuse(
                what,
                f"has lost the {name} of {whose}, as flatten_optimizer_state_dict=True of "
                "torch.distributed.checkpoint loses it, which you then should leave out",
            )
