"""Loss scaling: several passes a step under one ``torch.amp.GradScaler``, by its public methods only."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Scaler(Protocol):
    """What is asked of a gradient scaler: that of ``torch.amp.GradScaler``."""

    def unscale_(self, optimizer: Any) -> None: ...


class _Pass:
    """What ``GradScaler.unscale_`` looks at, once a pass: it takes every optimizer only once a step."""

    def __init__(self) -> None:
        self.param_groups: Sequence[dict[str, Any]] = ()


class LossScaling:
    """Unscales the gradients of one pass after the other; ``scaler.update()`` then hears of what overflowed in any."""

    def __init__(self) -> None:
        self._passes: list[_Pass] = []  # a scaler knows them by their ids, so they must live
        self._used = 0

    def begin(self) -> None:
        """The next pass is the first of a step."""
        self._used = 0

    def unscale(self, scaler: Scaler, groups: Sequence[dict[str, Any]]) -> None:
        """Divide the gradients that are there by the scale of the loss, in place."""
        if self._used == len(self._passes):
            self._passes.append(_Pass())
        which = self._passes[self._used]
        self._used += 1
        which.param_groups = groups
        scaler.unscale_(which)


def unscale_by(gradients: list[Tensor], scale: Tensor) -> None:
    """Divide gradients by a scale on the device, as ``GradScaler.unscale_`` rounds it; nothing waits."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for g in gradients:
        kinds.setdefault((g.device, g.dtype), []).append(g)
    inverse = scale.double().reciprocal().float()
    for (device, _), some in kinds.items():
        torch._foreach_mul_(some, inverse.to(device))
