"""Hooks on steps, on saving and on loading: once a step in every call shape, in torch's order, with its arguments."""

import copy

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import lets_kernels as lk
from support import family
from support.conv_net import Task
from support.core_methods import BASES
from support.family import ONE_EACH
from support.given_gradients import Toy, weights
from support.guard_bands import same_bits

KEY = "lets_kernels"


def by_closure(opt, backward):
    opt.step(backward)
    return "step"


def by_two_steps(opt, backward):
    backward()
    opt.first_step(zero_grad=True)
    backward()
    opt.second_step()
    return "second_step"


def by_context(opt, backward):
    backward()
    with opt.perturbed():
        backward()
    opt.step()
    return "step"


def by_first_step_and_step(opt, backward):
    backward()
    opt.first_step(zero_grad=True)
    backward()
    opt.step()
    return "step"


SHAPES = (by_closure, by_two_steps, by_context, by_first_step_and_step)


def made(backend, base="momentum", **options):
    """An optimizer over gradients given by hand, and a closure that counts its calls."""
    cls, _, base_options, _ = BASES[base]
    toy, calls = Toy(), []
    opt = lk.SAM(toy.params, cls, rho=0.3, backend=backend.name, **{**base_options, **options})

    def backward():
        opt.zero_grad()
        toy.set_grads(toy.grads(len(calls)))
        calls.append("closure")
        return torch.tensor(1.0)

    return toy, opt, backward, calls


@pytest.mark.parametrize("base", ["momentum", "adamw", "rmsprop"])
@pytest.mark.parametrize("shape", SHAPES)
def test_step_hooks_run_once_a_step_around_what_finishes_it(backend, shape, base):
    """Before it with the old weights, after it with the new ones; with the wrapper first among the arguments."""
    toy, opt, backward, _ = made(backend, base)
    seen = []
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o, args, kwargs, weights(toy))))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", o, args, kwargs, weights(toy))))
    for count in (1, 2):
        begin = weights(toy)
        shape(opt, backward)
        assert [name for name, *_ in seen] == ["pre", "post"] * count
        before, after = seen[-2:]
        for _, given, args, kwargs, _ in (before, after):
            assert given is opt and args == ((opt, backward) if shape is by_closure else (opt,)) and kwargs == {}
        assert same_bits(after[-1], weights(toy)) and not same_bits(after[-1], begin)
        assert shape is not by_closure or same_bits(before[-1], begin)
    assert opt.fused is (base != "rmsprop")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("base", ["momentum", "rmsprop"])
def test_global_hooks_see_a_step_once_fused_or_not(backend, base, shape):
    """That of the wrapper, in every shape. They come first before the step and last after it, as torch has it."""
    _, opt, backward, calls = made(backend, base)
    opt.register_step_pre_hook(lambda o, *_: calls.append(("own pre", o)))
    opt.register_step_post_hook(lambda o, *_: calls.append(("own post", o)))
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: calls.append(("global pre", o))),
        register_optimizer_step_post_hook(lambda o, *_: calls.append(("global post", o))),
    ]
    try:
        shape(opt, backward)
    finally:
        for handle in handles:
            handle.remove()
    assert opt.fused is (base != "rmsprop")
    around = [("global pre", opt), ("own pre", opt), ("own post", opt), ("global post", opt)]
    assert [call for call in calls if call != "closure"] == around
    assert calls.count("closure") == 2


@pytest.mark.parametrize("shape", family.SHAPES)
@pytest.mark.parametrize("name", ONE_EACH)
def test_hooks_run_once_a_step_of_any_method(name, shape):
    """Perturbed or not, with one pass or two; before it at the old weights and after it at the new ones, never at
    others."""
    task = Task(torch.float32, steps=4)
    opt, seen = family.build(name, task), []
    opt.register_step_pre_hook(lambda *_: seen.append(weights(task)))
    opt.register_step_post_hook(lambda *_: seen.append(weights(task)))
    for count, (batch, _) in enumerate(task.batches, 1):
        before = weights(task)
        family.take(opt, task.net, batch, shape)
        assert len(seen) == 2 * count and same_bits(seen[-1], weights(task)) and not same_bits(seen[-1], before)
        # In two steps it is `second_step` that they are around, and the weights before it are perturbed.
        assert shape == "two-steps" or same_bits(seen[-2], before)


