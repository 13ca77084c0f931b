"""Calls out of order, and what a call refuses: a clear error that names the way out, and no mark on a weight."""

import copy
import math
import pickle

import pytest
import torch

import lets_kernels as lk
from support.conv_net import Task
from support.given_gradients import Toy, weights
from support.guard_bands import same_bits

SGD = torch.optim.SGD


def parameter(*shape, **options):
    return torch.nn.Parameter(torch.randn(*shape or (3,)), **options)


@pytest.fixture
def made(backend):
    """An optimizer in the middle of its life, gradients in place; a check that nothing moved."""
    toy = Toy()
    opt = lk.SAM(toy.params, SGD, rho=0.5, backend=backend.name, lr=0.1, momentum=0.9)
    toy.steps(opt, 1)
    toy.set_grads(toy.grads(5))
    before = weights(toy)
    yield opt, toy
    opt.restore()
    assert same_bits(weights(toy), before), "an error left its mark on a weight"
    toy.steps(opt, 1, start=7)  # and the optimizer is usable
    assert not same_bits(weights(toy), before) and all(bool(w.isfinite().all()) for w in weights(toy))


def closure():
    raise AssertionError("the closure must not be called")


ORDER = {
    "first-step-twice": (lambda o, t: (o.first_step(), o.first_step()), "second_step.*restore"),
    "second-step-first": (lambda o, t: o.second_step(), "first_step"),
    "second-step-after-restore": (lambda o, t: (o.first_step(), o.restore(), o.second_step()), "first_step"),
    "context-within-a-pass": (lambda o, t: (o.first_step(), o.perturbed().__enter__()), "second_step.*restore"),
    "step-with-gradients-and-nothing-begun": (lambda o, t: o.step(), "closure.*first_step.*perturbed"),
    "state-dict-while-perturbed": (lambda o, t: (o.first_step(), o.state_dict()), "perturbed.*restore"),
    "load-while-perturbed": (lambda o, t: o.load_state_dict((o.state_dict(), o.first_step())[0]), "perturbed.*restore"),
    "new-group-while-perturbed": (
        lambda o, t: (o.first_step(), o.add_param_group({"params": [parameter()]})),
        "perturbed.*restore",
    ),
    "pickle-while-perturbed": (lambda o, t: (o.first_step(), pickle.dumps(o)), "perturbed.*restore"),
    "deepcopy-while-perturbed": (lambda o, t: (o.first_step(), copy.deepcopy(o)), "perturbed.*restore"),
    "radius-step-of-a-constant": (lambda o, t: o.radius_step(closure, closure), "learned radius"),
}


@pytest.mark.parametrize("case", ORDER)
def test_calls_out_of_order_are_refused(made, case):
    call, match = ORDER[case]
    with pytest.raises(RuntimeError, match=match):
        call(*made)


def test_a_superfluous_validation_closure_is_refused(made):
    with pytest.raises(ValueError, match="learned radius"):
        made[0].step(closure, closure)
    with pytest.raises(ValueError, match="radius_step"):
        made[0].step(None, closure)


@pytest.mark.parametrize("rho", [-1.0, math.nan])
def test_a_bad_rho_written_into_a_group_is_refused_at_the_step(made, rho):
    opt, _ = made
    opt.param_groups[0]["rho"] = rho
    with pytest.raises(ValueError, match="rho must be"):
        opt.first_step()
    opt.param_groups[0]["rho"] = 0.5


def test_a_bad_group_is_refused_and_not_added(made):
    opt, toy = made
    for bad, error in (
        ({"params": [parameter()], "rho": -1.0}, ValueError),
        ({"params": [torch.nn.Parameter(torch.ones(3).to(torch.float8_e5m2))]}, TypeError),
        ({"params": [torch.nn.Parameter(torch.randn(1, 4).expand(3, 4))]}, ValueError),
        ({"params": toy.params[:1]}, ValueError),
    ):
        with pytest.raises(error):
            opt.add_param_group(bad)
        assert len(opt.param_groups) == 1 and opt.param_groups is opt.base_optimizer.param_groups


def test_a_state_that_does_not_fit_is_refused_whole(made):
    opt, toy = made
    other = lk.SAM([parameter(2), parameter(3)], SGD, lr=0.7)
    buffers = [opt.state[p]["momentum_buffer"].clone() for p in toy.params]
    with pytest.raises(ValueError, match="group"):
        opt.load_state_dict(other.state_dict())
    assert opt.param_groups[0]["lr"] == 0.1
    assert same_bits(buffers, [opt.state[p]["momentum_buffer"] for p in toy.params])


RADII = {
    "constant": lambda: 0.3,
    "learned": lambda: lk.LearnedRadius(0.3),
    "learned-per-group": lambda: lk.LearnedRadius(0.3, per_group=True),
}


@pytest.mark.parametrize(
    "saved, wanted", [("constant", "learned"), ("learned", "constant"), ("learned-per-group", "learned")]
)
def test_a_state_with_another_kind_of_radius_is_refused_whole(saved, wanted):
    """Base state and radius go together: not the one from the file and the other from the constructor."""

    def make(kind, lr):
        groups = [{"params": [parameter(3)]}, {"params": [parameter(2)]}]
        return lk.SAM(groups, SGD, RADII[kind](), lr=lr)

    state, opt = make(saved, 0.7).state_dict(), make(wanted, 0.1)
    before = opt.rho.clone()
    with pytest.raises(ValueError, match="radi"):
        opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.1 and same_bits(opt.rho, before)


