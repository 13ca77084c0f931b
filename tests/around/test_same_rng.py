"""same_rng=True: the second pass draws the random numbers of the first, and the stream goes on as after one pass."""

import types
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lets_kernels as lk
from lets_kernels.around.network import SameRandomNumbers
from support import family
from support.call_shapes import SHAPES, Passes, run
from support.conv_net import Task
from support.family import ALWAYS, FAMILY, ONE_EACH, ONE_PASS
from support.given_gradients import snapshot
from support.guard_bands import same_bits

KNOWING = ["closure", "two-steps", "context", "micro-batches"]  # shapes in which the optimizer sees the first pass
STATE = torch.get_rng_state


class Dropped(nn.Module):
    """Two layers with dropout; `masks` are what it has drawn."""

    def __init__(self, again=False):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(72, 16), nn.Dropout(0.5), nn.Linear(16, 3)
        self.again, self.masks = again, []
        for p in self.parameters():
            nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))

    def inner(self, x):
        x = self.drop(self.first(x) + 100)  # never zero by itself
        self.masks.append(x.detach() == 0)
        return self.last(x - 50)

    def forward(self, x):
        x = x.flatten(1)
        return checkpoint(self.inner, x, use_reentrant=False) if self.again else self.inner(x)


def built(method="sam", same_rng=True, again=False, **options):
    task = Task(torch.float32, steps=3, net=Dropped(again))
    if method in FAMILY:
        return task, family.build(method, task, same_rng=same_rng, **ALWAYS.get(method, {}), **options)
    options = {"same_rng": same_rng, "lr": 0.1, "momentum": 0.9, **options}
    if method == "lets":
        return task, lk.LETSSAM(task.net.parameters(), torch.optim.SGD, 0.1, **options)
    return task, lk.SAM(task.net.parameters(), torch.optim.SGD, rho=0.1, **options)


@pytest.mark.parametrize("shape", KNOWING)
def test_both_passes_of_a_step_have_the_same_masks_and_no_two_steps(shape):
    task, opt = built()
    run(shape, opt, task, slice(None))
    masks = task.net.masks
    assert len(masks) == (12 if shape == "micro-batches" else 6)
    assert all(torch.equal(a, b) for a, b in zip(masks[::2], masks[1::2], strict=True))
    assert not any(torch.equal(a, b) for i, a in enumerate(masks[::2]) for b in masks[2 * i + 2 :: 2])


@pytest.mark.parametrize("name", [name for name in ONE_EACH if name not in (*ONE_PASS, "esam")])
def test_both_passes_of_any_method_have_the_same_masks(name):
    for shape in ("closure", "two-steps", "context"):
        task, opt = built(name)
        run(shape, opt, task, slice(None))
        masks, each = task.net.masks, 1 + opt.direction.ascents
        assert len(masks) == 3 * each
        for other in range(1, each):
            assert all(torch.equal(a, b) for a, b in zip(masks[::each], masks[other::each], strict=True))
        assert not torch.equal(masks[0], masks[each])


@pytest.mark.parametrize("name", ONE_PASS)
def test_a_method_with_one_pass_has_no_use_for_it(name):
    with pytest.raises(ValueError, match="the first of two passes"):
        built(name)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_it_they_differ(shape):
    task, opt = built(same_rng=False)
    run(shape, opt, task, slice(None))
    assert not any(torch.equal(a, b) for a, b in zip(task.net.masks[::2], task.net.masks[1::2], strict=True))


@pytest.mark.parametrize("method, passes", [("sam", 1), ("lets", 3)])
@pytest.mark.parametrize("shape", ["closure", "two-steps", "context"])
def test_the_stream_goes_on_as_if_there_had_been_no_second_pass(shape, method, passes):
    """The radius's own passes draw numbers of their own."""
    task, opt = built(method)
    torch.manual_seed(7)
    run(shape, opt, task, slice(0, 1))
    end = STATE()
    torch.manual_seed(7)
    for _ in range(passes):
        task.loss(task.batches[0][0])
    assert torch.equal(STATE(), end)


