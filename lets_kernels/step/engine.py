"""The life of a step: how a step is begun, finished, given up and healed. SAM is the public face of the engine."""

import warnings
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lets_kernels.around.amp import unscale_by
from lets_kernels.around.publication import Publication
from lets_kernels.base.foreign import own_step
from lets_kernels.learning.hypergradient import Trial
from lets_kernels.ops.layouts import mark_gradients
from lets_kernels.parts.joined import JoinedState
from lets_kernels.parts.passes import Moment
from lets_kernels.parts.progress import Progress
from lets_kernels.parts.radius import RadiusWarning
from lets_kernels.space.shards import versions
from lets_kernels.step.capture import check_same_graph
from lets_kernels.step.convention import Convention
from lets_kernels.step.losses import as_scalar
from lets_kernels.step.setting import Setting
from lets_kernels.step.step import Root, Start, Step
from lets_kernels.step.tracing import untraced, without_grad
from lets_kernels.step.workspace import Tables, Workspace, given_up

_SEEN = "_lets_kernels_seen"
_ASCENDS = "_lets_kernels_ascends"
#: A warning comes after so many steps from which a radius could have learned and did not.
_MISSED = 10


@dataclass
class Now:
    """What goes on now: a copy of the optimizer, and an optimizer that loads a state, begin all of this anew.

    What a single step finds is the :class:`Step`'s, what surrounds a pass the network's.
    """

    #: A step has been begun: its weights may be perturbed.
    step: Step | None = None
    #: The weights are moved for a first pass.
    start: Start | None = None
    #: A first pass was made at weights that had been moved for it.
    started: bool = False
    #: The radius waits for the closures with which it learns from the last step; and the lesson, if that step has one.
    radius_waits: bool = False
    lesson: Trial | None = None
    #: Steps from which the radius could have learned and did not; None once it has learned from a step.
    missed: int | None = 0
    #: A step's number, and what the schedule said of that step: the schedule is usually asked once a step.
    decision: tuple[int, bool] | None = None
    #: Who makes the first gradients: the closure, or the caller of ``step``.
    convention: Convention = field(default_factory=Convention)
    #: Calls of ``zero_grad``.
    zeroed: int = 0
    #: What the last step measured, for ``metrics()``.
    seen: dict[str, Tensor | Root] = field(default_factory=dict)
    #: Whether the last step was fused with the restore, and if not, why.
    fused: bool = False
    fused_reason: str = "no step yet"


