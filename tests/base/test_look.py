"""A part of a method looks at the base optimizer, changes nothing by it, and can refuse one that does not suit."""

import copy

import pytest
import torch

import lets_kernels as lk
from lets_kernels.base.state import Look
from support.core_methods import BASES

NAMES = ("momentum_buffer", "exp_avg", "square_avg", "precision")


class Looking(lk.Gradient):
    """Reads what it can find before every perturbation, and goes along the gradient."""

    def __init__(self):
        super().__init__()
        self.found = []

    def prepare(self, first):
        for runs in first.runs:
            self.found.append({name: first.base.tensors(runs, name) for name in NAMES})
            for p in runs.bucket.params:
                assert set(first.base.entry(p)) == set(first.base._state.get(p, {}))
        return super().prepare(first)


class Careful(Looking):
    """Goes with momentum alone."""

    def check_base(self, base):
        for group in base.groups:
            if not group.get("momentum"):
                raise ValueError(f"{base.name} has no momentum: pass momentum=0.9")


def params(*sizes):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, dtype=torch.float64)) for size in sizes]


def train(opt, weights, steps=3):
    for _ in range(steps):
        opt.step(lambda: _pass(opt, weights))


def _pass(opt, weights):
    opt.zero_grad()
    loss = sum((w**2).sum() for w in weights)
    loss.backward()
    return loss


@pytest.mark.parametrize("base", [*BASES, "adagrad"])
def test_looking_leaves_nothing_behind(base):
    """Plain SGD keeps its state empty, RMSprop makes its own: the state and the weights are SAM's without a look."""
    kind, options = (torch.optim.Adagrad, {"lr": 0.1}) if base == "adagrad" else (BASES[base][0], BASES[base][2])
    ends = []
    for direction in (Looking(), lk.Gradient()):
        weights = params(3, 5)
        opt = lk.SAM(weights, kind, rho=0.1, direction=direction, **options)
        train(opt, weights)
        ends.append(([w.detach().clone() for w in weights], copy.deepcopy(opt.state_dict()["state"])))
    (seen, mine), (unseen, other) = ends
    assert all(map(torch.equal, seen, unseen))
    assert mine.keys() == other.keys()
    for i in mine:
        assert mine[i].keys() == other[i].keys()
        assert all(torch.equal(torch.as_tensor(mine[i][k]), torch.as_tensor(other[i][k])) for k in mine[i])


def test_it_sees_the_very_tensors_of_the_base_optimizer_once_there_are_any():
    weights = params(3, 5)
    direction = Looking()
    opt = lk.SAM(weights, torch.optim.SGD, rho=0.1, direction=direction, lr=0.1, momentum=0.9)
    train(opt, weights, 2)
    first, second = (found["momentum_buffer"] for found in direction.found)
    assert first == [None, None]
    assert all(t is opt.state[w]["momentum_buffer"] for t, w in zip(second, weights, strict=True))
    assert all(found["exp_avg"] == [None, None] for found in direction.found)


def test_groups_and_entries_are_read_only():
    weights = params(3)
    base = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
    look = Look.at(base)
    assert look.kind is torch.optim.SGD and look.name == "SGD" and look.groups[0]["momentum"] == 0.9
    with pytest.raises(TypeError):
        look.groups[0]["momentum"] = 0.0
    with pytest.raises(TypeError):
        look.entry(weights[0])["momentum_buffer"] = torch.zeros(3)
    assert dict(look.entry(weights[0])) == {} and weights[0] not in base.state


def test_a_direction_refuses_a_base_where_the_optimizer_is_built():
    for base in (torch.optim.SGD, torch.optim.SGD(params(3), lr=0.1)):
        weights = params(3) if isinstance(base, type) else base.param_groups[0]["params"]
        options = {"lr": 0.1} if isinstance(base, type) else {}
        with pytest.raises(ValueError, match=r"SGD has no momentum: pass momentum=0\.9"):
            lk.SAM(weights, base, direction=Careful(), **options)


def test_a_direction_refuses_a_group_and_the_optimizer_goes_on_without_it():
    weights, more = params(3), params(2)
    opt = lk.SAM(weights, torch.optim.SGD, direction=Careful(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="no momentum"):
        opt.add_param_group({"params": more, "momentum": 0.0})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": more})
    train(opt, [*weights, *more], 1)


def test_a_group_that_is_added_to_the_base_is_refused_before_a_weight_moves():
    weights, more = params(3), params(2)
    opt = lk.SAM(weights, torch.optim.SGD, direction=Careful(), lr=0.1, momentum=0.9)
    opt.base_optimizer.add_param_group({"params": more, "momentum": 0.0})
    before = [w.detach().clone() for w in (*weights, *more)]
    for _ in range(2):  # it does not pass unseen at the second time
        with pytest.raises(ValueError, match="no momentum"):
            train(opt, [*weights, *more], 1)
    assert all(map(torch.equal, before, (*weights, *more)))


def test_a_direction_refuses_a_state_before_anything_of_it_is_loaded():
    weights = params(3)
    opt = lk.SAM(weights, torch.optim.SGD, direction=Careful(), lr=0.1, momentum=0.9)
    train(opt, weights, 2)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0].update(momentum=0.0, lr=7.0)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="no momentum"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 0.1
    assert torch.equal(opt.state[weights[0]]["momentum_buffer"], before["state"][0]["momentum_buffer"])


def test_the_posterior_goes_with_its_own_base_alone():
    with pytest.raises(ValueError, match=r"SGD has none: BSAM\(params, lr=..., data_size=...\)"):
        lk.SAM(params(3), torch.optim.SGD, direction=lk.Posterior(100, 0.999, 0.1), lr=0.1)
