"""Several ascents a step: what a user sees between them, what is refused, and what is given up."""

import pytest
import torch

import lets_kernels as lk
from support import family
from support.conv_net import Task
from support.given_gradients import Toy, weights
from support.guard_bands import same_bits
from support.inside import now

SGD = torch.optim.SGD
RHO = 0.5


def made(k=3, cls=lk.MultiStepSAM, dtype=torch.float64, **options):
    toy = Toy(dtype)
    return toy, cls(toy.params, SGD, RHO, k, lr=0.1, **options)


def moved(toy, before):
    return [p.detach() - x for p, x in zip(toy.params, before, strict=True)]


def length(vectors):
    return float(torch.stack([v.norm() for v in vectors]).norm())


@pytest.mark.parametrize("renormalize", [True, False])
def test_each_ascent_goes_along_the_sum_of_unit_gradients(backend, renormalize):
    """From θ, to where the formula says, in one place after the other; and the step is along the last gradient."""
    toy, opt = made(renormalize=renormalize, backend=backend.name)
    before, sums = weights(toy), [torch.zeros_like(p) for p in toy.params]
    for i in range(3):
        grads = toy.grads(i)
        toy.set_grads(grads)
        assert opt.first_step(zero_grad=True) is True and opt.ascents_left == 2 - i
        sums = [s + g / length(grads) for s, g in zip(sums, grads, strict=True)]
        expected = [RHO * s / (length(sums) if renormalize else 1) for s in sums]
        for found, e in zip(moved(toy, before), expected, strict=True):
            torch.testing.assert_close(found, e, rtol=1e-12, atol=1e-14)
    toy.set_grads(toy.grads(9))
    opt.second_step()
    for p, x, g in zip(toy.params, before, toy.grads(9), strict=True):
        torch.testing.assert_close(p.detach(), x - 0.1 * g, rtol=1e-14, atol=1e-15)
    assert opt.metrics()["gradients"] == 4
    torch.testing.assert_close(opt.metrics()["grad_norm"], torch.tensor(length(toy.grads(0)), dtype=torch.float64))


def test_adaptive_ascents_have_t_at_the_weights_themselves(backend):
    """T² Σ g/‖Tg‖, stretched until T⁻¹ε is as long as ρ."""
    toy, opt = made(2, adaptive=True, backend=backend.name)
    before = weights(toy)
    scale, sums = [x.abs() for x in before], [torch.zeros_like(p) for p in toy.params]
    for i in range(2):
        grads = toy.grads(i)
        toy.set_grads(grads)
        opt.first_step(zero_grad=True)
        norm = length([t * g for t, g in zip(scale, grads, strict=True)])
        sums = [s + g / norm for s, g in zip(sums, grads, strict=True)]
    norm = length([t * s for t, s in zip(scale, sums, strict=True)])
    for found, t, s in zip(moved(toy, before), scale, sums, strict=True):
        torch.testing.assert_close(found, RHO * t * t * s / norm, rtol=1e-12, atol=1e-14)


def test_a_step_that_is_finished_too_early_says_what_is_left_and_can_go_on():
    toy, opt = made()
    toy.set_grads(toy.grads(0))
    opt.first_step(zero_grad=True)
    toy.set_grads(toy.grads(1))
    there = weights(toy)
    for early in (opt.second_step, opt.step):
        with pytest.raises(RuntimeError, match=r"2 more of its 3 ascents.*while opt\.ascents_left is not 0"):
            early()
        assert same_bits(weights(toy), there) and opt.ascents_left == 2
    while opt.ascents_left:
        opt.first_step(zero_grad=True)
        toy.set_grads(toy.grads(1))
    opt.second_step()
    assert opt.metrics()["gradients"] == 4


def test_between_contexts_the_weights_are_theta_and_dropped_gradients_end_the_step():
    toy, opt = made()
    before = weights(toy)
    toy.set_grads(toy.grads(0))
    with opt.perturbed():
        toy.set_grads(toy.grads(1))
        assert not same_bits(weights(toy), before)
    assert same_bits(weights(toy), before) and opt.ascents_left == 2
    opt.zero_grad()
    assert opt.ascents_left == 0 and now(opt).step is None
    toy.steps(opt, 1)
    assert opt.metrics()["gradients"] == 4 and not same_bits(weights(toy), before)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("cls", [lk.MultiStepSAM, lk.Lookbehind])
