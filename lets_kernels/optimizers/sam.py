"""SAM, the engine of every method: it takes a direction, a schedule, a descent and a radius, and runs the step."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lets_kernels import ops
from lets_kernels.descent import Descent, Perturbed
from lets_kernels.direction import Adaptive, Direction
from lets_kernels.distributed import Replicas
from lets_kernels.hypergradient import Gradients, by_index
from lets_kernels.layout import Bucket, ParameterSpace
from lets_kernels.optimizers.base import Wrapper, untraced
from lets_kernels.optimizers.step import Step, as_loss, as_scalar, check_capture, check_same_graph
from lets_kernels.radius import ConstantRadius, Radius, radii
from lets_kernels.schedule import Always, Schedule

Closure = Callable[[], Any]


class SAM(Wrapper):
    """Sharpness-aware minimisation (Foret et al., ICLR 2021, Algorithm 1), and the base of every other method.

    No step waits for an accelerator. Once a step or two have been taken, the next can be captured in a CUDA graph, with
    the passes in it or without. Whatever is a number on the host (a learning rate, a ρ that is no tensor) is then part
    of the graph, replays do not count as steps, and ``load_state_dict`` asks for another capture. Under torch.compile a
    step runs as plain Python between compiled graphs.

    Args:
        params: parameters, named parameters, or groups of them; a group may have its own ``rho``, ``adaptive``, ``xi``.
        base_optimizer: a torch optimizer class, which gets the remaining keyword arguments; or an instance that was
            built on the same parameters. It stays a true optimizer: its groups and state are this optimizer's.
        rho: the radius ρ ≥ 0 of the perturbation, or a :class:`~lets_kernels.Radius`.
        adaptive: ASAM's T = |θ|, element-wise and with ξ = 0 unless a group has its own ``xi``.
        direction, schedule, descent: the other three parts of a method. Default: ``adaptive`` as above, ``Always()``,
            ``Perturbed()``.
        backend: ``"auto"``, or one of the names in :func:`lets_kernels.backends`.
        flatten: move the parameters of each bucket into one buffer, for the least work on the host. Other code must not
            hold on to the old storage.
        check_finite: a gradient that is not finite, in either pass, skips the whole step: weights, state and radius
            stay as they are. Decided on the device; costs one read of the second gradient.
        model: the module whose parameters these are: tells transposed convolutions and names apart.
        process_group: ranks that hold the same weights and gradients (DistributedDataParallel); the scalars of a step
            are averaged over it, so that all take the same step to the bit.

    Raises:
        TypeError: parameters of a dtype without gradients, or a base optimizer that is none.
        ValueError: no parameters; ρ or ξ negative or not finite; settings that contradict each other.
        RuntimeError: the backend asked for does not run here.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer,
        rho: float | Radius = 0.05,
        adaptive: bool = False,
        *,
        direction: Direction | None = None,
        schedule: Schedule | None = None,
        descent: Descent | None = None,
        backend: str = "auto",
        flatten: bool = False,
        check_finite: bool = True,
        model: torch.nn.Module | None = None,
        process_group: "torch.distributed.ProcessGroup | None" = None,
        **kwargs: Any,
    ) -> None:
        ops.check_request(backend)
        if direction is None:
            direction = Adaptive(xi=0.0)
            direction.defaults = {**direction.defaults, "adaptive": adaptive}
        elif adaptive and "adaptive" not in direction.defaults:
            raise ValueError(f"adaptive=True goes with an adaptive direction, not with {type(direction).__name__}")
        self.direction, self.schedule, self.descent = direction, schedule or Always(), descent or Perturbed()
        self.radius = rho if isinstance(rho, Radius) else ConstantRadius(rho)
        self._backend, self._flatten = backend, flatten
        self.check_finite, self.model, self.replicas = check_finite, model, Replicas(process_group)
        self._own = {"rho": self.radius.rho, "adaptive": False, **direction.defaults}
        super().__init__(params, base_optimizer, kwargs)

    # ---- the three call shapes -------------------------------------------------------------------------------------

    @untraced
    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, *, loss: Any = None) -> None:
        """Move the weights to θ + ε, from the gradients that the first backward left.

        Args:
            zero_grad: set the gradients to None afterwards, as the second backward needs it.
            loss: the loss at θ, for ``metrics()``; needed by a radius that reuses this gradient and learns from the
                squared gap.

        Raises:
            RuntimeError: the weights are perturbed already.
            TypeError: sparse gradients. No weight has been touched then.
        """
        self._heal()
        self._refuse_while_perturbed("first_step()")
        self._step = None
        self._step = Step(self, as_scalar(loss), keep=not zero_grad)
        if zero_grad:
            self.zero_grad()
        self._step.perturb()

    @untraced
    @torch.optim.Optimizer.profile_hook_step
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights and take the base optimizer's step, along the gradients of the second backward.

        Step hooks run around it, as they do around :meth:`step`: once a step, in whatever shape it is taken.

        Raises:
            RuntimeError: without a ``first_step`` before it, or inside ``perturbed()``.
            TypeError: sparse gradients. The weights are restored and the step is given up then.
        """
        self._finish(zero_grad)

    @torch.no_grad()
    def _finish(self, zero_grad: bool = False) -> None:
        """What :meth:`second_step` does, without the hooks, which around :meth:`step` have run."""
        self._heal()
        step, self._trial = self._step, None
        if step is None:
            raise RuntimeError("second_step() without first_step(): call first_step() after the first backward")
        if step.in_context:
            raise RuntimeError("the step is taken after `with opt.perturbed():`, not inside; leave the context first")
        check_same_graph(step.captured, "second_step()", "first_step()")
        try:
            self.fused, self.fused_reason = step.descend()
        except BaseException:
            self.restore()
            raise
        self._trial, self._step, self._radius_waits = step.trial, None, self.radius.learns
        self._last, self._step_number = step.metrics(), self._step_number + 1
        for optimizer in (self, self.base_optimizer):
            optimizer.__dict__["_opt_called"] = True  # what LR schedulers look at
        if zero_grad:
            self.zero_grad()
        else:
            self._mark_gradients()

    @untraced
    @contextmanager
    def perturbed(self, *, loss: Any = None) -> Iterator[None]:
        """Weights at θ + ε inside, at θ to the bit outside, whatever happens; ``step()`` then takes the step.

        Raises:
            RuntimeError, TypeError: as :meth:`first_step`.
        """
        self._heal()
        self._refuse_while_perturbed("perturbed()")
        try:
            self.first_step(loss=loss)
            assert self._step is not None
            self._step.in_context = True
            yield
        except BaseException:
            self.restore()
            raise
        if self._step is not None:  # else given up inside, by restore()
            with torch.no_grad():
                self._step.restore()
            self._step.in_context = False

    @untraced
    def restore(self) -> None:
        """Bring the weights back to θ, to the bit, and give up the step that was begun. Harmless at any time."""
        step = self._step
        if step is not None:
            with torch.no_grad():
                step.restore()
            self._step = None

    @untraced
    def step(self, closure: Closure | None = None, val_closure: Closure | None = None) -> Any:
        """One step of the method.

        Args:
            closure: zeroes the gradients, computes the loss, calls backward and returns the loss. It is called once
                for each gradient that the step needs. If there are gradients at the first call of ``step(closure)``,
                the caller is taken to do the first backward of every step, and the closure is called for the others
                only; a step that finds no new gradients calls it for the first as well. None: the second backward
                has been done; finish what ``first_step`` or ``perturbed`` began.
            val_closure: the same on a validation batch; for a learned radius, and only for it.

        Returns:
            The first loss, as the closure returned it; None if the closure did not compute it.

        Raises:
            RuntimeError: gradients, but no first pass and no closure.
            ValueError: a validation closure missing or superfluous.
        """
        if closure is None:
            if val_closure is not None:
                raise ValueError("step(None, val_closure): use radius_step(train_closure, val_closure) after step()")
            if self._step is not None:
                self._finish()
            else:
                self._step_alone()
            return None
        if self.radius.learns and val_closure is None:
            raise ValueError("a learned radius needs a validation closure: step(closure, val_closure)")
        if not self.radius.learns and val_closure is not None:
            raise ValueError("val_closure is for a learned radius: step(closure), or rho=LearnedRadius(...)")
        check_capture(self)
        self.restore()
        if self._caller_begins is None:
            self._caller_begins = self._has_new_gradients()
        loss = None
        try:
            if not (self._caller_begins and self._has_new_gradients()):
                self._drop_gradients()
                loss = self._call(closure)
                if self.radius.learns:
                    as_loss(loss, "closure")
            self.first_step(zero_grad=True, loss=loss)
            assert self._step is not None
            if self._step.perturbs:
                self._step.perturbed_loss = as_scalar(self._call(closure))
            else:
                self._step.return_gradients()
            self._finish()
        except BaseException:
            self.restore()
            self._mark_gradients()  # of a pass that failed: no step may start from them
            raise
        if self._trial is not None:
            self.radius_step(closure, val_closure)
        return loss

    def _step_alone(self) -> None:
        """``step()`` with nothing begun: what checkpointing tools call, with zero gradients or lr = 0."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            return
        if all(float(group.get("lr", 1.0)) == 0 for group in self.param_groups):
            if not self.state:
                self.base_optimizer.step()  # makes the state, moves nothing
        elif any(map(torch.any, grads)):
            raise RuntimeError(
                "step() without a perturbation before it: call step(closure), or first_step() and second_step(), or "
                "step() after `with opt.perturbed():`; base_optimizer.step() takes a step without one"
            )

    # ---- learning the radius ---------------------------------------------------------------------------------------

    @untraced
    def radius_step(self, train_closure: Closure | None, val_closure: Closure | None) -> None:
        """Learn ρ from the step just taken; ``step(closure, val_closure)`` does so by itself.

        The closures are called in this order, at the new weights, on the steps that the radius learns from.

        Args:
            train_closure: as ``step``'s ``closure``; may be None where the radius does not need it.
            val_closure: the same on a validation batch.

        Raises:
            RuntimeError: the radius is not learned, or no step has just been taken.
            ValueError: a closure is missing.
        """
        radius = self.radius
        if not radius.learns:
            raise RuntimeError("radius_step() is for a learned radius: rho=LearnedRadius(...)")
        if val_closure is None or (train_closure is None and radius.needs_train_closure):
            raise ValueError("radius_step(train_closure, val_closure) needs both closures for this radius")
        if not self._radius_waits:
            raise RuntimeError("radius_step() comes after second_step(), once a step")
        observed, self._trial, self._radius_waits = self._trial, None, False
        if observed is None:  # a step that the radius does not learn from
            return
        trial, versions = observed
        check_same_graph(trial.captured, "radius_step()", "the step before it")
        if any(g._version != v for g, v in versions):
            raise RuntimeError(
                "the gradients of the perturbed pass were changed in place before radius_step(); zero them with "
                "set_to_none=True"
            )
        assert self._buckets is not None
        buckets = self._buckets.buckets  # those of the step, whatever has been frozen since
        kept = [(p, p.grad) for b in buckets for p in b.params]
        train: list[Gradients] | None = None
        train_loss = None
        try:
            if radius.needs_train_closure:
                assert train_closure is not None
                self._drop_gradients()
                train_loss = as_loss(self._call(train_closure), "train_closure")
                train = [by_index(b.gather()) for b in buckets]
            self._drop_gradients()
            val_loss = as_loss(self._call(val_closure), "val_closure")
            val = [by_index(b.gather()) for b in buckets]
        finally:
            for p, grad in kept:
                p.grad = grad
            self._mark_gradients()
        with torch.no_grad():
            radius.observe(trial, val, val_loss, train, train_loss, self.param_groups, self.replicas)

    # ---- what a user reads -------------------------------------------------------------------------------------------

    @property
    def rho(self) -> Tensor:
        """The radius: 0-d if all groups share one, else one value a group. Nothing waits for the device."""
        groups = self.param_groups[:1] if self.radius.shared else self.param_groups
        values = radii([self.radius.present(i, group) for i, group in enumerate(groups)])
        return values[0].clone() if len(values) == 1 else torch.stack(values)

    @property
    def backend(self) -> str:
        """The backend that runs, by name; several, separated by commas, where parameters lie on several devices."""
        return ", ".join(sorted({b.backend for b in self._space().buckets}))

    def metrics(self) -> dict[str, Tensor]:
        """What the last step saw, as tensors on the device; nothing waits for them.

        ``grad_norm`` is ‖Tg‖ in the dual norm (over all parameters), ``perturbed_grad_norm`` ‖ĝ‖ (with
        ``check_finite``), ``rho`` the present radius, ``skipped_steps`` a count; ``loss``, ``perturbed_loss`` and
        ``loss_gap`` where the optimizer saw the losses; and what the radius reports: ``rho_grad`` = ∂F/∂ρ,
        ``val_loss``, ``train_loss``.
        """
        return {**self._last, "rho": self.rho, "skipped_steps": self.skipped.clone(), **self.radius.metrics()}

    # ---- within ----------------------------------------------------------------------------------------------------

    def _space(self) -> ParameterSpace:
        """The buckets, built anew where the groups or the parameters have changed."""
        if self._buckets is None or not self._buckets.is_current(self.param_groups):
            self._take_in_new_groups()
            names = {id(p): name for name, p in self.model.named_parameters()} if self.model is not None else {}
            self.direction.bind(self.model)
            geometry = self.direction.geometry
            self._buckets = ParameterSpace(self.param_groups, names, geometry, self._backend, self._flatten)
            self._move_scalars(self._buckets.buckets)
        return self._buckets

    def _move_scalars(self, buckets: list[Bucket]) -> None:
        """What is counted and learned lies beside the first parameters, also where those have been moved."""
        if buckets and buckets[0].device != self.skipped.device:
            self.skipped = self.skipped.to(buckets[0].device)
            self.radius.to(self.skipped.device)

    def keep_for_graphs(self) -> None:
        """Keep what the CUDA graph that is being captured refers to, as long as this optimizer lives.

        Later steps may replace it here (``load_state_dict`` does), but not in the graph.
        """
        state = [t for entry in self.base_optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
        radii = [g["rho"] for g in self.param_groups if isinstance(g["rho"], Tensor)]
        self._captured.append((self._space(), state, radii))

    def _call(self, closure: Closure) -> Any:
        with torch.enable_grad():
            return closure()

    def _heal(self) -> None:
        """Undo a perturbation that an interrupt cut off before it was complete, or while it was being undone."""
        if self._step is not None and self._step.torn:
            self.restore()
