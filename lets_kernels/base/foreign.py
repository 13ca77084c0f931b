"""Other people's optimizers within ours: what cannot be one, and how their own steps are taken."""

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
    """Refuse an optimizer whose saved state is laid out otherwise than torch's: ``TypeError``, and not in a year."""
    if type(optimizer).state_dict is torch.optim.Optimizer.state_dict:
        return
    name = type(optimizer).__name__
    try:
        found = optimizer.state_dict()
    except RuntimeError:  # it has one at times only, as ZeroRedundancyOptimizer when it is consolidated, and says so
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
    """``optimizer.step()`` within a step of ours.

    Hooks that were registered for all optimizers run around ours, so not once more around this one. An error from
    within says what it has left.
    """
    with _without_global_hooks():
        try:
            optimizer.step()
        except BaseException as error:
            _note(
                error,
                f"{type(optimizer).__name__}.step() failed within this step: the parameters that come after the one "
                "where it failed have not been stepped, those before may have been. Go on from a saved state, or mend "
                "what it says and take the next step",
            )
            raise


@contextmanager
def _without_global_hooks() -> Iterator[None]:
    """The dicts stay the same ones, since handles that remove hooks refer to them."""
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