def test_a_closure_that_fails_in_any_pass_leaves_theta_and_the_next_step_is_a_fresh_one(cls, call):
    ends = []
    for fails in (True, False):
        toy, opt = made(cls=cls)
        before, calls = weights(toy), []

        def closure():
            calls.append(1)
            toy.set_grads(toy.grads(len(calls)))
            if fails and len(calls) == call:
                raise KeyboardInterrupt
            return torch.zeros(())

        if fails:
            with pytest.raises(KeyboardInterrupt):
                opt.step(closure)
            assert same_bits(weights(toy), before) and opt.ascents_left == 0
            fails = False
            calls.clear()
        opt.step(closure)
        assert len(calls) == 4
        ends.append(weights(toy))
    assert same_bits(*ends)


@pytest.mark.parametrize("where", [0, 1, 2, 3])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [{}, {"renormalize": False}], ids=["renormalized", "growing"])
def test_a_gradient_that_is_not_finite_in_any_pass_skips_the_step(backend, where, value, options):
    toy, opt = made(backend=backend.name, **options)
    before = weights(toy)
    for i in range(4):
        grads = toy.grads(i)
        if i == where:
            grads[1][3] = value
        toy.set_grads(grads)
        opt.first_step(zero_grad=True) if i < 3 else opt.second_step()
    assert same_bits(weights(toy), before) and opt.skipped == 1
    toy.steps(opt, 1)
    assert opt.skipped == 1 and all(torch.isfinite(w).all() for w in weights(toy))


class Newest(lk.Gradient):
    """Two ascents, of which the second knows nothing of the first."""

    ascents = 2


@pytest.mark.parametrize("where", [0, 1])
def test_a_direction_that_forgets_the_first_ascent_does_not_forget_that_it_was_not_finite(where):
    toy = Toy(torch.float64)
    opt = lk.SAM(toy.params, SGD, RHO, direction=Newest(), lr=0.1)
    before = weights(toy)
    for i in range(3):
        grads = toy.grads(i)
        grads[0].view(-1)[0] += torch.inf if i == where else 0.0
        toy.set_grads(grads)
        opt.first_step(zero_grad=True) if i < 2 else opt.second_step()
    assert same_bits(weights(toy), before) and opt.skipped == 1
    toy.steps(opt, 1)
    assert opt.skipped == 1 and not same_bits(weights(toy), before)


@pytest.mark.parametrize("zero_grad", [True, False])
def test_an_ascent_without_a_backward_since_is_refused_and_the_step_can_go_on(zero_grad):
    toy, opt = made()
    toy.set_grads(toy.grads(0))
    opt.first_step(zero_grad=zero_grad)
    there = weights(toy)
    with pytest.raises(RuntimeError, match=r"no backward since.*restore"):
        opt.first_step()
    assert same_bits(weights(toy), there) and opt.ascents_left == 2
    toy.set_grads(toy.grads(1))
    opt.first_step(zero_grad=zero_grad)
    with pytest.raises(RuntimeError, match="no backward since"):
        opt.first_step()
    assert opt.ascents_left == 1


def test_a_step_left_between_its_ascents_is_given_up_by_new_gradients():
    """Gradients dropped by model.zero_grad(), which the optimizer does not see, and a backward on the next batch."""
    ends = []
    for left in (True, False):
        toy, opt = made()
        if left:
            toy.set_grads(toy.grads(7))
            with opt.perturbed():
                toy.set_grads(toy.grads(8))
        toy.set_grads(toy.grads(0))
        assert opt.first_step(zero_grad=True) and opt.ascents_left == 2
        toy.set_grads(toy.grads(1))
        while opt.ascents_left:
            opt.first_step(zero_grad=True)
            toy.set_grads(toy.grads(1))
        opt.second_step()
        ends.append(weights(toy))
        assert opt.metrics()["gradients"] == 4
    assert same_bits(*ends)


