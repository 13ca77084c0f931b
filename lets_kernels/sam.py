"""SAM, the public face of every method: it takes the parts of one and its settings, and hands the steps on."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from lets_kernels import ops
from lets_kernels.around.amp import Scaler, handed_over
from lets_kernels.around.network import Named, Network
from lets_kernels.around.randomness import Randomness
from lets_kernels.base.state import Look
from lets_kernels.learning.auto import as_radius
from lets_kernels.parts.descent import Descent, Perturbed
from lets_kernels.parts.direction import Adaptive, Direction
from lets_kernels.parts.progress import Progress
from lets_kernels.parts.radius import Radius, RadiusLike, radii
from lets_kernels.parts.samples import Closure, Samples
from lets_kernels.parts.schedule import Always, Schedule
from lets_kernels.space.distributed import Replicas, check_whole
from lets_kernels.step import saving
from lets_kernels.step.capture import check_capture
from lets_kernels.step.closures import closure_step
from lets_kernels.step.contexts import FirstPassContext, PerturbedContext
from lets_kernels.step.engine import Engine
from lets_kernels.step.frameworks import no_scaler_steps, stand_aside, unwrap
from lets_kernels.step.groups import base_on, check_groups, check_is_optimizer, check_options
from lets_kernels.step.learn import learn
from lets_kernels.step.micro import micro_step
from lets_kernels.step.setting import Setting
from lets_kernels.step.tracing import untraced

#: Parameters, named parameters, or groups of them.
Params: TypeAlias = Iterable[Any]
#: A torch optimizer class, or an instance.
BaseLike: TypeAlias = type[torch.optim.Optimizer] | torch.optim.Optimizer


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al., ICLR 2021, Algorithm 1), and the base of every other method.

    No step waits for an accelerator. Once a step or two have been taken, the next can be captured in a CUDA graph, with
    the passes in it or without. Whatever is a number on the host (a learning rate, a ρ that is no tensor) is then part
    of the graph, replays do not count as steps, and ``load_state_dict`` asks for another capture. Under torch.compile a
    step runs as plain Python between compiled graphs.

    Args:
        params: parameters, named parameters, or groups of them; a group may have its own ``rho``, ``adaptive``, ``xi``.
        base_optimizer: a torch optimizer class, which gets the remaining keyword arguments; or an instance that was
            built on the same parameters. It stays a true optimizer: its groups and state are this optimizer's.
        rho: the radius ρ ≥ 0 of the perturbation, a :class:`~lets_kernels.Radius`, or ``"auto"``, which finds one while
            it trains: ``AutoRadius()``.
        adaptive: ASAM's T = |θ|, element-wise and with ξ = 0 unless a group has its own ``xi``.
        direction, schedule, descent: the other three parts of a method. Default: ``adaptive`` as above, ``Always()``,
            ``Perturbed()``.
        samples: which samples of a batch each pass counts; default all. See :mod:`lets_kernels.parts.samples`.
        seed: of the method's random numbers, if it draws any. They are the same on all ranks, which take the first
            one's seed, and a saved state goes on with them. Default: drawn from torch's generator.
        backend: ``"auto"``, or one of the names in :func:`lets_kernels.backends`.
        flatten: move the parameters of each bucket into one buffer, for the least work on the host. Other code must not
            hold on to the old storage.
        check_finite: a gradient that is not finite, in either pass, skips the whole step: weights, state and radius
            stay as they are. Decided on the device; costs one read of the second gradient.
        model: the module whose parameters these are, as it is called in training (wrapped by DistributedDataParallel
            or sharded by ``fully_shard``, where it is). Running statistics of its normalisation layers then count the
            first pass of a step only, transposed convolutions and names are told apart, sharded weights are gathered
            anew when they have moved, and saving, copying or loading the module, or one in it, is refused while the
            weights are perturbed.
        process_group: the ranks that train one model together; the scalars of a step are averaged over them, so that
            all take the same step to the bit. Default: those of the parameters' mesh (DTensor) or of a
            DistributedDataParallel ``model``. ``"alone"``: nothing is sent.
        sync_perturbation: under DistributedDataParallel, False perturbs each rank along its own first gradient
            (m-sharpness), which is then not synchronised.
        rho_warmup: steps over which the radius rises, in equal parts, from nothing to what ``rho`` says, a number, a
            schedule or a learned radius; a large radius fails mostly in the first steps. ``opt.rho`` says what is risen
            to, ``metrics()["applied_rho"]`` what the last step perturbed by.
        same_rng: the second pass draws the same random numbers as the first, so dropout has the same masks.
        running_state: what else than torch's normalisation layers is to count the first pass of a step only: modules in
            ``model`` (with those in them), classes of modules, or names as in ``model.named_modules()`` and
            ``model.named_buffers()``. Their buffers are brought back after the second pass, also those that the
            module replaces (``self.ema = ...``).

    Raises:
        TypeError: parameters of a dtype without gradients, or a base optimizer that is none.
        ValueError: no parameters; ρ or ξ negative or not finite; settings that contradict each other; ``model`` holds
            none of the parameters.
        RuntimeError: the backend asked for does not run here.
    """

    #: ``GradScaler.step`` then calls ``step()`` in any case, with what it found on the device: nothing waits for that.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Params,
        base_optimizer: BaseLike,
        rho: RadiusLike = 0.05,
        adaptive: bool = False,
        *,
        direction: Direction | None = None,
        schedule: Schedule | None = None,
        descent: Descent | None = None,
        samples: Samples | None = None,
        seed: int | None = None,
        backend: str = "auto",
        flatten: bool = False,
        check_finite: bool = True,
        model: torch.nn.Module | None = None,
        process_group: "torch.distributed.ProcessGroup | str | None" = None,
        sync_perturbation: bool = True,
        same_rng: bool = False,
        running_state: Iterable[Named] = (),
        rho_warmup: int = 0,
        **kwargs: Any,
    ) -> None:
        check_whole(type(self).__name__)
        ops.check_request(backend)
        if isinstance(rho_warmup, bool) or not isinstance(rho_warmup, int) or rho_warmup < 0:
            raise ValueError(f"rho_warmup must be a number of steps >= 0, not {rho_warmup!r}")
        if direction is None:
            direction = Adaptive(xi=0.0)
            direction.defaults = {**direction.defaults, "adaptive": adaptive}
        elif adaptive and "adaptive" not in direction.defaults:
            raise ValueError(f"adaptive=True goes with an adaptive direction, not with {type(direction).__name__}")
        radius = as_radius(rho)
        setting = Setting(
            direction=direction,
            schedule=schedule or Always(),
            descent=descent or Perturbed(),
            radius=radius,
            samples=samples or Samples(),
            network=Network(model, sync_perturbation, same_rng, running_state),
            replicas=Replicas(process_group),
            backend=backend,
            flatten=flatten,
            check_finite=check_finite,
            rho_warmup=rho_warmup,
            # Tools that load a saved state key by key must find the key at which the first group carries numbers.
            group_keys={"rho": radius.rho, "adaptive": False, **direction.defaults, saving.KEY: None},
        )
        setting.check()
        random = Randomness(seed, used=direction.draws or setting.schedule.draws)
        if radius.moves and radius.bound:
            raise ValueError("this radius belongs to another optimizer already, with which it moves; give each its own")
        check_is_optimizer(base_optimizer)
        #: A true optimizer: its groups and its state are this one's. Until it is there something holds both.
        self.base_optimizer: torch.optim.Optimizer = cast(Any, SimpleNamespace())
        super().__init__(params, dict(setting.group_keys))
        base = base_on(self.param_groups, base_optimizer, kwargs, setting.group_keys, direction)
        self.base_optimizer = base
        self.defaults = {**base.defaults, **setting.group_keys}
        first = next((p for group in base.param_groups for p in group["params"]), torch.empty(0, device="cpu"))
        radius.bind(base.param_groups, first.device)
        radius.bound = True
        self._engine = Engine(setting, base, Progress(random, first.device))
        setting.network.check_holds(self._engine.work.params())
        self._engine.mark_gradients()  # whatever they are from, no backward of this optimizer's made them

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stand_aside(cls, SAM)

    # ---- what a user reads -----------------------------------------------------------------------------------------

    @property
    def direction(self) -> Direction:
        """Where to perturb."""
        return self._engine.work.setting.direction

    @property
    def schedule(self) -> Schedule:
        """Whether to perturb at a step."""
        return self._engine.work.setting.schedule

    @property
    def descent(self) -> Descent:
        """Which gradient to step along."""
        return self._engine.work.setting.descent

    @property
    def radius(self) -> Radius:
        """How far to perturb."""
        return self._engine.work.setting.radius

    @property
    def samples(self) -> Samples:
        """Which samples of a batch each pass counts."""
        return self._engine.work.setting.samples

    @property
    def model(self) -> torch.nn.Module | None:
        """The module that was given as ``model=``."""
        return self._engine.work.setting.model

    @property
    def skipped(self) -> Tensor:
        """How many steps were skipped: int64, 0-d, on the device."""
        return self._engine.work.progress.skipped

    @property
    def fused(self) -> bool:
        """Whether the last step of the base optimizer was fused with the restore."""
        return self._engine.now.fused

    @property
    def fused_reason(self) -> str:
        """If it was not, why, in words."""
        return self._engine.now.fused_reason

    @property
    def backend(self) -> str:
        """The backend that runs, by name; several, separated by commas, where parameters lie on several devices."""
        return ", ".join(sorted({b.backend for b in self._engine.work.tables.current().buckets}))

    @property
    def rho(self) -> Tensor:
        """The radius: 0-d if all groups share one, else one value a group. Nothing waits for the device."""
        self._engine.work.tables.take_in_new_groups()
        radius, groups = self.radius, self.param_groups
        groups = groups[:1] if radius.shared else groups
        values = radii([radius.present(i, group) for i, group in enumerate(groups)])
        return values[0].clone() if len(values) == 1 else torch.stack(values)

    def metrics(self) -> dict[str, Tensor]:
        """What the last step saw, as tensors on the device; nothing waits for them.

        ``grad_norm`` is ‖Tg‖ in the dual norm (over all parameters; the power mean of several where ranks or
        micro-batches are perturbed one by one; ‖g‖ on a step that does not perturb), ``perturbed_grad_norm`` ‖ĝ‖ (with
        ``check_finite``), ``rho`` the present radius, ``skipped_steps`` and ``gradients``, the gradients that all steps
        have taken, two counts; ``loss``, ``perturbed_loss`` and
        ``loss_gap`` where the optimizer saw the losses; with ``rho_warmup`` ``applied_rho``, by which the last step
        perturbed; and what the radius reports: ``rho_grad`` = ∂F/∂ρ,
        ``val_loss``, ``train_loss``. With 16-bit weights, from the first step and then from every hundredth:
        ``perturbation_cosine`` between ε and what rounding left of it, ``perturbation_length``, the ratio of their
        lengths, and ``perturbed_fraction``, the share of weights that moved at all.
        """
        w, now = self._engine.work, self._engine.now
        gradients = torch.full((), w.progress.gradients, dtype=torch.int64, device=w.progress.home)
        counted = {"rho": self.rho, "skipped_steps": w.progress.skipped.clone(), "gradients": gradients}
        return {**now.seen, **w.tables.precision, **counted, **self.radius.metrics()}

    # ---- the three call shapes -------------------------------------------------------------------------------------

    def first_pass(self) -> FirstPassContext:
        """Around forward and backward of a step's first pass, for what needs to know where that begins and ends.

        That is ``sync_perturbation=False``, ``same_rng=True``, and methods whose first gradients are taken beside θ
        (R-SAM, bSAM): inside the weights are there, outside at θ to the bit, whatever happens. Otherwise it does
        nothing. ``step(closure)`` sees to it by itself. Under DistributedDataParallel a forward goes with the backward
        after it: of two forwards in a row it synchronises one.

        Raises:
            RuntimeError: the weights are perturbed; with ``sync_perturbation=False``, no forward inside, or a model
                with ``static_graph=True``.
        """
        return FirstPassContext(self._engine)

    @untraced
    def unscale_first(self, scaler: Scaler) -> None:
        """Under a ``torch.amp.GradScaler``: undo its scale in the gradients of the first pass, before ``first_step``.

        Then go on as ever: ``scaler.step(opt)`` takes the step, or skips it where a pass has overflowed, and
        ``scaler.update()`` hears of both passes. Public methods of the scaler only.

        Raises:
            RuntimeError: the weights are perturbed, or these gradients have been unscaled already (the scaler's).
            ValueError: float16 gradients, which the scaler refuses.
        """
        w = self._engine.work
        self._engine.refuse_while_perturbed("unscale_first()")
        w.scaling.begin(scaler, first_only=True)
        w.scaling.unscale(scaler, w.groups)

    @untraced
    def first_step(self, zero_grad: bool = False, *, loss: Any = None) -> bool:
        """Move the weights to θ + ε, from the gradients that the first backward left.

        On a step that the schedule does not perturb, nothing moves. Then the second pass may be left out:
        ``second_step`` steps along the first gradients if it finds no others. Whoever clips gradients before
        ``second_step`` makes it all the same, or leaves them in their place with ``zero_grad=False``; under a gradient
        scaler they are taken away in any case.

        Args:
            zero_grad: set the gradients to None afterwards, as the second backward needs it.
            loss: the loss at θ, for ``metrics()``; needed by a radius that reuses this gradient and learns from the
                squared gap.

        Returns:
            True if a second pass is needed.

        Raises:
            RuntimeError: the weights are perturbed already.
            TypeError: sparse gradients. No weight has been touched then.
        """
        return self._engine.begin(zero_grad, loss)

    @untraced
    @torch.optim.Optimizer.profile_hook_step
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights and take the base optimizer's step, along the gradients of the second backward.

        Step hooks run around it, as they do around :meth:`step`: once a step, in whatever shape it is taken.

        Raises:
            RuntimeError: without a ``first_step`` before it, or inside ``perturbed()``.
            TypeError: sparse gradients. The weights are restored and the step is given up then.
        """
        self._engine.finish(zero_grad)
        self._stepped()

    @untraced
    def perturbed(self, *, loss: Any = None) -> PerturbedContext:
        """Weights at θ + ε inside, at θ to the bit outside, whatever happens; ``step()`` then takes the step.

        ``with opt.perturbed() as needed:`` gets what :meth:`first_step` returns.

        Raises:
            RuntimeError, TypeError: as :meth:`first_step`, on the way in.
        """
        return PerturbedContext(self._engine, loss)

    @untraced
    def step(
        self,
        closure: Closure | Sequence[Closure] | None = None,
        val_closure: Closure | None = None,
        *,
        scaler: Scaler | None = None,
        first_backward: bool | None = None,
    ) -> Any:
        """One step of the method.

        Args:
            closure: zeroes the gradients, computes the loss, calls backward and returns the loss. It is called once
                for each gradient that the step needs, whatever lies in ``p.grad`` before. In the older convention the
                caller does the first backward of every step, and a closure that does not zero does the others; a step
                that finds no new gradients calls that one for the first as well. Which it is shows in what the closure
                does to the gradients. None: the second backward has been done; finish what ``first_step`` or
                ``perturbed`` began. A list: one closure a micro-batch, each perturbed along its own gradient
                (m-sharpness); the step is along the mean of theirs.
            val_closure: the same on a validation batch; for a learned radius, and only for it.
            scaler: a ``torch.amp.GradScaler`` with which the closures scale the loss for their backward (they return
                the loss itself). Every pass is unscaled here, a first backward of the caller's too, and looked at for
                overflow even if ``check_finite`` is False; ``scaler.update()`` is still the caller's.
            first_backward: says aloud who makes the first gradient: True, the caller, by a backward before this call;
                False, the closure. None: what the closure does shows it. :class:`~lets_kernels.ClosureWarning` where
                it does not, once: new gradients before a closure that does not zero and made those of earlier steps.

        Returns:
            What the closure returned for the first pass, or a list of that; None if the caller made that pass.

        Raises:
            RuntimeError: gradients, but no first pass and no closure; ``first_backward=True``, but no new gradients.
            ValueError: a validation closure missing or superfluous; ``first_backward=True`` with what makes every
                gradient itself.
        """
        closure, e = unwrap(closure), self._engine
        with handed_over(self) as (scale, overflow):
            if closure is None:
                if val_closure is not None:
                    raise ValueError("step(None, val_closure): use radius_step(closure, val_closure) after step()")
                if e.finish_begun(scale, overflow):
                    self._stepped()
                return None
            if overflow is not None:
                raise RuntimeError(
                    "scaler.step(opt, closure) would step along scaled gradients: call opt.step(closure, "
                    "scaler=scaler), then scaler.update()"
                )
        if self.radius.learns and val_closure is None:
            raise ValueError("a learned radius needs a validation closure: step(closure, val_closure)")
        if not self.radius.learns and val_closure is not None:
            raise ValueError(
                "val_closure is for a learned radius that takes its validation gradient from a closure: step(closure), "
                "or rho=LearnedRadius(...)"
            )
        check_capture(e.work)
        e.restore()
        e.work.scaling.begin(scaler)
        with no_scaler_steps(self):
            if isinstance(closure, Sequence):
                if first_backward:
                    raise ValueError("first_backward=True goes with one closure; a list makes every gradient itself")
                returned: Any = micro_step(e, closure, scaler)
            else:
                returned = closure_step(e, closure, scaler, first_backward)
            self._stepped()
            if e.now.lesson is not None:
                learn(e, closure if not isinstance(closure, Sequence) else None, val_closure, scaler)
        return returned

    def _stepped(self) -> None:
        self.__dict__["_opt_called"] = True  # what LR schedulers look at

    @untraced
    def restore(self) -> None:
        """Bring the weights back to θ, to the bit, and give up the step that was begun. Harmless at any time.

        That includes a signal handler that runs in the middle of a step: the weights are then home for the handler (of
        a fused step that is under way the first buckets may have stepped), and once it has returned. A step whose
        perturbation was under way ends with ``RuntimeError``; one that had not moved a weight yet goes on, and one that
        was coming home is taken.

        After an exception between ``first_step()`` and ``second_step()`` the weights stay perturbed until this is
        called, or ``step(closure)``, which does so first; a forward pass or ``zero_grad()`` notices nothing.
        """
        self._engine.restore()

    # ---- learning the radius ---------------------------------------------------------------------------------------

    @untraced
    def radius_step(
        self, train_closure: Closure | None, val_closure: Closure | None, *, scaler: Scaler | None = None
    ) -> None:
        """Learn ρ from the step just taken; ``step(closure, val_closure)`` does so by itself.

        The closures are called in this order, at the new weights, on the steps that the radius learns from.

        Args:
            train_closure: as ``step``'s ``closure``; may be None where the radius does not need it.
            val_closure: the same on a validation batch.
            scaler: as for :meth:`step`; ``scaler.update()`` comes after this.

        Raises:
            RuntimeError: the radius is not learned, or no step has just been taken, or the next one has been begun.
            ValueError: a closure is missing.
        """
        with no_scaler_steps(self):
            learn(self._engine, train_closure, val_closure, scaler)

    # ---- groups and state, which are the base optimizer's ------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As :meth:`torch.optim.Optimizer.add_param_group`; a group may have its own ``rho``, ``adaptive``, ``xi``.

        Raises:
            RuntimeError: while the weights are perturbed.
        """
        if "_engine" not in self.__dict__:
            super().add_param_group(param_group)
            return
        w = self._engine.work
        self._engine.refuse_while_perturbed("add_param_group()")
        w.tables.take_in_new_groups()
        group = {**w.setting.group_keys, **param_group}
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        check_groups([{**group, "params": tensors}], self.direction)
        whole = {**self.defaults, **group}
        check_options([whole])
        self.direction.check_base(Look(type(self.base_optimizer), [whole]))
        self.radius.check_groups([*self.param_groups, whole])
        self.base_optimizer.add_param_group(group)
        self.radius.bind(self.param_groups, w.progress.home)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base optimizer's state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.base_optimizer.state = state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As :meth:`torch.optim.Optimizer.zero_grad`; a first pass that no step followed is then forgotten."""
        self._engine.zeroes()
        super().zero_grad(set_to_none)
        if not set_to_none:
            self._engine.mark_gradients()

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
        self._engine.refuse_while_perturbed("state_dict()")
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = saving.saved(self._engine)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state; that of the bare base optimizer will do, and leaves the radius as it is.

        Raises:
            RuntimeError: while the weights are perturbed.
            ValueError: the groups, or the number of learned radii, do not match, or the state is damaged. Nothing has
                been loaded then.
        """
        tables = self._engine.work.tables
        self._engine.refuse_while_perturbed("load_state_dict()")
        tables.take_in_new_groups()
        tables.forget_replaced()
        state_dict = dict(state_dict)  # what hooks put in or take out of it stays among them
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        saving.load(self._engine, state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._engine.refuse_while_perturbed("copying or pickling the optimizer")
        return {name: value for name, value in self.__dict__.items() if name not in _NOT_COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._engine.mark_gradients()  # those that a copy takes along


_HOOKS = {f"_optimizer_{what}_hooks" for what in ("step_pre", "step_post", "state_dict_pre", "state_dict_post")}
_HOOKS |= {"_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"}
# `step` is there if an LR scheduler has wrapped it; the copy has its own.
_NOT_COPIED = frozenset({"step", *_HOOKS})
