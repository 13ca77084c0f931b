"""Gradients that are not finite, are zero, or are not the same set in both passes."""

import copy

import pytest
import torch
from torch import nn

import lets_kernels as lk
from support import family, oracle
from support.backends import Recorder
from support.conv_net import Task
from support.core_methods import BASES
from support.family import ALWAYS, COUNTED, ONE_EACH
from support.given_gradients import Toy, snapshot, weights
from support.guard_bands import same_bits
from support.inside import progress


def spoiled(grads, value):
    result = [g.clone() for g in grads]
    result[3].view(-1)[17] = value
    return result


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["first", "second", "both"])
@pytest.mark.parametrize("base", [*BASES])
def test_a_non_finite_gradient_skips_the_whole_step_and_is_counted(backend, base, where, value):
    """Weights, state and rho keep their bits, and the steps that follow are those that would have come without it."""
    cls, _, options, _ = BASES[base]
    ends = []
    for bad in (False, True):
        toy = Toy()
        opt = lk.SAM(toy.params, cls, rho=0.5, adaptive=True, backend=backend.name, **options)
        toy.steps(opt, 2)
        if bad:
            before = snapshot(opt)
            first, second = toy.grads(50), toy.grads(51)
            first = spoiled(first, value) if where != "second" else first
            second = spoiled(second, value) if where != "first" else second
            toy.two_steps(opt, first, second)
            assert same_bits(snapshot(opt), before)
            assert opt.metrics()["skipped_steps"].item() == 1
        toy.steps(opt, 2, start=2)
        ends.append(snapshot(opt))
        assert opt.metrics()["skipped_steps"].item() == int(bad)
    assert same_bits(*ends)


@pytest.mark.parametrize("where, before", [("first", 0), ("first", 2), ("second", 2)])
@pytest.mark.parametrize("name", ONE_EACH)
def test_a_non_finite_gradient_skips_the_step_of_any_method(name, where, before):
    """No average moves for a first gradient that is not finite, and no mask is selected by one; the random numbers of
    the next step are others, as those after any step."""
    toy = Toy()
    opt = family.build(name, toy.params, **ALWAYS.get(name, {}))
    toy.steps(opt, before)
    old, first, second = family.held(opt), toy.grads(50), toy.grads(51)
    if where == "first" and name not in family.ONE_PASS:
        first = spoiled(first, torch.nan)
    else:
        second = spoiled(second, torch.inf)
    toy.two_steps(opt, first, second)
    new = family.held(opt)
    fresh = {k: torch.full_like(v, 1.0 if "mask" in k else 0.0) for k, v in new.items() if k not in old}
    changed = {k for k, v in {**old, **fresh}.items() if not same_bits(new[k], v)}
    counted = COUNTED.get(name, set()) if where == "second" else set()
    counted = counted | ({"random.count"} if progress(opt).random.used else set())
    assert {k.split(".", 1)[1] if k[0].isdigit() else k for k in changed} == counted
    assert opt.metrics()["skipped_steps"].item() == 1
    toy.steps(opt, 2, start=before)
    assert opt.metrics()["skipped_steps"].item() == 1
    assert all(bool(v.double().isfinite().all()) for v in family.held(opt).values())
    assert not same_bits(family.held(opt)["weights.0"], new["weights.0"])


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_gradient_of_zero_perturbs_nothing_in_any_method(name):
    """But for those that draw ε or the start: they go along what they drew."""
    toy = Toy()
    opt = family.build(name, toy.params, **ALWAYS.get(name, {}))
    zeros, before = [torch.zeros_like(p) for p in toy.params], weights(toy)
    with opt.first_pass():
        toy.set_grads(zeros)
    opt.first_step()
    assert same_bits(weights(toy), before) is (name not in ("random-sam", "rsam", "rgsam"))
    toy.set_grads(zeros)
    while opt.ascents_left:
        opt.first_step()
        assert same_bits(weights(toy), before)
        toy.set_grads(zeros)
    opt.second_step()
    assert all(bool(v.double().isfinite().all()) for v in family.held(opt).values())
    toy.steps(opt, 2)
    assert opt.metrics()["skipped_steps"].item() == 0
    assert all(bool(v.double().isfinite().all()) for v in family.held(opt).values())


@pytest.mark.parametrize("where", ["first", "second", "train", "val"])
@pytest.mark.parametrize("curvature", ["secant", "diagonal"])
def test_a_learned_radius_stays_where_a_gradient_is_not_finite(backend, curvature, where):
    """In either pass the whole step is skipped; in the radius' own gradients the step stands and rho stays."""
    task = Task(torch.float32, steps=3)
    radius = lk.LearnedRadius(0.1, curvature=curvature)
    opt = lk.LETSASAM(task.net.parameters(), torch.optim.SGD, radius, backend=backend.name, lr=0.1, momentum=0.9)
    task.run(opt, task.batches[:1], learned=True)
    before, (batch, val_batch) = snapshot(opt), task.batches[1]
    at = {"first": 1, "second": 2, "train": 3, "val": 1}[where]
    calls = []

    def closure(which, data):
        def run():
            calls.append(which)
            loss = task.closure(data)()
            if calls.count(which) == at and (where == "val") == (which == "val"):
                next(task.net.parameters()).grad[0, 0, 0, 0] = torch.nan
            return loss

        return run

    opt.step(closure("train", batch), closure("val", val_batch))
    assert opt.rho.item() == before[0].item()
    skipped = where in ("first", "second")
    assert opt.metrics()["skipped_steps"].item() == int(skipped)
    after = snapshot(opt)
    assert same_bits(after, before) if skipped else not same_bits(after, before)
    task.run(opt, task.batches[2:], learned=True)
    assert opt.rho.item() != before[0].item() and bool(torch.isfinite(opt.rho))
    assert all(bool(x.isfinite().all()) for x in weights(task))