def test_hooks_of_the_base_optimizer_run_too_and_it_then_steps_itself(backend):
    toy, opt, backward, calls = made(backend)
    other, plain, other_backward, _ = made(backend)
    handle = opt.base_optimizer.register_step_post_hook(lambda o, *_: calls.append(o))
    opt.step(backward)
    plain.step(other_backward)
    assert calls.count(opt.base_optimizer) == 1 and not opt.fused and "hooks" in opt.fused_reason and plain.fused
    for ours, theirs in zip(weights(toy), weights(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    handle.remove()
    opt.step(backward)
    assert opt.fused


@pytest.mark.parametrize("shape", [by_closure, by_two_steps])
def test_a_pre_hook_may_change_the_arguments_and_a_removed_hook_is_gone(backend, shape):
    toy, opt, backward, calls = made(backend)

    def other_closure():
        calls.append("other")
        return backward()

    change = {by_closure: lambda *_: ((opt, other_closure), {}), by_two_steps: lambda *_: ((opt, True), {})}[shape]
    handle = opt.register_step_pre_hook(change)
    shape(opt, backward)
    assert calls.count("other") == 2 * (shape is by_closure)
    assert shape is by_closure or all(p.grad is None for p in toy.params)
    handle.remove()
    shape(opt, backward)
    assert calls.count("other") == 2 * (shape is by_closure) and toy.params[0].grad is not None


def test_hooks_run_once_where_the_radius_learns_as_well(backend):
    """The steps of the optimizer of nu are its own: hooks of the wrapper see one step."""
    task = Task(torch.float32, steps=2)
    opt = lk.LETSSAM(task.net.parameters(), torch.optim.SGD, 0.1, backend=backend.name, lr=0.1)
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append(opt.rho.item()))
    opt.register_step_post_hook(lambda *_: seen.append(opt.rho.item()))
    task.run(opt, learned=True)
    assert len(seen) == 4 and len({*seen}) == 3 and seen[1] == seen[2]


def test_a_failed_step_runs_no_post_hook_and_a_skipped_one_does(backend):
    toy, opt, backward, calls = made(backend)
    opt.register_step_post_hook(lambda *_: calls.append("post"))

    def fails():
        backward()
        raise KeyError

    with pytest.raises(KeyError):
        opt.step(fails)
    assert "post" not in calls
    toy.set_grads([torch.full_like(p, torch.nan) for p in toy.params])
    opt.first_step()
    opt.second_step()
    assert calls.count("post") == 1 and opt.metrics()["skipped_steps"].item() == 1


REGISTER = {
    "pre": lambda opt, hook: opt.register_step_pre_hook(hook),
    "post": lambda opt, hook: opt.register_step_post_hook(hook),
    "global-pre": lambda _, hook: register_optimizer_step_pre_hook(hook),
    "global-post": lambda _, hook: register_optimizer_step_post_hook(hook),
}


@pytest.mark.parametrize("which", REGISTER)
def test_one_hook_alone_is_called(which):
    w, seen = torch.nn.Parameter(torch.ones(3)), []
    opt = lk.SAM([w], torch.optim.SGD, lr=0.1)
    handle = REGISTER[which](opt, lambda optimizer, *_: seen.append(optimizer))
    for half in (opt.first_step, opt.second_step):
        w.grad = torch.ones(3)
        half()
    handle.remove()
    assert seen == [opt]


def test_the_profiler_names_one_step_of_the_wrapper(backend):
    for shape in (by_closure, by_two_steps):
        _, opt, backward, _ = made(backend)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            shape(opt, backward)
        names = [event.name for event in profile.events()]
        assert names.count("Optimizer.step#SAM.step") == 1


# ---- saving and loading


def stepped(backend):
    toy, opt, backward, _ = made(backend)
    opt.step(backward)
    return toy, opt


def test_state_dict_hooks_see_the_whole_state_and_may_replace_it(backend):
    _, opt = stepped(backend)
    calls = []
    opt.register_state_dict_pre_hook(lambda o: calls.append(("second", o)))
    opt.register_state_dict_pre_hook(lambda o: calls.append(("first", o)), prepend=True)
    opt.register_state_dict_post_hook(lambda o, state: calls.append(("post", o, set(state))))
    opt.register_state_dict_post_hook(lambda o, state: {**state, "mine": 1})
    opt.register_state_dict_post_hook(lambda o, state: state.pop(KEY) and None)
    state = opt.state_dict()
    assert calls == [("first", opt), ("second", opt), ("post", opt, {"state", "param_groups", KEY})]
    assert set(state) == {"state", "param_groups", "mine"}


def test_a_state_dict_pre_hook_comes_before_anything_is_read(backend):
    task = Task(torch.float32, steps=1)
    opt = lk.LETSSAM(task.net.parameters(), torch.optim.SGD, 0.1, backend=backend.name, lr=0.1)
    opt.register_state_dict_pre_hook(lambda o: o.radius.nu[0].data.fill_(0.5))
    assert opt.state_dict()[KEY]["radius"]["nu"][0].item() == 0.5


def test_load_hooks_run_around_the_loading_and_leave_the_callers_dictionary_alone(backend):
    _, opt = stepped(backend)
    saved = opt.state_dict()
    saved["param_groups"][0]["lr"] = 0.7
    keys, calls = set(saved), []
    _, fresh, *_ = made(backend)
    fresh.register_load_state_dict_pre_hook(lambda o, state: calls.append(("second", o.param_groups[0]["lr"])))
    fresh.register_load_state_dict_pre_hook(lambda o, state: state.update(mine=1), prepend=True)
    fresh.register_load_state_dict_pre_hook(lambda o, state: calls.append(state["mine"]))
    fresh.register_load_state_dict_post_hook(lambda o: calls.append(("post", o.param_groups[0]["lr"])))
    fresh.load_state_dict(saved)
    assert calls == [("second", 0.1), 1, ("post", 0.7)] and set(saved) == keys


def test_a_load_pre_hook_may_replace_the_state(backend):
    _, opt = stepped(backend)
    _, fresh, *_ = made(backend)
    fresh.register_load_state_dict_pre_hook(lambda o, state: opt.state_dict())
    fresh.load_state_dict({"nothing": "that could be loaded"})
    momenta = [o.state_dict()["state"][0]["momentum_buffer"] for o in (opt, fresh)]
    assert same_bits(*momenta)


class Renaming(torch.optim.SGD):
    """A base optimizer that saves in a form of its own."""

    def state_dict(self):
        return {"form": 2, **super().state_dict()}

    def load_state_dict(self, state):
        assert state["form"] == 2
        super().load_state_dict({k: v for k, v in state.items() if k != "form"})


def test_the_base_optimizers_own_ways_of_saving_are_used(backend):
    """Its hooks and its overridden methods: what it loads is what it has saved."""
    ends = []
    for moved in (False, True):
        toy = Toy()
        opt = lk.SAM(toy.params, Renaming, rho=0.3, backend=backend.name, lr=0.1, momentum=0.9)
        toy.steps(opt, 1)
        if moved:
            calls = []
            opt.base_optimizer.register_state_dict_post_hook(lambda o, state: calls.append(o))
            state = opt.state_dict()
            assert calls == [opt.base_optimizer]
            opt = lk.SAM(toy.params, Renaming, rho=0.3, backend=backend.name, lr=0.1, momentum=0.9)
            opt.load_state_dict(state)
        toy.steps(opt, 1, start=1)
        ends.append(weights(toy))
    assert same_bits(*ends)


def test_a_copy_takes_no_hooks_along(backend):
    """As with torch's own: hooks belong to the program around the optimizer."""
    _, opt, *_ = made(backend)
    calls = []
    opt.register_step_post_hook(lambda *_: calls.append(1))
    opt.register_state_dict_pre_hook(lambda *_: calls.append(2))
    other = copy.deepcopy(opt)
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    other.first_step()
    other.second_step()
    other.state_dict()
    assert calls == []
