"""Who makes the first gradient of ``step(closure)``. What the closure does to gradients shows it."""

import enum
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from lets_kernels.base.fused import OWN_CODE
from lets_kernels.ops.memory import capturing
from lets_kernels.parts.samples import Closure
from lets_kernels.space.shards import is_spread
from lets_kernels.step.workspace import Workspace

_CODES = 64
#: Where the function inside lies: of methods, of partial, of functools.wraps, of torch.compile.
_INNER = ("__func__", "func", "__wrapped__", "_torchdynamo_orig_callable")
_LAYERS = 16


class ClosureWarning(UserWarning):
    """``step(closure)`` found gradients, and nothing shows whether they are the first gradients of the step.

    Examples:
        >>> opt = SAM([w], SGD, rho=5.0, lr=0.1)
        >>> loss = opt.step(closure, first_backward=False)  # says who makes the first gradient: no warning
    """


class Guess(enum.Enum):
    """Who makes a step's first gradient, before the closure has been called."""

    CLOSURE = enum.auto()
    CALLER = enum.auto()
    #: The caller, as far as is known: the closure did not zero before. The step watches whether it does now.
    KNOWN_CALLER = enum.auto()
    #: Probably the caller. If the closure then zeroes, the step is taken once more, from its beginning.
    LIKELY_CALLER = enum.auto()
    #: Not known. The closure is called first, at θ, and what it does decides.
    OPEN = enum.auto()


class Convention:
    """Who makes the first gradient of a step: the closure, or its caller in a backward before ``step(closure)``.

    A closure that zeroes gradients makes all of them, whatever was there before. With a closure that does not zero, the
    caller made the gradients that are new since the last step, unless closures have begun earlier steps. Whether a
    closure zeroes is not guessed from gradients: zeros in the place of gradients show it.
    """

    def __init__(self) -> None:
        #: Closures, by their code: True if the closure was seen to zero, False if it was seen not to.
        self._zeroing: dict[object, bool] = {}
        #: Whether the caller began the last step; None if nothing has shown it.
        self._caller: bool | None = None
        #: Closures make every gradient, and no step asks any more: they zero, or a warning has said that they do not.
        self.settled = False

    def look(
        self, w: Workspace, closure: Closure, said: bool | None, begun: bool, are_new: Callable[[], bool]
    ) -> Guess:
        """Who makes the first gradient?

        Args:
            w: what the step works with.
            closure: the closure of the step.
            said: what ``first_backward=`` says.
            begun: a first pass was made inside ``first_pass()``.
            are_new: are there gradients that no step has used?

        Raises:
            RuntimeError: ``first_backward=True``, and there is no new gradient.
            ValueError: ``first_backward=True``, and the method has no use for the caller's gradient.
        """
        if said:
            _check_said(w, are_new)
        setting = w.setting
        if said is not None or setting.samples.per_sample or not setting.direction.needs_gradient or self.settled:
            return Guess.CALLER if said else Guess.CLOSURE
        if self._caller is not False and begun:  # with opt.first_pass(): was around it
            return Guess.CALLER
        if setting.direction.starts or not are_new():  # a first pass that starts elsewhere is made inside first_pass()
            return Guess.CLOSURE
        zeroing = self._zeroing.get(_code(closure))
        if zeroing:
            return Guess.CLOSURE
        if zeroing is None and (_mentions_zeroing(closure) or self._caller is False):
            return Guess.OPEN
        if not self.are_callers(w.gradients()):
            return Guess.CLOSURE
        if zeroing is False:  # ranks would have to look at the same gradients, and to agree
            return Guess.CALLER if setting.replicas.groups else Guess.KNOWN_CALLER
        # A step cannot always undo what it does between its passes. Where it cannot, the closure is called first.
        waits = setting.learning is not None and setting.learning.waits
        remembers = setting.direction.remembers or setting.length.remembers
        undone = setting.schedule.capturable and not (remembers or waits)
        return Guess.LIKELY_CALLER if undone else Guess.OPEN

    def are_callers(self, gradients: Sequence[Tensor]) -> bool:
        """Did the caller make these new gradients? The closure does not zero. Warns if they are dropped instead."""
        if self._caller:
            return True
        nothing = _are_nothing(gradients)
        if self._caller is False:
            self.settled = True
            if not nothing:
                _warn_of_gradients()
        return self._caller is None and not nothing

    def saw(self, closure: Closure, zeroes: bool) -> None:
        """Remember whether this closure zeroed the zeros in the place of gradients."""
        if len(self._zeroing) >= _CODES:
            self._zeroing.clear()
        self._zeroing[_code(closure)] = zeroes

    def began(self, by_caller: bool, closure: Closure) -> None:
        """A step was taken; ``by_caller`` says who made its first gradient."""
        self._caller = by_caller
        if not by_caller and not self.settled:
            zeroing = self._zeroing.get(_code(closure))
            self.settled = _mentions_zeroing(closure) if zeroing is None else zeroing


