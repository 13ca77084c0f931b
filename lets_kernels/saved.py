"""Whether a saved state can be loaded, asked before any of it is: a state that is damaged changes nothing.

Every function raises ``ValueError``, or returns None and has changed nothing.
"""

import copy
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lets_kernels.bases import own_step
from lets_kernels.fused import FUSED, refusal
from lets_kernels.hypergradient import Trial
from lets_kernels.shards import local as real

_ASCENT = {"bucket", "indices", "group", "places", "vectors", "xi", "q", "scaled", "saved", "filter_norms"}
_TRIAL = {field.name for field in fields(Trial)} - {"captured", "buckets"}


def _refuse(what: str, found: str) -> None:
    raise ValueError(
        f"the saved state does not fit, and nothing of it was loaded: {what} {found}. Build the optimizer as the one "
        "that was saved; if it is so built, the state is damaged: load another copy"
    )


def check_keys(entry: Any, keys: Iterable[str], what: str) -> None:
    """The entry is a dict with these keys."""
    if not isinstance(entry, Mapping):
        _refuse(what, f"is a {type(entry).__name__}, not a dict")
    keys = set(keys)
    if entry.keys() != keys:
        lacks, beside = (sorted(map(str, some)) for some in (keys - entry.keys(), entry.keys() - keys))
        found = [f"{verb} {', '.join(some)}" for verb, some in (("lacks", lacks), ("has an unknown", beside)) if some]
        _refuse(what, " and ".join(found))


def check_count(value: Any, what: str) -> None:
    """A whole number, not negative."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        _refuse(what, f"is {value!r}, not a count")


def check_scalar(value: Any, what: str) -> None:
    """A 0-d tensor of a finite number."""
    if not isinstance(value, Tensor) or value.dim() != 0 or not bool(torch.isfinite(value)):
        _refuse(what, f"is {value!r}, not a 0-d tensor of a finite number")


def check_numbers(values: Any, count: int, what: str) -> None:
    """So many 0-d tensors of finite numbers."""
    if not _is_list(values) or len(values) != count:
        _refuse(what, f"is {values!r}, not a list of {count}")
    for value in values:
        check_scalar(value, what)


def check_part(state: Any, present: Mapping[str, Any], what: str) -> None:
    """The state of a part of a method: numbers where it has numbers now, finite ones, and counts where it counts."""
    check_keys(state, present, what)
    for name, now in present.items():
        value, label = state[name], f"{what}: {name}"
        number = isinstance(now, Real) and not isinstance(now, bool)
        scalar = isinstance(now, Tensor) and now.dim() == 0
        if not _alike(value, now) or (number and isinstance(value, (bool, Tensor))) or (scalar and value is None):
            _refuse(label, f"is {value!r}, and {now!r} has another kind")
        if (number or scalar) and not bool(torch.isfinite(torch.as_tensor(value, device=_device(value)))):
            _refuse(label, f"is {value!r}, not a finite number")
        counts = isinstance(now, int) if number else scalar and not now.is_floating_point()
        if counts and (value < 0 or float(value) != int(value)):
            _refuse(label, f"is {value!r}, not a count")


def _device(value: Any) -> torch.device:
    """Where a number is looked at: where it is, and for those of Python not where torch makes tensors by default."""
    return value.device if isinstance(value, Tensor) else torch.device("cpu")


def check_optimizer(state: Any, optimizer: torch.optim.Optimizer, what: str) -> None:
    """The state is one that this optimizer, whose parameters are few and small, can load and go on from."""
    check_keys(state, ("state", "param_groups"), what)
    made = refusal(optimizer) is None  # its state is there from the beginning; that of others may come with a step
    trial = copy.deepcopy(optimizer)
    try:
        trial.load_state_dict(copy.deepcopy(dict(state)))
        for mine, loaded in zip(optimizer.param_groups, trial.param_groups, strict=True):
            # It goes with the device, and not with the state.
            if isinstance(loaded.get("capturable"), bool) and "capturable" in mine:
                loaded["capturable"] = mine["capturable"]
    except Exception as error:
        _refuse(what, f"is none that {type(optimizer).__name__} can load ({error})")
    for mine, loaded in zip(optimizer.param_groups, trial.param_groups, strict=True):
        for name in mine.keys() & optimizer.defaults.keys():
            if name not in loaded or not _alike(loaded[name], mine[name]):
                _refuse(f"{what}['param_groups']", f"has no usable {name}")
        for p, q in zip(mine["params"], loaded["params"], strict=True):
            present, found = optimizer.state.get(p, {}), trial.state.get(q, {})
            if not isinstance(found, Mapping):
                _refuse(f"{what}['state']", f"holds a {type(found).__name__}, not a dict")
            for name in present if found or made else ():
                if name not in found or not _alike(found[name], present[name]):
                    _refuse(f"{what}['state']", f"has no usable {name}")
    wrong = _tried_out(trial)
    if wrong is not None and _tried_out(copy.deepcopy(optimizer)) is None:  # else it says nothing of the state
        _refuse(what, f"is none that {type(optimizer).__name__} can go on from ({wrong})")


def _tried_out(trial: torch.optim.Optimizer) -> Exception | None:
    """What is wrong with a step of this optimizer, which is nobody's, along a small gradient."""
    params = [p for group in trial.param_groups for p in group["params"]]
    try:
        for p in params:
            p.grad = torch.full_like(p, 1e-3)
        own_step(trial)
        if any(bool(p.isnan().any()) for p in params):
            raise ValueError("its next step is no number")
    except Exception as error:
        return error
    return None


