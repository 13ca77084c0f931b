"""Loss scaling: several passes a step under one ``torch.amp.GradScaler``, by its public methods only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor


class Scaler(Protocol):
    """What is asked of a gradient scaler: that of ``torch.amp.GradScaler``."""

    def scale(self, outputs: Any) -> Any: ...

    def unscale_(self, optimizer: Any) -> None: ...

    def is_enabled(self) -> bool: ...


class LossScaling:
    """Unscales the gradients of one pass after the other; ``scaler.update()`` then hears of what overflowed in any."""

    def __init__(self) -> None:
        #: What ``GradScaler.unscale_`` takes for optimizers, one a pass: it takes each only once a step, and knows them
        #: by their ids, so they must live.
        self._passes: list[SimpleNamespace] = []
        self._used = self._spent = 0
        self._scaler: Scaler | None = None
        #: Every pass of the present step is unscaled here.
        self.every_pass = False
        #: The first pass of the present step was unscaled here; the second is ``scaler.step``'s.
        self.first_only = False

    def begin(self, scaler: Scaler | None, first_only: bool = False) -> None:
        """The next pass is the first of a step."""
        self._used, self._spent = self._spent, 0
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.every_pass = self._scaler is not None and not first_only
        self.first_only = self._scaler is not None and first_only

    def end(self) -> None:
        """The step has been taken; further passes may follow, until ``scaler.update()``."""
        self._scaler, self.every_pass, self.first_only = None, False, False

    def give_up(self) -> None:
        """The step was not taken. The next one may come without ``scaler.update()``, so it uses other passes."""
        self._spent = self._used
        self.end()

    def unscale(self, scaler: Scaler, groups: Sequence[dict[str, Any]]) -> None:
        """Divide the gradients that are there by the scale of the loss, in place."""
        if self._used == len(self._passes):
            self._passes.append(SimpleNamespace(param_groups=()))
        which = self._passes[self._used]
        self._used += 1
        which.param_groups = groups
        try:
            scaler.unscale_(which)
        finally:
            which.param_groups = ()

    def tell(self, gate: Tensor) -> None:
        """Let the scaler back off where ``gate`` (0-d) is zero: another rank's own pass may have overflowed."""
        if self._scaler is not None:
            said = torch.zeros((), device=gate.device)
            said.grad = torch.where(gate != 0, 0.0, torch.inf)
            self.unscale(self._scaler, [{"params": [said]}])


@contextmanager
def handed_over(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """The scale, and whether there was an overflow, as ``GradScaler.step`` sets them on an optimizer for its step.

    It takes them back from a step that succeeds; this does so where one fails, or the next step would find them.
    """
    own = optimizer.__dict__
    try:
        found = own.get("found_inf")
        yield own.get("grad_scale"), torch.tensor(found, device="cpu") if isinstance(found, (int, float)) else found
    except BaseException:
        own.pop("grad_scale", None)
        own.pop("found_inf", None)
        raise


def unscale_by(gradients: list[Tensor], scale: Tensor) -> None:
    """Divide gradients by a scale on the device, as ``GradScaler.unscale_`` rounds it; nothing waits."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for g in gradients:
        kinds.setdefault((g.device, g.dtype), []).append(g)
    inverse = scale.double().reciprocal().float()
    for (device, _), some in kinds.items():
        torch._foreach_mul_(some, inverse.to(device))