class Engine:
    """What an optimizer works with (``work``), what goes on now (``now``), and how a step changes both."""

    def __init__(self, setting: Setting, base: torch.optim.Optimizer, progress: Progress) -> None:
        self.work = Workspace(setting, base, progress, Tables(setting, base, progress, Publication(self)))
        self.now = Now()
        #: What users read as the state.
        self.joined = JoinedState(base, progress.held, setting.held)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: leaves out what goes on now, and the tables, which describe this memory."""
        w = self.work
        return {"setting": w.setting, "base": w.base, "progress": w.progress}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def begin_anew(self) -> None:
        """Another state has been loaded: what went on is forgotten, here and in the network, and so are the tables."""
        self.now, tables = Now(), self.work.tables
        self.work.setting.network.forget_pass()
        tables.space, tables.precision = None, {}

    # ---- refusals ----------------------------------------------------------------------------------------------------

    def refuse_while_perturbed(self, what: str) -> None:
        """``RuntimeError`` while the weights are not at θ."""
        step = self.now.step
        if self.now.start is not None:
            raise RuntimeError(
                f"{what} while the weights are moved away from theta for the first pass: leave "
                "`with opt.first_pass():` first, or call restore() to give the pass up"
            )
        if step is not None and step.is_perturbed:
            raise RuntimeError(
                f"{what} while the weights are perturbed: call second_step() after the second backward first, or "
                "restore() to give the perturbation up"
            )

    @untraced
    def refuse_another_step(self, what: str) -> None:
        """``RuntimeError`` if a step has been begun and its weights are perturbed."""
        self._heal()
        self.refuse_while_perturbed(what)

    def _heal(self) -> None:
        """Undo a perturbation that an interrupt cut off before it was complete, or while it was being undone."""
        step, start = self.now.step, self.now.start  # a signal handler may take them away at any time
        if (step is not None and step.torn) or (start is not None and start.torn):
            self.restore()

    @property
    def begun_step(self) -> Step:
        """The step that was begun, or ``RuntimeError`` if a signal handler has called :meth:`restore` since."""
        step = self.now.step
        if step is None:
            raise given_up()
        return step

    # ---- gradients: which are new, which the last step has seen ------------------------------------------------------

    def _marked(self) -> list[Tensor]:
        """The gradients that carry a mark: all, or only the first if closures make every gradient and few steps ask."""
        if not self.now.convention.settled:
            return self.work.gradients()
        each = (p.grad for group in self.work.groups for p in group["params"] if p.requires_grad)
        return list(islice((g for g in each if g is not None), 1))

    def mark_gradients(self) -> None:
        """Remember that the present gradients have been used, each in its version; a later backward makes new ones."""
        if not self.now.convention.settled and all(mark_gradients(g["params"], _SEEN) for g in self.work.groups):
            return
        marked = self._marked()
        for g, seen in zip(marked, versions(marked), strict=True):
            setattr(g, _SEEN, seen)

    def has_new_gradients(self) -> bool:
        marked = self._marked()
        return any(getattr(g, _SEEN, None) != now for g, now in zip(marked, versions(marked), strict=True))

    def zeroes(self) -> None:
        """``zero_grad()`` is called: a first pass that no step has followed is forgotten."""
        self.now.zeroed += 1
        step = self.now.step
        if step is not None and step.ascents_left and not step.is_perturbed:
            self.restore()  # its next ascent has lost its gradients
        if self.now.step is None:
            self.forget_pass()

    def forget_pass(self) -> None:
        """The gradients of a pass are dropped, and the step for which they were made is not taken."""
        self.work.setting.network.forget_pass()
        self.now.started = False
        if self.work.scaling.first_only:
            self.work.scaling.give_up()

    # ---- the first half ----------------------------------------------------------------------------------------------

    def _decide(self, moment: Moment) -> bool:
        """Whether the present step perturbs."""
        known, schedule, progress = self.now.decision, self.work.setting.schedule, self.work.progress
        # A schedule that looks at the gradient is asked once a first pass. A step that is begun again has a new one.
        if known is None or known[0] != progress.step or schedule.looks_at_gradient:
            known = progress.step, schedule.decide(moment)
            self.now.decision = known
        return known[1]

    def begin_start(self) -> None:
        """Move the weights away from θ for the first pass, if the direction starts elsewhere."""
        self.now.started = False
        if self.work.setting.direction.starts:
            self.work.tables.agreed()  # the schedule may draw random numbers
            if self._decide(Moment(self.work.progress.step, self.work.progress.random, None)):
                self._forget_lesson()
                self.now.start = start = Start(self.work)
                start.move()

    def end_start(self, failed: bool) -> None:
        """Bring the weights back from the first pass."""
        start = self.now.start
        if start is not None:
            if failed:
                start.given_up = True
                self.work.setting.network.pass_failed()
            start.restore()
            self.now.start, self.now.started = None, not failed and not start.given_up

    @without_grad
    def begin(self, zero_grad: bool, loss: Any) -> bool:
        """:meth:`SAM.first_step`."""
        w, now = self.work, self.now
        self._heal()
        if now.step is not None and now.step.ascents_left and not now.step.in_context:
            if now.step.is_perturbed or not self._begins_anew():
                return self._ascend(now.step, zero_grad)
            self.restore()
        self.refuse_while_perturbed("first_step()")
        now.step = None
        try:
            step = Step(w, as_scalar(loss), keep=not zero_grad)
            started, now.started = now.started, False
            step.prepare(self._decide, started)
            now.step = step
        except BaseException:
            self.forget_pass()
            w.scaling.give_up()
            raise
        try:
            # Gradients left in their place would be unscaled twice, if no second pass replaces them.
            unscaled = w.scaling.first_only and not step.perturbs
            if zero_grad:
                now.zeroed += 1
            if zero_grad or unscaled:
                w.drop_gradients()
            if now.radius_waits or now.lesson is not None:
                self._forget_lesson()
            step.perturb()
            if step.ascents_left:
                self.mark_gradients()
        except BaseException:
            self.restore()
            raise
        return step.perturbs or not w.setting.direction.needs_gradient

    def _ascend(self, step: Step, zero_grad: bool) -> bool:
        """The next of several ascents of a step, from the gradients at θ + ε."""
        # Ranks may lack gradients, one more than the other; they go on together.
        if step.perturbation.ascents and not self.work.setting.replicas.groups and not self.has_new_gradients():
            raise RuntimeError(
                "first_step() again, and no backward since: each ascent needs forward and backward at the perturbed "
                "weights first. restore() gives the step up"
            )
        try:
            check_same_graph(step.captured, "first_step()", "the one before it")
            step.ascend()
            if zero_grad:
                self.now.zeroed += 1
                self.work.drop_gradients()
            self.mark_gradients()
        except BaseException:
            self.restore()
            raise
        return True

    def leave_ascent(self) -> None:
        """A context has brought the weights back, and another ascent is to follow from the gradients made in it."""
        for g in self.work.gradients():
            setattr(g, _ASCENDS, True)

    def _begins_anew(self) -> bool:
        """The gradients are none of those that the last context left: the step with that ascent is not gone on with."""
        return not any(getattr(g, _ASCENDS, False) for g in self.work.gradients())

    def _forget_lesson(self) -> None:
        """The next step begins, and overwrites what the radius would have learned from the last one.

        Warns once if the radius misses steps because nobody calls ``radius_step``.
        """
        now = self.now
        missed, now.lesson, now.radius_waits = now.lesson is not None, None, False
        if now.missed is None or not missed:
            return
        now.missed += 1
        if now.missed == _MISSED:
            warnings.warn(
                f"the radius has not learned from any of {_MISSED} steps and stays where it began: call "
                "opt.radius_step(closure, val_closure) after every second_step(), or take steps with "
                "opt.step(closure, val_closure); LearnedRadius(validation='next') and rho='auto' need neither",
                RadiusWarning,
                stacklevel=2,
            )

    # ---- the second half ---------------------------------------------------------------------------------------------

    @without_grad
    def finish(self, zero_grad: bool = False) -> None:
        """:meth:`SAM.second_step`, without the hooks, which around :meth:`SAM.step` have run."""
        w, now, radius = self.work, self.now, self.work.setting.radius
        self._heal()
        step = now.step
        if step is None:
            raise RuntimeError("second_step() without first_step(): call first_step() after the first backward")
        if step.in_context:
            raise RuntimeError("the step is taken after `with opt.perturbed():`, not inside; leave the context first")
        refused: RuntimeError | None = None
        try:
            refused = self._refuses_to_finish(step)
            if refused is None:
                step.find_second_pass()
                now.fused, now.fused_reason = step.descend()
                if not w.setting.network.sync_perturbation:
                    w.scaling.tell(step.gate)
                now.lesson, now.step, now.radius_waits = step.lesson, None, radius.learns
                if now.lesson is not None and not radius.learns:
                    trial, now.lesson = now.lesson, None
                    assert w.setting.learning is not None
                    w.setting.learning.observe(trial, None, None, w.groups, w.setting.replicas)
        except BaseException:  # an interrupt after the base optimizer's step too: it must not be taken again
            self.restore()
            raise
        if refused is not None:
            raise refused
        w.scaling.end()
        now.seen = step.metrics()
        w.progress.count(step.passes, step.perturbs)
        w.base.__dict__["_opt_called"] = True  # what LR schedulers look at
        if zero_grad:
            self.zeroes()
            w.drop_gradients()
        else:
            self.mark_gradients()

    def _refuses_to_finish(self, step: Step) -> RuntimeError | None:
        """The error if the second half was called in a wrong way, and the step can still be taken in a right one."""
        try:
            check_same_graph(step.captured, "second_step()", "first_step()")
        except RuntimeError as error:
            return error
        if step.ascents_left:
            return RuntimeError(
                f"the step has {step.ascents_left} more of its {self.work.setting.direction.ascents} ascents to make: "
                "call first_step(), or enter perturbed(), after each backward while opt.ascents_left is not 0; "
                "step(closure) does it by itself"
            )
        if self.work.scaling.first_only and step.overflow is None:
            return RuntimeError(
                "unscale_first() unscaled the first gradients, the second ones are still scaled: take the step with "
                "scaler.step(opt), which unscales them too (unless scaler.unscale_(opt) has done so)"
            )
        return None

    def finish_begun(self, scale: Tensor | None, overflow: Tensor | None) -> bool:
        """``step()``: finish the step that was begun; a gradient scaler hands over its scale and its overflow flag.

        Returns:
            True if a step was taken.
        """
        step, scaling = self.now.step, self.work.scaling
        if step is None:
            self._step_alone()
            return False
        if overflow is not None and not scaling.first_only and self.work.setting.direction.needs_gradient:
            self.restore()
            raise RuntimeError(
                "scaler.step(opt) without opt.unscale_first(scaler): the first gradients are still scaled, and the "
                "scaler would not hear of their overflow; call opt.unscale_first(scaler) between the first backward "
                "and first_step() or perturbed(). The weights were restored, the step is given up"
            )
        if scale is not None:
            unscale_by(self.work.gradients(), scale)
        step.overflow = overflow
        self.finish()
        return True

    def _step_alone(self) -> None:
        """``step()`` when no step was begun: checkpointing tools call it so, with zero gradients or with lr = 0."""
        w = self.work
        self.refuse_another_step("step()")
        grads = [p.grad for p in w.params() if p.grad is not None]
        if not grads:
            return
        if all(float(group.get("lr", 1.0)) == 0 for group in w.groups):
            if not w.base.state:
                own_step(w.base)  # makes the state, moves nothing
            w.progress.held.make([b.all_runs() for b in w.tables.current().buckets], w.setting.held)
            w.setting.radius.make_state()
        elif any(map(torch.any, grads)):
            raise RuntimeError(
                "step() without a perturbation before it: call step(closure), or first_step() and second_step(), or "
                "step() after `with opt.perturbed():`; base_optimizer.step() takes a step without one. A framework "
                "that calls the closure itself (Lightning's 16-mixed) leaves no room for the second pass: use "
                "bf16-mixed, or manual optimisation with a loss scaler of your own"
            )

    @untraced
    def restore(self) -> None:
        """:meth:`SAM.restore`."""
        now = self.now
        if now.start is not None:
            self.end_start(failed=True)
        step = now.step
        if step is not None:
            step.given_up = True
            if step.is_perturbed:
                self.work.setting.network.pass_failed()
            with torch.no_grad():
                step.restore()
            now.step = None
            self.work.scaling.give_up()
