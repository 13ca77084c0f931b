"""A saved state that is damaged is refused before anything of it is loaded, whatever in it is wrong."""

import copy

import pytest
import torch

import lets_kernels as lk
from support import family
from support.conv_net import Task
from support.family import FAMILY, ONE_EACH
from support.given_gradients import snapshot
from support.guard_bands import same_bits
from support.inside import progress


def lets(net, **options):
    radius = lk.LearnedRadius(0.1, curvature="secant", lr=0.05, reuse_train_gradient=True, **options)
    return lk.LETSSAM(net.parameters(), torch.optim.AdamW, radius, lr=0.02)


def run(make, steps):
    task = Task(torch.float32, steps=4)
    opt = make(task.net)
    task.run(opt, task.batches[:steps], opt.radius.learns)
    return task, opt


@pytest.fixture(scope="module")
def saved():
    """The state of a run with everything in it: averages, a learned radius, a step that waits."""
    state = run(lets, 2)[1].state_dict()
    assert state["lets_kernels"]["radius"]["pending"] is not None
    state["state"][0]["exp_avg"].fill_(3.0)  # would show
    state["param_groups"][0]["lr"] = 7.0
    return state


def paths(entry, path=()):
    """Every key and index within an entry, and so every value."""
    items = entry.items() if isinstance(entry, dict) else enumerate(entry) if isinstance(entry, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


def parent(state, path):
    for key in path[:-1]:
        state = state[key]
    return state


def everything(opt):
    """Weights, states, radii and the numbers beside them; identities too, since nothing may be replaced."""
    waiting = opt.radius._pending if opt.radius.learns else None
    numbers = {
        **opt.param_groups[0],
        "params": None,
        "rho": None,
        "step": progress(opt).step,
        "waiting": id(waiting),
    }
    return numbers, [*snapshot(opt), opt.skipped.clone()]


def assert_refused(opt, state, what):
    before = everything(opt)
    try:
        opt.load_state_dict(state)
    except (ValueError, TypeError):
        pass
    else:
        pytest.fail(f"loaded, with {what}")
    after = everything(opt)
    assert before[0] == after[0] and same_bits(before[1], after[1]), what


def damaged(saved, path, damage):
    """The state with one value of the entry gone, or something else."""
    state = copy.deepcopy(saved)
    home = parent(state["lets_kernels"], path)
    if damage == "gone":
        del home[path[-1]]
    else:
        home[path[-1]] = damage
    return state


# Options that torch's Adam has got in the course of its versions; it gives them to states that lack them.
LATER = {"amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay", "foreach", "fused"}


@pytest.mark.parametrize("damage", ["gone", "a word"])
def test_every_value_that_is_gone_or_of_another_kind_is_noticed(saved, damage):
    """One at a time, the whole entry through, but for the step that waits."""
    _, opt = run(lets, 1)
    own = saved["lets_kernels"]
    found = [path for path in paths(own) if "pending" not in path and parent(own, path)[path[-1]] is not None]
    found = [path for path in found if damage != "gone" or path[-1] not in LATER]
    assert len(found) >= 20
    for path in found:
        assert_refused(opt, damaged(saved, path, damage), f"{damage} at {path}")
    opt.load_state_dict(copy.deepcopy(saved))  # which in itself is fine
    assert opt.param_groups[0]["lr"] == 7.0 and opt.radius.waits


@pytest.mark.parametrize("damage", ["gone", "a word"])
def test_a_damaged_step_that_waits_is_noticed(saved, damage):
    """Every key of its dicts; every tensor in its lists. Places and sizes are compared when it is unpacked."""
    _, opt = run(lets, 1)
    own, places = saved["lets_kernels"], ("group", "places", "xi", "q")
    found = [path for path in paths(own) if "pending" in path and not {"places", "lr"} & {*path[:-1]}]
    if damage == "gone":
        found = [path for path in found if isinstance(path[-1], str)]
    else:
        found = [path for path in found if path[-1] not in places and path[-2] != "indices"]
        found = [path for path in found if parent(own, path)[path[-1]] is not None]
    assert len(found) >= 20
    for path in found:
        assert_refused(opt, damaged(saved, path, damage), f"{damage} at {path}")


def member(name):
    task = Task(torch.float32, steps=4)
    opt = family.build(name, task, "adamw")
    family.run(opt, task, task.batches[:3])
    return opt


MINUS = -1


@pytest.mark.parametrize("damage", ["gone", "a word", float("nan"), MINUS, None, torch.ones(2)], ids=str)
@pytest.mark.parametrize("name", ONE_EACH)
def test_what_the_parts_of_any_method_have_counted_is_looked_at(name, damage):
    """One value at a time, and nothing is loaded: neither weights' state nor what the other parts keep."""
    whole, opt = member(name).state_dict(), member(name)
    own = whole["lets_kernels"]
    found = [path for path in paths(own) if path[0] in ("direction", "schedule", "descent", "random")]
    assert len(found) >= 5
    whole["param_groups"][0]["lr"] = 7.0
    for path in found:
        if damage is MINUS and isinstance(parent(own, path)[path[-1]], float):
            continue  # finite; a mean of squares is none, but a part of one's own may have such numbers
        before = family.held(opt)
        with pytest.raises(ValueError, match="nothing of it was loaded"):
            opt.load_state_dict(damaged(whole, path, damage))
        family.assert_same(before, family.held(opt))
        assert opt.param_groups[0]["lr"] != 7.0
    opt.load_state_dict(copy.deepcopy(whole))
    assert opt.param_groups[0]["lr"] == 7.0


KEEPING = [name for name in ONE_EACH if name in ("looksam", "aelooksam", "friendly", "vasso", "sparse")]
BROKEN = {
    "a-word": lambda t: "a word",
    "another-size": lambda t: t.flatten()[:-1],
    "another-shape": lambda t: t[None].clone(),
    "a-number": lambda t: 3.0,
    "another-name": None,
    "for-nobody": None,
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("name", KEEPING)
def test_what_is_kept_for_a_parameter_is_looked_at(name, broken):
    whole, opt = member(name).state_dict(), member(name)
    whole["param_groups"][0]["lr"] = 7.0
    entries = [(key, n) for key, entry in whole["state"].items() for n in entry if n.startswith("lets_kernels.")]
    assert len(entries) == 8
    key, kept = entries[-1]
    if broken == "another-name":
        whole["state"][key]["lets_kernels.other"] = whole["state"][key].pop(kept)
    elif broken == "for-nobody":
        whole["state"][99] = {kept: whole["state"][key].pop(kept)}
    else:
        whole["state"][key] = {**whole["state"][key], kept: BROKEN[broken](whole["state"][key][kept])}
    before = family.held(opt)
    with pytest.raises(ValueError, match="nothing of it was loaded"):
        opt.load_state_dict(whole)
    family.assert_same(before, family.held(opt))


BASE = {
    "adamw": (torch.optim.AdamW, {"lr": 0.02}),
    "momentum": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.02}),
}
DAMAGED = {
    "no count": ("adamw", "step", torch.empty(0)),
    "counts": ("adamw", "step", torch.ones(3)),
    "a count in words": ("adamw", "step", "three"),
    "a count is gone": ("adamw", "step", None),
    "an average of another size": ("adamw", "exp_avg", torch.zeros(7, 7)),
    "an average of another shape": ("adamw", "exp_avg_sq", "flat"),
    "an average that is a number": ("adamw", "exp_avg", 0.5),
    "an average is gone": ("adamw", "exp_avg", None),
    "a momentum of another shape": ("momentum", "momentum_buffer", "flat"),
    "no entry but a list": ("momentum", None, [1, 2]),
    "another base's average": ("rmsprop", "square_avg", "flat"),
    "another base's count": ("rmsprop", "step", torch.ones(2)),
}


