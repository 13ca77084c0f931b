"""The closure loop of the README over a Task: what the loops of other packages are held against, bit by bit."""

from contextlib import nullcontext

import torch

import lets_kernels as lk
from support import family
from support.conv_net import Task
from support.given_gradients import snapshot

#: The other methods whose closure is torch's: a framework's own knows no losses of single samples.
OTHERS = [name for name in family.ONE_EACH if name not in family.PER_SAMPLE]
METHODS = {
    "sam": lambda p: lk.SAM(p, torch.optim.SGD, rho=0.3, lr=0.1, momentum=0.9),
    "asam": lambda p: lk.ASAM(p, torch.optim.AdamW, rho=0.5, filterwise=True, lr=0.02),
    "rmsprop": lambda p: lk.SAM(p, torch.optim.RMSprop, rho=0.1, lr=0.01),
    "scheduled": lambda p: lk.SAM(p, torch.optim.SGD, lk.ScheduledRadius.linear(0.5, 0.1, 12), lr=0.1),
    "lets": lambda p: lk.LETSSAM(
        p, torch.optim.SGD, lk.LearnedRadius(0.1, curvature="secant", lr=0.1), lr=0.1, momentum=0.9
    ),
    **{name: lambda p, name=name: family.build(name, p) for name in OTHERS},
}


def made(method, steps=6):
    """A task and the optimizer on it: the same weights and batches at every call."""
    task = Task(torch.float32, steps=steps)
    return task, METHODS[method](task.net.parameters())


def closure_over(task, opt, batches, clip=None, cast=nullcontext, seen=None):
    """A closure over the batches of one step: their mean loss, and its gradient, clipped if asked for.

    With `seen`, a list, keeps every loss there.
    """

    def closure():
        opt.zero_grad()
        total = torch.zeros(())
        for batch in batches:
            with cast():
                loss = task.loss(batch) / len(batches)
            loss.backward()
            total += loss.detach()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(task.net.parameters(), clip)
        if seen is not None:
            seen.append(total)
        return total

    return closure


def plain(task, opt, pairs, accumulate=1, after=lambda: None, **options):
    """Steps through (training, validation) pairs, `accumulate` of them a step; returns the first losses."""
    losses = []
    for start in range(0, len(pairs), accumulate):
        train, val = zip(*pairs[start : start + accumulate], strict=True)
        seen = []
        closures = [closure_over(task, opt, train, seen=seen, **options)]
        if opt.radius.learns:
            closures.append(closure_over(task, opt, val, **options))
        opt.step(*closures)
        losses.append(seen[0])
        after()
    return losses


def bits(task, opt):
    """Weights, buffers (running statistics), state and radius."""
    return [*snapshot(opt), *(b.clone() for b in task.net.buffers())]


def expected(method, steps=6, epochs=1, **options):
    """The bits that the plain loop ends with, and its first losses."""
    task, opt = made(method, steps)
    losses = [loss for _ in range(epochs) for loss in plain(task, opt, task.batches, **options)]
    return bits(task, opt), losses
