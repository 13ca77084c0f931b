"""SAM, the engine of every method: it takes a direction, a schedule, a descent and a radius, and runs the step."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lets_kernels import ops
from lets_kernels.around.amp import LossScaling, Scaler, handed_over, unscale_by
from lets_kernels.around.network import Named, Network
from lets_kernels.around.randomness import Randomness
from lets_kernels.learning.auto import as_radius
from lets_kernels.parts.descent import Descent, Perturbed
from lets_kernels.parts.direction import Adaptive, Direction
from lets_kernels.parts.radius import RadiusLike
from lets_kernels.parts.samples import Samples
from lets_kernels.parts.schedule import Always, Schedule
from lets_kernels.space.distributed import Replicas
from lets_kernels.step.base import untraced
from lets_kernels.step.closures import closure_step
from lets_kernels.step.combinations import check_parts
from lets_kernels.step.frameworks import unwrap
from lets_kernels.step.learn import learn
from lets_kernels.step.micro import micro_step
from lets_kernels.step.perturbed import PerturbedContext
from lets_kernels.step.start import FirstPassContext
from lets_kernels.step.step import Closure, Step, as_scalar, check_capture
from lets_kernels.step.undo import Undone


class SAM(Undone):
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
        params: Iterable[Any],
        base_optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer,
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
        ops.check_request(backend)
        if isinstance(rho_warmup, bool) or not isinstance(rho_warmup, int) or rho_warmup < 0:
            raise ValueError(f"rho_warmup must be a number of steps >= 0, not {rho_warmup!r}")
        self.rho_warmup = rho_warmup
        if direction is None:
            direction = Adaptive(xi=0.0)
            direction.defaults = {**direction.defaults, "adaptive": adaptive}
        elif adaptive and "adaptive" not in direction.defaults:
            raise ValueError(f"adaptive=True goes with an adaptive direction, not with {type(direction).__name__}")
        self.direction, self.schedule, self.descent = direction, schedule or Always(), descent or Perturbed()
        self.samples = samples or Samples()
        self.radius = as_radius(rho)
        if rho_warmup and self.radius.compares:
            raise ValueError("rho='auto' begins small by itself: leave rho_warmup out")
        self._backend, self._flatten = backend, flatten
        self.check_finite, self.replicas = check_finite, Replicas(process_group)
        self.network, self._scaling = Network(model, sync_perturbation, same_rng, running_state), LossScaling()
        check_parts(self)
        self.random = Randomness(seed, used=self.direction.draws or self.schedule.draws)
        self._own = {"rho": self.radius.rho, "adaptive": False, **direction.defaults}
        super().__init__(params, base_optimizer, kwargs)
        self.network.check_holds(self._all_params())
        self.random.to(self.skipped.device)

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
        return FirstPassContext(self)

    @untraced
    def unscale_first(self, scaler: Scaler) -> None:
        """Under a ``torch.amp.GradScaler``: undo its scale in the gradients of the first pass, before ``first_step``.

        Then go on as ever: ``scaler.step(opt)`` takes the step, or skips it where a pass has overflowed, and
        ``scaler.update()`` hears of both passes. Public methods of the scaler only.

        Raises:
            RuntimeError: the weights are perturbed, or these gradients have been unscaled already (the scaler's).
            ValueError: float16 gradients, which the scaler refuses.
        """
        self._refuse_while_perturbed("unscale_first()")
        self._scaling.begin(scaler, first_only=True)
        self._scaling.unscale(scaler, self.param_groups)

    @untraced
    @torch.no_grad()
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
        self.refuse_another_step("first_step()")
        self._step = None
        try:
            self._step = step = Step(self, as_scalar(loss), keep=not zero_grad)
        except BaseException:
            self._forget_pass()
            self._scaling.give_up()
            raise
        try:
            # Left in their place they would be unscaled twice, if no second pass replaces them.
            unscaled = self._scaling.first_only and not step.perturbs
            if zero_grad:
                self.zero_grad()
            elif unscaled:
                self._drop_gradients()
            self._forget_trial()
            step.perturb()
        except BaseException:
            self.restore()
            raise
        return step.perturbs or not self.direction.needs_gradient

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
        step = self._step
        if step is None:
            raise RuntimeError("second_step() without first_step(): call first_step() after the first backward")
        if step.in_context:
            raise RuntimeError("the step is taken after `with opt.perturbed():`, not inside; leave the context first")
        refused: RuntimeError | None = None
        try:
            refused = self._refuses_to_finish(step)
            if refused is None:
                step.find_second_pass()
                self.fused, self.fused_reason = step.descend()
                if not self.network.sync_perturbation:
                    self._scaling.tell(step.gate)
                self._trial, self._step, self._radius_waits = step.trial, None, self.radius.learns
                if self._trial is not None and not self.radius.learns:
                    (trial, _), self._trial = self._trial, None
                    self.radius.observe(trial, None, None, None, None, self.param_groups, self.replicas)
        except BaseException:  # an interrupt after the base optimizer's step too: it must not be taken again
            self.restore()
            raise
        if refused is not None:
            raise refused
        self._scaling.end()
        self._last, self._step_number = step.metrics(), self._step_number + 1
        self._passes += step.passes
        self._perturbed_steps += step.perturbs
        self.random.advance()
        for optimizer in (self, self.base_optimizer):
            optimizer.__dict__["_opt_called"] = True  # what LR schedulers look at
        if zero_grad:
            self.zero_grad()
        else:
            self._mark_gradients()

    @untraced
    def perturbed(self, *, loss: Any = None) -> PerturbedContext:
        """Weights at θ + ε inside, at θ to the bit outside, whatever happens; ``step()`` then takes the step.

        ``with opt.perturbed() as needed:`` gets what :meth:`first_step` returns.

        Raises:
            RuntimeError, TypeError: as :meth:`first_step`, on the way in.
        """
        return PerturbedContext(self, loss)

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
        closure = unwrap(closure)
        with handed_over(self) as (scale, overflow):
            if closure is None:
                if val_closure is not None:
                    raise ValueError("step(None, val_closure): use radius_step(closure, val_closure) after step()")
                self._finish_begun(scale, overflow)
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
        check_capture(self)
        self.restore()
        self._scaling.begin(scaler)
        if isinstance(closure, Sequence):
            if first_backward:
                raise ValueError("first_backward=True goes with one closure; a list makes every gradient itself")
            return micro_step(self, closure, scaler)
        loss = closure_step(self, closure, scaler, first_backward)
        if self._trial is not None:
            self.radius_step(closure, val_closure, scaler=scaler)
        return loss

    def _finish_begun(self, scale: Tensor | None, overflow: Tensor | None) -> None:
        """``step()``: finish what was begun; under a scaler with the scale and the overflow that it hands over."""
        step = self._step
        if step is None:
            self._step_alone()
            return
        if overflow is not None and not self._scaling.first_only and self.direction.needs_gradient:
            self.restore()
            raise RuntimeError(
                "scaler.step(opt) without opt.unscale_first(scaler): the first gradients are still scaled, and the "
                "scaler would not hear of their overflow; call it between the first backward and first_step() or "
                "perturbed(). The weights were restored, the step is given up"
            )
        if scale is not None:
            unscale_by(self._gradients(), scale)
        step.overflow = overflow
        self._finish()

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
        learn(self, train_closure, val_closure, scaler)
