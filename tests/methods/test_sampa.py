"""SAMPa: where its first pass is made, what it remembers of it, and with which base optimizers."""

import pytest
import torch

import lets_kernels as lk
from support.given_gradients import Toy, weights
from support.guard_bands import same_bits

SGD = torch.optim.SGD
RHO = 0.5
#: Roundings of float64 numbers below ten.
TIGHT = {"rtol": 1e-13, "atol": 1e-14}


def ahead(toy, opt, grads):
    """The first pass; where the weights were in it."""
    with opt.first_pass():
        there = weights(toy)
        toy.set_grads(grads)
    return there


def length(vectors):
    return float(torch.stack([v.norm() for v in vectors]).norm())


@pytest.mark.parametrize("flatten", [False, True])
def test_the_first_pass_is_where_sgd_would_go_along_the_last_first_gradient(backend, flatten):
    """Each group by its learning rate, its weight decay and its momentum, of which the third has none yet."""
    toy = Toy(torch.float64)
    p = toy.params
    groups = [
        {"params": p[:2], "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
        {"params": p[2:4], "lr": 0.3},
        {"params": p[4:], "lr": 0.2, "momentum": 0.5},
    ]
    opt = lk.SAMPa(groups, SGD, RHO, lr=0.1, backend=backend.name, flatten=flatten)
    of = [g for g in opt.param_groups for _ in g["params"]]
    last = [torch.zeros_like(x) for x in p]
    for i in range(3):
        before = weights(toy)
        momenta = [opt.state.get(x, {}).get("momentum_buffer") for x in p]
        momenta = [torch.zeros_like(x) if m is None else m.clone() for x, m in zip(p, momenta, strict=True)]
        there = ahead(toy, opt, toy.grads(2 * i))
        for y, x, a, m, g in zip(there, before, last, momenta, of, strict=True):
            expected = x - g["lr"] * (a + g["weight_decay"] * x + g["momentum"] * m)
            torch.testing.assert_close(y, expected, **TIGHT)
        assert same_bits(weights(toy), before)
        opt.first_step(zero_grad=True)
        norm = length(last) or 1.0
        for found, x, a in zip(p, before, last, strict=True):
            torch.testing.assert_close(found.detach(), x + RHO * a / norm, **TIGHT)
        toy.set_grads(toy.grads(2 * i + 1))
        opt.second_step(zero_grad=True)
        last = toy.grads(2 * i)


def test_lambda_mixes_the_gradient_ahead_into_the_step(backend):
    toy = Toy(torch.float64)
    opt = lk.SAMPa(toy.params, SGD, RHO, 0.2, lr=0.1, backend=backend.name)
    before = weights(toy)
    toy.two_steps(opt, toy.grads(0), toy.grads(1))
    for p, x, y, hat in zip(toy.params, before, toy.grads(0), toy.grads(1), strict=True):
        torch.testing.assert_close(p.detach(), x - 0.1 * (0.8 * hat + 0.2 * y), **TIGHT)


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_other_base_optimizers_look_ahead_by_the_gradient_alone(base):
    """Also RMSprop, whose group has a momentum that is none of gradients; a learning rate may be a tensor."""
    toy = Toy(torch.float64)
    lr = torch.tensor(0.02, dtype=torch.float64) if base is torch.optim.AdamW else 0.02
    opt = lk.SAMPa(toy.params, base, RHO, lr=lr, weight_decay=0.1)
    toy.two_steps(opt, toy.grads(0), toy.grads(1))
    before = weights(toy)
    for y, x, a in zip(ahead(toy, opt, toy.grads(2)), before, toy.grads(0), strict=True):
        torch.testing.assert_close(y, x - 0.02 * a, **TIGHT)


def test_a_first_gradient_that_is_not_finite_is_not_remembered(backend):
    toy = Toy(torch.float64)
    opt = lk.SAMPa(toy.params, SGD, RHO, lr=0.1, backend=backend.name)
    toy.two_steps(opt, toy.grads(0), toy.grads(1))
    spoiled, before = toy.grads(2), weights(toy)
    spoiled[0].view(-1)[1] = torch.inf
    toy.two_steps(opt, spoiled, toy.grads(3))
    assert opt.skipped == 1 and same_bits(weights(toy), before)
    for y, x, a in zip(ahead(toy, opt, toy.grads(4)), before, toy.grads(0), strict=True):
        torch.testing.assert_close(y, x - 0.1 * a, **TIGHT)


def test_a_base_optimizer_without_a_learning_rate_is_refused():
    class Own(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            pass

    with pytest.raises(ValueError, match="Own's groups have no 'lr'"):
        lk.SAMPa(Toy().params, Own)
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\]"):
        lk.SAMPa(Toy().params, SGD, lam=1.5, lr=0.1)
    with pytest.raises(TypeError, match="it is called lam here"):
        lk.SAMPa(Toy().params, SGD, og=0.2, lr=0.1)
