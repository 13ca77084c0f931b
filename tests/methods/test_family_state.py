"""Saved states of every method, in the middle of what it does; and its random numbers."""

import io

import pytest
import torch

from support import family
from support.conv_net import Task
from support.family import FAMILY, ONE_EACH, SEED, TUNED, assert_same, build, few, held
from support.inside import progress

# Steps before the interruption, where it matters: in the middle of LookSAM's cycle of three, between two selections of
# a mask, before AE-LookSAM has a g_v (its first perturbed step is the fifth) and after, before SAM sets in and after.
BEFORE = {
    "aelooksam": (3, 6),
    "looksam": (2,),
    "looksam-per-tensor": (2,),
    "sparse-dynamic": (3,),
    "rst": (0, 3),
    "late-sam": (1, 3),
}


def through_bytes(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("route", ["dict", "file"])
@pytest.mark.parametrize(("name", "before"), [(name, b) for name in FAMILY for b in BEFORE.get(name, (2,))])
def test_a_resumed_run_goes_on_to_the_bit(name, before, route):
    """In a fresh optimizer, which would have another seed, on a fresh net."""
    task, end = Task(), min(before + 3, 10)
    opt = build(name, task)
    family.run(opt, task, task.batches[:before])
    saved = {"net": task.net.state_dict(), "opt": opt.state_dict()}
    saved = through_bytes(saved) if route == "file" else {k: _copied(v) for k, v in saved.items()}
    family.run(opt, task, task.batches[before:end])

    other = Task()
    fresh = build(name, other, seed=SEED + 5)
    if FAMILY[name].base:  # a state of its own to be replaced; bSAM's is there from the beginning
        family.run(fresh, other, other.batches[7:8])
    other.net.load_state_dict(saved["net"])
    fresh.load_state_dict(saved["opt"])
    family.run(fresh, other, task.batches[before:end])
    assert_same(held(opt), held(fresh))
    assert fresh.metrics()["gradients"] == opt.metrics()["gradients"]


def _copied(value):
    """A saved state refers to what it was taken of, as torch's do."""
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copied, value))
    return value.clone() if torch.is_tensor(value) else value


@pytest.mark.parametrize("name", ["rst", "rsam", "friendly", "sparse", "esam", "aelooksam", "bsam"])
def test_a_resumed_run_goes_on_on_the_other_backend_s_state(backend, name):
    """What one backend has kept the other takes up: the same values, under the same names."""
    task = Task(steps=2)
    opt = build(name, task, backend="cpu" if backend.name == "reference" else "reference")
    family.run(opt, task, task.batches[:1])
    saved, before = through_bytes({"net": task.net.state_dict(), "opt": opt.state_dict()}), held(opt)
    fresh = build(name, Task(steps=2, net=task.net), backend=backend.name)
    fresh.load_state_dict(saved["opt"])
    assert_same(held(fresh), before)


@pytest.mark.parametrize("name", ONE_EACH)
def test_steps_leave_torchs_generator_alone(backend, name):
    """And what torch draws in between changes no step: every decision is a function of the seed and the step."""
    ends = []
    for disturbed in (False, True):
        task = Task(steps=3)
        opt = build(name, task, backend=backend.name)
        for batch, _ in task.batches[: few(name, backend)]:
            if disturbed:
                torch.manual_seed(99)
                torch.rand(5)
            state = torch.get_rng_state()
            family.take(opt, task.net, batch)
            assert torch.equal(torch.get_rng_state(), state)
        ends.append(held(opt))
    assert_same(*ends)


@pytest.mark.parametrize("name", ONE_EACH)
def test_without_a_seed_torchs_generator_gives_it(name):
    """A method that draws takes one number when it is built; one that draws nothing leaves the generator alone."""
    ends, moved = [], []
    for start in (5, 5, 6):
        torch.manual_seed(start)
        before = torch.get_rng_state()
        task = Task(steps=6)
        opt = build(name, task, seed=None)
        moved.append(not torch.equal(torch.get_rng_state(), before))
        ends.append(progress(opt).random.seed)
    assert ends[0] == ends[1]
    assert (ends[0] != ends[2]) is progress(opt).random.used
    assert moved == [progress(opt).random.used] * 3


def test_methods_that_draw_are_those_that_should():
    drawing = {name for name in ONE_EACH if progress(build(name, Task(steps=1))).random.used}
    assert drawing & set(TUNED) == {"rst", "rgsam", "rsam", "random-sam", "sparse", "esam", "bsam"}


@pytest.mark.parametrize("seed", [0, 1, 2**53 - 1])
def test_seeds_of_any_size(seed):
    ends = []
    for own in (seed, seed, seed ^ (1 << 40)):  # the upper half of the key counts too
        task = Task(steps=1)
        opt = build("random-sam", task, seed=own)
        family.run(opt, task)
        ends.append(held(opt)["weights.0"])
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("seed", [-1, 2**53, 1.0, True])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        build("rst", Task(steps=1), seed=seed)


@pytest.mark.parametrize("name", ["looksam", "friendly", "sparse", "rst"])
def test_a_state_of_another_method_is_refused(name):
    """Before anything of it is taken over."""
    other = {"looksam": "friendly", "friendly": "looksam", "sparse": "vasso", "rst": "aesam"}[name]
    task, twin = Task(steps=2), Task(steps=2)
    opt, wrong = build(name, task), build(other, twin)
    family.run(opt, task, task.batches[:1])
    family.run(wrong, twin, twin.batches[:1])
    before = held(opt)
    with pytest.raises(ValueError, match="nothing of it was loaded"):
        opt.load_state_dict(wrong.state_dict())
    assert_same(held(opt), before)
