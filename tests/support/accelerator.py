"""The device of the GPU tests, and how they capture a graph there.

Where there is no GPU they run on the CPU, on the two backends that are there and without graphs, so that what they say
is right before a GPU sees them. That proves nothing about one, and so they are marked ``gpu`` only where there is one.
"""

import contextlib

import pytest
import torch

import lets_kernels as lk
from support.core_methods import BASES
from support.given_gradients import Toy

DRY = not torch.cuda.is_available()
DEVICE = "cpu" if DRY else "cuda"
STAND_INS = {"cuda": "cpu", "triton": "reference"} if DRY else {}
BACKENDS = tuple(STAND_INS.get(name, name) for name in ("cuda", "triton"))
needs_gpu = () if DRY else (pytest.mark.gpu,)


def on_a_gpu(*names):
    """Decorator of a test or a class of tests: on a GPU, with `name` each of these backends in turn."""
    here = tuple(dict.fromkeys(STAND_INS.get(name, name) for name in names))

    def marked(test):
        for mark in (pytest.mark.parametrize("name", here), *needs_gpu):
            test = mark(test)
        return test

    return marked


@pytest.fixture(autouse=True)
def plain_float32():
    """Convolutions in float32, not in TF32, and by the same algorithm every time."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@contextlib.contextmanager
def without_waits():
    """Inside, whatever makes the host wait for the GPU raises."""
    if DRY:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def side_stream():
    """Inside, the current stream is another one, which has waited for this one; afterwards this one waits for it."""
    if DRY:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def litter():
    """Write NaN over whatever device memory of small tensors is free, so that a use of freed memory shows."""
    filled = [torch.full((size,), torch.nan, dtype=torch.float64, device=DEVICE) for size in (1, 64, 1024) * 200]
    del filled


class Graph:
    """A function captured in a CUDA graph, after two runs of it on a side stream; in a dry run, the function itself."""

    def __init__(self, function, before=lambda i: None):
        with side_stream():
            for i in range(2):
                before(i)
                function()
        if DRY:
            self.replay = function
            return
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            function()
        self.replay = self.graph.replay


def toy_on(device=DEVICE, dtype=torch.float32, **options):
    return Toy(dtype, device=device, **options)


def sam(toy, name, cls=lk.ASAM, base="momentum", **options):
    """A method on a toy's parameters."""
    optimizer, _, base_options, _ = BASES[base]
    return cls(toy.params, optimizer, **{"rho": 0.5, **options}, backend=name, **base_options)


def loss_of(toy):
    return torch.ones((), dtype=torch.float32, device=toy.device)


def steady_step(toy, opt, grads, loss):
    """A step in the two-step shape, radius and metrics included, on gradients that lie ready."""

    def closure(i):
        def run():
            toy.set_grads(grads[i])
            return loss * i

        return run

    toy.set_grads(grads[0])
    opt.first_step(zero_grad=True, loss=loss)
    toy.set_grads(grads[1])
    opt.second_step()
    if opt.radius.learns:
        opt.radius_step(closure(2), closure(3))
    return opt.metrics(), opt.rho
