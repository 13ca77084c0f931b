"""Loss scaling: several passes a step under one ``torch.amp.GradScaler``, with its public methods only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor


class Scaler(Protocol):
    """The methods of ``torch.amp.GradScaler`` that this package calls."""

    def scale(self, outputs: Any) -> Any: ...

    def unscale_(self, optimizer: Any) -> None: ...

    def is_enabled(self) -> bool: ...


class LossScaling:
    """Unscales the gradients of each pass; ``scaler.update()`` then learns of an overflow in any of the passes."""

    def __init__(self) -> None:
        #: Stand-ins for optimizers, one a pass: ``GradScaler.unscale_`` takes each optimizer only once a step. It
        #: knows optimizers by their ids, so the stand-ins must live.
        self._passes: list[SimpleNamespace] = []
        self._used = self._spent = 0
        self._scaler: Scaler | None = None
        #: True if every pass of the present step is unscaled here.
        self.every_pass = False
        #: True if the first pass of the present step was unscaled here; ``scaler.step`` then unscales the second pass.
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
        """The step was not taken. The next step may come without ``scaler.update()``, so it uses other stand-ins."""
        self._spent = self._used
        self.end()

    def unscale(self, scaler: Scaler, groups: Sequence[dict[str, Any]]) -> None:
        """Divide the present gradients by the scale of the loss, in place."""
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
        """Let the scaler back off if ``gate`` (0-d) is zero: another rank's own pass may have overflowed."""
        if self._scaler is not None:
            said = torch.zeros((), device=gate.device)
            said.grad = torch.where(gate != 0, 0.0, torch.inf)
            self.unscale(self._scaler, [{"params": [said]}])


@contextmanager
def handed_over(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """The scale and the overflow flag that ``GradScaler.step`` sets on an optimizer for its step.

    ``GradScaler.step`` removes them after a step that succeeds. After a step that fails they are removed here, or the
    next step would find them.
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
    """Divide gradients by a scale on the device, with the rounding of ``GradScaler.unscale_``; nothing waits."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for g in gradients:
        kinds.setdefault((g.device, g.dtype), []).append(g)
    inverse = scale.double().reciprocal().float()
    for (device, _), some in kinds.items():
        torch._foreach_mul_(some, inverse.to(device))
