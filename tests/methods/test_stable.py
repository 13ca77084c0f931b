"""Stable SAM: how long its step is, on which steps, and what it goes with."""

import pytest
import torch

import lets_kernels as lk
from support.given_gradients import Toy

SGD = torch.optim.SGD


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def take(opt, toy, seed):
    """A step with given gradients; the two gradients and the step over the learning rate, as vectors."""
    first, second, before = toy.grads(2 * seed), toy.grads(2 * seed + 1), flat(toy.params).clone()
    toy.set_grads(first)
    opt.first_step(zero_grad=True)
    toy.set_grads([3 * g for g in second])
    opt.second_step(zero_grad=True)
    return flat(first), 3 * flat(second), (before - flat(toy.params)) / 0.1


@pytest.mark.parametrize(
    "make",
    [
        lambda p, **k: lk.StableSAM(p, SGD, **k),
        lambda p, **k: lk.StableSAM(p, SGD, "auto", **k),
        lambda p, **k: lk.ASAM(p, SGD, descent=lk.Renormalized(), **k),
        lambda p, **k: lk.SAM(p, SGD, direction=lk.Gradient(p=1), descent=lk.Renormalized(), **k),
    ],
    ids=["plain", "auto", "asam", "p=1"],
)
def test_the_step_is_along_the_second_gradient_and_as_long_as_the_first(make):
    """In every geometry of the perturbation it is the Euclidean norm, over all tensors together."""
    toy = Toy(torch.float64)
    opt = make(toy.params, lr=0.1)
    for i in range(3):
        g, g_hat, step = take(opt, toy, i)
        # Differences of weights of about one, over the learning rate.
        torch.testing.assert_close(step, g_hat * (g.norm() / g_hat.norm()), rtol=0, atol=1e-13)


def test_a_step_that_does_not_perturb_is_the_base_optimizers():
    toy = Toy(torch.float64)
    opt = lk.SAM(toy.params, SGD, schedule=lk.Every(2), descent=lk.Renormalized(), lr=0.1)
    take(opt, toy, 0)
    _, present, step = take(opt, toy, 1)  # at θ too, and three times as long as the first
    torch.testing.assert_close(step, present, rtol=0, atol=1e-13)


def test_a_second_gradient_of_zero_moves_nothing():
    toy = Toy(torch.float64)
    opt, before = lk.StableSAM(toy.params, SGD, lr=0.1), flat(toy.params).clone()
    toy.set_grads(toy.grads(0))
    opt.first_step()
    toy.set_grads([torch.zeros_like(p) for p in toy.params])
    opt.second_step()
    assert torch.equal(flat(toy.params), before) and int(opt.skipped) == 0


def test_a_step_that_is_given_up_after_its_first_half_leaves_no_norm_behind():
    """The next step's factor is made of its own two gradients."""
    toy = Toy(torch.float64)
    opt = lk.StableSAM(toy.params, SGD, lr=0.1)
    toy.set_grads([9 * g for g in toy.grads(7)])
    opt.first_step()
    opt.restore()
    g, g_hat, step = take(opt, toy, 0)
    torch.testing.assert_close(step, g_hat * (g.norm() / g_hat.norm()), rtol=0, atol=1e-13)


def test_it_needs_a_first_gradient():
    with pytest.raises(ValueError, match="Renormalized needs a first gradient, and Gaussian takes none"):
        lk.RandomSAM(Toy(torch.float32).params, SGD, descent=lk.Renormalized(), lr=0.1)