@pytest.mark.parametrize("shape", ["old-closure", "two-steps", "context"])
def test_a_first_pass_that_nobody_saw_begin_is_refused(shape):
    task, opt = built()
    before, batch = snapshot(opt), task.batches[0][0]
    passes = Passes(task)
    passes(batch)
    begin = {
        "old-closure": lambda: opt.step(lambda: passes(batch)),
        "two-steps": opt.first_step,
        "context": lambda: opt.perturbed().__enter__(),
    }
    with pytest.raises(RuntimeError, match=r"with opt\.first_pass\(\):"):
        begin[shape]()
    assert passes.count == 1 and same_bits(snapshot(opt), before)
    opt.zero_grad()
    run("two-steps", opt, task, slice(1, 2))
    assert torch.equal(*task.net.masks[1:])


def test_the_callers_first_pass_and_a_closure_for_the_second():
    task, opt = built()
    passes, batch = Passes(task), task.batches[0][0]
    for _ in range(2):
        with opt.first_pass():
            passes(batch)
        opt.step(passes.closure(batch))
        opt.zero_grad()
    masks = task.net.masks
    assert torch.equal(*masks[:2]) and torch.equal(*masks[2:]) and not torch.equal(*masks[1:3])


@pytest.mark.parametrize("fail", [1, 2])
@pytest.mark.parametrize("shape", KNOWING)
def test_a_pass_that_fails_leaves_nothing_to_replay(shape, fail):
    """The numbers it drew are drawn; the next step has new ones, the same in both of its passes."""
    task, opt = built()
    with pytest.raises(MemoryError):
        run(shape, opt, task, slice(0, 1), fail=fail)
    opt.restore()
    opt.zero_grad()
    drawn, task.net.masks = task.net.masks, []
    run(shape, opt, task, slice(1, 2))
    masks = task.net.masks
    assert torch.equal(masks[0], masks[1]) and not any(torch.equal(masks[0], mask) for mask in drawn)


def test_a_step_that_does_not_perturb_does_not_repeat_its_numbers():
    class Never(lk.Schedule):
        def perturbs(self, step):
            return False

    task, opt = built(schedule=Never())
    run("closure", opt, task, slice(None))
    masks = task.net.masks
    assert len(masks) == 3 and not any(torch.equal(a, b) for a, b in pairwise(masks))


@pytest.mark.parametrize("shape", KNOWING)
def test_a_checkpointed_layer_draws_the_same_again(shape):
    """torch sets the generators back by itself while it recomputes; the steps are those without checkpoints."""
    ends = []
    for again in (False, True):
        torch.manual_seed(0)
        task, opt = built(again=again)
        run(shape, opt, task, slice(None))
        ends.append(snapshot(opt))
    assert same_bits(*ends)


def test_generators_of_devices_are_set_back_each_on_its_own(monkeypatch):
    """Through torch's module of each kind of device, asked for the device by index, and for none that is not used."""
    states, asked = {}, []

    def module(kind):
        def get(device):
            asked.append((kind, device))
            return states.setdefault(device, torch.tensor([0]))

        return types.SimpleNamespace(get_rng_state=get, set_rng_state=lambda s, device: states.update({device: s}))

    monkeypatch.setattr(torch, "get_device_module", module)
    devices = [torch.device("cuda:1"), torch.device("cpu"), torch.device("xpu:0")]
    numbers, host = SameRandomNumbers(), STATE()
    numbers.record(devices)
    assert sorted(asked) == [("cuda", devices[0]), ("xpu", devices[2])] and numbers.recorded
    for device in (devices[0], devices[2]):
        states[device] = states[device] + 1
    torch.rand(3)
    numbers.replay()
    assert set(states) == {devices[0], devices[2]} and all(state == 0 for state in states.values())
    assert torch.equal(STATE(), host) and not numbers.recorded
    states[devices[0]] = torch.tensor([5])
    numbers.replay()  # nothing is left to replay
    assert states[devices[0]] == 5


def test_a_first_pass_whose_gradients_were_dropped_is_no_first_pass():
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    opt = lk.SAM(net.parameters(), torch.optim.SGD, same_rng=True, lr=0.1)
    with opt.first_pass():
        net(torch.randn(4, 3)).sum().backward()
    opt.zero_grad()
    net(torch.randn(4, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="first_pass"):
        opt.first_step()


def test_the_forward_pass_that_selects_samples_would_use_up_the_numbers():
    with pytest.raises(ValueError, match="the forward pass that selects samples uses up the numbers"):
        built("esam")
    built("esam", gamma=1.0)  # takes all samples, and so makes none