def _warn_of_gradients() -> None:
    warnings.warn(
        "there are new gradients before step(closure), and the closure does not zero gradients. It made the first "
        "gradient of the steps before, so it makes this step's too, and the new gradients were dropped. Say what is "
        "meant: step(closure, first_backward=True) takes them for the first gradient, first_backward=False drops them. "
        "A closure that begins with optimizer.zero_grad() needs neither",
        ClosureWarning,
        stacklevel=_outside(),
    )


def _outside() -> int:
    """The ``stacklevel`` of the code that called the package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(OWN_CODE):
        frame, level = frame.f_back, level + 1
    return level


def _check_said(w: Workspace, are_new: Callable[[], bool]) -> None:
    setting = w.setting
    if setting.samples.per_sample:
        raise ValueError(
            f"first_backward=True: {type(setting.samples).__name__} needs the loss of each sample from both passes; "
            "let step(closure) call the closure for the first pass too"
        )
    if not setting.direction.needs_gradient:
        raise ValueError(
            f"first_backward=True: {type(setting.direction).__name__} has no first pass: call step(closure) alone"
        )
    if not are_new():
        raise RuntimeError(
            "first_backward=True, and there is no new gradient: call backward() before step(closure), or leave "
            "first_backward out"
        )


def _code(closure: Closure) -> object:
    """The closure's code, which stays the same if the closure is made anew for every step."""
    function: Any = closure
    for _ in range(_LAYERS):
        inner = next((found for name in _INNER if (found := getattr(function, name, None)) is not None), None)
        if inner is None:
            break
        function = inner
    return getattr(function, "__code__", type(function))


def _mentions_zeroing(closure: Closure) -> bool:
    """True if the closure's code names ``zero_grad``, or if a function that it calls by name does.

    This guess may save a pass. What the closure is seen to do decides.
    """
    seen: set[CodeType] = set()

    def search(function: Any, depth: int) -> bool:
        while isinstance(function, partial):
            function = function.func
        function = getattr(function, "__func__", function)
        if not isinstance(function, FunctionType):
            function = vars(type(function)).get("__call__")
        if not isinstance(function, FunctionType) or function.__code__ in seen:
            return False
        seen.add(function.__code__)
        names = {name for code in _codes(function.__code__) for name in code.co_names}
        if "zero_grad" in names:
            return True
        called = [function.__globals__.get(name) for name in names]
        for cell in function.__closure__ or ():
            try:
                called.append(cell.cell_contents)
            except ValueError:  # the cell is not filled yet
                continue
        return depth > 0 and any(search(f, depth - 1) for f in called if isinstance(f, (FunctionType, partial)))

    return search(closure, depth=2)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _are_nothing(gradients: Sequence[Tensor]) -> bool:
    """True for zeros that ``zero_grad(set_to_none=False)`` has left.

    The values are read only if the gradients were written to after backward made them. Only the first steps, whose
    convention is in doubt, ask this, so later steps do not wait for it.
    """
    if capturing() or any(is_spread(g) or g.layout is not torch.strided for g in gradients):
        return False  # a part of a gradient tells nothing of the others
    if any(g._version == 0 for g in gradients):  # as backward leaves them
        return False
    return not any(bool(g.any()) for g in gradients)
