"""Saving and loading everything that training needs to go on. A state is checked before anything is loaded."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lets_kernels.base.saved import check_base
from lets_kernels.base.state import Look
from lets_kernels.checks import check_count, check_keys, check_part, expect, refuse, shaped_as
from lets_kernels.parts.direction import check_xi
from lets_kernels.parts.passes import Held
from lets_kernels.parts.radius import check_rho
from lets_kernels.step import carried
from lets_kernels.step.engine import Engine
from lets_kernels.step.workspace import Workspace

#: The key of our own state in a saved state, and once more in the first group of it.
KEY = "lets_kernels"
_PARTS = ("direction", "schedule", "descent")
#: The weights before ε, and ε: what the SAM in common use keeps between its two passes, and never takes away.
_LEFT_BEHIND = ("old_p", "e_w")


def _parts(w: Workspace) -> tuple[str, ...]:
    """The parts that have an entry: the length only if it keeps something, since older states have none."""
    return (*_PARTS, "length") if w.setting.length.state_dict() else _PARTS


def saved(e: Engine) -> dict[str, Any]:
    """The base optimizer's state and groups, with our own state as a further entry and inside the first group."""
    w = e.work
    e.refuse_while_perturbed("state_dict()")
    w.tables.take_in_new_groups()
    w.tables.forget_replaced()
    state_dict, own = dict(w.base.state_dict()), own_state(w)
    state_dict["state"] = w.progress.held.add_to(state_dict["state"], {id(p): i for i, p in enumerate(w.params())})
    first, *others = state_dict["param_groups"]
    state_dict.update(param_groups=[{**first, KEY: carried.numbers(own)}, *others], **{KEY: own})
    return state_dict


def own_state(w: Workspace) -> dict[str, Any]:
    """Our own state: radius, parts and counters."""
    parts = {name: getattr(w.setting, name).state_dict() for name in (*_parts(w), "radius")}
    own = {**parts, **w.progress.state_dict()}
    if w.setting.held:  # without held tensors the entry is left out
        held = [w.progress.held.state.get(p, {}) for p in w.params()]
        own[carried.KEPT] = {name: sum(name in each for each in held) for name in w.setting.held}
    return own


def _check_own(w: Workspace, own: Any, groups: Sequence[dict[str, Any]]) -> None:
    """Refuse a damaged entry of a saved state, before anything of the state is loaded."""
    present = own_state(w)
    if isinstance(own, Mapping) and carried.KEPT not in own:  # saved by a version that did not count
        present.pop(carried.KEPT, None)
    check_keys(own, present, f"state[{KEY!r}]")
    if carried.KEPT in present:
        check_keys(own[carried.KEPT], present[carried.KEPT], "the numbers of what is kept")
        for name, count in own[carried.KEPT].items():
            check_count(count, f"the number of parameters with {name}")
    for part in _parts(w):
        check_part(own[part], getattr(w.setting, part).state_dict(), f"the {part}")
    w.progress.check_state_dict(own)
    w.setting.radius.check_state_dict(own["radius"])
    for group in groups:
        check_rho(group.get("rho", 0.0))
        check_xi(group.get("xi", 0.0))


def _check_layout(state_dict: Any) -> None:
    """The state has the layout of the states that torch's optimizers save."""
    what = "state_dict"
    expect(isinstance(state_dict, Mapping), what, f"is a {type(state_dict).__name__}, not a dict")
    for name, kind, known in (("state", Mapping, "a dict"), ("param_groups", (list, tuple), "a list")):
        expect(name in state_dict, what, f"lacks {name}")
        found = state_dict[name]
        expect(isinstance(found, kind), f"{what}[{name!r}]", f"is a {type(found).__name__}, not {known}")
    for index, group in enumerate(state_dict["param_groups"]):
        found = group.get("params") if isinstance(group, Mapping) else None
        listed = isinstance(found, (list, tuple)) and all(isinstance(key, Hashable) for key in found)
        expect(listed, f"{what}['param_groups'][{index}]", "has no list of params")


