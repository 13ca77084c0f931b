"""Whether the saved state of a learned radius can be loaded; see checks.py."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lets_kernels.base.saved import check_optimizer
from lets_kernels.checks import check_count, check_keys, check_scalar, expect, is_list, is_number, refuse
from lets_kernels.learning.hypergradient import Trial

_ASCENT = {"bucket", "indices", "group", "places", "vectors", "xi", "q", "scaled", "saved", "filter_norms"}

_TRIAL = {field.name for field in fields(Trial)} - {"captured", "buckets", "versions"}


def check_learned(
    state: Mapping[str, Any],
    nus: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    closures: bool,
    vectors: bool,
    curvature: str | None,
) -> None:
    """The state of a learned radius fits: the number of ν, their optimizer, and the waiting step if there is one.

    ``closures``: a waiting step holds what validates it; otherwise it waits for that. ``vectors``: a waiting step holds
    the vectors of the perturbation. ``curvature``: that of the sums which may be held in place of the validation
    gradient; None if the gradient itself is needed.
    """
    found = len(state["nu"]) if is_list(state["nu"]) else "no list of"
    if found != len(nus):
        raise ValueError(f"the state holds {found} learned radii, this optimizer has {len(nus)}")
    for nu in state["nu"]:
        check_scalar(nu, "log rho")
    check_optimizer(state["optimizer"], optimizer, "the radius's optimizer")
    _check_waiting(state["pending"], "the step that waits", len(nus), closures, vectors, curvature)


def _check_waiting(
    pending: Any, what: str, count: int, closures: bool, needs_vectors: bool, curvature: str | None
) -> None:
    """The value is None or a packed trial. Whether the trial fits the parameters is checked when it is unpacked."""
    if pending is None:
        return
    check_keys(pending, ("trial", "val", "val_loss"), what)
    trial, one = pending["trial"], f"{what}: an ascent"
    check_keys(trial, _TRIAL, f"{what}['trial']")
    scalars = [trial["total"], trial["gate"]]
    tensors: list[Any] = []
    if closures:
        scalars.append(pending["val_loss"])
    elif pending["val"] is not None or pending["val_loss"] is not None:
        refuse(what, "holds a validation gradient, and this radius takes that of the next step")
    slope = trial["slope"]
    expect(isinstance(slope, Real) and not isinstance(slope, bool), f"{what}: slope", f"is {slope!r}, not a number")
    lists = {name: trial[name] for name in ("first", "perturbed", "stepped")}
    if closures and isinstance(pending["val"], Mapping):
        scalars += _checked_sums(pending["val"], f"{what}['val']", count, curvature)
    elif closures:
        lists["val"] = pending["val"]
    by_group = {name: trial[name] for name in ("lr", "rho")}
    for name, entries in (*lists.items(), *by_group.items(), ("ascents", trial["ascents"])):
        expect(is_list(entries), f"{what}: {name}", f"is a {type(entries).__name__}, not a list")
    for each in (lists, by_group):
        expect(len(set(map(len, each.values()))) == 1, what, "has lists of different lengths")
    scalars += by_group["rho"]
    expect(all(map(is_number, by_group["lr"])), f"{what}: lr", "holds something else than numbers")
    named: list[tuple[int, int, Any]] = []  # by bucket and place
    for name, entries in lists.items():
        for k, each in enumerate(entries):
            by_place = isinstance(each, Mapping) and all(map(_is_place, each))
            expect(by_place, f"{what}: {name}", "does not hold gradients by their places")
            named += [(k, i, g) for i, g in each.items()]
    buckets = []
    for ascent in trial["ascents"]:
        check_keys(ascent, _ASCENT, one)
        check_count(ascent["bucket"], f"{one}'s bucket")
        expect(isinstance(ascent["scaled"], bool), one, f"has {ascent['scaled']!r} for a flag")
        indices, vectors, places, groups = (ascent[name] for name in ("indices", "vectors", "places", "group"))
        for name, least in (("xi", 0), ("q", 1)):
            each_run = name == "xi" and is_list(ascent[name]) and len(ascent[name]) == len(indices)
            numbers = ascent[name] if each_run else [ascent[name]]
            if not all(is_number(x) and x >= least for x in numbers):
                refuse(one, f"has {ascent[name]!r} for {name}")
        expect(is_list(places) and all(map(_is_place, places)), one, f"has {places!r} for places")
        if is_list(groups):  # of each parameter; one number in a state with a bucket for each group
            expect(len(groups) == len(places) and all(map(_is_place, groups)), one, f"has {groups!r} for groups")
        else:
            check_count(groups, f"{one}'s group")
        if not (is_list(indices) and is_list(vectors) and len(vectors) in (0, len(indices))):
            refuse(one, "has not one vector for every index")
        if needs_vectors and len(vectors) != len(indices):
            refuse(one, "has no vectors, and this radius needs those of the perturbation")
        differ = all(map(_is_place, indices)) and len(set(indices)) == len(indices)
        expect(differ, f"{one}'s indices", f"are {indices!r}, not places that differ")
        buckets.append(ascent["bucket"])
        named += [(ascent["bucket"], i, v) for i, v in zip(indices, vectors, strict=False)]
        tensors += [ascent[name] for name in ("saved", "filter_norms") if ascent[name] is not None]
    tensors += [*scalars, *(t for _, _, t in named)]
    expect(all(isinstance(t, Tensor) for t in tensors), what, "holds something else where tensors belong")
    expect(not any(t.dim() for t in scalars), what, "holds a larger tensor where a 0-d one belongs")
    expect(len(set(buckets)) == len(buckets), f"{what}: ascents", "hold one bucket twice")
    kinds: dict[tuple[int, int], Any] = {}
    for k, i, t in named:  # each tensor is as large as its parameter
        kind = kinds.setdefault((k, i), (t.shape, t.dtype))
        expect(kind == (t.shape, t.dtype), what, f"holds tensors of different kinds for parameter {i} of bucket {k}")


def _checked_sums(val: Mapping[str, Any], what: str, count: int, curvature: str | None) -> list[Any]:
    """The sums over the validation gradient, one for each ν that there was, of the curvature that the radius has."""
    check_keys(val, ("curvature", "sums"), what)
    if val["curvature"] != curvature:
        needs = "the gradient itself, for direction='algorithm1'" if curvature is None else f"curvature={curvature!r}"
        refuse(what, f"holds sums with curvature={val['curvature']!r}, and this radius needs {needs}")
    sums = val["sums"]
    # Fewer if a group was added since: that step is then not learned from.
    expect(is_list(sums) and 1 <= len(sums) <= count, what, f"has no list of {count} sums")
    return list(sums)


def _is_place(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
