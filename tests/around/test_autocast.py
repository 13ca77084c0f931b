"""Autocast remembers casts of the weights for as long as its region lasts; weights that have moved are cast anew."""

from contextlib import nullcontext

import pytest
import torch

import lets_kernels as lk
from lets_kernels.around.network import Network
from support.call_shapes import SHAPES, Passes
from support.conv_net import Task
from support.given_gradients import snapshot, weights
from support.guard_bands import same_bits

BUILDS = {
    "sam": lambda params, *rest, **options: lk.SAM(params, *rest, rho=0.5, **options),
    "asam-rmsprop": lambda params, base, **options: lk.ASAM(params, torch.optim.RMSprop, rho=1.0, lr=0.1),
    "lets": lambda params, *rest, **options: lk.LETSSAM(
        params, *rest, lk.LearnedRadius(0.5, curvature="secant", lr=0.1), **options
    ),
}


def cast(**options):
    return torch.autocast("cpu", torch.bfloat16, **options)


class Regions:
    """A task whose steps lie in one region each ("around"), whose forward passes do ("within"), or both."""

    def __init__(self, method, around=None, within=None):
        self.around = around or nullcontext
        self.task = Task(torch.float32, steps=3, net=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(72, 3)))
        torch.nn.init.constant_(self.task.net[1].weight, 0.01)
        torch.nn.init.zeros_(self.task.net[1].bias)
        plain = self.task.loss

        def loss(batch):
            with (within or nullcontext)():
                return plain(batch)

        self.task.loss = loss
        self.opt = BUILDS[method](self.task.net.parameters(), torch.optim.SGD, lr=1.0)

    def run(self, shape, batches=slice(None)):
        for batch, val in self.task.batches[batches]:
            with self.around():
                SHAPES[shape](self.opt, Passes(self.task), batch, val)
        return [*snapshot(self.opt), *(v.clone() for _, v in sorted(self.opt.metrics().items()))]


COMBINATIONS = [(s, m) for s in SHAPES for m in BUILDS if (s, m) != ("micro-batches", "lets")]


@pytest.mark.parametrize("shape, method", COMBINATIONS)
def test_one_region_around_the_step_is_one_for_each_pass(shape, method, monkeypatch):
    """To the bit, with and without autocast's memory, nested or not; and the memory is what would have differed."""
    apart = Regions(method, within=cast).run(shape)
    assert same_bits(Regions(method, around=cast).run(shape), apart)
    assert same_bits(Regions(method, around=cast, within=cast).run(shape), apart)
    assert same_bits(Regions(method, around=lambda: cast(cache_enabled=False)).run(shape), apart)
    monkeypatch.setattr(Network, "weights_move", lambda self: None)
    assert not same_bits(Regions(method, around=cast).run(shape), apart)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_region_around_several_steps(shape):
    """What the base optimizer has moved is cast anew for the next step's first pass."""
    apart = Regions("sam", within=cast).run(shape)
    whole = Regions("sam")
    with cast():
        assert same_bits(whole.run(shape), apart)


def test_the_second_pass_sees_the_perturbed_weights_and_restore_brings_the_first_loss_back():
    regions = Regions("sam")
    task, opt, batch = regions.task, regions.opt, regions.task.batches[0][0]
    with cast():
        loss = task.loss(batch)
        loss.backward()
        opt.first_step()
        above = task.loss(batch)
        opt.restore()
        again = task.loss(batch)
    assert above > loss and torch.equal(again, loss)


def test_weights_and_gradients_stay_float32():
    regions = Regions("sam", around=cast)
    regions.run("closure")
    assert {w.dtype for w in weights(regions.task)} == {torch.float32}
    assert all(p.grad.dtype == torch.float32 for p in regions.task.net.parameters())
