"""model=: running statistics are those of one pass a step, at θ, as in training without a second pass."""

import copy

import pytest
import torch
from torch import nn

import lets_kernels as lk
from lets_kernels.around import network
from lets_kernels.around.network import RunningStatistics
from support import family
from support.call_shapes import SHAPES, Passes, run
from support.conv_net import Task
from support.family import BESIDE, FAMILY, ONE_EACH, ONE_PASS
from support.given_gradients import weights
from support.guard_bands import same_bits


def every_norm(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            nn.Conv2d(4, 4, 1),
            nn.SyncBatchNorm(4),  # takes tensors on the CPU while there are no process groups
            nn.BatchNorm2d(4, momentum=None),  # a cumulative average
            nn.Flatten(),
            nn.Linear(64, 6),
            nn.BatchNorm1d(6, track_running_stats=False),  # without buffers
            nn.BatchNorm1d(6, affine=False),
            nn.Linear(6, 3),
        )


BUILDS = {
    "sam": lambda params, **options: lk.SAM(params, torch.optim.SGD, rho=0.5, lr=0.1, **options),
    "asam-rmsprop": lambda params, **options: lk.ASAM(params, torch.optim.RMSprop, rho=1.0, lr=0.01, **options),
    "lets": lambda params, **options: lk.LETSSAM(params, torch.optim.SGD, 0.5, lr=0.1, **options),
}
COMBINATIONS = [(s, m) for s in SHAPES for m in BUILDS if (s, m) != ("micro-batches", "lets")]
#: Those whose first pass, or the only one, is beside the weights count it all the same: of that a test below.
COMBINATIONS += [(s, m) for s in ("closure", "context") for m in ONE_EACH if m not in (*BESIDE, *ONE_PASS)]


def built(method="sam", steps=3, model=True, **options):
    task = Task(torch.float32, steps=steps, net=every_norm())
    if method in FAMILY:
        return task, family.build(method, task.net if model else list(task.net.parameters()), **options)
    return task, BUILDS[method](task.net.parameters(), model=task.net if model else None, **options)


def buffers(net):
    return [b.detach().clone() for b in net.buffers()]


class Plain:
    """A twin of the net that sees each batch once, at the weights that the net has before a step."""

    def __init__(self, task):
        self.net, self.twin = task.net, copy.deepcopy(task.net)

    def see(self, batch, parts=1):
        with torch.no_grad():
            for mine, other in zip(self.twin.parameters(), self.net.parameters(), strict=True):
                mine.copy_(other)
            for x in batch[0].chunk(parts):
                self.twin(x)

    def agrees(self):
        return same_bits(buffers(self.net), buffers(self.twin))


@pytest.mark.parametrize("shape, method", COMBINATIONS)
def test_statistics_are_those_of_one_pass_a_step(shape, method):
    """To the bit, every buffer of every kind of layer, after each step."""
    task, opt = built(method)
    plain = Plain(task)
    for step, (batch, _) in enumerate(task.batches):
        plain.see(batch, 2 if shape == "micro-batches" else 1)
        run(shape, opt, task, slice(step, step + 1))
        assert plain.agrees()
    assert task.net[1].num_batches_tracked == (6 if shape == "micro-batches" else 3)


@pytest.mark.parametrize("shape", ["closure", "two-steps", "context"])
@pytest.mark.parametrize("name", [*BESIDE, *(name for name in ONE_PASS if name in ONE_EACH)])
def test_a_pass_beside_the_weights_counts_where_it_is_the_first(shape, name):
    """Once a step, at the weights where it is made; the second pass of those with two does not count."""
    task, opt = built(name)
    twin, seen = copy.deepcopy(task.net), []

    def see(net, inputs):
        seen.append([p.detach().clone() for p in net.parameters()])

    handle = task.net.register_forward_pre_hook(see)
    for step, (batch, _) in enumerate(task.batches):
        seen.clear()
        run(shape, opt, task, slice(step, step + 1))
        assert len(seen) == (1 if name in ONE_PASS else 2)
        with torch.no_grad():
            for mine, value in zip(twin.parameters(), seen[0], strict=True):
                mine.copy_(value)
            twin(batch[0])
        assert same_bits(buffers(task.net), buffers(twin))
    handle.remove()


@pytest.mark.parametrize("method, passes", [("sam", 2), ("lets", 4)])
@pytest.mark.parametrize("shape", ["closure", "two-steps"])
def test_without_the_model_every_pass_counts(shape, method, passes):
    task, opt = built(method, model=False)
    run(shape, opt, task, slice(0, 1))
    assert task.net[1].num_batches_tracked == passes


class Every2nd(lk.Schedule):
    def perturbs(self, step):
        return step % 2 == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_that_does_not_perturb_counts_once_too(shape):
    """In two steps its caller does a second pass all the same."""
    task, opt = built(schedule=Every2nd())
    plain = Plain(task)
    for step, (batch, _) in enumerate(task.batches):
        plain.see(batch, 2 if shape == "micro-batches" else 1)
        run(shape, opt, task, slice(step, step + 1))
        assert plain.agrees()


