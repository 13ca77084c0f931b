"""The three call shapes of every method, and how many passes each takes."""

import copy

import pytest
import torch

import lets_kernels as lk
from support import family
from support.conv_net import Task
from support.family import BESIDE, FAMILY, ONE_PASS, SHAPES, TUNED, assert_same, build, closure, few, held, take
from support.inside import now

# Passes of a step that perturbs, and of one that does not: (calls of the closure, gradients).
CALLS = {lk.ESAM: ((3, 2), (1, 1))}


def calls_of(name, opt):
    """The calls and the gradients of a step that perturbs, and those of one that does not."""
    several = ((1 + opt.direction.ascents,) * 2, (1, 1))
    return CALLS.get(FAMILY[name].cls, ONE if name in ONE_PASS else several)


ONE = ((1, 1), (1, 1))


def perturbs(opt):
    """Whether the step just taken was a perturbed one."""
    return now(opt).decision[1]


@pytest.mark.parametrize("name", FAMILY)
def test_all_call_shapes_take_the_same_steps_to_the_bit(backend, name):
    """Also where the user makes the second pass in any case, though the step does not perturb."""
    ends = []
    for shape, skip in [(shape, True) for shape in SHAPES] + [("two-steps", False), ("context", False)]:
        if backend.name == "reference" and len(ends) == len(SHAPES):
            break  # the rest is no backend's
        task = Task(steps=4)
        opt = build(name, task, backend=backend.name)
        family.run(opt, task, task.batches[: few(name, backend)], shape, skip)
        ends.append(held(opt))
    for end in ends[1:]:
        assert_same(ends[0], end)


@pytest.mark.parametrize("name", FAMILY)
def test_flattened_parameters_take_the_same_steps_to_the_bit(name):
    ends = []
    for flatten in (False, True):
        task = Task(steps=4)
        opt = build(name, task, flatten=flatten)
        family.run(opt, task)
        ends.append(held(opt))
    assert_same(*ends)


@pytest.mark.parametrize("name", ["rst", "looksam", "aesam", "aelooksam", "late-sam"])
def test_a_second_pass_that_is_not_needed_may_be_left_out_in_both_shapes(backend, name):
    """With the same result; over ten steps, some of which perturb and some do not."""
    ends, kinds = [], set()
    for shape in ("two-steps", "context"):
        for skip in (True, False):
            task = Task()
            opt = build(name, task, backend=backend.name)
            for batch, _ in task.batches:
                take(opt, task.net, batch, shape, skip)
                kinds.add(perturbs(opt))
            ends.append(held(opt))
    assert kinds == {True, False}
    for end in ends[1:]:
        assert_same(ends[0], end)


@pytest.mark.parametrize("name", FAMILY)
def test_the_closure_is_called_as_often_as_needed_and_gradients_are_counted(name):
    task, gradients = Task(), 0
    opt = build(name, task)
    for batch, _ in task.batches:
        calls = []
        opt.step(closure(opt, task.net, batch, calls))
        expected, passes = calls_of(name, opt)[0 if perturbs(opt) else 1]
        gradients += passes
        assert len(calls) == expected
        assert opt.metrics()["gradients"] == gradients
    assert opt.metrics()["gradients"].dtype == torch.int64


# What goes by one micro-batch after the other. The others remember one first gradient a step, or look at the batch.
def goes_one_by_one(opt):
    remembers = opt.direction.remembers or opt.descent.looks_back or opt.schedule.looks_at_gradient
    remembers = remembers or opt.length.remembers or opt.direction.ascents > 1
    return opt.direction.needs_gradient and not (remembers or opt.samples.per_sample)


ONE_BY_ONE = [n for n in FAMILY if goes_one_by_one(build(n, Task(steps=1)))]


def test_those_that_go_by_micro_batches_are_those_that_should():
    assert {FAMILY[n].cls for n in ONE_BY_ONE if n in TUNED} == {
        lk.RST,
        lk.LateSAM,
        lk.RSAM,
        lk.FisherSAM,
        lk.LESAM,
        lk.USAM,
    }


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_gradients_over_micro_batches_are_counted(name):
    """Two micro-batches, each perturbed by itself: four gradients, or two. Every closure is called that often."""
    task, calls = Task(steps=6), []
    opt = build(name, task)
    for batch, other in task.batches:
        opt.step([closure(opt, task.net, b, calls) for b in (batch, other)])
        assert opt.metrics()["gradients"] == len(calls)
    assert len(calls) == (6 * 4 if opt.schedule.capturable else len(calls))


