"""``step(closure)``: the passes that a closure makes."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lets_kernels.around.amp import Scaler
from lets_kernels.ops.memory import capturing
from lets_kernels.parts.samples import Closure
from lets_kernels.step.contexts import FirstPassContext
from lets_kernels.step.convention import Guess
from lets_kernels.step.engine import Engine
from lets_kernels.step.given_up import given_up
from lets_kernels.step.losses import as_loss, loss_in
from lets_kernels.step.watch import Watch


def closure_step(e: Engine, closure: Closure, scaler: Scaler | None, said: bool | None) -> Any:
    """:meth:`SAM.step` over one closure.

    Returns:
        What the closure returned for the first pass; None if the caller made that.
    """
    begun = e.work.setting.network.passed or e.now.started
    guess = e.now.convention.look(e.work, closure, said, begun, e.has_new_gradients)
    try:
        if guess is Guess.CLOSURE:
            loss = _by_closure(e, closure, scaler)
        elif guess is Guess.OPEN:
            loss = _by_either(e, closure, scaler)
        else:
            loss = _by_caller(e, closure, scaler, guess)
        e.finish()
    except BaseException:
        e.restore()
        e.forget_pass()
        e.work.scaling.give_up()
        e.mark_gradients()  # of a pass that failed: no step may start from them
        e.work.setting.network.statistics.keep()
        raise
    return loss


def _by_closure(e: Engine, closure: Closure, scaler: Scaler | None) -> Any:
    """Every pass is the closure's."""
    e.work.drop_gradients()
    if not e.work.setting.direction.needs_gradient:
        return _second_pass(e, closure, scaler, None, [])[1]
    return _from_first(e, closure, scaler, _first_pass(e, closure, scaler))


def _from_first(e: Engine, closure: Closure, scaler: Scaler | None, loss: Any) -> Any:
    _second_pass(e, closure, scaler, loss, [])
    e.now.convention.began(False, closure)
    return loss


def _by_caller(e: Engine, closure: Closure, scaler: Scaler | None, guess: Guess) -> Any:
    """The first pass is the caller's, unless the closure is seen to zero: then it makes every one."""
    if scaler is not None:
        try:
            e.work.scaling.unscale(scaler, e.work.groups)
        except AssertionError:  # it has not scaled anything yet, so these gradients were not made for this step
            if guess is not Guess.LIKELY_CALLER:
                raise
            e.work.scaling.give_up()
            e.work.scaling.begin(scaler)
            return _by_closure(e, closure, scaler)
    watched = [] if guess is Guess.CALLER else _with_gradients(e)
    if guess is Guess.KNOWN_CALLER:
        watched = sorted(watched, key=Tensor.numel)[:1]
    zeroed, _ = _second_pass(e, closure, scaler, None, watched)
    if zeroed is not None:
        e.now.convention.saw(closure, zeroed)
    if zeroed:
        _begin_again(e, scaler)
        return _by_closure(e, closure, scaler)
    e.now.convention.began(True, closure)
    return None


def _by_either(e: Engine, closure: Closure, scaler: Scaler | None) -> Any:
    """The closure is called as for the first pass; if it does not zero what is there, that was the caller's."""
    e.work.tables.agreed()  # who takes part
    watch = Watch(e.work, e.now, _with_gradients(e))
    e.work.setting.network.statistics.hold()  # perhaps it is one pass too many
    try:
        loss = _first_pass(e, closure, scaler)
    finally:
        watch.ends()
    zeroed = watch.saw_zeroing()
    e.now.convention.saw(closure, zeroed)
    if not zeroed and e.now.convention.are_callers(watch.gradients):
        watch.give_back()
        _begin_again(e, scaler)
        return _by_caller(e, closure, scaler, Guess.CALLER)
    e.work.setting.network.statistics.keep()
    return _from_first(e, closure, scaler, loss)


def _begin_again(e: Engine, scaler: Scaler | None) -> None:
    """A pass was made that belongs to no step."""
    e.restore()
    e.work.setting.network.statistics.release()
    e.forget_pass()
    e.work.scaling.give_up()
    e.work.scaling.begin(scaler)
    e.work.progress.gradients += 1


def _first_pass(e: Engine, closure: Closure, scaler: Scaler | None) -> Any:
    context = FirstPassContext(e)
    with context:
        loss = e.work.setting.samples.first(e.work.a_pass(scaler), closure)
    if context.given_up:
        raise given_up()
    if e.work.setting.radius.learns:
        as_loss(e.work.setting.samples.loss(loss), "closure")
    return loss


def _second_pass(
    e: Engine, closure: Closure, scaler: Scaler | None, loss: Any, watched: Sequence[Tensor]
) -> tuple[bool | None, Any]:
    """From the first gradients, which are there, to the second.

    Returns:
        If the closure was seen to zero the gradients of ``watched``, None if nobody saw it; and what it returned.
    """
    zeroed, returned = None, None
    if e.begin(zero_grad=True, loss=loss_in(e.work.setting.samples.loss(loss))):
        watch = Watch(e.work, e.now, watched)
        try:
            returned = e.work.setting.samples.second(e.work.a_pass(scaler), closure)
        finally:
            watch.ends()
        zeroed = watch.saw_zeroing() if watched else None
        e.begun_step.perturbed_loss = loss_in(e.work.setting.samples.loss(returned))
    else:
        e.begun_step.return_gradients()
    return zeroed, returned


def _with_gradients(e: Engine) -> list[Tensor]:
    """The parameters that have one; nobody watches what goes into a CUDA graph, which could not decide again."""
    if capturing():
        return []
    return [p for group in e.work.groups for p in group["params"] if p.requires_grad and p.grad is not None]
