"""Steps of other optimizers that a flag can hold back: on the host where it may be read, and without reading it."""

import copy

import pytest
import torch

from lets_kernels.base.guarded import guarded_step, step_and_undo

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def states(optimizer):
    return [v.clone() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]


def prepared(name, warm):
    torch.manual_seed(0)
    params = [torch.randn(5, requires_grad=True), torch.randn(2, 3, requires_grad=True)]
    optimizer = OPTIMIZERS[name](params)
    for _ in range(2 if warm else 0):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("step", [guarded_step, step_and_undo])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_closed_gate_leaves_weights_and_state(name, step):
    params, optimizer = prepared(name, warm=True)
    before, state = [p.detach().clone() for p in params], states(optimizer)
    for p in params:
        p.grad = torch.full_like(p, torch.inf)
    step(optimizer, torch.zeros((), dtype=torch.float64))
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(states(optimizer), state, strict=True))


@pytest.mark.parametrize("step", [guarded_step, step_and_undo])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_open_gate_is_the_optimizers_own_step(name, warm, step):
    params, optimizer = prepared(name, warm)
    others, other = prepared(name, warm)
    for p, q in zip(params, others, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    step(optimizer, torch.ones((), dtype=torch.float64))
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_undoing_the_very_first_step_leaves_averages_that_begin_anew():
    """State that the undone step made is zero, from which SGD's momentum goes on as if it had not been there."""
    params, optimizer = prepared("sgd", warm=False)
    plain, other = prepared("sgd", warm=False)
    for p in params:
        p.grad = torch.full_like(p, torch.nan)
    step_and_undo(optimizer, torch.zeros((), dtype=torch.float64))
    for p, q in zip(params, plain, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = copy.deepcopy(p.grad)
    step_and_undo(optimizer, torch.ones((), dtype=torch.float64))
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))