@pytest.mark.parametrize("wrong", DAMAGED)
def test_what_the_base_optimizer_keeps_is_looked_at(wrong):
    """Ops and torch's own steps take it for what it was; some would die of it, long after the load."""
    base, name, value = DAMAGED[wrong]
    optimizer, options = BASE[base]
    opt = run(lambda net: lk.SAM(net.parameters(), optimizer, rho=0.1, **options), 2)[1]
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0]["lr"] = 7.0
    last = max(state["state"])
    entry = state["state"][last]
    if name is None:
        state["state"][last] = value
    elif value is None:
        del entry[name]
    else:
        entry[name] = entry[name][None].clone() if isinstance(value, str) and value == "flat" else value
    with pytest.raises(ValueError, match=rf"nothing of it was loaded: state_dict\['state'\]\[{last}\]"):
        opt.load_state_dict(state)
    assert_refused(opt, state, wrong)


@pytest.mark.parametrize("damage", ["gone", "words", "a pair", "a flag"])
@pytest.mark.parametrize("base, option", [("adamw", "lr"), ("adamw", "betas"), ("momentum", "momentum")])
def test_the_numbers_of_the_groups_are_looked_at(base, option, damage):
    optimizer, options = BASE[base]
    opt = run(lambda net: lk.SAM(net.parameters(), optimizer, rho=0.1, **options), 1)[1]
    state = copy.deepcopy(opt.state_dict())
    group = state["param_groups"][0]
    if damage == "gone":
        del group[option]
    else:
        group[option] = {"words": "fast", "a pair": torch.ones(2), "a flag": True}[damage]
    with pytest.raises(ValueError, match=rf"nothing of it was loaded: state_dict\['param_groups'\]\[0\] .*{option}"):
        opt.load_state_dict(state)
    assert_refused(opt, state, damage)


