"""GSAM's radius, linear in the learning rate (Zhuang et al., 2022): what it is, at which bounds, and after a resume."""

import copy

import pytest
import torch

import lets_kernels as lk
from support.given_gradients import Toy

SGD = torch.optim.SGD


def build(toy, radius, lr=0.1, groups=None):
    return lk.GSAM(groups or toy.params, SGD, radius, backend="reference", lr=lr)


def step(opt, toy):
    def closure():
        toy.set_grads([p.detach() ** 3 for p in toy.params])
        return torch.tensor(0.0)

    opt.step(closure)


def test_it_follows_a_scheduler_between_its_bounds():
    toy = Toy(torch.float64)
    opt = build(toy, lk.LearningRateRadius(0.2, 0.05, lr_min=0.01))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=6, eta_min=0.01)
    found = []
    for _ in range(6):
        lr = opt.param_groups[0]["lr"]
        step(opt, toy)
        found.append(float(opt.rho))
        # the paper's formula; four roundings of numbers of its own size
        assert found[-1] == pytest.approx(0.05 + (0.2 - 0.05) * (lr - 0.01) / (0.1 - 0.01), rel=1e-15)
        scheduler.step()
    assert found[0] == 0.2 and sorted(found, reverse=True) == found and found[-1] < 0.07


def test_a_step_perturbs_by_it():
    toy = Toy(torch.float64)
    opt = build(toy, lk.LearningRateRadius(0.3, 0.1))
    opt.param_groups[0]["lr"] = 0.05
    before = [p.detach().clone() for p in toy.params]
    toy.set_grads([p.detach() ** 3 for p in toy.params])
    opt.first_step()
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(toy.params, before, strict=True)])
    torch.testing.assert_close(moved.norm(), torch.tensor(0.2, dtype=torch.float64), rtol=1e-12, atol=0)
    opt.restore()


def test_learning_rates_beyond_the_bounds_and_groups_of_their_own():
    toy = Toy(torch.float64)
    groups = [{"params": toy.params[:1], "lr": 1.0}, {"params": toy.params[1:]}]
    opt = build(toy, lk.LearningRateRadius(0.2, 0.1), groups=groups)
    opt.param_groups[0]["lr"], opt.param_groups[1]["lr"] = 0.25, 7.0
    step(opt, toy)
    assert opt.rho.tolist() == [0.1 + 0.1 * 0.25, 0.2]
    opt.param_groups[1]["lr"] = torch.tensor(0.0)
    step(opt, toy)
    assert float(opt.rho[1]) == 0.1


def test_a_resumed_run_has_the_bounds_of_the_first():
    toy = Toy(torch.float64)
    opt = build(toy, lk.LearningRateRadius(0.2))
    opt.param_groups[0]["lr"] = 0.05
    step(opt, toy)
    other = build(Toy(torch.float64), lk.LearningRateRadius(0.2), lr=0.01)  # as a script builds it that resumes
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    step(opt, toy)
    step(other, toy)
    assert float(other.rho) == float(opt.rho) == 0.1


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: lk.LearningRateRadius(-1.0), "rho must be"),
        (lambda: lk.LearningRateRadius(0.1, float("nan")), "rho must be"),
        (lambda: build(Toy(), lk.LearningRateRadius(0.1, lr_max=0.1, lr_min=0.1)), "lr_max must be above lr_min"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_state_without_the_bounds_is_refused():
    opt = build(Toy(), lk.LearningRateRadius(0.2))
    state = opt.state_dict()
    for wrong in ({}, {"lr_max": 3}, {"lr_max": [0.1, 0.1]}):
        damaged = copy.deepcopy(state)
        damaged["lets_kernels"]["radius"] = wrong
        with pytest.raises(ValueError, match=r"radius|lr_max"):
            opt.load_state_dict(damaged)
