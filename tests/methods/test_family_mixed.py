"""Parts of several papers in one optimizer: each does what it does in its own method, and nothing else."""

import copy

import pytest
import torch

import lets_kernels as lk
from support import oracle, papers
from support.conv_net import TRANSPOSED, Task
from support.family import SEED, closure, take
from support.nearness import assert_near
from support.papers import lin, sam_gradient, unit

TIGHT = 1e-12  # as in test_family.py
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def smoothed_gap(run):
    """VaSSO's direction at every other step, GSAM's descent there; its average sees the gradients of these steps."""
    d = None
    for t, batch in run.steps():
        g = run.grad(batch)
        if t % 2 == 0:
            d = g if d is None else lin((0.6, d), (0.4, g))
            run.descend(papers.surrogate_gap(g, sam_gradient(run, batch, d, 0.1), 0.4))
        else:
            run.descend(g)


def random_penalty(run):
    """R-SAM's gradients at every third step, in the norm penalty's mixture; those in between are at theta itself."""
    for t, batch in run.steps():
        if t % 3 == 0:
            g, g_hat = papers.random_start(run, t, batch, 0.1, 0.1, 0.7, "variance", TRANSPOSED)
            run.descend(lin((0.2, g), (0.8, g_hat)))
        else:
            run.descend(run.grad(batch))


def fisher_look(run):
    """Fisher SAM's direction under LookSAM's schedule and descent."""
    for t, batch in run.steps():
        g = run.grad(batch)
        if t % 3 == 0:
            inverse = {k: x / (1 + 20 * x**2) for k, x in g.items()}
            eps = lin((1 / oracle.dot(g, inverse).sqrt(), inverse))
            g_hat = run.grad(batch, run.moved(0.1, eps))
            g_v = papers.orthogonal(g, g_hat, False)
            run.descend(g_hat)
        else:
            run.descend(papers.along(g, g_v, 0.7, False))


def random_points(run):
    """Random SAM, with a probability: a step has one gradient, at theta + epsilon or at theta."""
    for t, batch in run.steps():
        noise = run.draw(papers.normals, t, papers.NOISE)
        size = sum(x.numel() for x in noise.values())
        perturbs = run.uniform(t) < 0.5
        run.descend(run.grad(batch, run.moved(0.3 * perturbs, lin((size**-0.5, noise)))), perturbs)


def falling_look(run):
    """LookSAM with a radius that falls to zero: there g_v is zero, and the steps after it are plain ones."""
    for t, batch in run.steps():
        g, rho = run.grad(batch), 0.1 * (1 - min(t, 6) / 6)
        if t % 3 == 0:
            g_hat = run.grad(batch, run.moved(rho, unit(g))) if rho else g
            g_v = papers.orthogonal(g, g_hat, False)
            run.descend(g_hat)
        else:
            run.descend(papers.along(g, g_v, 0.7, False) if t < 6 else g)


MIXED = {
    "smoothed-gap": (
        smoothed_gap,
        lambda: {"direction": lk.Smoothed(0.4), "schedule": lk.Every(2), "descent": lk.SurrogateGap(0.4)},
    ),
    "random-penalty": (
        random_penalty,
        lambda: {"direction": lk.RandomStart(0.1, 0.7), "schedule": lk.Every(3), "descent": lk.NormPenalty(0.8)},
    ),
    "fisher-look": (
        fisher_look,
        lambda: {"direction": lk.Fisher(20.0), "schedule": lk.Every(3), "descent": lk.Reuse(0.7)},
    ),
    "random-points": (
        random_points,
        lambda: {"rho": 0.3, "direction": lk.Gaussian(), "schedule": lk.Bernoulli(0.5)},
    ),
    "falling-look": (
        falling_look,
        lambda: {"rho": lk.ScheduledRadius.linear(0.1, 0.0, 6), "schedule": lk.Every(3), "descent": lk.Reuse(0.7)},
    ),
}


@pytest.mark.parametrize("shape", ["closure", "two-steps"])
@pytest.mark.parametrize("name", MIXED)
def test_parts_of_several_papers_go_together(backend, name, shape):
    paper, parts = MIXED[name]
    task, base = Task(), oracle.SGD(**OPTIONS)
    run = papers.Run(copy.deepcopy(task.net), task.weights(), task.batches, base, SEED)
    paper(run)
    arguments = {"rho": 0.1, "seed": SEED, "model": task.net, "backend": backend.name, **parts()}
    opt = lk.SAM(task.net.parameters(), torch.optim.SGD, **arguments, **OPTIONS)
    for batch, _ in task.batches:
        take(opt, task.net, batch, shape)
    assert_near(task, opt, run.theta, base, TIGHT)


def test_selected_samples_with_another_direction():
    """ESAM's selection of samples, at Friendly SAM's perturbation: three calls of the closure each."""
    task, base, m = Task(steps=5), oracle.SGD(**OPTIONS), None
    run = papers.Run(copy.deepcopy(task.net), task.weights(), task.batches, base, SEED)
    for _, batch in run.steps():
        g = run.grad(batch)
        d, m = (g, g) if m is None else (lin((1.0, g), (-0.8, m)), lin((0.7, m), (0.3, g)))
        there = run.moved(0.1, unit(d))
        with torch.no_grad():
            rise = run.losses(there, batch) - run.losses(run.theta, batch)
        chosen = rise.topk(4).indices
        run.descend(run.grad((batch[0][chosen], batch[1][chosen]), there))
    parts = {"direction": lk.Friendly(0.8, 0.7), "samples": lk.SelectedSamples(0.5)}
    opt = lk.SAM(task.net.parameters(), torch.optim.SGD, 0.1, **parts, **OPTIONS)
    for batch, _ in task.batches:
        calls = []
        opt.step(closure(opt, task.net, batch, calls))
        assert len(calls) == 3
    assert_near(task, opt, run.theta, base, TIGHT)
