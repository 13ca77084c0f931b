"""A torch optimizer around a torch optimizer: shared groups and state, saving, copying. One optimizer, not two."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # what torch's own optimizers use; imports the compiler at the first call

from lets_kernels.descent import Descent
from lets_kernels.direction import Direction, check_xi
from lets_kernels.guarded import check_steps_alone
from lets_kernels.hypergradient import Trial
from lets_kernels.layout import ParameterSpace, check_parameter
from lets_kernels.radius import Radius, check_rho
from lets_kernels.schedule import Schedule

if TYPE_CHECKING:
    from lets_kernels.optimizers.step import Step


KEY = "lets_kernels"
#: For what changes state that a trace does not see: under torch.compile it runs as plain Python, between two graphs.
untraced = _disable_dynamo
_SEEN = "_lets_kernels_seen"


def _check_options(groups: Sequence[dict[str, Any]]) -> None:
    if any(group.get("maximize") for group in groups):
        raise ValueError("maximize=True: sharpness is of a loss that is minimised; minimise the negative instead")
    if any(group.get("differentiable") for group in groups):
        raise ValueError(
            "differentiable=True: the step is taken in place, and no gradient leads through it; leave it out"
        )


class Wrapper(torch.optim.Optimizer):
    """Groups and state are the base optimizer's own; the rest of the state travels beside them under one key.

    A subclass sets the four parts and ``_own``, the group keys that it adds with their defaults, and then calls
    ``__init__``.
    """

    base_optimizer: torch.optim.Optimizer
    direction: Direction
    schedule: Schedule
    descent: Descent
    radius: Radius
    _own: dict[str, Any]

    def __init__(
        self,
        params: Iterable[Any],
        base: type[torch.optim.Optimizer] | torch.optim.Optimizer,
        kwargs: dict[str, Any],
    ) -> None:
        self._reset()
        if self.radius.learns and self.radius.bound:
            raise ValueError("this learned radius belongs to another optimizer; give each its own")
        is_class = isinstance(base, type) and issubclass(base, torch.optim.Optimizer)
        if not is_class and not isinstance(base, torch.optim.Optimizer):
            raise TypeError(f"base_optimizer must be a torch optimizer class or instance, not {base!r}")
        check_steps_alone(base if isinstance(base, type) else type(base))
        super().__init__(params, dict(self._own))
        if not any(group["params"] for group in self.param_groups):
            raise ValueError("no parameters: every group is empty")
        if isinstance(base, torch.optim.Optimizer):
            self._adopt(base, kwargs)
        else:
            self._check_groups(self.param_groups)
            base = base(self.param_groups, **kwargs)
        _check_options(base.param_groups)
        self.base_optimizer = base
        del self.__dict__["_early_groups"], self.__dict__["_early_state"]
        self.defaults = {**base.defaults, **self._own}
        first = next((p for group in base.param_groups for p in group["params"]), torch.empty(0))
        self.radius.bind(self.param_groups, first.device)
        self.radius.bound = True
        #: Skipped steps, on the device where all scalars of a step meet: that of the first bucket.
        self.skipped = torch.zeros((), dtype=torch.int64, device=first.device)
        self._step_number = 0
        self._mark_gradients()  # whatever they are from, no backward of this optimizer's made them

    def _reset(self) -> None:
        """What a step leaves behind and a copy of the optimizer does not take along."""
        self._buckets: ParameterSpace | None = None
        #: What captured CUDA graphs read and write; replays must find it, whatever has replaced it here.
        self._captured: list[Any] = self.__dict__.get("_captured", [])
        self._step: Step | None = None
        self._trial: tuple[Trial, list[tuple[Tensor, int]]] | None = None
        self._radius_waits = False
        #: Whether the caller does the first backward and the closure the others; the first `step(closure)` shows.
        self._caller_begins: bool | None = None
        self._last: dict[str, Tensor] = {}
        #: Whether the last step was fused with the restore, and if not, why.
        self.fused, self.fused_reason = False, "no step yet"

    # ---- groups and state --------------------------------------------------------------------------------------------

    def _adopt(self, base: torch.optim.Optimizer, kwargs: dict[str, Any]) -> None:
        """Check that an instance was built on the parameters given here, and give its groups what they lack."""
        if kwargs:
            raise ValueError(f"base_optimizer is an instance already; set {', '.join(kwargs)} where it is built")
        wanted = {id(p): group for group in self.param_groups for p in group["params"]}
        if {id(p) for group in base.param_groups for p in group["params"]} != set(wanted):
            raise ValueError("base_optimizer was built on other parameters than those given as params")
        for group in base.param_groups:
            mine = {id(wanted[id(p)]): wanted[id(p)] for p in group["params"]}
            values = [{k: g[k] for k in self._own} for g in mine.values()] or [dict(self._own)]
            if any(v != values[0] for v in values):
                raise ValueError("a group of base_optimizer has parameters with different rho, adaptive or xi")
            group.update(values[0])
        self._check_groups(base.param_groups)

    def _check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Refuse bad options before anything is built on them."""
        for index, group in enumerate(groups):
            check_rho(group["rho"])
            check_xi(group.get("xi", 0.0))
            if group["adaptive"] and "adaptive" not in self.direction.defaults:
                raise ValueError(f"param_groups[{index}]: adaptive=True goes with an adaptive direction")
            for p in group["params"]:
                check_parameter(p, f"param_groups[{index}]")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As :meth:`torch.optim.Optimizer.add_param_group`; a group may have its own ``rho``, ``adaptive``, ``xi``.

        Raises:
            RuntimeError: while the weights are perturbed.
        """
        if "base_optimizer" not in self.__dict__:
            super().add_param_group(param_group)
            return
        self._refuse_while_perturbed("add_param_group()")
        group = {**self._own, **param_group}
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        self._check_groups([{**group, "params": [p[1] if isinstance(p, tuple) else p for p in group["params"]]}])
        whole = {**self.defaults, **group}
        _check_options([whole])
        self.radius.check_groups([*self.param_groups, whole])
        self.base_optimizer.add_param_group(group)
        self.radius.bind(self.param_groups, self.skipped.device)

    def _take_in_new_groups(self) -> None:
        """Groups that were added to the base optimizer get what they lack."""
        if any(name not in group for group in self.param_groups for name in self._own):
            for group in self.param_groups:
                for name, value in self._own.items():
                    group.setdefault(name, value)
            self.radius.bind(self.param_groups, self.skipped.device)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups."""
        base = self.__dict__.get("base_optimizer")
        return self.__dict__["_early_groups"] if base is None else base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        base = self.__dict__.get("base_optimizer")
        if base is None:
            self.__dict__["_early_groups"] = groups
        else:
            base.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base optimizer's state."""
        base = self.__dict__.get("base_optimizer")
        return self.__dict__["_early_state"] if base is None else base.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        base = self.__dict__.get("base_optimizer")
        if base is None:
            self.__dict__["_early_state"] = state
        else:
            base.state = state

    # ---- saving --------------------------------------------------------------------------------------------------

    def _refuse_while_perturbed(self, what: str) -> None:
        if self._step is not None and self._step.is_perturbed:
            raise RuntimeError(
                f"{what} while the weights are perturbed: call second_step() after the second backward first, or "
                "restore() to give the perturbation up"
            )

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and groups, and beside them the radius and the counters.

        Raises:
            RuntimeError: while the weights are perturbed.
        """
        self._refuse_while_perturbed("state_dict()")
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        own = {
            "direction": self.direction.state_dict(),
            "schedule": self.schedule.state_dict(),
            "descent": self.descent.state_dict(),
            "radius": self.radius.state_dict(),
            "step": self._step_number,
            "skipped": self.skipped.clone(),
        }
        state_dict = {**self.base_optimizer.state_dict(), KEY: own}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state; that of the bare base optimizer will do, and leaves the radius as it is.

        Raises:
            RuntimeError: while the weights are perturbed.
            ValueError: the groups, or the number of learned radii, do not match.
        """
        self._refuse_while_perturbed("load_state_dict()")
        state_dict = dict(state_dict)  # what hooks put in or take out of it stays among them
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        own = state_dict.get(KEY)
        if own is not None:
            self.radius.check_state_dict(own["radius"])
        before = [{name: group[name] for name in self._own} for group in self.param_groups]
        self.base_optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != KEY})
        for group, values in zip(self.param_groups, before, strict=True):
            for name, value in values.items():
                if own is None or name not in group:
                    group[name] = value
        self._reset()
        if own is not None:
            self.direction.load_state_dict(own["direction"])
            self.schedule.load_state_dict(own["schedule"])
            self.descent.load_state_dict(own["descent"])
            self.radius.load_state_dict(own["radius"], self.param_groups)
            self._step_number = int(own["step"])
            self.skipped.copy_(own["skipped"])
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_while_perturbed("copying or pickling the optimizer")
        return {name: value for name, value in self.__dict__.items() if name not in _TRANSIENT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reset()
        super().__setstate__(state)

    # ---- gradients: which are new, which the last step has seen ------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As :meth:`torch.optim.Optimizer.zero_grad`."""
        super().zero_grad(set_to_none)
        if not set_to_none:
            self._mark_gradients()

    def _gradients(self) -> list[Tensor]:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.requires_grad]
        return [g for g in grads if g is not None]

    def _mark_gradients(self) -> None:
        """Remember that these gradients, in this version, have been used; a later backward makes others."""
        if self._caller_begins is not False:  # else nobody asks
            for g in self._gradients():
                setattr(g, _SEEN, g._version)

    def _has_new_gradients(self) -> bool:
        return any(getattr(g, _SEEN, None) != g._version for g in self._gradients())

    def _drop_gradients(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            p.grad = None


_HOOKS = {f"_optimizer_{what}_hooks" for what in ("step_pre", "step_post", "state_dict_pre", "state_dict_post")}
_HOOKS |= {"_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"}
_STEP = {"_step", "_trial", "_radius_waits", "_caller_begins", "_last", "fused", "fused_reason"}
# `step` is there if an LR scheduler has wrapped it; the copy has its own.
_TRANSIENT = frozenset({"step", "_buckets", "_captured", *_HOOKS, *_STEP})