def test_a_parameter_that_the_last_pass_does_not_reach_steps_along_what_reached_it():
    toy, opt = made(2, lk.Lookbehind, alpha=0.5)
    before, grads = weights(toy), toy.grads(1)
    toy.set_grads(toy.grads(0))
    opt.first_step(zero_grad=True)
    toy.set_grads(grads)
    opt.first_step(zero_grad=True)
    toy.set_grads([None, *toy.grads(2)[1:]])
    opt.second_step()
    torch.testing.assert_close(toy.params[0].detach(), before[0] - 0.1 * 0.5 * grads[0], rtol=1e-14, atol=1e-15)
    expected = before[1] - 0.1 * 0.5 * (grads[1] + toy.grads(2)[1])
    torch.testing.assert_close(toy.params[1].detach(), expected, rtol=1e-14, atol=1e-15)


def test_restore_in_the_middle_gives_the_step_up():
    toy, opt = made()
    before = weights(toy)
    toy.set_grads(toy.grads(0))
    opt.first_step(zero_grad=True)
    toy.set_grads(toy.grads(1))
    opt.first_step(zero_grad=True)
    opt.restore()
    assert same_bits(weights(toy), before) and opt.ascents_left == 0
    with pytest.raises(RuntimeError, match=r"without first_step\(\)"):
        opt.second_step()


def test_a_buffer_lives_from_the_first_ascent_to_the_last_only():
    """It is as large as the weights, so nothing of it stays behind, also after a step that is given up."""
    toy, opt = made(cls=lk.Lookbehind)
    toy.set_grads(toy.grads(0))
    opt.first_step(zero_grad=True)
    assert now(opt).step._carried
    for i in range(2):
        toy.set_grads(toy.grads(1 + i))
        opt.first_step()
    assert not now(opt).step._carried
    opt.second_step()
    assert now(opt).step is None


@pytest.mark.parametrize("cls", [lk.MultiStepSAM, lk.Lookbehind])
def test_a_learned_and_an_automatic_radius_go_with_it(cls):
    for rho in (lk.LearnedRadius(0.1), "auto"):
        task = Task(torch.float64, steps=4)
        opt = cls(task.net.parameters(), SGD, rho, k=2, lr=0.1)
        radii = [float(opt.rho)]
        for batch, other in task.batches:
            opt.step(*map(task.closure, (batch, other) if opt.radius.learns else (batch,)))
            radii.append(float(opt.rho))
        assert len(set(radii)) > 2


def test_what_knows_one_ascent_alone_is_refused():
    net = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match="at least 1"):
        lk.MultiStepSAM(net.parameters(), SGD, k=0, lr=0.1)
    with pytest.raises(ValueError, match="MultiStep takes 2 gradients before the last one, and SelectedSamples"):
        lk.MultiStepSAM(net.parameters(), SGD, samples=lk.SelectedSamples(), lr=0.1)
    with pytest.raises(TypeError, match="it is called k here"):
        lk.Lookbehind(net.parameters(), SGD, k_steps=5, lr=0.1)


def test_the_authors_steps_are_one_step_of_sgd():
    """Mordido et al. step k times from θ and go α of the way: the same weights, but for rounding."""
    task = Task(torch.float64, steps=1)
    opt = lk.Lookbehind(task.net.parameters(), SGD, rho=RHO, k=3, alpha=0.6, lr=0.1)
    start = weights(task)
    fast, gradients = [x.clone() for x in start], []
    at = [x.clone() for x in start]
    params, batch = list(task.net.parameters()), task.batches[0][0]
    for i in range(4):
        with torch.no_grad():
            [p.copy_(x) for p, x in zip(params, at, strict=True)]
        task.closure(batch)()
        gradients = [p.grad.clone() for p in params]
        if i:
            fast = [x - 0.1 * g for x, g in zip(fast, gradients, strict=True)]
        at = [x + RHO * g / length(gradients) for x, g in zip(at, gradients, strict=True)]
    expected = [x + 0.6 * (f - x) for x, f in zip(start, fast, strict=True)]
    with torch.no_grad():
        [p.copy_(x) for p, x in zip(params, start, strict=True)]
    family.take(opt, task.net, batch)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-12, atol=1e-14)
