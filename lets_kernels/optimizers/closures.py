"""``step(closure)``: the passes that a closure makes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lets_kernels.amp import Scaler
from lets_kernels.optimizers.convention import Watch
from lets_kernels.optimizers.step import Closure, as_loss, loss_in
from lets_kernels.runs import capturing

if TYPE_CHECKING:
    from lets_kernels.optimizers.sam import SAM


def closure_step(o: "SAM", closure: Closure, scaler: Scaler | None, said: bool | None) -> Any:
    """:meth:`SAM.step` over one closure.

    Returns:
        What the closure returned for the first pass; None if the caller made that.
    """
    by_caller, certain = o._convention.look(o, closure, said)
    try:
        if by_caller:
            loss = _by_caller(o, closure, scaler, certain)
        elif certain:
            loss = _by_closure(o, closure, scaler)
        else:
            loss = _by_either(o, closure, scaler)
        o._finish()
    except BaseException:
        o.restore()
        o._forget_pass()
        o._scaling.give_up()
        o._mark_gradients()  # of a pass that failed: no step may start from them
        raise
    return loss


def _by_closure(o: "SAM", closure: Closure, scaler: Scaler | None) -> Any:
    """Every pass is the closure's."""
    o._drop_gradients()
    if not o.direction.needs_gradient:
        return _second_pass(o, closure, scaler, None, [])[1]
    loss = _first_pass(o, closure, scaler)
    watched = [] if o._convention.knows(closure) else _with_gradients(o)
    return _second_by_closure(o, closure, scaler, loss, sorted(watched, key=Tensor.numel)[:1])


def _second_by_closure(o: "SAM", closure: Closure, scaler: Scaler | None, loss: Any, watched: Sequence[Tensor]) -> Any:
    zeroed, _ = _second_pass(o, closure, scaler, loss, watched)
    if zeroed is not None:
        o._convention.saw(closure, zeroed)
    o._convention.began(False, closure)
    return loss


def _by_caller(o: "SAM", closure: Closure, scaler: Scaler | None, certain: bool) -> Any:
    """The first pass is the caller's, unless the closure is seen to zero: then it makes every one."""
    if scaler is not None:
        o._scaling.unscale(scaler, o.param_groups)
    zeroed, _ = _second_pass(o, closure, scaler, None, [] if certain else _with_gradients(o))
    if zeroed is not None:
        o._convention.saw(closure, zeroed)
    if zeroed:
        _begin_again(o, scaler)
        return _by_closure(o, closure, scaler)
    o._convention.began(True, closure)
    return None


def _by_either(o: "SAM", closure: Closure, scaler: Scaler | None) -> Any:
    """The closure seems to zero what is there, so it makes the first pass; if it does not, that was the caller's."""
    watch = Watch(o, _with_gradients(o))
    try:
        loss = _first_pass(o, closure, scaler)
    finally:
        zeroed = watch.ends()
    o._convention.saw(closure, zeroed)
    if not zeroed and o._convention.are_callers(watch.gradients):
        watch.give_back()
        _begin_again(o, scaler)
        return _by_caller(o, closure, scaler, certain=True)
    return _second_by_closure(o, closure, scaler, loss, [])


def _begin_again(o: "SAM", scaler: Scaler | None) -> None:
    """A pass was made that belongs to no step."""
    o.restore()
    o._scaling.give_up()
    o._scaling.begin(scaler)
    o._passes += 1


def _first_pass(o: "SAM", closure: Closure, scaler: Scaler | None) -> Any:
    with o.first_pass():
        loss = o.samples.first(o._pass(scaler), closure)
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
            seen = watch.ends()
        zeroed = seen if watched else None
        o.begun_step.perturbed_loss = loss_in(o.samples.loss(returned))
    else:
        o.begun_step.return_gradients()
    return zeroed, returned


def _with_gradients(o: "SAM") -> list[Tensor]:
    """The parameters that have one; nobody watches what goes into a CUDA graph, which could not decide again."""
    if capturing():
        return []
    return [p for group in o.param_groups for p in group["params"] if p.requires_grad and p.grad is not None]
