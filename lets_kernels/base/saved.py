"""Whether the saved state of a base optimizer, or of the optimizer for ν, can be loaded; see checks.py."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lets_kernels.base.foreign import own_step
from lets_kernels.base.fused import fused_as, fused_by
from lets_kernels.checks import alike, check_keys, expect, is_finite, is_number, refuse, shaped_as

#: The keys that we add to groups.
_OURS = ("rho", "adaptive", "xi")

#: State that torch's optimizers keep only with certain options; and state that is a single number.
_OPTIONAL = ("momentum_buffer", "max_exp_avg_sq", "grad_avg")

_NUMBERS = ("step", "mu_product", "eta", "mu")

#: What torch's optimizers without a fused step keep for every parameter.
_KEEPS: dict[type, tuple[str, ...]] = {
    torch.optim.RMSprop: ("step", "square_avg"),
    torch.optim.Adagrad: ("step", "sum"),
    torch.optim.Adamax: ("step", "exp_avg", "exp_inf"),
    torch.optim.NAdam: ("step", "mu_product", "exp_avg", "exp_avg_sq"),
    torch.optim.RAdam: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.ASGD: ("step", "eta", "mu", "ax"),
    torch.optim.Rprop: ("step", "prev", "step_size"),
}


def check_base(
    state: Mapping[Any, Any],
    groups: Sequence[Mapping[str, Any]],
    base: torch.optim.Optimizer,
    places: Mapping[Any, int],
    params: Sequence[Tensor],
) -> None:
    """The base optimizer can load this: its numbers are in every group, and its state fits the parameters.

    Missing switches are no error: the base optimizer fills in what an older version did not save. If the optimizer is
    not torch's, only values of a known kind are checked: the learning rate, step counts, and values that are tensors at
    present. If the optimizer has hooks of its own on loading, nothing is checked.

    ``places`` maps each key of ``state`` that belongs to a parameter to the parameter's place in ``params``.
    """
    if getattr(base, "_optimizer_load_state_dict_pre_hooks", None):  # the hooks may change the state in any way
        return
    needs = _needs(base)
    for index, group in enumerate(groups):
        for name, value in group.items():
            known = name in base.defaults or name in _OURS
            if known and isinstance(value, Tensor) and value.numel() != 1:
                refuse(f"state_dict['param_groups'][{index}]", f"has {value.numel()} elements for {name}")
        for name, now in base.defaults.items():
            if needs is None and name != "lr":  # the kinds of other options are not known
                continue
            numbers = now if isinstance(now, (list, tuple)) else (now,)
            if not all(is_number(number) for number in numbers):
                continue
            what = f"state_dict['param_groups'][{index}]"
            expect(name in group, what, f"lacks {name}")
            values = group[name] if isinstance(now, (list, tuple)) else (group[name],)
            if not isinstance(values, (list, tuple)) or len(values) != len(numbers) or not all(map(is_number, values)):
                refuse(what, f"has {group[name]!r} for {name}, where {now!r} has another kind")
            if all(map(is_finite, numbers)) and not all(map(is_finite, values)):
                refuse(what, f"has {group[name]!r} for {name}, which is not finite")
    options = {key: group for group in groups for key in group["params"]}
    seen: set[int] = set()
    for key, entry in state.items():
        if key not in places or not 0 <= places[key] < len(params):
            continue
        p = params[places[key]]
        what = f"state_dict['state'][{key!r}]"
        expect(isinstance(entry, Mapping), what, f"is a {type(entry).__name__}, not a dict")
        for name in (*needs, *_asked_for(base, options[key])) if needs is not None and entry else ():
            if entry.get(name) is None:
                refuse(what, f"lacks {name}")
        present = base.state.get(p, {})
        for name, value in entry.items():
            known = needs is not None and name in (*needs, *_OPTIONAL)
            now = present.get(name)
            if name in _NUMBERS and (known or (now is not None and is_number(now))):
                if not is_number(value) or not is_finite(value, 0.0 if name == "step" else -math.inf):
                    refuse(f"{what}[{name!r}]", f"is {value!r}, not a number that it could have come to")
                continue
            if known and isinstance(value, Tensor) and value.dim():
                if id(value) in seen:
                    refuse(f"{what}[{name!r}]", "is the tensor of another entry too")
                seen.add(id(value))
            alike = known or (needs is None and isinstance(now, Tensor) and now.shape == p.shape)
            if alike and not shaped_as(value, p) and not (value is None and name in _OPTIONAL):
                refuse(f"{what}[{name!r}]", "is no tensor of the parameter's shape")


def _needs(base: torch.optim.Optimizer) -> tuple[str, ...] | None:
    """The names of what an optimizer keeps for a parameter after a step; None if they are not known."""
    kind = fused_as(type(base))
    return kind.needs if kind is not None else _KEEPS.get(type(base))


def _asked_for(base: torch.optim.Optimizer, group: Mapping[str, Any]) -> Iterator[str]:
    """The names of the state that these options make an optimizer keep in addition."""
    if group.get("amsgrad"):
        yield "max_exp_avg_sq"
    if isinstance(base, torch.optim.RMSprop):
        if group.get("centered"):
            yield "grad_avg"
        if group.get("momentum"):
            yield "momentum_buffer"


def check_optimizer(state: Any, optimizer: torch.optim.Optimizer, what: str) -> None:
    """This optimizer, whose parameters are few and small, can load the state and go on from it."""
    check_keys(state, ("state", "param_groups"), what)
    # Some optimizers have their state from the beginning, others get it in a step.
    made = not isinstance(fused_by(optimizer), str)
    trial = copy.deepcopy(optimizer)
    try:
        trial.load_state_dict(copy.deepcopy(dict(state)))
        for mine, loaded in zip(optimizer.param_groups, trial.param_groups, strict=True):
            # This option follows the device, not the state.
            if isinstance(loaded.get("capturable"), bool) and "capturable" in mine:
                loaded["capturable"] = mine["capturable"]
    except Exception as error:
        refuse(what, f"is none that {type(optimizer).__name__} can load ({error})")
    for mine, loaded in zip(optimizer.param_groups, trial.param_groups, strict=True):
        for name in mine.keys() & optimizer.defaults.keys():
            usable = name in loaded and alike(loaded[name], mine[name])
            expect(usable, f"{what}['param_groups']", f"has no usable {name}")
        for p, q in zip(mine["params"], loaded["params"], strict=True):
            present, found = optimizer.state.get(p, {}), trial.state.get(q, {})
            expect(isinstance(found, Mapping), f"{what}['state']", f"holds a {type(found).__name__}, not a dict")
            for name in present if found or made else ():
                usable = name in found and alike(found[name], present[name])
                expect(usable, f"{what}['state']", f"has no usable {name}")
    wrong = _tried_out(trial)
    if wrong is not None and _tried_out(copy.deepcopy(optimizer)) is None:  # otherwise the error is not from the state
        refuse(what, f"is none that {type(optimizer).__name__} can go on from ({wrong})")


def _tried_out(trial: torch.optim.Optimizer) -> Exception | None:
    """The error of a step along a small gradient, or None. The optimizer is a copy, which the step may change."""
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
