"""``with opt.first_pass():``, and the weights beside θ at which some methods make it."""

from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from lets_kernels.base.state import Look
from lets_kernels.parts.direction import Ascent
from lets_kernels.parts.passes import FirstPass
from lets_kernels.step.base import given_up, untraced

if TYPE_CHECKING:
    from lets_kernels.sam import SAM
    from lets_kernels.step.engine import Engine


class Start:
    """The weights at θ + δ, for the first pass; ``restore`` is right, and harmless, at any point."""

    def __init__(self, optimizer: "Engine") -> None:
        self._optimizer = optimizer
        self._runs = [b.all_runs() for b in optimizer._space().buckets]
        #: The weights are on their way there or back.
        self.torn = self.given_up = False

    @torch.no_grad()
    def move(self) -> None:
        o, self.torn = self._optimizer, True
        home = o.skipped.device
        look = Look.at(o.base_optimizer)
        first = FirstPass(self._runs, o.param_groups, o._step_number, home, None, o.random, o.held, look, keeps=False)
        o.network.weights_move()
        one = torch.ones((), dtype=torch.float64, device=home)
        for runs in self._runs:
            room = first.room(runs)
            o.direction.start(runs, first)
            near = one.to(runs.bucket.device)
            Ascent.along(runs, room).perturb(near, near)
        self.torn = False
        if self.given_up:
            for runs in self._runs:
                runs.bucket.dirty.fill_(1)
            self.restore()
            raise given_up()

    @torch.no_grad()
    def restore(self) -> None:
        self.torn = True
        self._optimizer.network.weights_move()
        for runs in self._runs:
            runs.bucket.restore(runs)
        self.torn = False


class FirstPassContext:
    """Around the first pass; a class, for the reason that :class:`PerturbedContext` is one."""

    def __init__(self, optimizer: "SAM") -> None:
        self._optimizer = optimizer
        devices = {p.device for group in optimizer.param_groups for p in group["params"]}
        self._network = optimizer.network.first_pass(devices)
        self._start: Start | None = None

    @property
    def given_up(self) -> bool:
        """``restore()`` was called within, so no step may be taken from this pass."""
        return self._start is not None and self._start.given_up

    def __enter__(self) -> None:
        o = self._optimizer
        o.refuse_another_step("first_pass()")
        try:
            _enter(o, self._network)
            self._start = o._start
        except BaseException:
            o.restore()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        o = self._optimizer
        try:
            _leave(o, self._network, kind, error, traceback)
        except BaseException:
            o.restore()
            raise


@untraced
def _enter(o: "SAM", network: AbstractContextManager[None]) -> None:
    network.__enter__()
    try:
        o.begin_start()
    except BaseException as error:
        network.__exit__(type(error), error, error.__traceback__)
        raise


@untraced
def _leave(
    o: "SAM",
    network: AbstractContextManager[None],
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
) -> None:
    try:
        o.end_start(failed=kind is not None)
    finally:
        network.__exit__(kind, error, traceback)