def check_layout(state_dict: Any) -> None:
    """A state of the layout in which torch's optimizers save theirs."""
    what = "state_dict"
    if not isinstance(state_dict, Mapping):
        _refuse(what, f"is a {type(state_dict).__name__}, not a dict")
    for name, kind, known in (("state", Mapping, "a dict"), ("param_groups", (list, tuple), "a list")):
        if name not in state_dict:
            _refuse(what, f"lacks {name}")
        if not isinstance(state_dict[name], kind):
            _refuse(f"{what}[{name!r}]", f"is a {type(state_dict[name]).__name__}, not {known}")
    for index, group in enumerate(state_dict["param_groups"]):
        found = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(found, (list, tuple)) or not all(isinstance(key, Hashable) for key in found):
            _refuse(f"{what}['param_groups'][{index}]", "has no list of params")


def check_held(held: Mapping[Any, Mapping[str, Any]], params: Sequence[Tensor], names: Iterable[str]) -> None:
    """What parts keep for parameters: tensors of their sizes, under names that these parts have."""
    names = set(names)
    for key, own in held.items():
        if not isinstance(key, int) or not 0 <= key < len(params):
            _refuse(f"the state of parameter {key!r}", "goes with no parameter here")
        for name, value in own.items():
            if name not in names:
                _refuse(f"the state of parameter {key}", f"has a {name}, which no part of this optimizer keeps")
            if not _shaped_as(value, params[key]):
                _refuse(f"the {name} of parameter {key}", "is no tensor of the parameter's shape")


