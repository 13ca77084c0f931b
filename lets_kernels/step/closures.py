"""``step(closure)``: the passes that a closure makes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lets_kernels.around.amp import Scaler
from lets_kernels.space.runs import capturing
from lets_kernels.step.base import given_up
from lets_kernels.step.convention import Guess, Watch
from lets_kernels.step.step import Closure, as_loss, loss_in

if TYPE_CHECKING:
    from lets_kernels.sam import SAM


def closure_step(o: "SAM", closure: Closure, scaler: Scaler | None, said: bool | None) -> Any:
    """:meth:`SAM.step` over one closure.

    Returns:
        What the closure returned for the first pass; None if the caller made that.
    """
    guess = o._convention.look(o, closure, said)
    try:
        if guess is Guess.CLOSURE:
            loss = _by_closure(o, closure, scaler)
        elif guess is Guess.OPEN:
            loss = _by_either(o, closure, scaler)
        else:
            loss = _by_caller(o, closure, scaler, guess)
        o._finish()
    except BaseException:
        o.restore()
        o._forget_pass()
        o._scaling.give_up()
        o._mark_gradients()  # of a pass that failed: no step may start from them
        o.network.statistics.keep()
        raise
    return loss


def _by_closure(o: "SAM", closure: Closure, scaler: Scaler | None) -> Any:
    """Every pass is the closure's."""
    o._drop_gradients()
    if not o.direction.needs_gradient:
        return _second_pass(o, closure, scaler, None, [])[1]
    return _from_first(o, closure, scaler, _first_pass(o, closure, scaler))


def _from_first(o: "SAM", closure: Closure, scaler: Scaler | None, loss: Any) -> Any:
    _second_pass(o, closure, scaler, loss, [])
    o._convention.began(False, closure)
    return loss


def _by_caller(o: "SAM", closure: Closure, scaler: Scaler | None, guess: Guess) -> Any:
    """The first pass is the caller's, unless the closure is seen to zero: then it makes every one."""
    if scaler is not None:
        try:
            o._scaling.unscale(scaler, o.param_groups)
        except AssertionError:  # it has not scaled anything yet, so these gradients were not made for this step
            if guess is not Guess.LIKELY_CALLER:
                raise
            o._scaling.give_up()
            o._scaling.begin(scaler)
            return _by_closure(o, closure, scaler)
    watched = [] if guess is Guess.CALLER else _with_gradients(o)
    if guess is Guess.KNOWN_CALLER:
        watched = sorted(watched, key=Tensor.numel)[:1]
    zeroed, _ = _second_pass(o, closure, scaler, None, watched)
    if zeroed is not None:
        o._convention.saw(closure, zeroed)
    if zeroed:
        _begin_again(o, scaler)
        return _by_closure(o, closure, scaler)
    o._convention.began(True, closure)
    return None


def _by_either(o: "SAM", closure: Closure, scaler: Scaler | None) -> Any:
    """The closure is called as for the first pass; if it does not zero what is there, that was the caller's."""
    o._agreed_space()  # who takes part
    watch = Watch(o, _with_gradients(o))
    o.network.statistics.hold()  # perhaps it is one pass too many
    try:
        loss = _first_pass(o, closure, scaler)
    finally:
        watch.ends()
    zeroed = watch.saw_zeroing()
    o._convention.saw(closure, zeroed)
    if not zeroed and o._convention.are_callers(watch.gradients):
        watch.give_back()
        _begin_again(o, scaler)
        return _by_caller(o, closure, scaler, Guess.CALLER)
    o.network.statistics.keep()
    return _from_first(o, closure, scaler, loss)


def _begin_again(o: "SAM", scaler: Scaler | None) -> None:
    """A pass was made that belongs to no step."""
    o.restore()
    o.network.statistics.release()
    o._forget_pass()
    o._scaling.give_up()
    o._scaling.begin(scaler)
    o._passes += 1


def _first_pass(o: "SAM", closure: Closure, scaler: Scaler | None) -> Any:
    context = o.first_pass()
    with context:
        loss = o.samples.first(o._pass(scaler), closure)
    if context.given_up:
        raise given_up()
    if o.radius.learns:
        as_loss(o.samples.loss(loss), "closure")
    return loss


def _second_pass(
    o: "SAM", closure: Closure, scaler: Scaler | None, loss: Any, watched: Sequence[Tensor]
) -> tuple[bool | None, Any]:
    """From the first gradients, which are there, to the second.

    Returns:
        If the closure was seen to zero the gradients of ``watched``, None if nobody saw it; and what it returned.
    """
    zeroed, returned = None, None
    if o.first_step(zero_grad=True, loss=loss_in(o.samples.loss(loss))):
        watch = Watch(o, watched)
        try:
            returned = o.samples.second(o._pass(scaler), closure)
        finally:
            watch.ends()
        zeroed = watch.saw_zeroing() if watched else None
        o.begun_step.perturbed_loss = loss_in(o.samples.loss(returned))
    else:
        o.begun_step.return_gradients()
    return zeroed, returned


def _with_gradients(o: "SAM") -> list[Tensor]:
    """The parameters that have one; nobody watches what goes into a CUDA graph, which could not decide again."""
    if capturing():
        return []
    return [p for group in o.param_groups for p in group["params"] if p.requires_grad and p.grad is not None]
