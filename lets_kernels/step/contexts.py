"""``with opt.first_pass():`` and ``with opt.perturbed():``.

They are classes and not generators. ``contextlib`` runs its own code around a generator's; an interrupt in that code
would leave the weights moved until the generator is collected, perhaps in the middle of a later step. An untraced
function has torch's code around it, so it is called within the ``try``, for the same reason.
"""

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch

from lets_kernels.step.engine import Engine
from lets_kernels.step.step import Start
from lets_kernels.step.tracing import untraced


class FirstPassContext:
    """Around the first pass. The weights are moved for it if the direction starts elsewhere than at θ."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        devices = {p.device for p in engine.work.params()}
        self._network = engine.work.setting.network.first_pass(devices)
        self._start: Start | None = None

    @property
    def given_up(self) -> bool:
        """``restore()`` was called within, so no step may be taken from this pass."""
        return self._start is not None and self._start.given_up

    def __enter__(self) -> None:
        e = self._engine
        e.refuse_another_step("first_pass()")
        try:
            _enter_first(e, self._network)
            self._start = e.now.start
        except BaseException:
            e.restore()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            _leave_first(self._engine, self._network, kind, error, traceback)
        except BaseException:
            self._engine.restore()
            raise


@untraced
def _enter_first(e: Engine, network: AbstractContextManager[None]) -> None:
    network.__enter__()
    try:
        e.begin_start()
    except BaseException as error:
        network.__exit__(type(error), error, error.__traceback__)
        raise


@untraced
def _leave_first(e: Engine, network: AbstractContextManager[None], *raised: Any) -> None:
    try:
        e.end_start(failed=raised[0] is not None)
    finally:
        network.__exit__(*raised)


class PerturbedContext:
    """Weights perturbed inside, restored outside, also if an interrupt comes while the weights move in or out."""

    def __init__(self, engine: Engine, loss: Any) -> None:
        self._engine, self._loss = engine, loss

    def __enter__(self) -> bool:
        self._engine.refuse_another_step("perturbed()")
        try:
            return _enter_perturbed(self._engine, self._loss)
        except BaseException:
            self._engine.restore()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            _leave_perturbed(self._engine, failed=kind is not None)
        except BaseException:
            self._engine.restore()
            raise


@untraced
def _enter_perturbed(e: Engine, loss: Any) -> bool:
    needed = e.begin(zero_grad=False, loss=loss)
    e.begun_step.in_context = True
    return needed


@untraced
@torch.no_grad()
def _leave_perturbed(e: Engine, failed: bool) -> None:
    if failed:
        e.restore()
        return
    step = e.now.step
    if step is not None:  # None if restore() was called inside, which gives the step up
        step.restore()
        step.in_context = False
        if step.ascents_left:
            e.leave_ascent()
