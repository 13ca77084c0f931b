"""Gradients accumulated over micro-batches, and gradients that are clipped: where that acts, in every call shape."""

import pytest
import torch

import lets_kernels as lk
from support import family
from support.call_shapes import SHAPES, Passes
from support.conv_net import Task
from support.family import FAMILY, ONE_EACH, PER_SAMPLE
from support.given_gradients import snapshot, weights
from support.guard_bands import same_bits
from support.moving_radii import auto

# Sums of 8 terms in another order, in float64, through a net whose derivatives are of order one: some hundred roundings
# of 2^-53 relative to the gradient, and each of the few steps adds as much.
CLOSE = {"rtol": 0, "atol": 1e-12}


def plain_task():
    """Without batch norm, whose statistics depend on what is in a batch."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(72, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
    return Task(steps=3, net=net.double())


class Accumulating(Passes):
    """Each pass runs over the batch in four backward passes, whose gradients add up to that of the mean loss."""

    def __call__(self, batch):
        self.count += 1
        losses = []
        for part in zip(batch[0].chunk(4), batch[1].chunk(4), strict=True):
            losses.append(self.task.loss(part) / 4)
            (losses[-1] if self.scaler is None else self.scaler.scale(losses[-1])).backward()
        return torch.stack(losses).sum().detach()


METHODS = {
    "sam": lambda params, *rest, **options: lk.SAM(params, *rest, rho=0.1, **options),
    "auto": lambda params, *rest, **options: lk.SAM(params, *rest, auto(), **options),
    "asam": lambda params, *rest, **options: lk.ASAM(params, *rest, rho=0.5, **options),
    "lets": lambda params, *rest, **options: lk.LETSSAM(
        params, *rest, lk.LearnedRadius(0.1, curvature="secant", optimizer=torch.optim.SGD, lr=1.0), **options
    ),
}


CASES = [
    (method, shape, scaled)
    for method in METHODS
    for shape in ("closure", "old-closure", "two-steps", "context")
    for scaled in (False, True)
]
# A closure that returns the losses of samples has no place for a second backward.
WHOLE = [name for name in ONE_EACH if name not in PER_SAMPLE]
CASES += [(name, ("closure", "two-steps", "context")[i % 3], True) for i, name in enumerate(WHOLE)]


def made(method, task):
    if method in FAMILY:
        return family.build(method, task)
    return METHODS[method](task.net.parameters(), torch.optim.SGD, lr=0.5, momentum=0.9)


@pytest.mark.parametrize("method, shape, scaled", CASES)
def test_accumulating_is_the_big_batch(method, shape, scaled):
    ends = []
    for passes in (Passes, Accumulating):
        task, scaler = plain_task(), torch.amp.GradScaler("cpu", init_scale=256.0) if scaled else None
        opt = made(method, task)
        for batch, val in task.batches:
            SHAPES[shape](opt, passes(task, scaler), batch, val)
            if scaled:
                scaler.update()
        ends.append(snapshot(opt))
    for big, small in zip(*ends, strict=True):
        torch.testing.assert_close(small, big, **CLOSE)


def test_a_list_of_closures_is_not_the_big_batch():
    """It perturbs for each micro-batch by itself, which is another method."""
    ends = []
    for shape in ("closure", "micro-batches"):
        task = plain_task()
        opt = lk.SAM(task.net.parameters(), torch.optim.SGD, rho=0.1, lr=0.5)
        SHAPES[shape](opt, Passes(task), *task.batches[0])
        ends.append(torch.cat([w.flatten() for w in weights(task)]))
    assert (ends[0] - ends[1]).abs().max() > 1e-6


def gradient_at(task, theta, batch):
    """By autograd alone, as a flat vector."""
    loss = task.functional()
    theta = {name: w.detach().requires_grad_() for name, w in theta.items()}
    grads = torch.autograd.grad(loss(theta, batch), list(theta.values()))
    return torch.cat([g.flatten() for g in grads])


def unflat(task, flat):
    shapes = [(name, p.shape) for name, p in task.net.named_parameters()]
    parts = flat.split([shape.numel() for _, shape in shapes])
    return {name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)}


@pytest.mark.parametrize("where", ["second", "both", "closure"])
def test_clipping_shortens_the_step_and_never_the_perturbation(where):
    """θ' = θ − η c ĝ(θ + ρ g/‖g‖), c = min(1, limit / ‖ĝ‖): ε has length ρ, however short the clipped g is."""
    task, batch, limit, rho, lr = plain_task(), plain_task().batches[0][0], 1e-2, 0.3, 0.5
    opt = lk.SAM(task.net.parameters(), torch.optim.SGD, rho=rho, lr=lr)
    theta = torch.cat([w.flatten() for w in weights(task)])
    g = gradient_at(task, unflat(task, theta), batch)
    above = theta + rho * g / g.norm()
    g_hat = gradient_at(task, unflat(task, above), batch)
    assert g.norm() > 5 * limit and g_hat.norm() > 5 * limit
    reached = []

    def run(clipped):
        opt.zero_grad()
        reached.append(torch.cat([w.flatten() for w in weights(task)]))
        loss = task.loss(batch)
        loss.backward()
        if clipped:
            torch.nn.utils.clip_grad_norm_(task.net.parameters(), limit)
        return loss

    if where == "closure":
        opt.step(lambda: run(True))
    else:
        run(where == "both")
        opt.first_step(zero_grad=True)
        run(True)
        opt.second_step()
    # clip_grad_norm_ divides by norm + 1e-6
    expected = theta - lr * limit / (g_hat.norm() + 1e-6) * g_hat
    torch.testing.assert_close(reached[1], above, **CLOSE)
    torch.testing.assert_close(torch.cat([w.flatten() for w in weights(task)]), expected, **CLOSE)


def test_clipping_the_first_pass_alone_changes_nothing_but_the_metric():
    ends, norms = [], []
    for limit in (torch.inf, 2.0**-10):
        task = plain_task()
        opt = lk.SAM(task.net.parameters(), torch.optim.SGD, rho=0.3, lr=0.5)
        task.loss(task.batches[0][0]).backward()
        grads = [p.grad for p in task.net.parameters()]
        for g in grads:  # a power of two, so that no bit is rounded
            g.mul_(min(1.0, limit))
        opt.first_step(zero_grad=True)
        task.loss(task.batches[0][0]).backward()
        opt.second_step()
        ends.append(snapshot(opt))
        norms.append(opt.metrics()["grad_norm"])
    assert same_bits(*ends) and norms[1] == 2.0**-10 * norms[0]
