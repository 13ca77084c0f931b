"""What holds when things go wrong: exceptions, non-finite gradients, other gradients, writes under autograd's feet."""

import importlib

import pytest
import torch

import lets_kernels as lk
from support.backends import MODULES
from support.conv_net import Task
from support.core_methods import BASES, build
from support.given_gradients import Toy, snapshot, weights
from support.guard_bands import DTYPES, same_bits

LEARNED = {"curvature": "secant"}


class Failing:
    """A closure of the task that raises on its n-th call, before or after its backward."""

    def __init__(self, task, batch, error, call, late):
        self.task, self.batch, self.error, self.call, self.late, self.calls = task, batch, error, call, late, 0

    def __call__(self):
        self.calls += 1
        self.task.net.zero_grad()
        if self.calls == self.call and not self.late:
            raise self.error
        loss = self.task.loss(self.batch)
        loss.backward()
        if self.calls == self.call:
            raise self.error
        return loss


def learner(base, backend, learned):
    task = Task(torch.float32, steps=4)
    options = {"rho": lk.LearnedRadius(0.1, **LEARNED)} if learned else {}
    return task, build("asam", task, base, backend.name, **options)


@pytest.mark.parametrize("late", [False, True], ids=["before-backward", "after-backward"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("base", ["momentum", "rmsprop"])
def test_an_exception_in_the_closure_leaves_the_weights_and_a_usable_optimizer(backend, base, call, error, late):
    """The step that was given up leaves no trace: what follows is what would have followed without it."""
    ends = []
    for fails in (False, True):
        task, opt = learner(base, backend, learned=False)
        task.run(opt, task.batches[:2])
        if fails:
            before = snapshot(opt)
            failing = Failing(task, task.batches[2][0], error("stop"), call, late)
            with pytest.raises(error, match="stop"):
                opt.step(failing)
            assert failing.calls == call
            assert same_bits(snapshot(opt), before)
        task.run(opt, task.batches[3:])
        ends.append(snapshot(opt))
    assert same_bits(*ends)


@pytest.mark.parametrize("late", [False, True], ids=["before-backward", "after-backward"])
@pytest.mark.parametrize("which", ["train", "val"])
def test_an_exception_while_the_radius_learns_leaves_a_whole_step(backend, which, late):
    """The base optimizer has stepped by then: weights are those of the step, the radius is the old one."""
    task, opt = learner("momentum", backend, learned=True)
    other, expected = learner("momentum", backend, learned=False)
    (batch, val_batch), (later, later_val) = task.batches[:2]
    by_hand = Failing(task, batch, KeyboardInterrupt("stop"), 3 if which == "train" else 99, late)
    val = Failing(task, val_batch, KeyboardInterrupt("stop"), 1 if which == "val" else 99, late)
    with pytest.raises(KeyboardInterrupt, match="stop"):
        opt.step(by_hand, val)
    expected.param_groups[0]["rho"] = 0.1
    expected.step(other.closure(batch))
    assert same_bits(weights(task), weights(other))
    assert opt.rho.item() == pytest.approx(0.1, rel=1e-15)
    opt.step(task.closure(later), task.closure(later_val))
    expected.step(other.closure(later))
    assert same_bits(weights(task), weights(other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_inside_the_context_restores_to_the_bit(backend, error, dtype):
    toy = Toy(dtype)
    opt = lk.SAM(toy.params, torch.optim.SGD, rho=3.0, backend=backend.name, lr=0.1)
    before = weights(toy)
    toy.set_grads(toy.grads(0))
    with pytest.raises(error), opt.perturbed():  # noqa: PT012
        assert not same_bits(weights(toy), before)
        raise error
    assert same_bits(weights(toy), before)
    other = Toy(dtype)
    expected = lk.SAM(other.params, torch.optim.SGD, rho=3.0, backend=backend.name, lr=0.1)
    toy.steps(opt, 2)
    other.steps(expected, 2)
    assert same_bits(weights(toy), weights(other))


def test_an_interrupt_between_the_perturbation_and_the_context_restores(backend, monkeypatch):
    """Code of torch's stands around `first_step`; inside the context, or not, the weights are either's."""
    toy = Toy()
    opt = lk.SAM(toy.params, torch.optim.SGD, rho=3.0, backend=backend.name, lr=0.1)
    before, perturb, seen = weights(toy), opt._engine.begin, []

    def begin(**options):
        perturb(**options)
        seen.append(weights(toy))
        raise KeyboardInterrupt

    monkeypatch.setattr(opt._engine, "begin", begin)
    toy.set_grads(toy.grads(0))
    with pytest.raises(KeyboardInterrupt), opt.perturbed():
        pass
    assert same_bits(weights(toy), before) and not same_bits(seen[0], before)


@pytest.mark.parametrize("entry", ["step", "restore", "first_step", "perturbed"])
@pytest.mark.parametrize("after", [False, True], ids=["before-the-op", "after-the-op"])
@pytest.mark.parametrize("op", ["grad_norm", "perturb_", "restore_", "restore_sgd_"])
def test_an_interrupt_between_two_buckets_is_healed_at_the_next_entry(backend, monkeypatch, op, after, entry):
    """Two dtypes are two buckets; the interrupt comes at the second one's op. What was half perturbed or half restored
    is as it was before; of a half-finished step the first bucket's part stands, the second's is restored or whole."""
    toy = Toy([torch.float32] * 2 + [torch.float64] * 4)
    opt = lk.SAM(toy.params, torch.optim.SGD, rho=3.0, backend=backend.name, lr=0.1, momentum=0.9)
    toy.steps(opt, 1)
    before = weights(toy)
    module = importlib.import_module(MODULES[backend.name])
    original, calls = getattr(module, op), []

    def interrupted(*args):
        calls.append(op)
        if len(calls) != 2:
            return original(*args)
        if after:
            original(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, op, interrupted)
        toy.set_grads(toy.grads(10))
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            opt.first_step(zero_grad=True)
            if op == "restore_":
                opt.restore()
            toy.set_grads(toy.grads(11))
            opt.second_step()
    seen = []
    if entry == "restore":
        opt.restore()
    elif entry == "first_step":
        toy.set_grads(toy.grads(12))
        opt.first_step()
        opt.restore()
    elif entry == "perturbed":
        toy.set_grads(toy.grads(12))
        with opt.perturbed():
            pass
    else:
        opt.zero_grad()
        with pytest.raises(ZeroDivisionError):
            opt.step(lambda: seen.append(weights(toy)) or 1 / 0)
    healed = weights(toy)
    assert all(same_bits(healed, x) for x in seen)
    stepped = [not same_bits(a, b) for a, b in zip(healed, before, strict=True) if a.numel()]
    done = (len(stepped) if after else 2) if op == "restore_sgd_" else 0
    assert stepped == [i < done for i in range(len(stepped))]


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("write", ["first_step", "restore", "second_step", "rmsprop"])
def test_autograd_catches_a_write_between_forward_and_backward(backend, write, flatten):
    """Kernels write where autograd cannot see: they must tell it, or a backward silently uses other weights."""
    task = Task(torch.float32)
    base = torch.optim.RMSprop if write == "rmsprop" else torch.optim.SGD
    opt = lk.SAM(task.net.parameters(), base, backend=backend.name, flatten=flatten, lr=0.1)
    batch = task.batches[0][0]
    task.run(opt, task.batches[:1])
    opt.zero_grad()
    task.loss(batch).backward()
    if write == "first_step":
        held = task.loss(batch)
        opt.first_step(zero_grad=True)
    else:
        opt.first_step(zero_grad=True)
        held = task.loss(batch)
        if write != "restore":
            task.loss(batch).backward()
            opt.second_step()
        else:
            opt.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.backward()


@pytest.mark.parametrize("base", ["momentum", "rmsprop"])
def test_weights_written_between_the_context_and_the_step_are_stepped_from(backend, base):
    """Outside of the context the weights are the user's: a projection there must not be undone by a stale copy."""
    cls, _, options, _ = BASES[base]
    ends = []
    for write in ("before", "between"):
        toy = Toy()
        opt = lk.SAM(toy.params, cls, rho=0.5, backend=backend.name, **options)
        first, second = toy.grads(0), toy.grads(1)
        with torch.no_grad():
            if write == "before":
                [p.mul_(0.5) for p in toy.params]
        toy.set_grads(first)
        with opt.perturbed():
            toy.set_grads(second)
        with torch.no_grad():
            if write == "between":
                [p.mul_(0.5) for p in toy.params]
        opt.step()
        ends.append(snapshot(opt))
    assert same_bits(*ends)


@pytest.mark.parametrize("entry", ["first_step", "perturbed", "restore"])
def test_an_interrupt_within_the_restoring_is_healed_at_the_next_entry(backend, monkeypatch, entry):
    """Two dtypes are two buckets: one interrupt comes at the second's perturbation, another while that is undone."""
    toy = Toy([torch.float32] * 2 + [torch.float64] * 4)
    opt = lk.SAM(toy.params, torch.optim.SGD, rho=3.0, backend=backend.name, lr=0.1)
    toy.steps(opt, 1)
    before = weights(toy)
    module = importlib.import_module(MODULES[backend.name])
    perturb, calls = module.perturb_, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return perturb(*args)

    def again(*args):
        raise KeyboardInterrupt

    toy.set_grads(toy.grads(10))
    with monkeypatch.context() as patch:
        patch.setattr(module, "perturb_", interrupted)
        patch.setattr(module, "restore_", again)
        with pytest.raises(KeyboardInterrupt):
            opt.first_step()
    assert not same_bits(weights(toy), before)
    if entry == "restore":
        opt.restore()
    elif entry == "first_step":
        opt.first_step()
        opt.restore()
    else:
        with opt.perturbed():
            pass
    assert same_bits(weights(toy), before)
