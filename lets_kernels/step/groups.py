"""The param groups, which our optimizer and the base optimizer share: they are one optimizer, not two."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lets_kernels.base.foreign import check_saves, check_steps_alone
from lets_kernels.base.state import Look
from lets_kernels.parts.direction import Direction, check_xi
from lets_kernels.parts.radius import check_rho
from lets_kernels.space.memory import check_parameter

Groups = list[dict[str, Any]]


def check_is_optimizer(base: Any) -> None:
    """``TypeError`` for what cannot be a base optimizer."""
    is_class = isinstance(base, type) and issubclass(base, torch.optim.Optimizer)
    if not is_class and not isinstance(base, torch.optim.Optimizer):
        raise TypeError(f"base_optimizer must be a torch optimizer class or instance, not {base!r}")
    check_steps_alone(base if isinstance(base, type) else type(base))


def base_on(
    groups: Groups,
    base: type[torch.optim.Optimizer] | torch.optim.Optimizer,
    kwargs: dict[str, Any],
    keys: Mapping[str, Any],
    direction: Direction,
) -> torch.optim.Optimizer:
    """The base optimizer on these groups: built from its class, or the given instance. Its groups get our ``keys``.

    Raises:
        ValueError: it has options that no step can follow, or it was built on other parameters.
    """
    if not any(group["params"] for group in groups):
        raise ValueError("no parameters: every group is empty")
    if isinstance(base, torch.optim.Optimizer):
        _check_names(base, keys)
        _adopt(base, groups, kwargs, keys, direction)
    else:
        check_groups(groups, direction)
        base = base(groups, **kwargs)
        _check_names(base, keys)
    check_options(base.param_groups)
    direction.check_base(Look.at(base))
    check_saves(base)
    return base


def check_options(groups: Sequence[dict[str, Any]]) -> None:
    """``ValueError`` for options of a base optimizer that contradict a step of this package."""
    if any(group.get("maximize") for group in groups):
        raise ValueError("maximize=True: sharpness is of a loss that is minimised; minimise the negative instead")
    if any(group.get("differentiable") for group in groups):
        raise ValueError(
            "differentiable=True: the step is taken in place, and no gradient leads through it; leave it out"
        )


def check_groups(groups: Sequence[dict[str, Any]], direction: Direction) -> None:
    """Refuse bad values of our group options, and parameters that no method can perturb, before anything is built."""
    for index, group in enumerate(groups):
        check_rho(group["rho"])
        check_xi(group.get("xi", 0.0))
        if group["adaptive"] and "adaptive" not in direction.defaults:
            raise ValueError(
                f"param_groups[{index}]: adaptive=True goes with a direction that T can scale, such as Adaptive "
                f"(ASAM's), not with {type(direction).__name__}: leave it out"
            )
        for p in group["params"]:
            check_parameter(p, f"param_groups[{index}]")


def _check_names(base: torch.optim.Optimizer, keys: Mapping[str, Any]) -> None:
    """``ValueError`` if an option of the base optimizer has the name of one of our group options (Adadelta's rho)."""
    shared = sorted(keys.keys() & base.defaults.keys())
    if shared:
        raise ValueError(
            f"{type(base).__name__} has an option called {', '.join(shared)} too, and a group can hold only one of "
            "that name; take another base optimizer"
        )


def _adopt(
    base: torch.optim.Optimizer, groups: Groups, kwargs: dict[str, Any], keys: Mapping[str, Any], direction: Direction
) -> None:
    """Check that an instance was built on the parameters given here, and give its groups what they lack."""
    if kwargs:
        raise ValueError(f"base_optimizer is an instance already; set {', '.join(kwargs)} where it is built")
    wanted = {id(p): group for group in groups for p in group["params"]}
    if {id(p) for group in base.param_groups for p in group["params"]} != set(wanted):
        raise ValueError(
            "base_optimizer was built on other parameters than those given as params: build it on the same ones, or "
            "give its class, with its arguments after it"
        )
    for group in base.param_groups:
        mine = {id(wanted[id(p)]): wanted[id(p)] for p in group["params"]}
        values = [{k: g[k] for k in keys} for g in mine.values()] or [dict(keys)]
        if any(v != values[0] for v in values):
            raise ValueError("a group of base_optimizer has parameters with different rho, adaptive or xi")
        group.update(values[0])
    check_groups(base.param_groups, direction)
