"""running_state=: buffers outside of torch's normalisation layers that are to count the first pass of a step only."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import lets_kernels as lk
from support.call_shapes import SHAPES, run
from support.given_gradients import closures
from support.guard_bands import same_bits

SGD = torch.optim.SGD


class InPlace(nn.Module):
    """A batch norm that keeps its statistics in place, and counts."""

    def __init__(self, count):
        super().__init__()
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("nothing", None)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
                self.calls += 1
        return x - self.mean


class Replacing(InPlace):
    """As that, with new tensors each time; also the input itself, which is the user's."""

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
            self.calls = self.calls + 1
            self.nothing = x.detach()[:4]
        return x - self.mean


def own(kind, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), kind(6), spectral_norm(nn.Linear(6, 5)), nn.BatchNorm1d(5), nn.Linear(5, 3))
    net.eval()(torch.randn(8, 4))
    return net.train()


NAMES = {
    "modules": lambda net: [net[1], net[2]],
    "classes": lambda net: [InPlace, type(net[2].parametrizations.weight[0])],
    "names-of-modules": lambda net: ["1", "2.parametrizations.weight"],
    "names-of-buffers": lambda net: [
        *("1.mean", "1.calls", "2.parametrizations.weight.0._u", "2.parametrizations.weight.0._v"),
        *(["1.nothing"] if net[1].nothing is not None else []),
    ],
    "a-generator-and-twice": lambda net: (m for m in (net, net[1])),
}


class Once:
    """A net, and a twin that sees each batch once, at the weights that the net has before a step."""

    def __init__(self, kind, named, **options):
        self.net = own(kind)
        self.opt = lk.SAM(
            self.net.parameters(), SGD, 0.5, lr=0.1, model=self.net, running_state=named(self.net), **options
        )
        self.batches = [2 * ((torch.randn(8, 4), torch.randint(3, (8,))),) for _ in range(3)]

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("named", NAMES)
@pytest.mark.parametrize("kind", [InPlace, Replacing])
def test_named_running_state_counts_the_first_pass_only(kind, named, shape):
    task = Once(kind, NAMES[named])
    for i in range(3):
        twin, batch = copy.deepcopy(task.net), task.batches[i][0]
        kept = batch[0].clone()
        parts = 2 if shape == "micro-batches" else 1
        with torch.no_grad():
            for x in batch[0].chunk(parts):
                twin(x)
        run(shape, task.opt, task, slice(i, i + 1))
        assert same_bits(batch[0], kept)
        assert int(task.net[1].calls) == parts * (i + 1)
        names = [name for name, _ in twin.named_buffers() if name != "1.nothing" or "buffers" not in named]
        mine, theirs = dict(task.net.named_buffers()), dict(twin.named_buffers())
        assert same_bits([mine[n] for n in names], [theirs[n] for n in names])


def test_without_a_name_every_pass_counts():
    task = Once(InPlace, lambda net: [])
    run("closure", task.opt, task, slice(0, 1))
    assert int(task.net[1].calls) == 2 and int(task.net[3].num_batches_tracked) == 1


def test_radius_steps_and_moved_modules_with_named_running_state():
    net = own(Replacing)
    opt = lk.LETSSAM(net.parameters(), SGD, 0.5, lr=0.1, model=net, running_state=[Replacing])
    batches = [torch.randn(8, 4) for _ in range(2)]
    opt.step(*closures(opt, lambda _: net(batches[0]).square().mean(), lambda _: net(batches[1]).square().mean()))
    assert int(net[1].calls) == 1
    net(batches[0]).square().mean().backward()
    opt.first_step()
    held = net[1].mean.clone()
    net[1].mean = net[1].mean.double() + 1  # as module.to() would leave it
    opt.restore()
    assert net[1].mean.dtype == torch.float64 and same_bits(net[1].mean.float(), held)


REFUSED = {
    "no-such-name": (["1.variance"], ValueError, "'1.variance' stands for no buffer.*named_modules"),
    "no-such-module": ([nn.BatchNorm1d(3)], ValueError, "BatchNorm1d stands for no buffer.*register_buffer"),
    "no-such-class": ([nn.InstanceNorm1d], ValueError, "InstanceNorm1d stands for no buffer"),
    "without-buffers": (["0"], ValueError, "'0' stands for no buffer"),
    "a-word": ("1.mean", TypeError, "must be a list"),
    "a-class": (InPlace, TypeError, "must be a list"),
    "a-number": ([3], TypeError, "modules, module classes and names, not 3"),
    "a-tensor": ([torch.ones(2)], TypeError, "not tensor"),
    "another-class": ([torch.optim.SGD], TypeError, "not <class"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_running_state_that_names_nothing_is_refused(case):
    named, error, match = REFUSED[case]
    net = own(InPlace)
    with pytest.raises(error, match=match):
        lk.ASAM(net.parameters(), SGD, lr=0.1, model=net, running_state=named)


def test_running_state_without_a_model_is_refused():
    net = own(InPlace)
    with pytest.raises(ValueError, match="pass model="):
        lk.LookSAM(net.parameters(), SGD, lr=0.1, running_state=["1.mean"])
