"""What stands around an optimizer's methods: torch.compile, gradient mode, profilers and step hooks.

torch's own decorators for the last three cost a tenth of what a small step takes, so what they do without need is left
out here.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo  # what torch's own optimizers use; imports the compiler at the first call
from torch.optim import optimizer as of_torch

P = ParamSpec("P")
R = TypeVar("R")

#: For functions that change state which a trace does not see: torch.compile runs them as plain Python between graphs.
untraced = _disable_dynamo


def without_grad(function: Callable[P, R]) -> Callable[P, R]:
    """As ``torch.no_grad()`` around a function, without a new context at each call."""

    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return inner


def _watched(optimizer: torch.optim.Optimizer) -> bool:
    """True if step hooks or a profiler look at a step of the optimizer."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or of_torch._global_optimizer_pre_hooks
        or of_torch._global_optimizer_post_hooks
        or torch.autograd.profiler._is_profiler_enabled
        or torch._C._autograd._profiler_enabled()
    )


def hooked(step: Callable[..., R]) -> Callable[..., R]:
    """As ``torch.optim.Optimizer.profile_hook_step``: runs the step hooks, and labels the step for profilers.

    Without hooks and profilers the method runs as it is. An ``ExecutionTraceObserver`` that runs without a profiler
    sees the ops of a step without the label.
    """
    around = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def inner(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> R:
        return (around if _watched(self) else step)(self, *args, **kwargs)

    return inner
