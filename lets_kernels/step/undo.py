"""What undoes a step or a first pass that was begun, and what refuses one that may not begin or end now."""

import torch

from lets_kernels.base.foreign import own_step
from lets_kernels.step.base import given_up, untraced
from lets_kernels.step.engine import Engine
from lets_kernels.step.start import Start
from lets_kernels.step.step import Step, check_same_graph


class Undone(Engine):
    """The part of :class:`SAM` that brings weights back."""

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
        if self._start is not None:
            self.end_start(failed=True)
        step = self._step
        if step is not None:
            step.given_up = True
            if step.is_perturbed:
                self.network.pass_failed()
            with torch.no_grad():
                step.restore()
            self._step = None
            self._scaling.give_up()

    def begin_start(self) -> None:
        """Move the weights to where the first pass is made; what :meth:`first_pass` does on the way in."""
        self._started = False
        if self.direction.starts:
            self._agreed_space()  # the schedule may draw
            if self._perturbs(None):
                self._forget_trial()
                self._start = start = Start(self)
                start.move()

    def end_start(self, failed: bool) -> None:
        """Bring them back."""
        start = self._start
        if start is not None:
            if failed:
                start.given_up = True
                self.network.pass_failed()
            start.restore()
            self._start, self._started = None, not failed and not start.given_up

    @untraced
    def refuse_another_step(self, what: str) -> None:
        """``RuntimeError`` if a step has been begun and its weights are perturbed."""
        self._heal()
        self._refuse_while_perturbed(what)

    @property
    def begun_step(self) -> Step:
        """The step that was begun, or ``RuntimeError`` if a signal handler has called :meth:`restore` since."""
        step = self._step
        if step is None:
            raise given_up()
        return step

    def _heal(self) -> None:
        """Undo a perturbation that an interrupt cut off before it was complete, or while it was being undone."""
        step, start = self._step, self._start  # a signal handler may take them away at any time
        if (step is not None and step.torn) or (start is not None and start.torn):
            self.restore()

    def _refuses_to_finish(self, step: Step) -> RuntimeError | None:
        """What stands against the second part of a step that may still be taken otherwise, or None."""
        try:
            check_same_graph(step.captured, "second_step()", "first_step()")
        except RuntimeError as error:
            return error
        if self._scaling.first_only and step.overflow is None:
            return RuntimeError(
                "the first gradients were unscaled by unscale_first(), these are still scaled: take the step with "
                "scaler.step(opt), which unscales them too (unless scaler.unscale_(opt) has done so)"
            )
        return None

    def _step_alone(self) -> None:
        """``step()`` with nothing begun: what checkpointing tools call, with zero gradients or lr = 0."""
        self.refuse_another_step("step()")
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            return
        if all(float(group.get("lr", 1.0)) == 0 for group in self.param_groups):
            if not self.state:
                own_step(self.base_optimizer)  # makes the state, moves nothing
            kept = (*self.direction.held, *self.descent.held, *self.radius.held)
            self.held.make([b.all_runs() for b in self._space().buckets], kept)
            self.radius.make_state()
        elif any(map(torch.any, grads)):
            raise RuntimeError(
                "step() without a perturbation before it: call step(closure), or first_step() and second_step(), or "
                "step() after `with opt.perturbed():`; base_optimizer.step() takes a step without one. A framework "
                "that calls the closure itself (Lightning's 16-mixed) leaves no room for the second pass: use "
                "bf16-mixed, or manual optimisation with a loss scaler of your own"
            )
