"""A script that trains until a signal ends it: `python interrupted_training.py <shape> <file for the weights>`.

It says "ready", waits for a line, takes a step and says "training".
"""

import signal
import sys

import torch

import lets_kernels as lk
from support.conv_net import Pointwise, Task


def training(shape):
    """A task whose gradients are the same bits in every process, and its optimizer."""
    task = Task(torch.float32, steps=4, net=Pointwise())
    if shape == "by_start":
        return task, lk.RSAM(task.net.parameters(), torch.optim.SGD, rho=0.5, gamma=0.5, seed=1, lr=0.1, momentum=0.9)
    return task, lk.SAM(task.net.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)


def by_closure(task, opt, batch):
    opt.step(task.closure(batch))


def by_two_steps(task, opt, batch):
    task.closure(batch)()
    opt.first_step(zero_grad=True)
    task.loss(batch).backward()
    opt.second_step()


def by_start(task, opt, batch):
    with opt.first_pass():
        task.closure(batch)()
    by_context(task, opt, batch, begun=True)


def by_context(task, opt, batch, begun=False):
    if not begun:
        task.closure(batch)()
    with opt.perturbed():
        task.closure(batch)()
    opt.step()


ENDED = 3
SHAPES = {shape.__name__: shape for shape in (by_closure, by_two_steps, by_context, by_start)}


def main(shape, path):
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ENDED))
    task, opt = training(shape)
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        SHAPES[shape](task, opt, task.batches[-1][0])
        print("training", flush=True)
        while True:
            for batch, _ in task.batches:
                SHAPES[shape](task, opt, batch)
    finally:
        opt.restore()
        torch.save([p.detach() for p in task.net.parameters()], path)


if __name__ == "__main__":
    main(*sys.argv[1:])
