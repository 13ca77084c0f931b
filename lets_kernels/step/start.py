"""The weights beside θ at which some methods make the first pass."""

import torch

from lets_kernels.parts.direction import Ascent
from lets_kernels.step.given_up import given_up
from lets_kernels.step.workspace import Workspace


class Start:
    """The weights at θ + δ, for the first pass; ``restore`` is right, and harmless, at any point."""

    def __init__(self, work: Workspace) -> None:
        self._work = work
        self._runs = [b.all_runs() for b in work.tables.current().buckets]
        #: The weights are on their way there or back.
        self.torn = self.given_up = False

    @torch.no_grad()
    def move(self) -> None:
        w, self.torn = self._work, True
        first = w.first_pass(self._runs, synced=False)
        w.setting.network.weights_move()
        one = torch.ones((), dtype=torch.float64, device=first.home)
        for runs in self._runs:
            room = first.room(runs)
            w.setting.direction.start(runs, first)
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
        self._work.setting.network.weights_move()
        for runs in self._runs:
            runs.bucket.restore(runs)
        self.torn = False