def _check_held(held: Mapping[Any, Mapping[str, Any]], params: Sequence[Tensor], names: Iterable[str]) -> None:
    """The held tensors have the sizes of their parameters, and names that the parts of this optimizer know."""
    names = set(names)
    for key, own in held.items():
        if not isinstance(key, int) or not 0 <= key < len(params):
            refuse(f"the state of parameter {key!r}", "goes with no parameter here")
        for name, value in own.items():
            whose = f"of parameter {key}"
            expect(name in names, f"the state {whose}", f"has a {name}, which no part of this optimizer keeps")
            expect(shaped_as(value, params[key]), f"the {name} {whose}", "is no tensor of the parameter's shape")


def _check_kept(
    held: Mapping[Any, Mapping[str, Any]], names: Iterable[str], kept: Mapping[str, int] | None, begun: bool, what: str
) -> None:
    """The held tensors are all there: a state that has lost some would go on wrongly, without an error.

    ``kept`` says for how many parameters each name was held when the state was saved. It is None for states saved by
    versions that did not count this: then each name must be there at least once if the part had begun.
    """
    for name in names:
        count = int(begun) if kept is None else kept[name]
        found = sum(name in own for own in held.values())
        if found < count:
            whose = f"{count - found} of {count} parameters" if found else "every parameter"
            refuse(
                what,
                f"has lost the {name} of {whose} (under flatten_optimizer_state_dict=True, "
                "torch.distributed.checkpoint reads the names that the loading optimizer has: load into a new one)",
            )


def _without_left_behind(state: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]]) -> Mapping[Any, Any]:
    """The state of a parameter, without what another SAM has left there: one whose groups have a ρ as ours have."""
    if not any("rho" in group for group in groups):
        return state
    kept: dict[Any, Any] = {}
    for key, entry in state.items():
        if isinstance(entry, Mapping) and not entry.keys().isdisjoint(_LEFT_BEHIND):
            entry = {name: value for name, value in entry.items() if name not in _LEFT_BEHIND}
            if not entry:
                continue
        kept[key] = entry
    return kept


def load(e: Engine, state_dict: dict[str, Any]) -> None:
    """Take over a saved state, unless it is damaged or another optimizer's."""
    w, setting, held_by = e.work, e.work.setting, e.work.progress.held
    _check_layout(state_dict)
    own, groups = state_dict.get(KEY), state_dict["param_groups"]
    numbers = next((group[KEY] for group in groups if group.get(KEY) is not None), None)
    if own is None and numbers is not None:
        own = carried.filled(own_state(w), numbers)
    if own is not None:
        _check_own(w, own, groups)
    groups = [{name: value for name, value in group.items() if name != KEY} for group in groups]
    before = [{name: group[name] for name in setting.group_keys} for group in w.groups]
    rest = {name: value for name, value in state_dict.items() if name != KEY}
    rest["state"], held = Held.take_from(state_dict["state"])
    if own is None:
        rest["state"] = _without_left_behind(rest["state"], groups)
    # As in torch: the groups say which parameter a state belongs to; some tools put names there instead of numbers.
    places = {key: i for i, key in enumerate(key for group in groups for key in group["params"])}
    held = {places.get(key, f"{key}"): own_tensors for key, own_tensors in held.items()}
    params = w.params()
    check_base(rest["state"], groups, w.base, places, params)
    setting.direction.check_base(Look(type(w.base), groups))
    _check_held(held, params, setting.held)
    if own is not None:
        counts = own["direction"].values()
        begun = own["step"] > 0 and (not counts or any(bool(value) for value in counts))
        kept = own.get(carried.KEPT)
        _check_kept(held, setting.direction.held, kept, begun, "the direction")
        _check_kept(held, setting.descent.held, kept, own["step"] > 0, "the descent")
        _check_kept(held, setting.radius.held, kept, own["perturbed_steps"] > 0, "the radius")
    w.base.load_state_dict({**rest, "param_groups": groups})
    for group, values in zip(w.groups, before, strict=True):
        for name, value in values.items():
            if own is None or name not in group:
                group[name] = value
    e.begin_anew()
    e.mark_gradients()  # the present gradients were made before the load
    if own is not None:
        held_by.load(held, params)
        w.progress.load_state_dict(own)
        for part in _parts(w):
            getattr(setting, part).load_state_dict(own[part])
        setting.radius.load_state_dict(own["radius"], w.groups)
