"""``with opt.perturbed():``."""

from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from lets_kernels.step.base import untraced

if TYPE_CHECKING:
    from lets_kernels.sam import SAM


class PerturbedContext:
    """Perturbed inside, restored outside, also where an interrupt comes while the weights are moved or moved back.

    A class and not a generator: around a generator's code runs ``contextlib``'s, and an interrupt there would leave the
    weights perturbed until the generator is collected, which may be in the middle of a later step. For the same reason
    what is untraced, and so has torch's code around it, is called within the ``try``.
    """

    def __init__(self, optimizer: "SAM", loss: Any) -> None:
        self._optimizer, self._loss = optimizer, loss

    def __enter__(self) -> bool:
        self._optimizer.refuse_another_step("perturbed()")
        try:
            return _enter(self._optimizer, self._loss)
        except BaseException:
            self._optimizer.restore()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            _leave(self._optimizer, failed=kind is not None)
        except BaseException:
            self._optimizer.restore()
            raise


@untraced
def _enter(optimizer: "SAM", loss: Any) -> bool:
    needed = optimizer.first_step(loss=loss)
    optimizer.begun_step.in_context = True
    return needed


@untraced
@torch.no_grad()
def _leave(optimizer: "SAM", failed: bool) -> None:
    if failed:
        optimizer.restore()
        return
    step = optimizer._step
    if step is not None:  # else given up inside, by restore()
        step.restore()
        step.in_context = False