def _shaped_as(value: Any, p: Tensor) -> bool:
    """True for a tensor that goes with a parameter, or with this rank's part of it, element by element."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    return value.shape in (p.shape, real(p).shape) and (value.device.type != "meta" or p.device.type == "meta")


def check_base(
    state: Mapping[Any, Any],
    groups: Sequence[Mapping[str, Any]],
    base: torch.optim.Optimizer,
    places: Mapping[Any, int],
    params: Sequence[Tensor],
) -> None:
    """What the base optimizer would load: its numbers in every group, and state that goes with the parameters.

    Options that are switches it fills in by itself, where an older version saved none. Of an optimizer that is not
    torch's only that is looked at whose kind is known: the learning rate, step counts, and what it has a tensor for at
    present. One that has hooks of its own on what it loads knows best.

    ``places`` has the place among ``params`` of each key of ``state``; another key is none of a parameter.
    """
    if getattr(base, "_optimizer_load_state_dict_pre_hooks", None):  # they may make of it what they want
        return
    needs = _needs(base)
    for index, group in enumerate(groups):
        for name, value in group.items():
            known = name in base.defaults or name in _OURS
            if known and isinstance(value, Tensor) and value.numel() != 1:
                _refuse(f"state_dict['param_groups'][{index}]", f"has {value.numel()} elements for {name}")
        for name, now in base.defaults.items():
            if needs is None and name != "lr":  # who knows what else it may be
                continue
            numbers = now if isinstance(now, (list, tuple)) else (now,)
            if not all(_is_number(number) for number in numbers):
                continue
            what = f"state_dict['param_groups'][{index}]"
            if name not in group:
                _refuse(what, f"lacks {name}")
            values = group[name] if isinstance(now, (list, tuple)) else (group[name],)
            if not isinstance(values, (list, tuple)) or len(values) != len(numbers) or not all(map(_is_number, values)):
                _refuse(what, f"has {group[name]!r} for {name}, where {now!r} has another kind")
            if all(map(_is_finite, numbers)) and not all(map(_is_finite, values)):
                _refuse(what, f"has {group[name]!r} for {name}, which is not finite")
    options = {key: group for group in groups for key in group["params"]}
    seen: set[int] = set()
    for key, entry in state.items():
        if key not in places or not 0 <= places[key] < len(params):
            continue
        p = params[places[key]]
        what = f"state_dict['state'][{key!r}]"
        if not isinstance(entry, Mapping):
            _refuse(what, f"is a {type(entry).__name__}, not a dict")
        for name in (*needs, *_asked_for(base, options[key])) if needs is not None and entry else ():
            if entry.get(name) is None:
                _refuse(what, f"lacks {name}")
        present = base.state.get(p, {})
        for name, value in entry.items():
            known = needs is not None and name in (*needs, *_OPTIONAL)
            now = present.get(name)
            if name in _NUMBERS and (known or (now is not None and _is_number(now))):
                if not _is_number(value) or not _is_finite(value, 0.0 if name == "step" else -math.inf):
                    _refuse(f"{what}[{name!r}]", f"is {value!r}, not a number that it could have come to")
                continue
            if known and isinstance(value, Tensor) and value.dim():
                if id(value) in seen:
                    _refuse(f"{what}[{name!r}]", "is the tensor of another entry too")
                seen.add(id(value))
            alike = known or (needs is None and isinstance(now, Tensor) and now.shape == p.shape)
            if alike and not _shaped_as(value, p) and not (value is None and name in _OPTIONAL):
                _refuse(f"{what}[{name!r}]", "is no tensor of the parameter's shape")


#: What a group has of ours.
_OURS = ("rho", "adaptive", "xi")
#: What torch's optimizers keep where their options ask for it, and what of their state are single numbers.
_OPTIONAL = ("momentum_buffer", "max_exp_avg_sq", "grad_avg")
_NUMBERS = ("step", "mu_product", "eta", "mu")
#: What those that have no fused step keep for every parameter.
_KEEPS: dict[type, tuple[str, ...]] = {
    torch.optim.RMSprop: ("step", "square_avg"),
    torch.optim.Adagrad: ("step", "sum"),
    torch.optim.Adamax: ("step", "exp_avg", "exp_inf"),
    torch.optim.NAdam: ("step", "mu_product", "exp_avg", "exp_avg_sq"),
    torch.optim.RAdam: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.ASGD: ("step", "eta", "mu", "ax"),
    torch.optim.Rprop: ("step", "prev", "step_size"),
}


def _needs(base: torch.optim.Optimizer) -> tuple[str, ...] | None:
    """What an optimizer keeps for a parameter, once there is anything; None where nobody knows."""
    kind = FUSED.get(type(base))
    return kind.needs if kind is not None else _KEEPS.get(type(base))


def _asked_for(base: torch.optim.Optimizer, group: Mapping[str, Any]) -> Iterator[str]:
    """What it keeps beside, with these options."""
    if group.get("amsgrad"):
        yield "max_exp_avg_sq"
    if isinstance(base, torch.optim.RMSprop):
        if group.get("centered"):
            yield "grad_avg"
        if group.get("momentum"):
            yield "momentum_buffer"


def _is_finite(value: Any, least: float = -math.inf) -> bool:
    """A finite number, and not below the least; of a tensor without memory nobody knows."""
    return (isinstance(value, Tensor) and value.is_meta) or (math.isfinite(float(value)) and float(value) >= least)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and value.dtype is not torch.bool
    return isinstance(value, Real) and not isinstance(value, bool)


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
            _refuse(
                what,
                f"has lost the {name} of {whose}, as flatten_optimizer_state_dict=True of "
                "torch.distributed.checkpoint loses it, which you then should leave out",
            )


def _alike(value: Any, present: Any) -> bool:
    """True if one value can stand in the place of the other; of options that are None anything may have been saved."""
    if isinstance(present, bool):
        return value is None or isinstance(value, bool)
    if isinstance(present, Tensor) or isinstance(value, Tensor):
        shape = present.shape if isinstance(present, Tensor) else torch.Size(())
        return (isinstance(value, Tensor) and value.shape == shape) or (isinstance(value, Real) and not shape)
    if isinstance(present, Real):
        return isinstance(value, Real)
    if isinstance(present, (list, tuple)):
        return isinstance(value, (list, tuple)) and len(value) == len(present) and all(map(_alike, value, present))
    return True


def check_learned(
    state: Mapping[str, Any], nus: Sequence[Tensor], optimizer: torch.optim.Optimizer, closures: bool, vectors: bool
) -> None:
    """The state of a learned radius: as many ν as there are, an optimizer for them, and perhaps a step that waits.

    ``closures``: such a step holds the validation gradient, for which it waits otherwise. ``vectors``: it holds those
    of the perturbation.
    """
    found = len(state["nu"]) if _is_list(state["nu"]) else "no list of"
    if found != len(nus):
        raise ValueError(f"the state holds {found} learned radii, this optimizer has {len(nus)}")
    for nu in state["nu"]:
        check_scalar(nu, "log rho")
    check_optimizer(state["optimizer"], optimizer, "the radius's optimizer")
    _check_waiting(state["pending"], "the step that waits", closures, vectors)


def _check_waiting(pending: Any, what: str, closures: bool, needs_vectors: bool) -> None:
    """None, or a packed trial; whether it goes with the parameters is seen when it is unpacked."""
    if pending is None:
        return
    check_keys(pending, ("trial", "val", "val_loss"), what)
    trial = pending["trial"]
    check_keys(trial, _TRIAL, f"{what}['trial']")
    scalars = [trial["total"], trial["gate"]]
    tensors: list[Any] = []
    if closures:
        scalars.append(pending["val_loss"])
    elif pending["val"] is not None or pending["val_loss"] is not None:
        _refuse(what, "holds a validation gradient, and this radius takes that of the next step")
    if isinstance(trial["slope"], bool) or not isinstance(trial["slope"], Real):
        _refuse(f"{what}: slope", f"is {trial['slope']!r}, not a number")
    lists = {name: trial[name] for name in ("first", "perturbed", "stepped", "lr", "rho")}
    if closures:
        lists["val"] = pending["val"]
    counts = set()
    for name, entries in lists.items():
        if not _is_list(entries):
            _refuse(f"{what}: {name}", f"is a {type(entries).__name__}, not a list")
        counts.add(len(entries))
        if name == "rho":
            scalars += entries
        elif name == "lr":
            if not all(map(_is_number, entries)):
                _refuse(f"{what}: lr", "holds something else than numbers")
        else:
            for each in entries:
                if not isinstance(each, Mapping) or not all(map(_is_place, each)):
                    _refuse(f"{what}: {name}", "does not hold gradients by their places")
                tensors += each.values()
    if len(counts) != 1:
        _refuse(what, "has lists of different lengths")
    if not _is_list(trial["ascents"]):
        _refuse(f"{what}: ascents", f"is a {type(trial['ascents']).__name__}, not a list")
    named: list[tuple[int, int, Any]] = []  # by bucket and place
    for ascent in trial["ascents"]:
        check_keys(ascent, _ASCENT, f"{what}: an ascent")
        check_count(ascent["bucket"], f"{what}: an ascent's bucket")
        if not isinstance(ascent["scaled"], bool):
            _refuse(f"{what}: an ascent", f"has {ascent['scaled']!r} for a flag")
        for name, least in (("xi", 0), ("q", 1)):
            if not _is_number(ascent[name]) or not ascent[name] >= least:
                _refuse(f"{what}: an ascent", f"has {ascent[name]!r} for {name}")
        check_count(ascent["group"], f"{what}: an ascent's group")
        if not _is_list(ascent["places"]) or not all(map(_is_place, ascent["places"])):
            _refuse(f"{what}: an ascent", f"has {ascent['places']!r} for places")
        indices, vectors = ascent["indices"], ascent["vectors"]
        if not (_is_list(indices) and _is_list(vectors) and len(vectors) in (0, len(indices))):
            _refuse(f"{what}: an ascent", "has not one vector for every index")
        if needs_vectors and len(vectors) != len(indices):
            _refuse(f"{what}: an ascent", "has no vectors, and this radius needs those of the perturbation")
        if not all(map(_is_place, indices)) or len(set(indices)) != len(indices):
            _refuse(f"{what}: an ascent's indices", f"are {indices!r}, not places that differ")
        named += [(ascent["bucket"], i, v) for i, v in zip(indices, vectors, strict=False)]
        tensors += [*vectors, *(ascent[name] for name in ("saved", "filter_norms") if ascent[name] is not None)]
    if not all(isinstance(t, Tensor) for t in (*scalars, *tensors)):
        _refuse(what, "holds something else where tensors belong")
    if any(t.dim() for t in scalars):
        _refuse(what, "holds a larger tensor where a 0-d one belongs")
    buckets = [ascent["bucket"] for ascent in trial["ascents"]]
    if len(set(buckets)) != len(buckets):
        _refuse(f"{what}: ascents", "hold one bucket twice")
    for name in lists.keys() - {"lr", "rho"}:
        named += [(k, i, g) for k, each in enumerate(lists[name]) for i, g in each.items()]
    kinds: dict[tuple[int, int], Any] = {}
    for k, i, t in named:  # all of them are as large as the parameter
        if kinds.setdefault((k, i), (t.shape, t.dtype)) != (t.shape, t.dtype):
            _refuse(what, f"holds tensors of different kinds for parameter {i} of bucket {k}")


def _is_place(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