def test_sparse_gradients_are_refused_with_the_way_out(backend):
    table = torch.nn.Embedding(6, 3, sparse=True)
    other = parameter(3)
    opt = lk.SAM([other, table.weight], SGD, backend=backend.name, lr=0.1)
    before = weights([other, table.weight])
    (table(torch.tensor([1, 4])) * other).sum().backward()
    with pytest.raises(TypeError, match="sparse=False"):
        opt.first_step()
    assert same_bits(weights([other, table.weight]), before)
    opt.zero_grad()
    with pytest.raises(TypeError, match="sparse=False"):
        opt.step(lambda: (table(torch.tensor([1, 4])) * other).sum().backward())
    assert same_bits(weights([other, table.weight]), before)


def test_a_sparse_gradient_in_the_second_pass_is_refused_and_the_weights_come_back(backend):
    """Only the second pass meets the embedding: refused before the base optimizer steps; restore() gives theta back."""
    table, other = torch.nn.Embedding(6, 3, sparse=True), parameter(3)
    opt = lk.SAM([other, table.weight], SGD, backend=backend.name, lr=0.1)
    before = weights([other, table.weight])
    other.grad = torch.ones(3)
    with pytest.raises(TypeError, match="sparse=False"):  # noqa: PT012
        opt.first_step(zero_grad=True)
        (table(torch.tensor([1, 4])) * other).sum().backward()
        opt.second_step()
    opt.restore()
    assert same_bits(weights([other, table.weight]), before)


@pytest.fixture
def learning(backend):
    task = Task(torch.float32, steps=3)
    opt = lk.LETSSAM(task.net.parameters(), SGD, 0.1, backend=backend.name, lr=0.1)
    return opt, task, task.closure(task.batches[0][0]), task.closure(task.batches[0][1])


def test_a_missing_validation_closure_is_refused_before_the_closure_runs(learning):
    opt, task, *_ = learning
    before = weights(task)
    with pytest.raises(ValueError, match=r"validation closure.*val_closure"):
        opt.step(closure)
    assert same_bits(weights(task), before) and opt.rho.item() == pytest.approx(0.1)


def test_a_radius_step_out_of_order_or_without_its_closures_is_refused(learning):
    opt, task, train, val = learning
    with pytest.raises(RuntimeError, match="after second_step"):
        opt.radius_step(train, val)
    train()
    opt.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="while the weights are perturbed"):
        opt.radius_step(train, val)
    train()
    opt.second_step()
    before, rho = weights(task), opt.rho.item()
    for closures in ((None, val), (train, None), (None, None)):
        with pytest.raises(ValueError, match="both closures"):
            opt.radius_step(*closures)
    assert opt.rho.item() == rho
    opt.radius_step(train, val)
    assert opt.rho.item() != rho
    with pytest.raises(RuntimeError, match="once a step"):
        opt.radius_step(train, val)
    assert same_bits(weights(task), before)


def test_gradients_zeroed_in_place_before_the_radius_learns_are_noticed(learning):
    """The radius needs ĝ, which lies in p.grad: a learner that reads zeros would be silently wrong."""
    opt, _, train, val = learning
    train()
    opt.first_step(zero_grad=True)
    train()
    opt.second_step()
    opt.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match="set_to_none=True"):
        opt.radius_step(train, val)


def test_closures_that_return_no_loss_are_refused_where_the_loss_is_needed(learning):
    opt, task, train, val = learning
    rho = opt.rho.item()
    silent = {"^closure": (lambda: train() and None, val), "^val_closure": (train, lambda: val() and None)}
    before = weights(task)
    for name, closures in silent.items():
        with pytest.raises(ValueError, match=f"{name} must return the loss"):
            opt.step(*closures)
        if name == "^closure":  # noticed before any weight is touched
            assert same_bits(weights(task), before)
        assert opt.rho.item() == rho and all(bool(w.isfinite().all()) for w in weights(task))


@pytest.mark.parametrize("form", ["none", "zeros", "lr-zero"])
@pytest.mark.parametrize("base", [SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_a_step_with_nothing_to_do_is_harmless(backend, base, form):
    """As torch.distributed.checkpoint calls it, to create state: no gradients, zero gradients, or lr = 0. AdamW's
    weight decay, which needs no gradient, does not act either."""
    toy = Toy()
    lr = 0.0 if form == "lr-zero" else 0.1
    opt = lk.SAM(toy.params, base, rho=0.5, backend=backend.name, lr=lr)
    before = weights(toy)
    if form != "none":
        toy.set_grads([torch.zeros_like(p) if form == "zeros" else torch.ones_like(p) for p in toy.params])
    assert opt.step() is None
    assert same_bits(weights(toy), before)
    opt.state_dict()
    if form != "lr-zero":
        toy.steps(opt, 2)
        assert not same_bits(weights(toy), before)
