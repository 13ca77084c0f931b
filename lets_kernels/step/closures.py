"""``step(closure)``: the passes that a closure makes, and how the step sees whether the closure zeroes gradients."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lets_kernels.around.amp import Scaler
from lets_kernels.ops.memory import capturing
from lets_kernels.parts.samples import Closure
from lets_kernels.space.shards import is_spread, version
from lets_kernels.step.contexts import FirstPassContext
from lets_kernels.step.convention import Guess
from lets_kernels.step.engine import Engine
from lets_kernels.step.losses import as_loss, loss_in
from lets_kernels.step.workspace import given_up


def closure_step(e: Engine, closure: Closure, scaler: Scaler | None, said: bool | None) -> Any:
    """:meth:`SAM.step` over one closure.

    Returns:
        What the closure returned for the first pass; None if the caller made the first pass.
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
        e.mark_gradients()  # a failed pass made them: no step may start from them
        e.work.setting.network.statistics.keep()
        raise
    return loss


def _by_closure(e: Engine, closure: Closure, scaler: Scaler | None) -> Any:
    """The closure makes every pass."""
    e.work.drop_gradients()
    if not e.work.setting.direction.needs_gradient:
        return _second_pass(e, closure, scaler, None, [])[1]
    return _from_first(e, closure, scaler, _first_pass(e, closure, scaler))


def _from_first(e: Engine, closure: Closure, scaler: Scaler | None, loss: Any) -> Any:
    _second_pass(e, closure, scaler, loss, [])
    e.now.convention.began(False, closure)
    return loss


def _by_caller(e: Engine, closure: Closure, scaler: Scaler | None, guess: Guess) -> Any:
    """The caller has made the first pass. If the closure is then seen to zero, it makes every pass instead."""
    if scaler is not None:
        try:
            e.work.scaling.unscale(scaler, e.work.groups)
        except AssertionError:  # the scaler has not scaled anything yet, so these gradients were not made for this step
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
    """The closure is called as if for the first pass. If it does not zero the gradients, the caller made that pass."""
    e.work.tables.agreed()  # finds the ranks that take part
    watch = Watch(e, _with_gradients(e))
    e.work.setting.network.statistics.hold()  # this call may be one pass too many
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
    """Begin the step again, after a pass that belongs to no step."""
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
    """The way from the first gradients to the second ones.

    Returns:
        Whether the closure zeroed the gradients of ``watched`` (None if they were not watched); and what it returned.
    """
    zeroed, returned = None, None
    if e.begin(zero_grad=True, loss=loss_in(e.work.setting.samples.loss(loss))):
        watch = Watch(e, watched)
        try:
            returned = e.work.setting.samples.second(e.work.a_pass(scaler), closure)
        finally:
            watch.ends()
        zeroed = watch.saw_zeroing() if watched else None
        while not zeroed and e.begun_step.ascents_left:
            e.begin(zero_grad=True, loss=None)
            returned = e.work.setting.samples.second(e.work.a_pass(scaler), closure)
        e.begun_step.perturbed_loss = loss_in(e.work.setting.samples.loss(returned))
    else:
        e.begun_step.return_gradients()
    return zeroed, returned


def _with_gradients(e: Engine) -> list[Tensor]:
    """The parameters with a gradient; none in a captured step, which is not watched: a replay cannot decide again."""
    if capturing():
        return []
    return [p for group in e.work.groups for p in group["params"] if p.requires_grad and p.grad is not None]


class Watch:
    """Zeros in the place of gradients, to see whether a closure zeroes: it then drops them, or writes zeros over them.

    The zeros are -0: a gradient added to -0 keeps every bit. They are looked at when backward reaches each of them.
    """

    def __init__(self, e: Engine, params: Sequence[Tensor]) -> None:
        self._engine, self._calls = e, e.now.zeroed
        self._before = [(p, p.grad) for p in params]
        with torch.no_grad():
            self._zeros = [_zeros_for(p) for p in params]
        self._versions = list(map(version, self._zeros))
        self._reached = [False] * len(params)
        self._zeroed = False
        self._replaced: list[Tensor | None] = []
        self._hooks: list[RemovableHandle] = []
        for i, (p, zero) in enumerate(zip(params, self._zeros, strict=True)):
            p.grad = zero
            self._hooks.append(p.register_hook(partial(self._reach, i)))

    def _reach(self, i: int, _: Tensor) -> None:
        """Backward has reached the i-th parameter: was its zero dropped, or written to, before?"""
        if not self._reached[i]:
            self._reached[i] = True
            self._zeroed = self._zeroed or self._is_another(i)

    def _is_another(self, i: int) -> bool:
        (p, _), zero = self._before[i], self._zeros[i]
        if p.grad is not zero or version(zero) != self._versions[i]:
            return True
        # A write through grad.data shows only in the sign of zero, which is not read where that waits for a device.
        seen = zero.numel() and zero.device.type == "cpu" and not is_spread(zero) and not zero.is_complex()
        return bool(seen and not torch.signbit(zero.flatten()[0]))

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients that were there before the zeros."""
        return [grad for _, grad in self._before if grad is not None]

    def ends(self) -> None:
        """The closure has been called, or has failed. A gradient that it did not touch is None again."""
        for hook in self._hooks:
            hook.remove()
        for i, (p, _) in enumerate(self._before):
            if p.grad is not self._zeros[i]:
                self._replaced.append(p.grad)
            elif not self._reached[i] and not self._holds_gradient(i):
                p.grad = None

    def _holds_gradient(self, i: int) -> bool:
        """True if FSDP or DDP wrote a gradient without the parameter's own backward. A zero that is scaled is none."""
        zero = self._zeros[i]
        return version(zero) != self._versions[i] and (is_spread(zero) or bool(zero.any()))

    def saw_zeroing(self) -> bool:
        """Did the closure zero gradients? If it did on one rank, the answer is True on every rank that takes part."""
        zeroed = self._zeroed or self._engine.now.zeroed != self._calls
        replicas = self._engine.work.setting.replicas
        if not replicas.groups:  # DDP may put other gradients there at any time
            # Backward itself replaces a gradient only with create_graph=True.
            zeroed = zeroed or any(g is None or not g.requires_grad for g in self._replaced)
        return replicas.any(zeroed, self._engine.work.progress.home)

    def give_back(self) -> None:
        """Put back the gradients that were there before."""
        for p, grad in self._before:
            p.grad = grad


def _zeros_for(p: Tensor) -> Tensor:
    dtype = getattr(p, "grad_dtype", None) or p.dtype
    like = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    return like.neg_()
