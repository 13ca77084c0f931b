"""What parts keep, in a saved state: for parameters that had no gradient, and for those that were replaced."""

import copy

import pytest
import torch

import lets_kernels as lk
from support import family
from support.given_gradients import Toy, snapshot
from support.guard_bands import same_bits
from support.inside import held, progress
from support.moving_radii import auto

NAMES = ["vasso", "friendly", "looksam", "aelooksam", "sparse", "auto"]
NOBODY, SOME = (), (1, 3)  # whose gradients are there


def build(name, params):
    if name == "auto":
        return lk.SAM(params, torch.optim.SGD, auto(), lr=0.05, momentum=0.9)
    return family.build(name, params, "momentum")


def grads(toy, i, having=None):
    return [g if having is None or k in having else None for k, g in enumerate(toy.grads(i))]


def steps(toy, opt, count, having=None, start=0):
    for i in range(start, start + count):
        toy.two_steps(opt, grads(toy, 2 * i, having), grads(toy, 2 * i + 1, having))


def names(opt):
    return {*opt.direction.held, *opt.descent.held, *opt.radius.held}


def everything(opt):
    return [*snapshot(opt), *family.held(opt).values()]


def as_saved(state, how):
    """Beside the groups; by the numbers in the first group alone; and as either was saved before kept was counted."""
    state = copy.deepcopy(state)
    if "old" in how:
        del state["lets_kernels"]["kept"]
        numbers = state["param_groups"][0]["lets_kernels"]
        state["param_groups"][0]["lets_kernels"] = {k: v for k, v in numbers.items() if not k.startswith("kept.")}
    if "carried" in how:
        del state["lets_kernels"]
    return state


def without(state, name, count):
    """The state, with what is kept gone from the first so many entries that have it."""
    state = copy.deepcopy(state)
    entries = [entry for entry in state["state"].values() if f"lets_kernels.{name}" in entry]
    for entry in entries[:count]:
        del entry[f"lets_kernels.{name}"]
    return state


@pytest.mark.parametrize("how", ["beside", "carried"])
@pytest.mark.parametrize("having", [NOBODY, SOME], ids=["nobody", "some"])
@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_parameters_without_gradients_is_loaded_and_goes_on_to_the_bit(name, having, how):
    toy, other = Toy(), Toy(seed=5)
    opt, resumed = build(name, toy.params), build(name, other.params)
    steps(toy, opt, 3, having)
    state = as_saved(opt.state_dict(), how)
    other.generator, other.seed = toy.generator, toy.seed
    with torch.no_grad():
        for p, q in zip(other.params, toy.params, strict=True):
            p.copy_(q)
    steps(other, resumed, 2, start=9)
    with torch.no_grad():
        for p, q in zip(other.params, toy.params, strict=True):
            p.copy_(q)
    resumed.load_state_dict(state)
    assert progress(resumed).step == 3
    for each, optimizer in ((toy, opt), (other, resumed)):
        steps(each, optimizer, 2, having, start=3)
        steps(each, optimizer, 3, start=5)
    assert same_bits(everything(opt), everything(resumed))


@pytest.mark.parametrize("name", ["looksam", "vasso"])
def test_a_state_of_steps_by_closures_that_make_no_gradient_is_loaded(name):
    toy = Toy()
    opt = build(name, toy.params)
    for _ in range(2):
        opt.step(lambda: torch.ones(()))
    resumed = build(name, Toy().params)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert progress(resumed).step == 2 and not any(held(resumed).values())


