"""The call shapes of a step over a Task, with or without a gradient scaler; any pass may overflow or fail."""

import torch

from support import family


class Passes:
    """Forward and backward over batches, counted within a step: first, second and, where ρ is learned, train and val.

    Args:
        scaler: scales the loss for backward; every shape then unscales and steps as documented, and updates it.
        spoil: the pass (1 is the first) that leaves an infinite gradient. fail: the one that raises instead.
        clip: with two steps, the largest norm of the second gradient; it is then unscaled by hand.
    """

    def __init__(self, task, scaler=None, spoil=None, fail=None, clip=None):
        self.task, self.scaler, self.spoil, self.fail, self.clip = task, scaler, spoil, fail, clip
        self.count = 0

    def __call__(self, batch):
        self.count += 1
        loss = self.task.loss(batch)
        if self.count == self.fail:
            raise MemoryError
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.count == self.spoil:
            next(self.task.net.parameters()).grad.view(-1)[1] = torch.inf
        return loss

    def closure(self, batch):
        def run():
            self.task.net.zero_grad()
            return self(batch)

        return run

    def closure_of(self, opt, batch):
        """The closure that this optimizer's method takes."""
        return self.samples(opt, batch) if opt.samples.per_sample else self.closure(batch)

    def samples(self, opt, batch):
        """Returns the losses of samples, and counts what a backward follows."""

        def run(subset=None):
            self.count += torch.is_grad_enabled()
            if self.count == self.fail:
                raise MemoryError
            found = family.losses(opt, self.task.net, batch, subset)
            if self.count == self.spoil and torch.is_grad_enabled():
                found = (found[0] * torch.inf, found[1]) if isinstance(found, tuple) else found * torch.inf
            return found

        return run

    def first(self, opt, batch):
        """The first pass in the shapes without a closure, if the method has one."""
        if opt.direction.needs_gradient:
            with opt.first_pass():
                self(batch)
            if self.scaler is not None:
                opt.unscale_first(self.scaler)

    def again(self, opt):
        """After a pass at θ + ε that is not the last one."""
        if self.scaler is not None:
            opt.unscale_first(self.scaler)

    def take(self, opt):
        """The base optimizer's step in the shapes without a closure."""
        if self.clip is not None:
            if self.scaler is not None:
                self.scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(self.task.net.parameters(), self.clip)
        if self.scaler is None:
            opt.step()
        else:
            self.scaler.step(opt)

    def learn(self, opt, batch, val):
        if opt.radius.learns:
            opt.radius_step(self.closure(batch), self.closure(val), scaler=self.scaler)


def by_closure(opt, passes, batch, val):
    validation = [passes.closure(val)] if opt.radius.learns else []
    opt.step(passes.closure_of(opt, batch), *validation, scaler=passes.scaler)


def by_old_closure(opt, passes, batch, val):
    """The caller does the first backward, and the closure does not zero."""
    passes(batch)
    validation = [passes.closure(val)] if opt.radius.learns else []
    opt.step(lambda: passes(batch), *validation, scaler=passes.scaler)
    opt.zero_grad()


def by_two_steps(opt, passes, batch, val):
    opt.zero_grad()
    passes.first(opt, batch)
    opt.first_step(zero_grad=True)
    while opt.ascents_left:
        passes(batch)
        passes.again(opt)
        opt.first_step(zero_grad=True)
    passes(batch)
    passes.take(opt)
    passes.learn(opt, batch, val)


def by_context(opt, passes, batch, val):
    opt.zero_grad()
    passes.first(opt, batch)
    for _ in range(opt.direction.ascents):
        with opt.perturbed():
            opt.zero_grad()
            passes(batch)
        if opt.ascents_left:
            passes.again(opt)
    passes.take(opt)
    passes.learn(opt, batch, val)


def by_micro_batches(opt, passes, batch, val):
    inputs, targets = batch
    halves = zip(inputs.chunk(2), targets.chunk(2), strict=True)
    opt.step([passes.closure(half) for half in halves], scaler=passes.scaler)


SHAPES = {
    "closure": by_closure,
    "old-closure": by_old_closure,
    "two-steps": by_two_steps,
    "context": by_context,
    "micro-batches": by_micro_batches,
}


def run(shape, opt, task, steps, scaler=None, **options):
    """Some steps of a task in one call shape, with fresh counters in each."""
    for batch, val in task.batches[steps]:
        SHAPES[shape](opt, Passes(task, scaler, **options), batch, val)
        if scaler is not None:
            scaler.update()
