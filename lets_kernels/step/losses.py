"""The loss in what a closure or a caller hands over."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def as_scalar(loss: Any) -> Tensor | None:
    """A loss as a 0-d float64 tensor without a graph; None stays None.

    Raises:
        ValueError: the loss is no number.
    """
    found = None if loss is None else loss_in(loss)
    if found is None and loss is not None:
        raise ValueError(f"loss must be a number, or a tensor with one element, not {_described(loss)}")
    return found


def loss_in(returned: Any) -> Tensor | None:
    """The loss in what a closure returned, as a 0-d float64 tensor without a graph; None if no loss is found there.

    The loss is a number or a tensor with one element: alone, under ``"loss"`` in a mapping, or first in a tuple or
    list.
    """
    if isinstance(returned, Mapping):
        returned = returned.get("loss")
    elif isinstance(returned, (tuple, list)):
        returned = returned[0] if returned else None
    if isinstance(returned, Tensor):
        one = returned.layout is torch.strided and not returned.is_complex() and returned.numel() == 1
        return returned.detach().double().reshape(()) if one else None
    if not isinstance(returned, Real):
        return None
    try:
        return torch.tensor(float(returned), dtype=torch.float64, device="cpu")
    except OverflowError:  # an integer beyond float64
        return None


def as_loss(returned: Any, name: str) -> Tensor:
    """Like :func:`loss_in`, but ``ValueError`` if there is no loss."""
    found = loss_in(returned)
    if found is None:
        raise ValueError(
            f"{name} must return the loss, which a learned radius needs: a number or a tensor with one element, by "
            f"itself, first in a tuple, or under 'loss' in a dict. It returned {_described(returned)}"
        )
    return found


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return "None" if value is None else f"a {type(value).__name__}"
