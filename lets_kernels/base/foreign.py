"""Base optimizers from other packages: which are refused, and how their own steps are taken."""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import optimizer as _torch


def check_steps_alone(optimizer: type) -> None:
    """Refuse an optimizer that calls the closure itself, as LBFGS does: ``TypeError``."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")  # type: ignore[attr-defined]
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(f"{optimizer.__name__} calls the closure itself; take an optimizer whose step() needs none")


def check_saves(optimizer: torch.optim.Optimizer) -> None:
    """``TypeError`` for an optimizer whose saved state has another layout than torch's, before training begins."""
    if type(optimizer).state_dict is torch.optim.Optimizer.state_dict:
        return
    name = type(optimizer).__name__
    try:
        found = optimizer.state_dict()
    except RuntimeError:  # it has a state only at times, and says so: ZeroRedundancyOptimizer after consolidation
        return
    except Exception as error:
        raise TypeError(f"{name}.state_dict() fails, so nothing could be saved: {error!r}") from error
    lacks = [key for key in ("state", "param_groups") if not isinstance(found, Mapping) or key not in found]
    if lacks:
        raise TypeError(
            f"{name}.state_dict() lacks {' and '.join(map(repr, lacks))}, so nothing could be saved or loaded through "
            f"this optimizer. If {name} goes around another optimizer, let it go around this one: {name}(SAM(...))"
        )


def own_step(optimizer: torch.optim.Optimizer) -> None:
    """``optimizer.step()`` inside a step of our optimizer.

    Hooks that were registered for all optimizers run around our step, so they do not run again around this one. If this
    step fails, the error gets a note on which parameters were stepped.
    """
    with without_global_hooks():
        try:
            optimizer.step()
        except BaseException as error:
            _note(
                error,
                f"{type(optimizer).__name__}.step() failed within this step: the parameters after the one where it "
                "failed have not been stepped, the parameters before may have been. Go on from a saved state, or mend "
                "what the error says and take the next step",
            )
            raise


@contextmanager
def without_global_hooks() -> Iterator[None]:
    """Empty the dicts of global hooks and fill them again; they stay the same dicts, since handles refer to them."""
    hooks: list[dict[int, Any]] = [_torch._global_optimizer_pre_hooks, _torch._global_optimizer_post_hooks]
    if not any(hooks):
        yield
        return
    before = [dict(each) for each in hooks]
    try:
        for each in hooks:
            each.clear()
        yield
    finally:
        for each, own in zip(hooks, before, strict=True):
            own.update(each)
            each.clear()
            each.update(own)


def _note(error: BaseException, text: str) -> None:
    if hasattr(error, "add_note"):
        error.add_note(text)
    else:  # Python 3.10
        warnings.warn(text, RuntimeWarning, stacklevel=3)
