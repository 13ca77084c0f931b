"""What lives how long: one saved copy of the weights is all that SAM keeps, and gradients are not held."""

import weakref

import pytest
import torch

import lets_kernels


def problem(**options):
    torch.manual_seed(0)
    p = torch.randn(4096, requires_grad=True)
    options = {"lr": 0.1, "momentum": 0.9, **options}
    return p, options


def backward(p):
    (p.sin() ** 2).sum().backward()


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_first_gradient_is_freed_before_the_second_pass(adaptive):
    p, options = problem(adaptive=adaptive)
    opt = lets_kernels.SAM([p], torch.optim.SGD, **options)
    backward(p)
    first = weakref.ref(p.grad)
    opt.first_step(zero_grad=True)
    assert first() is None
    backward(p)
    opt.second_step()


def test_a_learned_radius_holds_it_until_it_has_learned():
    p, options = problem()
    opt = lets_kernels.LETSSAM([p], torch.optim.SGD, **options)
    backward(p)
    first = weakref.ref(p.grad)
    opt.first_step(zero_grad=True)
    assert first() is not None
    backward(p)
    opt.second_step()

    def closure():
        opt.zero_grad()
        backward(p)
        return torch.tensor(1.0)

    opt.radius_step(closure, closure)
    assert first() is None


def test_the_package_keeps_one_saved_copy_and_nothing_else_of_the_weights_size():
    """Every tensor reachable from the optimizer that has at least the weights' size, apart from weights and state."""
    p, options = problem(adaptive=True)
    opt = lets_kernels.SAM([p], torch.optim.SGD, **options)
    for _ in range(2):
        opt.zero_grad()
        backward(p)
        opt.first_step(zero_grad=True)
        backward(p)
        opt.second_step(zero_grad=True)
    seen, large = set(), []

    def walk(thing):
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            if thing.numel() >= p.numel():
                large.append(thing)
        elif isinstance(thing, dict):
            for key, value in thing.items():
                walk(key)
                walk(value)
        elif isinstance(thing, (list, tuple, set)):
            for value in thing:
                walk(value)
        elif type(thing).__module__.startswith(("lets_kernels", "torch.optim")):
            walk(vars(thing))

    walk(opt)
    momentum = opt.base_optimizer.state[p]["momentum_buffer"]
    others = [t for t in large if t is not p and t is not momentum]
    assert len(others) == 1
    assert others[0].data_ptr() == opt._space().buckets[0].saved.data_ptr()