@pytest.mark.parametrize("spoil", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_that_is_skipped_counts_as_any_other(shape, spoil):
    """Its batch was seen."""
    task, opt = built()
    plain = Plain(task)
    plain.see(task.batches[0][0], 2 if shape == "micro-batches" else 1)
    run(shape, opt, task, slice(0, 1), spoil=spoil)
    assert opt.metrics()["skipped_steps"] == 1 and plain.agrees()


@pytest.mark.parametrize("fail", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", ["closure", "old-closure", "two-steps", "context"])
def test_a_pass_that_fails_leaves_the_statistics_of_the_first(shape, fail):
    task, opt = built("lets")
    plain = Plain(task)
    plain.see(task.batches[0][0])
    with pytest.raises(MemoryError):
        run(shape, opt, task, slice(0, 1), fail=fail)
    opt.restore()
    assert plain.agrees()
    opt.zero_grad()
    plain.see(task.batches[1][0])
    run(shape, opt, task, slice(1, 2))
    assert plain.agrees()


@pytest.mark.parametrize("shape", ["closure", "old-closure", "two-steps", "context"])
def test_an_interrupt_between_the_layers_of_a_later_pass(shape):
    """Some layers have counted the pass by then, and some have not."""
    task, opt = built("lets")
    for at in (2, 3, 4):
        calls = []

        def interrupt(*_, at=at, calls=calls):
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt

        plain = Plain(task)
        plain.see(task.batches[0][0])
        hook = task.net[4].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(shape, opt, task, slice(0, 1))
        hook.remove()
        opt.restore()
        opt.zero_grad()
        assert plain.agrees()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("shape", ["closure", "two-steps", "context"])
def test_an_interrupt_while_statistics_are_copied(shape, at, when, monkeypatch):
    """On the way to the copies (1) or back (2): the statistics are those after the first pass in any case."""
    task, opt = built()
    run(shape, opt, task, slice(0, 1))
    plain, before, original, calls = Plain(task), weights(task), network._copy, []

    def interrupted(to, source):
        calls.append(1)
        if len(calls) == at and when == "before":
            raise KeyboardInterrupt
        original(to, source)
        if len(calls) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(network, "_copy", interrupted)
    plain.see(task.batches[1][0])
    with pytest.raises(KeyboardInterrupt):
        run(shape, opt, task, slice(1, 2))
    monkeypatch.undo()
    opt.restore()
    assert plain.agrees()
    assert same_bits(weights(task), before) or (at == 2 and shape != "context")
    opt.zero_grad()
    plain.see(task.batches[2][0])
    run(shape, opt, task, slice(2, 3))
    assert plain.agrees()


@pytest.mark.parametrize("frozen", ["all", "one"])
@pytest.mark.parametrize("shape", SHAPES)
def test_frozen_layers_count_nothing(shape, frozen):
    task, opt = built()
    (task.net if frozen == "all" else task.net[1]).eval()
    plain, before = Plain(task), buffers(task.net[1])
    plain.see(task.batches[0][0], 2 if shape == "micro-batches" else 1)
    run(shape, opt, task, slice(0, 1))
    assert plain.agrees() and same_bits(buffers(task.net[1]), before)
    assert task.net[5].num_batches_tracked == (0 if frozen == "all" else 2 if shape == "micro-batches" else 1)


def test_an_evaluation_between_the_passes_and_a_conversion_between_the_steps_change_nothing():
    task, opt = built()
    plain = Plain(task)
    for batch, val in task.batches[:2]:
        plain.see(batch)
        passes = Passes(task)
        opt.zero_grad()
        passes(batch)
        opt.first_step(zero_grad=True)
        task.net.eval()
        task.loss(val)
        task.net.train()
        passes(batch)
        opt.second_step()
        assert plain.agrees()
        task.net = plain.net = nn.SyncBatchNorm.convert_sync_batchnorm(task.net)


def test_holding_and_releasing_any_number_of_times():
    net = every_norm()
    guard, before = RunningStatistics(), buffers(net)
    guard.release()
    guard.bind(net)
    guard.release()
    for _ in range(2):
        guard.hold()
        net(torch.randn(8, 2, 6, 6))
        guard.hold()  # later than the first, and no news
        net(torch.randn(8, 2, 6, 6))
        guard.release()
        assert same_bits(buffers(net), before)
        guard.release()
        net(torch.randn(8, 2, 6, 6))
        assert not same_bits(buffers(net), before)
        before = buffers(net)
    guard.bind(None)
    guard.hold()
    guard.release()


def test_buffers_that_were_made_anew_between_steps_are_held_as_well():
    task, opt = built()
    run("closure", opt, task, slice(0, 1))
    task.net.double()
    task.batches = [((x.double(), y), None) for (x, y), _ in task.batches]
    plain = Plain(task)
    plain.see(task.batches[1][0])
    run("closure", opt, task, slice(1, 2))
    assert plain.agrees() and task.net[1].running_mean.dtype == torch.float64


@pytest.mark.parametrize("same_weights", [True, False], ids=["keeps-its-weights", "has-none"])
def test_a_layer_that_came_between_two_steps_counts_once_a_step(same_weights):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    opt = lk.SAM(net.parameters(), torch.optim.SGD, model=net, lr=0.1)

    def closure():
        opt.zero_grad()
        loss = net(torch.randn(8, 3)).square().mean()
        loss.backward()
        return loss

    opt.step(closure)
    fresh = torch.nn.BatchNorm1d(4, affine=same_weights)
    if same_weights:
        fresh.weight, fresh.bias = net[1].weight, net[1].bias
    net[1] = fresh
    for count in (1, 2):
        opt.step(closure)
        assert int(fresh.num_batches_tracked) == count