@pytest.mark.parametrize("name", [n for n in FAMILY if n not in ONE_BY_ONE])
def test_what_does_not_go_by_micro_batches_is_refused_before_a_weight_moves(name):
    task = Task(steps=1)
    opt = build(name, task)
    before = task.bits()
    with pytest.raises(ValueError, match=r"give step\(\) one closure, not a list"):
        opt.step([closure(opt, task.net, batch) for batch in task.batches[0]])
    assert all(map(torch.equal, task.bits(), before))


@pytest.mark.parametrize("gamma", [0.3, 0.5, 1.0])
def test_esams_second_gradient_is_of_a_share_of_the_samples(gamma):
    """Of eight: three, four, all; at 1 without the forward pass that would choose them."""
    task, calls = Task(steps=1), []
    opt = build("esam", task, gamma=gamma)
    opt.step(closure(opt, task.net, task.batches[0][0], calls))
    assert calls[0] is None
    if gamma == 1:
        assert len(calls) == 2 and calls[1] is None
    else:
        assert calls[1] is None and calls[2].dtype == torch.int64
        assert len(calls[2].unique()) == {0.3: 3, 0.5: 4}[gamma]


@pytest.mark.parametrize("name", BESIDE)
def test_a_first_pass_at_the_weights_themselves_is_refused(name):
    """In the shapes in which the user makes it; and inside the context the weights are beside, outside to the bit."""
    task = Task(steps=1)
    opt = build(name, task)
    batch, before = task.batches[0][0], task.bits()
    task.closure(batch)()
    with pytest.raises(RuntimeError, match="first_pass"):
        opt.first_step()
    opt.zero_grad()
    with opt.first_pass():
        assert not all(map(torch.equal, task.bits(), before))
        task.closure(batch)()
    assert all(map(torch.equal, task.bits(), before))
    opt.first_step(zero_grad=True)
    opt.restore()
    assert all(map(torch.equal, task.bits(), before))


REMEMBER = (lk.FriendlySAM, lk.VaSSO, lk.BSAM, lk.SparseSAM, lk.AESAM, lk.AELookSAM, lk.LightSAM, lk.SAMPa)


@pytest.mark.parametrize("name", FAMILY)
def test_a_step_that_is_given_up_is_taken_again_with_the_same_draws(name):
    """An error in the second pass leaves the weights and the base optimizer as they were. Averages, sums, precisions
    and AE-SAM's mean have counted the gradient, and a mask has been selected by it, as their docstrings say; what has
    no such memory takes the step as if nothing had been."""
    task, twin = Task(steps=1), Task(steps=1)
    opt, other = build(name, task), build(name, twin)
    batch, before = task.batches[0][0], task.bits()
    inner, count = closure(opt, task.net, batch), []

    def failing(*subset):
        count.append(1)
        if len(count) == (1 if name in ONE_PASS else 2):
            raise KeyError("once")
        return inner(*subset)

    failed = False
    try:
        opt.step(failing)
    except KeyError:
        failed = True
    perturbed = len(count) > 1 or name in ONE_PASS
    assert failed is perturbed
    if not failed:
        return
    assert all(map(torch.equal, task.bits(), before))
    opt.step(inner)
    take(other, twin.net, batch)
    remembers = opt.direction.remembers or opt.schedule.looks_at_gradient or opt.length.remembers
    assert remembers == (FAMILY[name].cls in REMEMBER)
    if not remembers or name == "sparse":  # whose one selection stays, and is the same
        assert_same(held(opt), held(other))


@pytest.mark.parametrize("name", FAMILY)
def test_a_copy_goes_on_as_the_original_does(name):
    task = Task(steps=4)
    opt = build(name, task)
    family.run(opt, task, task.batches[:2])
    twin = copy.deepcopy({"net": task.net, "opt": opt})
    other = Task(steps=4, net=twin["net"])
    family.run(opt, task, task.batches[2:])
    family.run(twin["opt"], other, task.batches[2:])
    assert_same(held(opt), held(twin["opt"]))
