"""A torch optimizer around a torch optimizer: shared groups and state, saving, copying. One optimizer, not two."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # what torch's own optimizers use; imports the compiler at the first call

from lets_kernels.around.publication import Publication
from lets_kernels.around.randomness import Randomness
from lets_kernels.base.foreign import check_saves, check_steps_alone
from lets_kernels.base.state import Look
from lets_kernels.learning.hypergradient import Trial
from lets_kernels.parts.descent import Descent
from lets_kernels.parts.direction import Direction, check_xi
from lets_kernels.parts.passes import Held
from lets_kernels.parts.radius import Radius, check_rho
from lets_kernels.parts.schedule import Schedule
from lets_kernels.space.distributed import check_whole
from lets_kernels.space.layout import ParameterSpace
from lets_kernels.space.runs import check_parameter
from lets_kernels.space.shards import version
from lets_kernels.step.convention import Convention
from lets_kernels.step.frameworks import stand_aside

if TYPE_CHECKING:
    from lets_kernels.step.start import Start
    from lets_kernels.step.step import Step


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


def given_up() -> RuntimeError:
    """For a step that cannot go on."""
    return RuntimeError(
        "restore() was called in the middle of this step, by a signal handler perhaps: the step is given up, and the "
        "weights are those from before it"
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
    random: Randomness
    held: Held
    _own: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stand_aside(cls, Wrapper)

    def __init__(
        self,
        params: Iterable[Any],
        base: type[torch.optim.Optimizer] | torch.optim.Optimizer,
        kwargs: dict[str, Any],
    ) -> None:
        self._reset()
        # Tools that load a saved state key by key must find the key at which the first group carries numbers.
        self._own = {**self._own, KEY: None}
        if self.radius.moves and self.radius.bound:
            raise ValueError("this radius belongs to another optimizer already, with which it moves; give each its own")
        is_class = isinstance(base, type) and issubclass(base, torch.optim.Optimizer)
        if not is_class and not isinstance(base, torch.optim.Optimizer):
            raise TypeError(f"base_optimizer must be a torch optimizer class or instance, not {base!r}")
        check_steps_alone(base if isinstance(base, type) else type(base))
        check_whole(type(self).__name__)
        super().__init__(params, dict(self._own))
        if not any(group["params"] for group in self.param_groups):
            raise ValueError("no parameters: every group is empty")
        if isinstance(base, torch.optim.Optimizer):
            self._check_names(base)
            self._adopt(base, kwargs)
        else:
            self._check_groups(self.param_groups)
            base = base(self.param_groups, **kwargs)
            self._check_names(base)
        _check_options(base.param_groups)
        self.direction.check_base(Look.at(base))
        check_saves(base)
        self.base_optimizer = base
        del self.__dict__["_early_groups"], self.__dict__["_early_state"]
        self.defaults = {**base.defaults, **self._own}
        first = next((p for group in base.param_groups for p in group["params"]), torch.empty(0, device="cpu"))
        self.radius.bind(self.param_groups, first.device)
        self.radius.bound = True
        #: Skipped steps, on the device where all scalars of a step meet: that of the first bucket.
        self.skipped = torch.zeros((), dtype=torch.int64, device=first.device)
        self._step_number = self._passes = self._perturbed_steps = 0
        self.held = Held()
        self._mark_gradients()  # whatever they are from, no backward of this optimizer's made them

    def _reset(self) -> None:
        """What a step leaves behind and a copy of the optimizer does not take along."""
        self._buckets: ParameterSpace | None = None
        self._publication: Publication = self.__dict__.get("_publication") or Publication(self)
        #: What captured CUDA graphs read and write; replays must find it, whatever has replaced it here.
        self._captured: list[Any] = self.__dict__.get("_captured", [])
        self._step: Step | None = None
        #: The weights are moved for a first pass; and a first pass was made that way.
        self._start: Start | None = None
        self._started = False
        self._trial: tuple[Trial, list[tuple[Tensor, int]]] | None = None
        self._radius_waits = False
        #: Steps from which a radius could have learned and did not; None once it has.
        self._missed: int | None = 0
        self._convention = Convention()
        #: Calls of ``zero_grad``.
        self._zeroed = 0
        self._last: dict[str, Tensor] = {}
        self._precision: dict[str, Tensor] = {}
        #: What the schedule said of a step, and of which: as a rule it is asked once.
        self._decision: tuple[int, bool] | None = None
        #: Whether the last step was fused with the restore, and if not, why.
        self.fused, self.fused_reason = False, "no step yet"

    # ---- groups and state --------------------------------------------------------------------------------------------

    def _check_names(self, base: torch.optim.Optimizer) -> None:
        """``ValueError`` if the base optimizer calls an option of its own as a group calls ours (Adadelta's rho)."""
        shared = sorted(self._own.keys() & base.defaults.keys())
        if shared:
            raise ValueError(
                f"{type(base).__name__} has an option called {', '.join(shared)} too, and a group can hold only one of "
                "that name; take another base optimizer"
            )

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
        self._take_in_new_groups()
        group = {**self._own, **param_group}
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        self._check_groups([{**group, "params": [p[1] if isinstance(p, tuple) else p for p in group["params"]]}])
        whole = {**self.defaults, **group}
        _check_options([whole])
        self.direction.check_base(Look(type(self.base_optimizer), [whole]))
        self.radius.check_groups([*self.param_groups, whole])
        self.base_optimizer.add_param_group(group)
        self.radius.bind(self.param_groups, self.skipped.device)

    def _take_in_new_groups(self) -> None:
        """Groups that were added to the base optimizer get what they lack."""
        if any(name not in group for group in self.param_groups for name in self._own):
            self.direction.check_base(Look.at(self.base_optimizer))
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

    def _refuse_while_perturbed(self, what: str) -> None:
        if self._start is not None:
            raise RuntimeError(
                f"{what} while the weights are beside themselves for the first pass: leave `with opt.first_pass():` "
                "first, or call restore() to give the pass up"
            )
        step = self._step
        if step is not None and step.is_perturbed:
            raise RuntimeError(
                f"{what} while the weights are perturbed: call second_step() after the second backward first, or "
                "restore() to give the perturbation up"
            )

    # ---- gradients: which are new, which the last step has seen ------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As :meth:`torch.optim.Optimizer.zero_grad`; a first pass that no step followed is then forgotten."""
        self._zeroed += 1
        if self._step is None:
            self._forget_pass()
        super().zero_grad(set_to_none)
        if not set_to_none:
            self._mark_gradients()

    def _forget_pass(self) -> None:
        """The gradients of a pass that was made for a step are dropped without it."""

    def _gradients(self) -> list[Tensor]:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.requires_grad]
        return [g for g in grads if g is not None]

    def _marked(self) -> list[Tensor]:
        """The gradients that are marked; the first stands for all where closures make every one, as is seldom asked."""
        if not self._convention.settled:
            return self._gradients()
        each = (p.grad for group in self.param_groups for p in group["params"] if p.requires_grad)
        return list(islice((g for g in each if g is not None), 1))

    def _mark_gradients(self) -> None:
        """Remember that these gradients, in this version, have been used; a later backward makes others."""
        for g in self._marked():
            setattr(g, _SEEN, version(g))

    def _has_new_gradients(self) -> bool:
        return any(getattr(g, _SEEN, None) != version(g) for g in self._marked())

    def _drop_gradients(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            p.grad = None
