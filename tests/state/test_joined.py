"""What every method keeps for a parameter is found in opt.state[p]: the tensors that the next step works with."""

import copy
import io
import pickle
from collections import defaultdict

import pytest
import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import lets_kernels as lk
from support import family
from support.family import FAMILY
from support.given_gradients import Toy, snapshot
from support.guard_bands import same_bits
from support.inside import held, work
from support.moving_radii import auto

# Beside those of the family: what keeps nothing, and a radius that keeps something.
OTHERS = {
    "sam": lambda params: lk.SAM(params, torch.optim.SGD, lr=0.05, momentum=0.9),
    "auto": lambda params: lk.SAM(params, torch.optim.SGD, auto(), lr=0.05, momentum=0.9),
}
#: One of each that keeps a tensor of its own.
KEEPING = ("friendly", "looksam", "sparse", "auto")


def build(name, params, base="momentum"):
    return OTHERS[name](params) if name in OTHERS else family.build(name, params, base)


def trained(name, steps=4, base="momentum"):
    toy = Toy()
    opt = build(name, toy.params, base)
    if not opt.samples.per_sample:
        toy.steps(opt, steps)
        return toy, opt
    for i in range(steps):
        opt.step(samples(toy, i))
    return toy, opt


def samples(toy, i):
    """A closure of four samples, each with its share of the gradients, for the methods that choose among samples."""

    def closure(subset=None):
        rows = torch.arange(4.0)[slice(None) if subset is None else subset]
        outputs = sum((rows + 1) * (g * p).sum() for g, p in zip(toy.grads(i), toy.params, strict=True))[:, None]
        return outputs[:, 0], outputs

    return closure


def everything(opt):
    return [*snapshot(opt), *family.held(opt).values()]


@pytest.mark.parametrize("name", [*FAMILY, *OTHERS])
def test_the_state_has_the_names_of_a_saved_one_and_the_tensors_of_the_next_step(name):
    toy, opt = trained(name)
    saved = opt.state_dict()["state"]
    names = {f"lets_kernels.{each}" for each in work(opt).setting.held}
    assert all(f"``{each}``" in lk.SAM.state.__doc__ for each in names)
    assert {id(p) for p in opt.state} == {id(p) for p in toy.params} and len(opt.state) == len(toy.params)
    for i, p in enumerate(toy.params):
        assert set(opt.state[p]) == set(saved[i]) >= names and len(opt.state[p]) == len(saved[i])
        for key, value in opt.state[p].items():
            assert value is saved[i][key]  # of which torch's optimizers save no copies either
    assert (opt.state is opt.base_optimizer.state) == (not names)
    before = {(i, key): opt.state[p][key].clone() for i, p in enumerate(toy.params) for key in names}
    shown = {(i, key): opt.state[p][key] for i, p in enumerate(toy.params) for key in names}
    if names:
        toy.steps(opt, 4, start=4)
        moves = any(not torch.equal(shown[place], before[place]) for place in before)
        assert moves or name == "sparse"  # whose mask is that of the first step
        assert all(opt.state[toy.params[i]][key] is t for (i, key), t in shown.items())