@pytest.mark.parametrize("curvature", ["secant", "diagonal"])
def test_a_learned_radius_stays_where_what_is_not_finite_is_no_part_of_its_own_gradient(backend, curvature):
    """A parameter that only the second pass reaches was not perturbed, so the hypergradient leaves it out; the step is
    skipped all the same, and a step that was not taken teaches nothing."""
    used, late = (torch.nn.Parameter(torch.randn(5)) for _ in range(2))
    radius = lk.LearnedRadius(0.1, curvature=curvature, metric="gap")
    opt = lk.LETSSAM([used, late], torch.optim.SGD, radius, backend=backend.name, lr=0.1)
    calls = []

    def closure(scale):
        opt.zero_grad()
        loss = (scale * used).square().sum()
        loss.backward()
        calls.append(scale)
        if bad and len(calls) == 2:
            late.grad = torch.full_like(late, torch.nan)
        return loss

    for bad in (True, False):
        calls.clear()
        before = snapshot(opt)
        opt.step(lambda: closure(1.0), lambda: closure(2.0))
        assert len(calls) == 4 and same_bits(snapshot(opt)[: len(before)], before) is bad
        assert opt.metrics()["skipped_steps"].item() == 1


def test_check_finite_costs_one_read_of_the_second_gradient_and_can_be_switched_off():
    counts = []
    for check in (True, False):
        toy = Toy()
        opt = lk.SAM(toy.params, torch.optim.SGD, backend="cpu", check_finite=check, lr=0.1)
        with Recorder() as recorder:
            toy.steps(opt, 1)
        counts.append(recorder.ops)
    assert sorted(counts[0]) == sorted([*counts[1], "grad_norm", "all_finite_"])
    assert counts[1] == ["grad_norm", "perturb_", "restore_sgd_"]


@pytest.mark.parametrize("zero", ["first", "both"])
@pytest.mark.parametrize("base", ["momentum", "adamw", "rmsprop"])
def test_a_gradient_of_zero_perturbs_nothing(backend, base, zero):
    """eps = 0, never NaN: the step is the base optimizer's along the second gradient."""
    cls, _, options, _ = BASES[base]
    ends = []
    for rho in (0.0, 5.0):
        toy = Toy()
        opt = lk.ASAM(toy.params, cls, rho=rho, backend=backend.name, **options)
        zeros = [torch.zeros_like(p) for p in toy.params]
        toy.set_grads(zeros)
        before = weights(toy)
        opt.first_step()
        assert same_bits(weights(toy), before)
        toy.set_grads(zeros if zero == "both" else toy.grads(1))
        opt.second_step()
        ends.append(snapshot(opt)[1:])
    assert same_bits(*ends) and all(bool(x.isfinite().all()) for x in ends[0])


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x, head):
        return getattr(self, head)(self.trunk(x).tanh())


@pytest.mark.parametrize("second", ["a", "b"])
@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize("base", ["momentum", "adamw", "rmsprop"])
def test_the_two_passes_may_have_different_gradients(backend, base, first, second):
    """Layer drop, experts: exactly what was perturbed is restored, and what has a second gradient steps."""
    net = TwoHeads().double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    inner = copy.deepcopy(net)

    def loss(theta, head):
        return ((torch.func.functional_call(inner, theta, (x, head)) - y) ** 2).mean()

    theta = {k: p.detach().clone() for k, p in net.named_parameters()}
    cls, transcription, options, _ = BASES[base]
    own, opt = transcription(**options), lk.ASAM(net.parameters(), cls, backend=backend.name, **options)
    for heads in ((first, second), (second, first), (first, first)):
        T = oracle.elementwise(0.01)(theta)
        _, g = oracle.gradient(loss, theta, heads[0])
        eps = oracle.unit(g, T)
        above = {k: theta[k] + 0.5 * eps[k] if k in eps else theta[k] for k in theta}
        _, g_hat = oracle.gradient(loss, above, heads[1])
        theta = own.step(theta, g_hat)
        before = weights(net)
        opt.zero_grad()
        ((net(x, heads[0]) - y) ** 2).mean().backward()
        opt.first_step(zero_grad=True)
        ((net(x, heads[1]) - y) ** 2).mean().backward()
        opt.second_step()
        for (k, p), old in zip(net.named_parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), theta[k], rtol=0, atol=1e-13)
            if k not in g_hat:
                assert same_bits(p.detach(), old)


def test_a_bad_first_gradient_counts_where_no_second_one_is_there(backend):
    p = torch.nn.Parameter(torch.ones(3))
    opt = lk.SAM([p], torch.optim.SGD, rho=0.1, lr=0.1, backend=backend.name)
    for value, skipped in ((torch.nan, 1), (1.0, 1), (torch.inf, 2)):
        p.grad = torch.full((3,), value)
        opt.first_step(zero_grad=True)
        opt.second_step()
        assert opt.metrics()["skipped_steps"] == skipped
        assert p.tolist() == [1.0] * 3
