"""Saving, loading, copying: everything that training goes on from, checked before it is taken over."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lets_kernels.base.saved import check_base
from lets_kernels.base.state import Look
from lets_kernels.checks import check_count, check_keys, check_part, check_scalar
from lets_kernels.parts.direction import check_xi
from lets_kernels.parts.passes import Held
from lets_kernels.parts.radius import check_rho
from lets_kernels.step import carried
from lets_kernels.step.base import KEY, Wrapper
from lets_kernels.step.loading import check_held, check_kept, check_layout


class Saved(Wrapper):
    """State dictionaries, pickles and copies."""

    #: What stood in the groups when that was looked at last.
    _placed: Sequence[Sequence[Tensor]] = ()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and groups, and beside them the radius and the counters.

        The first group carries the same numbers once more, for ``torch.distributed.checkpoint.state_dict``, which
        keeps state and groups only. What is lost there is the step that waits under ``reuse_train_gradient``: ρ does
        not learn from that one. The state of an optimizer for ν other than SGD without dampening, Adam and AdamW
        without amsgrad is there only after that tool's own first call on an optimizer without state, or after a step.

        Between a step and its ``radius_step`` there is nothing yet to save of that learning: who resumes from such a
        state goes on with the next step, and ρ does not learn from the one before.

        Raises:
            RuntimeError: while the weights are perturbed.
        """
        self._refuse_while_perturbed("state_dict()")
        self._take_in_new_groups()
        self._forget_replaced()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict, own = dict(self.base_optimizer.state_dict()), self._own_state()
        state_dict["state"] = self.held.add_to(
            state_dict["state"], {id(p): i for i, p in enumerate(self._all_params())}
        )
        first, *others = state_dict["param_groups"]
        state_dict.update(param_groups=[{**first, KEY: carried.numbers(own)}, *others], **{KEY: own})
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def _own_state(self) -> dict[str, Any]:
        own = {
            "direction": self.direction.state_dict(),
            "schedule": self.schedule.state_dict(),
            "descent": self.descent.state_dict(),
            "radius": self.radius.state_dict(),
            "random": self.random.state_dict(),
            "step": self._step_number,
            "gradients": self._passes,
            "perturbed_steps": self._perturbed_steps,
            "skipped": self.skipped.clone(),
        }
        names = sorted({*self.direction.held, *self.descent.held, *self.radius.held})
        if names:  # else as ever
            held = [self.held.state.get(p, {}) for p in self._all_params()]
            own[carried.KEPT] = {name: sum(name in each for each in held) for name in names}
        return own

    def _check_own(self, own: Any, groups: Sequence[dict[str, Any]]) -> None:
        """Refuse a damaged entry of a saved state, before anything of the state is loaded."""
        present = self._own_state()
        if isinstance(own, Mapping) and carried.KEPT not in own:  # saved before it was counted
            present.pop(carried.KEPT, None)
        check_keys(own, present, f"state[{KEY!r}]")
        if carried.KEPT in present:
            check_keys(own[carried.KEPT], present[carried.KEPT], "the numbers of what is kept")
            for name, count in own[carried.KEPT].items():
                check_count(count, f"the number of parameters with {name}")
        for part in ("direction", "schedule", "descent"):
            check_part(own[part], getattr(self, part).state_dict(), f"the {part}")
        check_keys(own["random"], self.random.state_dict(), "the random numbers")
        check_count(own["random"]["seed"], "the seed")
        check_scalar(own["random"]["count"], "the count of random steps")
        check_count(own["step"], "the step number")
        check_count(own["gradients"], "the number of gradients")
        check_count(own["perturbed_steps"], "the number of perturbed steps")
        check_scalar(own["skipped"], "the number of skipped steps")
        self.radius.check_state_dict(own["radius"])
        for group in groups:
            check_rho(group.get("rho", 0.0))
            check_xi(group.get("xi", 0.0))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state; that of the bare base optimizer will do, and leaves the radius as it is.

        Raises:
            RuntimeError: while the weights are perturbed.
            ValueError: the groups, or the number of learned radii, do not match, or the state is damaged. Nothing has
                been loaded then.
        """
        self._refuse_while_perturbed("load_state_dict()")
        self._take_in_new_groups()
        self._forget_replaced()
        state_dict = dict(state_dict)  # what hooks put in or take out of it stays among them
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        check_layout(state_dict)
        own, groups = state_dict.get(KEY), state_dict["param_groups"]
        numbers = next((group[KEY] for group in groups if group.get(KEY) is not None), None)
        if own is None and numbers is not None:
            own = carried.filled(self._own_state(), numbers)
        if own is not None:
            self._check_own(own, groups)
        groups = [{name: value for name, value in group.items() if name != KEY} for group in groups]
        before = [{name: group[name] for name in self._own} for group in self.param_groups]
        rest = {name: value for name, value in state_dict.items() if name != KEY}
        rest["state"], held = Held.take_from(state_dict["state"])
        # As torch's own: what a state is of is told by its groups, where tools put names in the place of numbers.
        places = {key: i for i, key in enumerate(key for group in groups for key in group["params"])}
        held = {places.get(key, f"{key}"): own_tensors for key, own_tensors in held.items()}
        params = self._all_params()
        check_base(rest["state"], groups, self.base_optimizer, places, params)
        self.direction.check_base(Look(type(self.base_optimizer), groups))
        check_held(held, params, {*self.direction.held, *self.descent.held, *self.radius.held})
        if own is not None:
            counts = own["direction"].values()
            begun = own["step"] > 0 and (not counts or any(bool(value) for value in counts))
            kept = own.get(carried.KEPT)
            check_kept(held, self.direction.held, kept, begun, "the direction")
            check_kept(held, self.descent.held, kept, own["step"] > 0, "the descent")
            check_kept(held, self.radius.held, kept, own["perturbed_steps"] > 0, "the radius")
        self.base_optimizer.load_state_dict({**rest, "param_groups": groups})
        for group, values in zip(self.param_groups, before, strict=True):
            for name, value in values.items():
                if own is None or name not in group:
                    group[name] = value
        self._reset()
        self._mark_gradients()  # they are from before the load
        if own is not None:
            self.held.load(held, params)
            self.random.load_state_dict(own["random"])
            self._passes, self._perturbed_steps = int(own["gradients"]), int(own["perturbed_steps"])
            self.direction.load_state_dict(own["direction"])
            self.schedule.load_state_dict(own["schedule"])
            self.descent.load_state_dict(own["descent"])
            self.radius.load_state_dict(own["radius"], self.param_groups)
            self._step_number = int(own["step"])
            self.skipped.copy_(own["skipped"])
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _all_params(self) -> list[Tensor]:
        """In the order in which a saved state numbers them."""
        return [p for group in self.param_groups for p in group["params"]]

    def _forget_replaced(self) -> None:
        """Drop what is kept for parameters in whose places others stand by now, and which are in no group any more.

        That of a parameter that was taken out, so that its group is of another length, stays, as in torch.
        """
        groups = [list(group["params"]) for group in self.param_groups]
        present = {id(p) for group in groups for p in group}
        known = self._placed if len(self._placed) <= len(groups) else ()  # else a group was taken out
        for before, now in zip(known, groups, strict=False):
            for p in before if len(before) == len(now) else ():
                if id(p) not in present:
                    self.held.state.pop(p, None)
                    self.state.pop(p, None)
        self._placed = groups

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_while_perturbed("copying or pickling the optimizer")
        return {name: value for name, value in self.__dict__.items() if name not in _TRANSIENT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reset()
        super().__setstate__(state)
        self._mark_gradients()  # those that a copy takes along


_HOOKS = {f"_optimizer_{what}_hooks" for what in ("step_pre", "step_post", "state_dict_pre", "state_dict_post")}
_HOOKS |= {"_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"}
_STEP = {
    "_step",
    "_start",
    "_started",
    "_trial",
    "_radius_waits",
    "_missed",
    "_convention",
    "_zeroed",
    "_last",
    "_precision",
    "_decision",
    "fused",
    "fused_reason",
}
# `step` is there if an LR scheduler has wrapped it; the copy has its own.
_TRANSIENT = frozenset({"step", "_buckets", "_captured", "_publication", *_HOOKS, *_STEP})
