"""What holds when things go wrong in what the family's methods add: a start beside the weights, averages, masks."""

import contextlib
import importlib

import pytest
import torch

from support import family
from support.backends import MODULES
from support.conv_net import Task
from support.family import ALWAYS, BESIDE, COUNTED, ONE_EACH
from support.given_gradients import Toy, weights
from support.guard_bands import same_bits
from support.inside import held


def stopping(closure, call, late):
    """Raises at its n-th call, before or after what it does."""
    left = [call]

    def run(*args):
        left[0] -= 1
        if left[0] == 0 and not late:
            raise KeyboardInterrupt("stop")
        found = closure(*args)
        if left[0] == 0:
            raise KeyboardInterrupt("stop")
        return found

    return run


def in_two_dtypes(task):
    """The task with its later modules in float64, so that its parameters are two buckets."""
    task.net[3:].double()
    task.net[3].register_forward_pre_hook(lambda module, args: tuple(x.double() for x in args))
    return task


@pytest.mark.parametrize("late", [False, True], ids=["before-backward", "after-backward"])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("name", ONE_EACH)
def test_an_exception_in_the_closure_of_any_method(name, call, late):
    """Weights, and all that the parts keep but what they say they have counted; the random numbers are drawn again."""
    ends, passes = [], 2 if name not in family.ONE_PASS else 1
    for fails in (False, True):
        task = Task(torch.float32, steps=4)
        opt = family.build(name, task, **ALWAYS.get(name, {}))
        family.run(opt, task, task.batches[:2])
        if name == "sparse":
            opt.direction._selected = 0  # the next step selects
        before, batch = family.held(opt), task.batches[2][0]
        if fails:
            closure = stopping(family.closure(opt, task.net, batch), min(call, passes), late)
            with pytest.raises(KeyboardInterrupt, match="stop"):
                opt.step(closure)
            after = family.held(opt)
            changed = {k for k in before if not same_bits(before[k], after[k])}
            counted = COUNTED.get(name, {"direction.selected", "lets_kernels.mask"} if name == "sparse" else set())
            assert {k.split(".", 1)[1] if k[0].isdigit() else k for k in changed} == (counted if call == 2 else set())
        family.take(opt, task.net, batch)
        ends.append(family.held(opt))
    if call == 1 or name not in COUNTED:
        family.assert_same(*ends)
    assert all(bool(v.isfinite().all()) for v in ends[1].values())


@pytest.mark.parametrize("where", ["enter", "pass", "exit"])
@pytest.mark.parametrize("name", BESIDE)
def test_an_exception_around_a_first_pass_beside_the_weights_restores(backend, monkeypatch, name, where):
    """Two dtypes are two buckets: on the way there and back the exception comes between them. An entry that comes then
    finds the weights where they belong, and the pass does not count."""
    task, module = in_two_dtypes(Task(torch.float32, steps=2)), importlib.import_module(MODULES[backend.name])
    opt = family.build(name, list(task.net.parameters()), backend=backend.name)
    family.take(opt, task.net, task.batches[0][0])
    before, op = weights(task), {"enter": "perturb_", "exit": "restore_"}.get(where)
    original, calls = getattr(module, op or "restore_"), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        if op:
            patch.setattr(module, op, interrupted)
        with opt.first_pass():
            assert not same_bits(weights(task), before)
            if where == "pass":
                raise KeyboardInterrupt
    assert same_bits(weights(task), before)
    task.closure(task.batches[1][0])()
    with pytest.raises(RuntimeError, match=r"opt\.first_pass"):
        opt.first_step()
    assert same_bits(weights(task), before)
    family.take(opt, task.net, task.batches[1][0], "context")


@pytest.mark.parametrize("entry", ["first_pass", "first_step", "perturbed", "restore", "step", "second_step"])
@pytest.mark.parametrize("name", ["rsam", "bsam"])
def test_a_start_that_was_torn_twice_is_healed_at_the_next_entry(backend, monkeypatch, name, entry):
    """One interrupt comes at the second bucket's start, another while that is undone."""
    task, module = in_two_dtypes(Task(torch.float32, steps=2)), importlib.import_module(MODULES[backend.name])
    opt = family.build(name, list(task.net.parameters()), backend=backend.name)
    family.take(opt, task.net, task.batches[0][0])
    before, perturb, calls, seen = weights(task), module.perturb_, [], []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return perturb(*args)

    def again(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "perturb_", interrupted)
        patch.setattr(module, "restore_", again)
        with pytest.raises(KeyboardInterrupt):
            opt.first_pass().__enter__()
    assert not same_bits(weights(task), before)
    calls = {
        "first_pass": lambda: opt.first_pass().__enter__(),
        "first_step": opt.first_step,
        "perturbed": lambda: opt.perturbed().__enter__(),
        "restore": opt.restore,
        "step": lambda: opt.step(lambda: seen.append(weights(task)) or 1 / 0),
        "second_step": opt.second_step,
    }
    with contextlib.suppress(RuntimeError, ZeroDivisionError):
        calls[entry]()
    if entry == "first_pass":
        opt.restore()
    assert same_bits(weights(task), before)
    family.take(opt, task.net, task.batches[1][0])


@pytest.mark.parametrize("name", ["sparse-interval", "sparse-dynamic"])
def test_an_interrupt_within_the_selection_of_a_mask_leaves_a_mask(monkeypatch, name):
    """Of zeros and ones, and after the next step one of its whole share: nothing of the selection's marks."""
    module, count = importlib.import_module(MODULES["cpu"]), 0
    for at in range(1, 11):
        toy = Toy([torch.float32, torch.float64, torch.float64], ((7,), (5, 6), (3,)))  # two buckets
        opt = family.build(name, toy.params, backend="cpu")
        opt.direction.interval, opt.direction.sparsity = 1, 0.5
        toy.steps(opt, 1)
        original, calls = module.select_, []

        def interrupted(*args, at=at, original=original, calls=calls):
            original(*args)
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt

        toy.set_grads(toy.grads(10))
        with monkeypatch.context() as patch:
            patch.setattr(module, "select_", interrupted)
            try:
                opt.first_step()
            except KeyboardInterrupt:
                count += 1
        opt.restore()
        masks = [held(opt)[p]["mask"] for p in toy.params]
        assert {*torch.cat([m.flatten() for m in masks]).tolist()} == {0, 1}
        toy.steps(opt, 1, start=7)
        masks = torch.cat([held(opt)[p]["mask"].flatten() for p in toy.params])
        assert {*masks.tolist()} == {0, 1} and masks.sum() == round(0.5 * 40)
    assert count == (8 if name == "sparse-interval" else 10)  # the ops of one selection
