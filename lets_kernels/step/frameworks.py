"""What training frameworks put around an optimizer and into its closures. No framework is imported here."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from operator import methodcaller
from typing import Any

_LIGHTNING = ("lightning", "pytorch_lightning")


def stand_aside(proxy: type, ours: type) -> None:
    """Let a proxy hand everything on to its optimizer, if it inherits from our class only to pass ``isinstance``.

    Lightning and Fabric make such classes. Without this our methods would run on the proxy itself, and what a step
    leaves behind would stay in the proxy. A class that inherits from ours for any other purpose is left alone.
    """
    front = proxy.__bases__[0]
    if not hasattr(front, "__getattr__"):
        return
    for cls in (c for c in proxy.__mro__[1:] if issubclass(c, ours)):
        for name in vars(cls):
            if not name.startswith("__") and not hasattr(front, name):  # if `front` is ours, it has every name
                setattr(proxy, name, property(methodcaller("__getattr__", name)))


def unwrap(closure: Any) -> Any:
    """The closure that ``step`` was meant to get: Lightning's optimizer passes a closure even if it was given none.

    Raises:
        RuntimeError: the closure of Lightning's automatic optimisation, while it accumulates gradients.
    """
    if not isinstance(closure, partial) or not closure.args:
        return closure
    inner = closure.args[-1]
    if getattr(inner, "__module__", "").partition(".")[0] not in _LIGHTNING:
        return closure
    if getattr(inner, "__name__", "") == "do_nothing_closure":
        closure()  # for the hooks that Lightning runs in it
        return None
    if getattr(inner, "_zero_grad_fn", inner) is None:
        raise RuntimeError(
            "accumulate_grad_batches under automatic optimisation: the second pass would see the last batch only. Use "
            "manual optimisation with a closure over all batches of the step, or accumulate_grad_batches=1"
        )
    return closure


@contextmanager
def no_scaler_steps(optimizer: Any) -> Iterator[None]:
    """Around closures: no scaler steps within them. Lightning asks there whether to clip, and would refuse in bf16."""
    try:
        optimizer._step_supports_amp_scaling = False
        yield
    finally:
        optimizer.__dict__.pop("_step_supports_amp_scaling", None)
