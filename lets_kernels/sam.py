"""SAM, the public face of every method: it takes the parts of a method and its settings, and hands the steps on."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar, TypeAlias, cast

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
from lets_kernels.parts.length import Length
from lets_kernels.parts.progress import Progress
from lets_kernels.parts.radius import Radius, RadiusLike, radii
from lets_kernels.parts.samples import Closure, Samples
from lets_kernels.parts.schedule import Always, Schedule
from lets_kernels.space.distributed import Replicas, check_whole
from lets_kernels.step import saving
from lets_kernels.step.arguments import check_arguments
from lets_kernels.step.capture import check_capture
from lets_kernels.step.closures import closure_step
from lets_kernels.step.contexts import FirstPassContext, PerturbedContext
from lets_kernels.step.engine import Engine
from lets_kernels.step.frameworks import no_scaler_steps, stand_aside, unwrap
from lets_kernels.step.groups import base_on, check_groups, check_is_optimizer, check_options
from lets_kernels.step.learn import learn
from lets_kernels.step.micro import micro_step
from lets_kernels.step.setting import Setting
from lets_kernels.step.step import Root
from lets_kernels.step.tracing import hooked, untraced

#: Parameters, named parameters, or groups of them.
Params: TypeAlias = Iterable[Any]
#: A torch optimizer class, or an instance of one.
BaseLike: TypeAlias = type[torch.optim.Optimizer] | torch.optim.Optimizer


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al., ICLR 2021, Algorithm 1), and the base of every other method.

    No step waits for an accelerator. After one or two steps the next step can be captured in a CUDA graph, with or
    without its passes. Every number on the host (a learning rate, a ρ that is no tensor) is then fixed in the graph,
    replays do not count as steps, and a new capture is needed after ``load_state_dict``. Under torch.compile a step
    runs as plain Python between compiled graphs.

    Args:
        params: parameters, named parameters, or groups of them; a group may have its own ``rho``, ``adaptive``, ``xi``.
        base_optimizer: a torch optimizer class, which gets the remaining keyword arguments; or an instance that was
            built on the same parameters. It stays a complete optimizer, and shares its groups and state with this one.
        rho: the radius ρ ≥ 0 of the perturbation, a :class:`~lets_kernels.Radius`, or ``"auto"`` for ``AutoRadius()``,
            which finds the radius during training.
        adaptive: ASAM's T = |θ|, element-wise and with ξ = 0 unless a group has its own ``xi``. It goes with the
            directions of Friendly SAM, VaSSO and ESAM, too.
        direction, schedule, descent: the other parts of a method. Default: ``adaptive`` as above, ``Always()``,
            ``Perturbed()``.
        length: how long the perturbation is for a given ρ; default ρ. See :class:`~lets_kernels.Length`.
        samples: which samples of a batch each pass counts; default all. See :mod:`lets_kernels.parts.samples`.
        seed: the seed of the method's random numbers, if it draws any. All ranks take the first rank's seed, so they
            draw the same numbers. A saved state holds the seed. Default: drawn from torch's generator.
        backend: ``"auto"``, or one of the names in :func:`lets_kernels.backends`.
        flatten: move the parameters of each bucket into one buffer, for the least work on the host. Other code must not
            keep using the old storage.
        check_finite: a gradient that is not finite, in either pass, skips the whole step: weights, state and radius
            stay unchanged. The device decides this; it costs one read of the second gradient.
        model: the module that owns the parameters, in the form that training calls (with its DistributedDataParallel
            wrapper, or sharded by ``fully_shard``, if it is used). Then the running statistics of its normalisation
            layers count only the first pass of a step; transposed convolutions and parameter names are known; sharded
            weights are gathered anew after they have moved; and saving, copying or loading the module, or a module in
            it, is refused while the weights are perturbed.
        process_group: the ranks that train one model together. The scalars of a step are averaged over these ranks, so
            that all take the same step to the bit. Default: the ranks of the parameters' mesh (DTensor) or of a
            DistributedDataParallel ``model``. ``"alone"``: nothing is sent.
        sync_perturbation: under DistributedDataParallel, False perturbs each rank along its own first gradient
            (m-sharpness); the first gradients are then not synchronised.
        rho_warmup: the number of steps over which the radius rises, linearly, from zero to the value of ``rho``: a
            number, a schedule or a learned radius. A large radius fails mostly in the first steps. ``opt.rho`` shows
            the value of ``rho``, ``metrics()["applied_rho"]`` the radius that the last step used.
        same_rng: the second pass draws the same random numbers as the first pass, so dropout has the same masks.
        running_state: what else, beside torch's normalisation layers, counts only the first pass of a step: modules in
            ``model`` (with the modules inside them), classes of modules, or names as in ``model.named_modules()`` and
            ``model.named_buffers()``. Their buffers are brought back after the second pass, also a buffer that the
            module replaces (``self.ema = ...``).

    Raises:
        TypeError: parameters of a dtype without gradients; a base optimizer that is no torch optimizer; or an argument
            that neither this class nor the base optimizer has.
        ValueError: no parameters; ρ or ξ negative or not finite; settings that contradict each other; ``model`` holds
            none of the parameters.
        RuntimeError: the backend asked for does not run here.

    Examples:
        >>> opt = SAM([w], SGD, rho=5.0, lr=0.1)
        >>> loss = opt.step(closure)  # calls it twice: at θ, and at θ + ε = (6, 6)
        >>> print(loss.item(), w.data)
        8.5 tensor([2.4000, 0.8000])
    """

    #: The arguments of a method by the names that they have in its authors' code; an error says what is meant.
    called: ClassVar[Mapping[str, str]] = MappingProxyType({})

    #: Makes ``GradScaler.step`` call ``step()`` always, and hand over its overflow flag on the device: nothing waits.
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
        length: Length | None = None,
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
            raise ValueError(
                f"adaptive=True goes with a direction that T can scale, such as Adaptive (ASAM's), not with "
                f"{type(direction).__name__}: leave it out"
            )
        radius = as_radius(rho)
        setting = Setting(
            direction=direction,
            schedule=schedule or Always(),
            descent=descent or Perturbed(),
            radius=radius,
            length=length or Length(),
            samples=samples or Samples(),
            network=Network(model, sync_perturbation, same_rng, running_state),
            replicas=Replicas(process_group),
            backend=backend,
            flatten=flatten,
            check_finite=check_finite,
            rho_warmup=rho_warmup,
            # Tools that load a saved state key by key must find the key at which the first group carries numbers.
            group_keys={"rho": radius.rho, "adaptive": False, **direction.defaults, saving.KEY: None}
            | ({"adaptive": True} if adaptive else {}),
        )
        setting.check()
        random = Randomness(seed, used=direction.draws or setting.schedule.draws)
        if radius.moves and radius.bound:
            raise ValueError("this radius belongs to another optimizer already, with which it moves; give each its own")
        check_is_optimizer(base_optimizer)
        check_arguments(type(self), base_optimizer, kwargs, self.called)
        #: A complete optimizer that shares groups and state with this one. Before it is built, a stand-in holds both.
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
        self._engine.mark_gradients()  # present gradients are not from a backward of this optimizer

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
    def length(self) -> Length:
        """How long the perturbation is for a given radius."""
        return self._engine.work.setting.length

    @property
    def samples(self) -> Samples:
        """Which samples of a batch each pass counts."""
        return self._engine.work.setting.samples

    @property
    def model(self) -> torch.nn.Module | None:
        """The module given as ``model=``."""
        return self._engine.work.setting.model

    @property
    def skipped(self) -> Tensor:
        """The number of skipped steps: int64, 0-d, on the device."""
        return self._engine.work.progress.skipped

    @property
    def fused(self) -> bool:
        """Whether the last step of the base optimizer was fused with the restore."""
        return self._engine.now.fused

    @property
    def fused_reason(self) -> str:
        """Why the last step was not fused, in words."""
        return self._engine.now.fused_reason

    @property
    def backend(self) -> str:
        """The name of the backend that runs; several names, with commas, if parameters lie on several devices."""
        return ", ".join(sorted({b.backend for b in self._engine.work.tables.current().buckets}))

    @property
    def rho(self) -> Tensor:
        """The radius: 0-d if all groups share one, otherwise one value for each group. Nothing waits for the device."""
        self._engine.work.tables.take_in_new_groups()
        radius, groups = self.radius, self.param_groups
        groups = groups[:1] if radius.shared else groups
        values = radii([radius.present(i, group) for i, group in enumerate(groups)])
        return values[0].clone() if len(values) == 1 else torch.stack(values)

    @property
    def ascents_left(self) -> int:
        """How often :meth:`first_step` is still to be called in this step, each time after a backward at θ + ε.

        0 for methods with one ascent, which are all but :class:`~lets_kernels.MultiStepSAM` and
        :class:`~lets_kernels.Lookbehind`.
        """
        step = self._engine.now.step
        return 0 if step is None else step.ascents_left

    def metrics(self) -> dict[str, Tensor]:
        """What the last step measured, as tensors on the device; nothing waits for them.

        ``grad_norm`` is ‖Tg‖ in the dual norm over all parameters. It is the power mean of several norms if ranks or
        micro-batches have perturbations of their own, and ‖g‖ on a step that does not perturb. ``perturbed_grad_norm``
        is ‖ĝ‖ (with ``check_finite``), ``rho`` the present radius. ``skipped_steps`` counts skipped steps, and
        ``gradients`` the gradients that all steps have taken. ``loss``, ``perturbed_loss`` and ``loss_gap`` are there
        if the optimizer saw the losses; with ``rho_warmup`` or ``length`` also ``applied_rho``, the length of the last
        perturbation.
        The radius adds its own: ``rho_grad`` = ∂F/∂ρ, ``val_loss``, ``train_loss``. With 16-bit weights, from the first
        step and then from every hundredth: ``perturbation_cosine`` between ε and what rounding left of it,
        ``perturbation_length``, the ratio of their lengths, and ``perturbed_fraction``, the share of weights that
        moved.
        """
        w, now = self._engine.work, self._engine.now
        gradients = torch.full((), w.progress.gradients, dtype=torch.int64, device=w.progress.home)
        counted = {"rho": self.rho, "skipped_steps": w.progress.skipped.clone(), "gradients": gradients}
        seen = {name: x.taken() if isinstance(x, Root) else x for name, x in now.seen.items()}
        return {**seen, **w.tables.precision, **counted, **self.radius.metrics()}

    # ---- the three call shapes -------------------------------------------------------------------------------------

    def first_pass(self) -> FirstPassContext:
        """A context for forward and backward of a step's first pass, where the optimizer must know its begin and end.

        ``sync_perturbation=False`` and ``same_rng=True`` need it, and so do methods whose first pass starts elsewhere
        than at θ (R-SAM, bSAM): for these the weights are moved inside, and at θ to the bit outside, whatever happens.
        Otherwise it does nothing. ``step(closure)`` enters it by itself. Under DistributedDataParallel each forward
        needs its own backward after it: of two forwards one after the other only one is synchronised.

        Raises:
            RuntimeError: the weights are perturbed; with ``sync_perturbation=False`` also if no forward was inside, or
                the model has ``static_graph=True``.
        """
        return FirstPassContext(self._engine)

    @untraced
    def unscale_first(self, scaler: Scaler) -> None:
        """Under a ``torch.amp.GradScaler``: undo its scale in the gradients of the first pass, before ``first_step``.

        The rest is as usual: ``scaler.step(opt)`` takes the step, or skips it if a pass has overflowed, and
        ``scaler.update()`` sees the overflow of both passes. Uses public methods of the scaler only.

        Raises:
            RuntimeError: the weights are perturbed; or the gradients are unscaled already (the scaler raises this).
            ValueError: float16 gradients, which the scaler refuses.
        """
        w = self._engine.work
        if not self.ascents_left:
            self._engine.refuse_while_perturbed("unscale_first()")
            w.scaling.begin(scaler, first_only=True)
        w.scaling.unscale(scaler, w.groups)

    @untraced
    def first_step(self, zero_grad: bool = False, *, loss: Any = None) -> bool:
        """Move the weights to θ + ε, from the gradients that the first backward left.

        On a step that the schedule does not perturb, no weight moves. Then the second pass may be left out:
        ``second_step`` steps along the first gradients if it finds no new ones. If you clip gradients before
        ``second_step``, make the second pass all the same, or keep the first gradients in place with
        ``zero_grad=False``; under a gradient scaler they are always taken away.

        Args:
            zero_grad: set the gradients to None afterwards, which the second backward needs.
            loss: the loss at θ, for ``metrics()``. A radius that reuses this gradient and learns from the squared gap
                needs it.

        Returns:
            True if a second pass is needed.

        Raises:
            RuntimeError: the weights are perturbed already.
            TypeError: sparse gradients. No weight has been touched.
        """
        return self._engine.begin(zero_grad, loss)

    @untraced
    @hooked
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights and take the base optimizer's step, along the gradients of the second backward.

        Step hooks run around this call as they run around :meth:`step`: once for each step, in every call shape.

        Raises:
            RuntimeError: without a ``first_step`` before it, or inside ``perturbed()``.
            TypeError: sparse gradients. The weights are restored, and the step is given up.
        """
        self._engine.finish(zero_grad)
        self._stepped()

    @untraced
    def perturbed(self, *, loss: Any = None) -> PerturbedContext:
        """Weights at θ + ε inside, at θ to the bit outside, whatever happens; ``step()`` then takes the step.

        ``with opt.perturbed() as needed:`` gets what :meth:`first_step` returns.

        Raises:
            RuntimeError, TypeError: as :meth:`first_step`, when the context is entered.
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
            closure: zeroes the gradients, computes the loss, calls backward and returns the loss. It is called once for
                each gradient that the step needs, whatever is in ``p.grad`` before. In the older convention the caller
                does the first backward of every step, and a closure that does not zero does the others. If that step
                finds no new gradients, it calls the closure for the first one too. What the closure does to the
                gradients shows the convention. None: the second backward has been done; finish the step that
                ``first_step`` or ``perturbed`` began. A list: one closure for each micro-batch, each with a
                perturbation along its own gradient (m-sharpness); the step is along the mean of their second gradients.
            val_closure: the same on a validation batch; for a learned radius, and only for it.
            scaler: a ``torch.amp.GradScaler`` with which the closures scale the loss for their backward (they return
                the unscaled loss). The step unscales every pass, also the caller's own first backward, and checks each
                for overflow even if ``check_finite`` is False. The caller still calls ``scaler.update()``.
            first_backward: who makes the first gradient: True, the caller, by a backward before this call; False, the
                closure. None: what the closure does shows it. If nothing shows it, one
                :class:`~lets_kernels.ClosureWarning` says so: there are new gradients, but the closure does not zero,
                and it made the first gradient of earlier steps.

        Returns:
            What the closure returned for the first pass, or a list of such values; None if the caller made that pass.

        Raises:
            RuntimeError: there are gradients, but no first pass was made and no closure given; or
                ``first_backward=True`` without new gradients.
            ValueError: a validation closure is missing or superfluous; or ``first_backward=True`` with a list or a
                method for which closures make every gradient.
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

        A signal handler may call this in the middle of a step. The weights are then at θ for the handler and after it
        returns; only in the middle of a fused step may the first buckets have stepped. A step whose perturbation was
        under way ends with ``RuntimeError``. A step that had not moved a weight yet goes on, and a step that was
        restoring the weights is taken.

        After an exception between ``first_step()`` and ``second_step()`` the weights stay perturbed until ``restore()``
        or ``step(closure)`` is called, which restores them first. A forward pass or ``zero_grad()`` does not notice.
        """
        self._engine.restore()

    # ---- learning the radius ---------------------------------------------------------------------------------------

    @untraced
    def radius_step(
        self, train_closure: Closure | None, val_closure: Closure | None, *, scaler: Scaler | None = None
    ) -> None:
        """Learn ρ from the step just taken; ``step(closure, val_closure)`` does this by itself.

        The closures are called in this order, at the new weights, on the steps that the radius learns from.

        Args:
            train_closure: as ``step``'s ``closure``; may be None if the radius does not need it.
            val_closure: the same on a validation batch.
            scaler: as for :meth:`step`; call ``scaler.update()`` after ``radius_step``.

        Raises:
            RuntimeError: the radius is not learned; no step has just been taken; or the next step has been begun.
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
        """What is kept for each parameter, by parameter and name; the names are those of a saved state.

        If no part of the method keeps tensors, this is the base optimizer's own state. Otherwise it is a view that
        shows them beside it, each as large as the parameter, under these names:

        - ``lets_kernels.average``: the average of the first gradients (FriendlySAM, VaSSO);
        - ``lets_kernels.ahead``: the first gradient of the last step (SAMPa);
        - ``lets_kernels.orthogonal``: the part of ĝ across g (LookSAM, AELookSAM);
        - ``lets_kernels.mask``: one byte for each element, 1 where it is perturbed (SparseSAM);
        - ``lets_kernels.before``: the weights before the last step that perturbed (``rho="auto"``). The next
          perturbation overwrites them.

        These are the tensors that the next step works with, so a change is seen on both sides; for a parameter that is
        spread over ranks they are DTensors over the same memory. A replaced one is taken over at the next step. A copy
        or a pickle of the view holds plain dicts. The view is true if the base optimizer has state, which is what
        torch's tools ask before they make one. The step with which a learned radius waits under
        ``reuse_train_gradient`` belongs to the radius: ``state_dict()["lets_kernels"]["radius"]``.

        Raises:
            ValueError: a name with this prefix that no part keeps, or a tensor of another shape, is put in.
        """
        if "_engine" not in self.__dict__ or not self._engine.work.setting.held:
            return self.base_optimizer.state
        return cast(Any, self._engine.joined)  # torch's annotation is a defaultdict; it behaves like one

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        if "_engine" not in self.__dict__ or not self._engine.work.setting.held:
            self.base_optimizer.state = state
        else:
            self._engine.joined.replace(state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As :meth:`torch.optim.Optimizer.zero_grad`. Also forgets a first pass that no step followed."""
        self._engine.zeroes()
        super().zero_grad(set_to_none)
        if not set_to_none:
            self._engine.mark_gradients()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and groups, and in a further entry the radius, the parts and the counters.

        The first group holds the same numbers once more, for ``torch.distributed.checkpoint.state_dict``, which keeps
        only state and groups. That tool loses the step that waits under ``reuse_train_gradient``: ρ does not learn from
        that step. If the optimizer for ν is none of SGD without dampening, Adam and AdamW without amsgrad, its state is
        there only after a step, or after that tool's own first call on an optimizer without state.

        A state saved between a step and its ``radius_step`` does not hold what the radius would learn from that step:
        training that resumes from it goes on with the next step, and ρ does not learn from the step before.

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
        """Load a saved state. A state of the bare base optimizer is allowed, and leaves the radius as it is.

        So is a state of the SAM in common use (davda54/sam). The weights before the perturbation that it keeps,
        ``old_p``, are dropped.

        Raises:
            RuntimeError: while the weights are perturbed.
            ValueError: the groups or the number of learned radii do not match, or the state is damaged. Nothing has
                been loaded.
        """
        tables = self._engine.work.tables
        self._engine.refuse_while_perturbed("load_state_dict()")
        tables.take_in_new_groups()
        tables.forget_replaced()
        state_dict = dict(state_dict)  # hooks may add and remove entries without changing the caller's dict
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
        self._engine.mark_gradients()  # gradients that were copied with the parameters


_HOOKS = {f"_optimizer_{what}_hooks" for what in ("step_pre", "step_post", "state_dict_pre", "state_dict_post")}
_HOOKS |= {"_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"}
# `step` is an attribute if an LR scheduler has wrapped it; the copy has its own.
_NOT_COPIED = frozenset({"step", *_HOOKS})