class RowWise(torch.optim.SGD):
    """With a count a row, an option that older versions had not, and what a user keeps beside."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr, momentum=0.9)
        self.defaults["beta3"] = 0.5
        for group in self.param_groups:
            group["beta3"] = 0.5

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("beta3", 0.5)

    def step(self, closure=None):
        super().step(closure)
        for p, own in self.state.items():
            own["step"] = torch.zeros(p.shape[0] if p.dim() else 1)


def test_what_another_optimizer_keeps_in_its_own_way_is_loaded():
    opt = run(lambda net: lk.SAM(net.parameters(), RowWise, rho=0.1), 2)[1]
    state = copy.deepcopy(opt.state_dict())
    del state["param_groups"][0]["beta3"]
    opt.load_state_dict(state)
    assert opt.param_groups[0]["beta3"] == 0.5


def test_what_a_user_keeps_beside_is_loaded():
    task, opt = run(lambda net: lk.SAM(net.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9), 2)
    first = next(task.net.parameters())
    opt.state[first]["lr_scale"] = 0.5
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert opt.state[first]["lr_scale"] == 0.5


def test_what_the_base_optimizers_own_hooks_make_of_a_state_is_theirs():
    opt = run(lambda net: lk.SAM(net.parameters(), torch.optim.Adam, rho=0.1, lr=0.1), 2)[1]
    old = copy.deepcopy(opt.state_dict())
    for entry in old["state"].values():
        entry["average"] = entry.pop("exp_avg")

    def rename(optimizer, state):
        entries = {k: {"exp_avg" if n == "average" else n: v for n, v in e.items()} for k, e in state["state"].items()}
        return {**state, "state": entries}

    opt.base_optimizer.register_load_state_dict_pre_hook(rename)
    opt.load_state_dict(old)
    assert all("exp_avg" in entry for entry in opt.base_optimizer.state.values())


def test_what_an_older_version_did_not_save_is_filled_in():
    """Switches that torch added since, and a learning rate that is a tensor."""
    optimizer, options = BASE["adamw"]
    opt = run(lambda net: lk.SAM(net.parameters(), optimizer, rho=0.1, **options), 2)[1]
    state = copy.deepcopy(opt.state_dict())
    for name in ("foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
        state["param_groups"][0].pop(name, None)
    state["param_groups"][0]["lr"] = torch.tensor(0.5)
    for entry in state["state"].values():
        entry["step"] = float(entry["step"])
    opt.load_state_dict(state)
    assert float(opt.param_groups[0]["lr"]) == 0.5
    assert all(float(entry["step"]) == 2 for entry in opt.base_optimizer.state.values())


@pytest.mark.parametrize("name", ONE_EACH)
def test_the_state_of_another_method_is_refused(name):
    """Unless its parts keep the same; what is loaded then is only what both have."""
    opt, before = member(name), None
    for other in ONE_EACH:
        whole = copy.deepcopy(member(other).state_dict()) if FAMILY[other].base is FAMILY[name].base else None
        if whole is None:
            continue
        own, mine = whole["lets_kernels"], opt.state_dict()["lets_kernels"]
        parts = ("direction", "schedule", "descent")
        alike = all(own[part].keys() == mine[part].keys() for part in parts)
        kept = {n for e in whole["state"].values() for n in e if n.startswith("lets_kernels.")}
        known = {f"lets_kernels.{n}" for n in (*opt.direction.held, *opt.descent.held)}
        if alike and kept <= known:
            continue
        before = family.held(opt)
        with pytest.raises(ValueError, match="nothing of it was loaded"):
            opt.load_state_dict(whole)
        family.assert_same(before, family.held(opt))
    assert before is not None or name == "bsam"


WRONG = {
    "no-dict": lambda own: [own],
    "a-negative-step": lambda own: {**own, "step": -1},
    "a-fractional-step": lambda own: {**own, "step": 1.5},
    "a-step-of-true": lambda own: {**own, "step": True},
    "many-skipped": lambda own: {**own, "skipped": torch.zeros(2, dtype=torch.int64)},
    "an-unknown-part": lambda own: {**own, "memory": {}},
    "a-direction-with-averages": lambda own: {**own, "direction": {"average": torch.zeros(3)}},
    "two-radii": lambda own: {**own, "radius": {**own["radius"], "nu": own["radius"]["nu"] * 2}},
    "no-radius-at-all": lambda own: {**own, "radius": {}},
    "a-radius-that-is-not-a-number": lambda own: {**own, "radius": {**own["radius"], "nu": [torch.tensor(torch.nan)]}},
    "a-radius-of-two-numbers": lambda own: {**own, "radius": {**own["radius"], "nu": [torch.zeros(2)]}},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_counts_and_kinds_are_looked_at(saved, wrong):
    _, opt = run(lets, 1)
    state = copy.deepcopy(saved)
    state["lets_kernels"] = WRONG[wrong](state["lets_kernels"])
    assert_refused(opt, state, wrong)


@pytest.mark.parametrize("wrong", ["average-of-two", "two-groups", "no-average", "another-optimizer"])
def test_the_state_of_the_optimizer_of_nu_is_looked_at(saved, wrong):
    _, opt = run(lets, 1)
    state = copy.deepcopy(saved)
    nu = state["lets_kernels"]["radius"]["optimizer"]
    if wrong == "average-of-two":
        nu["state"][0]["exp_avg"] = torch.zeros(2)
    elif wrong == "two-groups":
        nu["param_groups"] *= 2
    elif wrong == "no-average":
        del nu["state"][0]["exp_avg_sq"]
    else:
        nu.update(torch.optim.SGD([torch.zeros(())]).state_dict())
    assert_refused(opt, state, wrong)


@pytest.mark.parametrize("name, value", [("rho", -1.0), ("rho", "far"), ("rho", None), ("xi", float("nan"))])
def test_what_the_groups_say_is_looked_at(name, value):
    make = {"rho": 0.5, "lr": 0.02}
    _, other = run(lambda net: lk.ASAM(net.parameters(), torch.optim.AdamW, **make), 2)
    _, opt = run(lambda net: lk.ASAM(net.parameters(), torch.optim.AdamW, **make), 1)
    state = copy.deepcopy(other.state_dict())
    state["param_groups"][0][name] = value
    assert_refused(opt, state, name)


@pytest.mark.parametrize("carried", ["a word", {"step": 3}, {"step": 1.5, "skipped": torch.tensor(0)}])
def test_carried_numbers_are_looked_at_too(carried):
    make = {"rho": 0.5, "lr": 0.02}
    _, other = run(lambda net: lk.SAM(net.parameters(), torch.optim.AdamW, **make), 2)
    _, opt = run(lambda net: lk.SAM(net.parameters(), torch.optim.AdamW, **make), 1)
    state = copy.deepcopy(other.state_dict())
    del state["lets_kernels"]
    state["param_groups"][0]["lets_kernels"] = carried
    assert_refused(opt, state, carried)


def test_a_state_saved_between_a_step_and_its_radius_step_holds_the_step_alone(backend):
    """The original learns from it all the same; who resumes from the state goes on with the next step."""

    def make(net):
        radius = lk.LearnedRadius(0.1, curvature="secant", lr=0.05)
        return lk.LETSSAM(net.parameters(), torch.optim.SGD, radius, backend=backend.name, lr=0.1, momentum=0.9)

    task, opt = run(make, 1)
    (batch, val_batch), rho = task.batches[1], opt.rho
    closure, val_closure = task.closure(batch), task.closure(val_batch)
    closure()
    opt.first_step(zero_grad=True)
    closure()
    opt.second_step()
    net, state = copy.deepcopy(task.net.state_dict()), copy.deepcopy(opt.state_dict())
    opt.radius_step(closure, val_closure)
    assert opt.rho != rho

    ends = []
    for _ in range(2):
        other = Task(torch.float32, steps=4)
        resumed = make(other.net)
        other.net.load_state_dict(net)
        resumed.load_state_dict(copy.deepcopy(state))
        assert same_bits(resumed.rho, rho) and progress(resumed).step == 2
        if not ends:  # a try that changes nothing
            with pytest.raises(RuntimeError, match="once a step"):
                resumed.radius_step(other.closure(batch), other.closure(val_batch))
        other.run(resumed, task.batches[2:], learned=True)
        ends.append(snapshot(resumed))
    assert same_bits(*ends) and not same_bits(ends[0][0], rho)
