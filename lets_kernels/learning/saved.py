"""Whether the saved state of a learned radius can be loaded; see checks.py."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lets_kernels.base.saved import check_optimizer
from lets_kernels.checks import check_count, check_keys, check_scalar, is_list, is_number, refuse
from lets_kernels.learning.hypergradient import Trial

_ASCENT = {"bucket", "indices", "group", "places", "vectors", "xi", "q", "scaled", "saved", "filter_norms"}

_TRIAL = {field.name for field in fields(Trial)} - {"captured", "buckets"}


def check_learned(
    state: Mapping[str, Any], nus: Sequence[Tensor], optimizer: torch.optim.Optimizer, closures: bool, vectors: bool
) -> None:
    """The state of a learned radius: as many ν as there are, an optimizer for them, and perhaps a step that waits.

    ``closures``: such a step holds the validation gradient, for which it waits otherwise. ``vectors``: it holds those
    of the perturbation.
    """
    found = len(state["nu"]) if is_list(state["nu"]) else "no list of"
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
        refuse(what, "holds a validation gradient, and this radius takes that of the next step")
    if isinstance(trial["slope"], bool) or not isinstance(trial["slope"], Real):
        refuse(f"{what}: slope", f"is {trial['slope']!r}, not a number")
    lists = {name: trial[name] for name in ("first", "perturbed", "stepped", "lr", "rho")}
    if closures:
        lists["val"] = pending["val"]
    counts = set()
    for name, entries in lists.items():
        if not is_list(entries):
            refuse(f"{what}: {name}", f"is a {type(entries).__name__}, not a list")
        counts.add(len(entries))
        if name == "rho":
            scalars += entries
        elif name == "lr":
            if not all(map(is_number, entries)):
                refuse(f"{what}: lr", "holds something else than numbers")
        else:
            for each in entries:
                if not isinstance(each, Mapping) or not all(map(_is_place, each)):
                    refuse(f"{what}: {name}", "does not hold gradients by their places")
                tensors += each.values()
    if len(counts) != 1:
        refuse(what, "has lists of different lengths")
    if not is_list(trial["ascents"]):
        refuse(f"{what}: ascents", f"is a {type(trial['ascents']).__name__}, not a list")
    named: list[tuple[int, int, Any]] = []  # by bucket and place
    for ascent in trial["ascents"]:
        check_keys(ascent, _ASCENT, f"{what}: an ascent")
        check_count(ascent["bucket"], f"{what}: an ascent's bucket")
        if not isinstance(ascent["scaled"], bool):
            refuse(f"{what}: an ascent", f"has {ascent['scaled']!r} for a flag")
        for name, least in (("xi", 0), ("q", 1)):
            if not is_number(ascent[name]) or not ascent[name] >= least:
                refuse(f"{what}: an ascent", f"has {ascent[name]!r} for {name}")
        check_count(ascent["group"], f"{what}: an ascent's group")
        if not is_list(ascent["places"]) or not all(map(_is_place, ascent["places"])):
            refuse(f"{what}: an ascent", f"has {ascent['places']!r} for places")
        indices, vectors = ascent["indices"], ascent["vectors"]
        if not (is_list(indices) and is_list(vectors) and len(vectors) in (0, len(indices))):
            refuse(f"{what}: an ascent", "has not one vector for every index")
        if needs_vectors and len(vectors) != len(indices):
            refuse(f"{what}: an ascent", "has no vectors, and this radius needs those of the perturbation")
        if not all(map(_is_place, indices)) or len(set(indices)) != len(indices):
            refuse(f"{what}: an ascent's indices", f"are {indices!r}, not places that differ")
        named += [(ascent["bucket"], i, v) for i, v in zip(indices, vectors, strict=False)]
        tensors += [*vectors, *(ascent[name] for name in ("saved", "filter_norms") if ascent[name] is not None)]
    if not all(isinstance(t, Tensor) for t in (*scalars, *tensors)):
        refuse(what, "holds something else where tensors belong")
    if any(t.dim() for t in scalars):
        refuse(what, "holds a larger tensor where a 0-d one belongs")
    buckets = [ascent["bucket"] for ascent in trial["ascents"]]
    if len(set(buckets)) != len(buckets):
        refuse(f"{what}: ascents", "hold one bucket twice")
    for name in lists.keys() - {"lr", "rho"}:
        named += [(k, i, g) for k, each in enumerate(lists[name]) for i, g in each.items()]
    kinds: dict[tuple[int, int], Any] = {}
    for k, i, t in named:  # all of them are as large as the parameter
        if kinds.setdefault((k, i), (t.shape, t.dtype)) != (t.shape, t.dtype):
            refuse(what, f"holds tensors of different kinds for parameter {i} of bucket {k}")


def _is_place(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