@pytest.mark.parametrize("name", [*FAMILY, *OTHERS])
def test_it_comes_through_a_file_a_copy_and_a_pickle(name):
    toy, opt = trained(name)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other = Toy(seed=5)
    loaded = build(name, other.params)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for resumed in (loaded, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        params = [p for group in resumed.param_groups for p in group["params"]]
        for p, q in zip(toy.params, params, strict=True):
            entry, found = opt.state[p], resumed.state[q]
            assert set(found) == set(entry)
            for key, value in entry.items():
                assert same_bits(found[key], value) and found[key] is not value


@pytest.mark.parametrize("base", ["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize("name", KEEPING)
def test_the_base_optimizer_sees_its_own_only(name, base):
    _, opt = trained(name, base=base) if name != "auto" else trained(name)
    assert not any(key.startswith("lets_kernels") for own in opt.base_optimizer.state.values() for key in own)
    assert bool(opt.state) == bool(opt.base_optimizer.state)


@pytest.mark.parametrize("name", KEEPING)
def test_what_is_written_there_is_what_the_next_step_reads(name):
    """In place, and by another tensor in its place; beside a run that loads the same numbers."""
    toy, opt = trained(name)
    changed = copy.deepcopy(opt.state_dict())
    for entry in changed["state"].values():
        for key, value in entry.items():
            entry[key] = 1 - value if key == "lets_kernels.mask" else 2 * value
    ends = []
    for how in ("loaded", "in place", "replaced", "entries", "whole"):
        twin = copy.deepcopy(opt)
        theirs = Toy()
        theirs.params = [p for group in twin.param_groups for p in group["params"]]
        entries = {p: copy.deepcopy(changed["state"][i]) for i, p in enumerate(theirs.params)}
        if how == "loaded":
            twin.load_state_dict(copy.deepcopy(changed))
        elif how == "whole":
            twin.state = defaultdict(dict, entries)
        for p, entry in entries.items() if how not in ("loaded", "whole") else ():
            if how == "entries":
                twin.state[p] = entry
            for key, value in entry.items():
                if how == "in place":
                    twin.state[p][key].copy_(value)
                elif how == "replaced":
                    twin.state[p][key] = value
        theirs.steps(twin, 4, start=4)
        ends.append(everything(twin))
    assert all(same_bits(ends[0], end) for end in ends[1:])
    toy.steps(opt, 4, start=4)
    assert not same_bits(ends[0], everything(opt))


@pytest.mark.parametrize("name", KEEPING)
def test_tools_that_move_a_state_and_torchs_own_leave_it_as_it_is(name):
    toy, opt = trained(name)
    before = everything(opt)
    _optimizer_to_device(opt, "cpu")
    opt.state = opt.state
    assert same_bits(before, everything(opt))
    net = torch.nn.ParameterList(toy.params)
    for i, entry in get_optimizer_state_dict(net, opt)["state"].items():
        assert set(entry) == set(opt.state[toy.params[int(i)]])
    copied = copy.deepcopy(opt.state)
    assert type(copied) is defaultdict and {type(entry) for entry in copied.values()} == {dict}
    for own, p in zip(copied.values(), opt.state, strict=True):
        assert all(same_bits(t, opt.state[p][key]) and t is not opt.state[p][key] for key, t in own.items())
    assert "lets_kernels." in repr(opt.state) and type(copy.copy(opt.state[toy.params[0]])) is dict


@pytest.mark.parametrize("name", KEEPING)
def test_state_that_is_taken_away_begins_anew(name):
    toy, opt = trained(name)
    p = toy.params[1]
    key = f"lets_kernels.{work(opt).setting.held[0]}"
    del opt.state[p][key]
    assert key not in opt.state[p] and "momentum_buffer" in opt.state[p]
    with pytest.raises(KeyError, match=key):
        del opt.state[p][key]
    del opt.state[p]
    assert p not in opt.state and p not in opt.base_optimizer.state and not held(opt).get(p)
    assert dict(opt.state[p]) == {} and p not in opt.state  # looking makes no entry
    with pytest.raises(KeyError):
        del opt.state[p]
    opt.state.clear()
    assert not opt.state and len(opt.state) == 0 == len(opt.base_optimizer.state)
    toy.steps(opt, 1, start=4)
    opt.state = defaultdict(dict)
    assert not len(opt.state) and not any(held(opt).values())
    toy.steps(opt, 1, start=5)
    assert all(key in opt.state[p] for p in toy.params)


def test_an_entry_replaces_the_whole_entry_and_an_empty_one_is_none():
    toy, opt = trained("friendly", base="sgd")  # which keeps nothing of its own
    p, q = toy.params[:2]
    del opt.state[p]["lets_kernels.average"]
    opt.state[q] = {"lr_scale": 0.5}
    assert p not in opt.state and not any(x is p for x in opt.state) and dict(opt.state[q]) == {"lr_scale": 0.5}
    opt.state[q] = {}
    assert dict(opt.state[q]) == {} and len(opt.state) == len(toy.params) - 1  # as in torch, the empty entry stays


def test_what_no_part_keeps_is_refused_and_nothing_is_replaced():
    toy, opt = trained("friendly")
    before = everything(opt)
    p, wrong = toy.params[0], torch.zeros(3, 5, 7)
    with pytest.raises(ValueError, match=r"no part .* keeps a 'lets_kernels\.mask'; it keeps lets_kernels\.average"):
        opt.state[p]["lets_kernels.mask"] = torch.zeros_like(p)
    for entry in ({"lets_kernels.average": wrong}, {"lets_kernels.average": None}):
        with pytest.raises(ValueError, match="of the parameter's shape"):
            opt.state[p] = entry
        with pytest.raises(ValueError, match="of the parameter's shape"):
            opt.state = {p: entry}
    assert same_bits(before, everything(opt))
    opt.state[p]["lr_scale"] = 0.5  # of the base optimizer, as before
    assert opt.base_optimizer.state[p]["lr_scale"] == 0.5 and opt.state[p].pop("lr_scale") == 0.5
    assert "lr_scale" not in opt.base_optimizer.state[p]


def test_an_optimizer_that_keeps_something_else_is_shown_as_it_is():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            self.state["steps"] = self.state.get("steps", 0) + 1
            return super().step(closure)

    toy = Toy()
    opt = lk.FriendlySAM(toy.params, Counting, lr=0.1)
    toy.steps(opt, 2)
    assert opt.state["steps"] == 2 and "steps" in opt.state
    assert set(opt.state[toy.params[0]]) == {"lets_kernels.average"}


def test_an_entry_that_is_taken_out_keeps_what_it_had():
    """As with torch's own state: pruning and growing parameters moves entries from one to the other."""
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = lk.FriendlySAM([p], torch.optim.Adam, lr=0.1)

    def closure():
        opt.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    opt.step(closure)
    names = {"exp_avg", "exp_avg_sq", "step", "lets_kernels.average"}
    average = opt.state[p]["lets_kernels.average"]
    entry = opt.state.get(p)
    del opt.state[p]
    assert set(entry) == names and opt.state.get(p) is None and p not in opt.state
    opt.param_groups[0]["params"][0] = q
    opt.state[q] = entry
    assert set(opt.state[q]) == names and opt.state[q]["lets_kernels.average"] is average
    found = opt.state.pop(q)
    assert set(found) == names and q not in opt.state
    assert opt.state.pop(q, None) is None and opt.state.setdefault(q, found) is opt.state[q]
    with pytest.raises(KeyError):
        opt.state.pop(p)
    found["step"] = 7
    del found["exp_avg"]
    assert set(found) == names - {"exp_avg"} and found["step"] == 7
    (key, last), entries = opt.state.popitem(), len(opt.state)
    assert key is q and set(last) <= names and entries == 0
