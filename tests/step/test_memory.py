"""What lives how long: one saved copy of the weights is all that SAM keeps, and gradients are not held."""

import weakref

import pytest
import torch

import lets_kernels
from support import family
from support.family import ALWAYS, ONE_EACH
from support.inside import held, space, work


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


@pytest.mark.parametrize("name", ONE_EACH)
def test_who_holds_the_first_gradient_through_the_second_pass(name):
    """Those whose descent is made from both, and nobody else."""
    p, _ = problem()
    opt = family.build(name, [p], **ALWAYS.get(name, {}))
    with opt.first_pass():
        backward(p)
    first = weakref.ref(p.grad)
    opt.first_step(zero_grad=True)
    assert (first() is not None) is (name in ("gsam", "rgsam", "norm-penalty", "wsam", "sampa", "looksam", "aelooksam"))
    backward(p)
    while opt.ascents_left:
        opt.first_step(zero_grad=True)
        backward(p)
    opt.second_step(zero_grad=True)
    assert first() is None


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


#: Beside the saved copy: an average, what is orthogonal, the mask. bSAM's are its base optimizer's state.
KEPT = {"looksam": 1, "aelooksam": 1, "friendly": 1, "vasso": 1, "sparse": 1, "sampa": 1}


@pytest.mark.parametrize("name", ["adaptive", *ONE_EACH])
def test_the_package_keeps_one_saved_copy_and_nothing_else_of_the_weights_size(name):
    """Every tensor reachable from the optimizer that has at least the weights' size, apart from weights and state; and
    what the method says that it keeps."""
    p, options = problem(adaptive=True)
    if name == "adaptive":
        opt = lets_kernels.SAM([p], torch.optim.SGD, **options)
    else:
        opt = family.build(name, [p], **ALWAYS.get(name, {}))
    for _ in range(2):
        opt.zero_grad()
        with opt.first_pass():
            backward(p)
        opt.first_step(zero_grad=True)
        backward(p)
        while opt.ascents_left:
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
            walk(getattr(thing, "__dict__", {}))  # compiled things have none, and keep no tensors

    walk(opt)
    state = opt.base_optimizer.state[p].values()
    others = {t.data_ptr() for t in large if t is not p and not any(t is s for s in state)}
    assert space(opt).buckets[0].saved.data_ptr() in others
    assert len(others) == 1 + KEPT.get(name, 0)


def sizes(tensors):
    """Bytes of the memory in which these tensors lie, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_auto_holds_the_first_gradient_through_the_second_pass_and_no_memory_of_its_own():
    """The weights before the last step lie in the buffer that perturbations are undone from."""
    p, options = problem()
    opt = lets_kernels.SAM([p], torch.optim.SGD, rho="auto", **options)
    for _ in range(2):
        backward(p)
        first = weakref.ref(p.grad)
        opt.first_step(zero_grad=True)
        assert first() is not None
        backward(p)
        opt.second_step(zero_grad=True)
        assert first() is None, "kept beyond the step"
    (bucket,) = work(opt).tables.space.buckets
    kept = [t for own in held(opt).values() for t in own.values()]
    assert len(kept) == 1
    assert kept[0].untyped_storage().data_ptr() == bucket.saved.untyped_storage().data_ptr()
    assert sizes([bucket.saved]) == 4 * 4096
    assert sizes([opt.radius.memory]) <= 64


WAITING = {
    "next": ({"validation": "next"}, 2),
    "next-secant": ({"validation": "next", "curvature": "secant"}, 2),
    "reuse": ({"reuse_train_gradient": True, "metric": "gap"}, 2),
    "reuse-secant": ({"reuse_train_gradient": True, "metric": "gap", "curvature": "secant"}, 2),
    "reuse-algorithm1": ({"reuse_train_gradient": True, "metric": "gap", "direction": "algorithm1"}, 3),
}


@pytest.mark.parametrize("kind", WAITING)
def test_what_waits_for_the_next_gradient_is_two_buffers(kind):
    """g and ĝ. Algorithm 1's direction is not known yet, so there the validation gradient waits too."""
    p, options = problem()
    kind, buffers = WAITING[kind]
    radius = lets_kernels.LearnedRadius(0.05, **kind)
    opt = lets_kernels.SAM([p], torch.optim.SGD, radius, **options)
    backward(p)
    opt.first_step(zero_grad=True)
    backward(p)
    opt.second_step(zero_grad=True)
    if radius.learns:
        opt.radius_step(None, lambda: backward(p) or torch.tensor(1.0))
    trial, val = radius._pending
    waiting = [g for each in (*trial.first, *trial.perturbed, *trial.stepped) for g in each.values()]
    waiting += [v for a in trial.ascents for v in a.vectors]
    if val is not None:
        waiting += val.sums if hasattr(val, "sums") else [g for each in val.gradients for g in each.values()]
    assert buffers * 4 * 4096 <= sizes(waiting) <= buffers * 4 * 4096 + 64
    known = [weakref.ref(t) for t in waiting]
    del trial, val, waiting
    backward(p)
    opt.first_step(zero_grad=True)
    assert all(t() is None for t in known), "kept once the radius has learned from it"
    opt.restore()
