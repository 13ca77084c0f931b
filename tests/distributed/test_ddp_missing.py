"""Ranks that do not have all gradients, or none: what is missing is zero, and nobody waits for them in vain."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from support.ddp_training import KINDS, VALIDATION, batch, build, closure, net, replica, train
from support.family import BESIDE, FAMILY, PER_SAMPLE
from support.given_gradients import snapshot
from support.guard_bands import same_bits


class Branches(nn.Module):
    """Rank r goes through branch r; nobody through the last. ``missing`` leaves the others out, else they count 0."""

    def __init__(self, missing):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.missing = missing
        self.stem = nn.Parameter(torch.randn(4, 32, generator=generator, dtype=torch.float64) / 4)
        self.arms = nn.ParameterList(torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(3))

    def forward(self, inputs):
        x, arm = inputs
        x = torch.tanh(x.flatten(1) @ self.stem.t())
        if self.missing:
            return x @ self.arms[arm].t()
        return sum((k == arm) * (x @ each.t()) for k, each in enumerate(self.arms))


def branching(rank, kind, sync, missing):
    model = replica(layers=Branches(missing), find_unused_parameters=missing)
    opt = build(model, kind, sync)

    def batches(step):
        x, y = batch(rank, step, torch.float64)
        return (x, rank), y

    train(opt, model, batches, 4)
    return [opt.rho, *(p.detach() for p in model.parameters()), opt.metrics().get("grad_norm", opt.rho)]


#: A mask is a share of the elements that have a gradient; what has none is left out where R-SAM moves the others by
#: noise too. ESAM takes samples out of a batch, which here comes with the number of a branch.
BY_GRADIENT = [name for name in FAMILY if name not in BESIDE and not name.startswith(("sparse", "esam"))]
MISSING = [(kind, sync) for kind in ("sam", "secant", "diagonal", "algorithm1") for sync in (True, False)]


@pytest.mark.parametrize(("kind", "sync"), [*MISSING, *((name, True) for name in BY_GRADIENT)])
def test_a_gradient_that_a_rank_does_not_have_stands_for_zero(ranks, kind, sync):
    """As if the branches that a rank leaves out had been multiplied by zero, to rounding; and nobody hangs."""
    found, other = ranks.run(branching, kind, sync, True)
    assert same_bits(found, other)
    expected, _ = ranks.run(branching, kind, sync, False)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def empty_handed(rank, kind):
    """The second rank has no examples in its first passes, and calls no backward."""
    model = replica()
    opt = build(model, kind, sync=False)
    for step in range(3):
        data, calls = batch(rank, step), []

        def run(data=data, calls=calls):
            calls.append(1)
            model.zero_grad()
            loss = cross_entropy(model(data[0]), data[1])
            if rank == 0 or len(calls) > 1:
                loss.backward()
            return loss

        opt.step(run, *([closure(model, batch(rank, step + VALIDATION))] if opt.radius.learns else []))
    return snapshot(opt)


@pytest.mark.parametrize("kind", ["sam", "secant", "diagonal", "algorithm1"])
def test_a_rank_without_any_first_gradient_does_not_hold_up_the_others(ranks, kind):
    found, other = ranks.run(empty_handed, kind)
    assert same_bits(found, other)
    if kind == "sam":
        alone = net()
        opt = build(alone, kind)
        for step in range(3):
            silent = closure(alone, batch(1, step), [0.0, 1.0])
            opt.step([closure(alone, batch(0, step)), silent])
        torch.testing.assert_close(found, snapshot(opt), rtol=1e-5, atol=1e-6)


def never_backward(rank, kind):
    """Ranks of a group, without DistributedDataParallel; the second has no gradients in any pass."""
    layers = net()
    opt = build(layers, kind, model=None, process_group=dist.group.WORLD)

    def run(step):
        layers.zero_grad()
        loss = cross_entropy(layers(batch(rank, step)[0]), batch(rank, step)[1])
        if rank == 0:
            loss.backward()
        return loss.detach()

    for step in range(3):
        opt.step(*[lambda s=s: run(s) for s in (step, step + VALIDATION)][: 1 + opt.radius.learns])
    return opt.rho, all(map(torch.equal, layers.parameters(), net().parameters()))


#: Not those that call backward by themselves: they have gradients wherever there is a loss.
SILENT = [name for name in FAMILY if name not in PER_SAMPLE]


@pytest.mark.parametrize("kind", [*KINDS, *SILENT])
def test_a_rank_without_any_gradient_takes_part_all_the_same(ranks, kind):
    (rho, first_stays), (other, second_stays) = ranks.run(never_backward, kind)
    assert torch.equal(rho, other)
    assert (first_stays, second_stays) == (False, True)