@pytest.mark.parametrize("how", ["beside", "carried"])
@pytest.mark.parametrize("having", [SOME, None], ids=["some", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_what_was_kept_and_is_lost_is_noticed_of_one_parameter_too(name, having, how):
    toy = Toy()
    opt = build(name, toy.params)
    steps(toy, opt, 3, having)
    state, before = opt.state_dict(), everything(opt)
    for kind in names(opt):
        count = state["lets_kernels"]["kept"][kind]
        assert count == (len(toy.params) if having is None or kind in ("mask", "before") else len(having))
        for lost, whose in ((1, f"1 of {count} parameters"), (count, "every parameter")):
            with pytest.raises(ValueError, match=f"nothing of it was loaded: .* has lost the {kind} of {whose}"):
                opt.load_state_dict(as_saved(without(state, kind, lost), how))
    assert same_bits(before, everything(opt))


@pytest.mark.parametrize("how", ["beside, old", "carried, old"])
@pytest.mark.parametrize("name", NAMES)
def test_a_state_in_which_that_was_not_counted_is_loaded_by_what_it_has(name, how):
    toy = Toy()
    opt = build(name, toy.params)
    steps(toy, opt, 3)
    state, before = opt.state_dict(), everything(opt)
    for kind in names(opt):
        with pytest.raises(ValueError, match=f"has lost the {kind} of every parameter"):
            opt.load_state_dict(as_saved(without(state, kind, 99), how))
    resumed = build(name, toy.params)
    resumed.load_state_dict(as_saved(state, how))
    assert same_bits(before, everything(resumed))
    resumed.load_state_dict(as_saved(without(state, min(names(opt)), 1), how))


@pytest.mark.parametrize("value", [-1, 1.5, True, "six", None, {}, torch.tensor(6)], ids=str)
def test_numbers_of_what_is_kept_that_are_none_are_refused(value):
    toy = Toy()
    opt = build("vasso", toy.params)
    steps(toy, opt, 1)
    before = everything(opt)
    for kept in ({"average": value}, value, {}, {"average": 6, "mask": 6}):
        state = copy.deepcopy(opt.state_dict())
        state["lets_kernels"]["kept"] = kept
        with pytest.raises(ValueError, match="nothing of it was loaded"):
            opt.load_state_dict(state)
    assert same_bits(before, everything(opt))


def test_the_keys_of_the_carried_numbers_are_there_before_anything_is_kept():
    """Tools load key by key into a fresh optimizer; one that keeps nothing carries what it always did."""
    for name in NAMES:
        toy = Toy()
        opt = build(name, toy.params)
        fresh = opt.state_dict()["param_groups"][0]["lets_kernels"].keys()
        assert {key for key in fresh if key.startswith("kept")} == {f"kept.{kind}" for kind in names(opt)}
        steps(toy, opt, 2)
        assert opt.state_dict()["param_groups"][0]["lets_kernels"].keys() == fresh
    plain = lk.SAM(Toy().params, torch.optim.SGD, lr=0.1).state_dict()
    assert "kept" not in plain["lets_kernels"] and not any(
        "kept" in k for k in plain["param_groups"][0]["lets_kernels"]
    )


# ---- parameters that are replaced, or taken out ----------------------------------------------------------------------


def exchange(toy, opt, place=1):
    """Another parameter in the place of one that has been trained; the old one."""
    old = toy.params[place]
    toy.params[place] = torch.nn.Parameter(old.detach().clone() + 1)
    group = next(group for group in opt.param_groups if any(p is old for p in group["params"]))
    group["params"] = [toy.params[place] if p is old else p for p in group["params"]]
    return old


def has(opt, p):
    return p in opt.state, p in held(opt)


@pytest.mark.parametrize("then", ["step", "state_dict", "load_state_dict", "load_before"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_for_a_parameter_goes_when_another_takes_its_place(name, then):
    toy = Toy()
    opt = build(name, toy.params)
    steps(toy, opt, 2)
    if then == "load_before":  # tables are made anew after it, and none are there in between
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    saved = copy.deepcopy(opt.state_dict())
    old = exchange(toy, opt)
    assert has(opt, old) == (True, True)
    if then in ("step", "load_before"):
        steps(toy, opt, 1, start=2)
    elif then == "state_dict":
        state = opt.state_dict()
        assert 1 not in state["state"] and set(state["lets_kernels"]["kept"].values()) == {len(toy.params) - 1}
    else:
        opt.load_state_dict(saved)
    assert has(opt, old) == (False, False)
    steps(toy, opt, 1, start=3)
    everyone = {id(p) for p in toy.params}
    assert {id(p) for p in opt.state} == {id(p) for p in held(opt)} == everyone

    other = Toy()
    with torch.no_grad():
        for p, q in zip(other.params, toy.params, strict=True):
            p.copy_(q)
    resumed = build(name, other.params)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for each, optimizer in ((toy, opt), (other, resumed)):
        steps(each, optimizer, 2, start=4)
    assert same_bits(everything(opt), everything(resumed))


def test_in_a_copy_too_and_the_original_keeps_its_own():
    toy = Toy()
    opt = build("vasso", toy.params)
    steps(toy, opt, 2)
    twin = copy.deepcopy(opt)
    theirs = Toy()
    theirs.params = [p for group in twin.param_groups for p in group["params"]]
    old = exchange(theirs, twin)
    steps(theirs, twin, 1, start=2)
    assert has(twin, old) == (False, False)
    steps(toy, opt, 1, start=2)
    assert all(has(opt, p) == (True, True) for p in toy.params)


def test_a_parameter_that_is_taken_out_for_a_while_keeps_its_own():
    toy = Toy()
    opt = build("vasso", toy.params)
    steps(toy, opt, 2)
    group, away = opt.param_groups[0], toy.params[1]
    kept = [opt.state[away]["momentum_buffer"].clone(), held(opt)[away]["average"].clone()]
    group["params"] = [p for p in toy.params if p is not away]
    steps(toy, opt, 2, start=2)
    assert same_bits(kept, [opt.state[away]["momentum_buffer"], held(opt)[away]["average"]])
    group["params"] = list(toy.params)
    assert set(opt.state_dict()["lets_kernels"]["kept"].values()) == {len(toy.params)}
    steps(toy, opt, 1, start=4)
    assert all(has(opt, p) == (True, True) for p in toy.params)


def groups_of(toy, *places):
    return [{"params": [toy.params[i] for i in some]} for some in places]


def test_parameters_that_move_among_groups_keep_their_own():
    """In another order, in another group, in a group that is the first one after another was taken out."""
    toy = Toy()
    opt = build("vasso", groups_of(toy, (0, 1, 2), (3, 4, 5)))
    steps(toy, opt, 2)
    first, second = opt.param_groups
    first["params"], second["params"] = second["params"], first["params"][::-1]
    steps(toy, opt, 1, start=2)
    assert all(has(opt, p) == (True, True) for p in toy.params)
    opt.param_groups.remove(first)
    steps(toy, opt, 1, start=3)
    assert all(has(opt, p) == (True, True) for p in toy.params)
    opt.add_param_group({"params": first["params"]})
    steps(toy, opt, 1, start=4)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert all(has(opt, p) == (True, True) for p in toy.params)
