"""Filter-normalised directions, and the loss along them; the watch, and the generalisation gap."""

import math

import pytest
import torch
from torch import nn

from lets_kernels import SAM
from lets_kernels.sharpness import (
    Objective,
    Watch,
    along_gradient,
    direction,
    eigenvalues,
    generalisation_gap,
    in_ball,
    line,
    plane,
)
from support.known_minima import assert_same, entropy, quadratic, small, state, symmetric

THETA = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
A = symmetric([1.0, 2.0, 4.0])


def test_a_direction_has_the_norm_of_each_filter():
    model = nn.ModuleList([nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(2, 3, 3), nn.Linear(4, 5), nn.BatchNorm2d(3)])
    at = Objective(model, lambda model, batch: model[2](batch).mean(), [torch.zeros(1, 4)])
    convolution, bias, turned, _, linear, other, *norm = at.split(direction(at))
    for d, theta in zip(convolution, model[0].weight, strict=True):
        assert float(d.norm()) == pytest.approx(float(theta.detach().norm()), rel=1e-5)
    for d, theta in zip(turned.unbind(1), model[1].weight.unbind(1), strict=True):
        assert float(d.norm()) == pytest.approx(float(theta.detach().norm()), rel=1e-5)
    for d, theta in zip(linear, model[2].weight, strict=True):
        assert float(d.norm()) == pytest.approx(float(theta.detach().norm()), rel=1e-5)
    assert not any(t.any() for t in (bias, other, *norm)), "biases and batch norm stay"
    cosine = torch.cosine_similarity(at.flat(at.split(direction(at, 1))), direction(at), dim=0)
    assert abs(float(cosine)) < 0.5, "seeds draw different directions"


def test_a_line_and_a_plane_are_the_losses_there():
    at = quadratic(THETA, [A])
    d, e = (torch.tensor(t, dtype=torch.float64) for t in ([1.0, 0, 0], [0, 2.0, 0]))

    def loss(x):
        return float(0.5 * x @ A @ x)

    found = line(at, d, span=2.0, points=5)
    assert found.places == [-2, -1, 0, 1, 2]
    assert found.losses == pytest.approx([loss(THETA + a * d) for a in found.places], rel=1e-12)
    grid = plane(at, (d, e), span=1.0, points=3)
    for j, b in enumerate(grid.places):
        assert grid.losses[j] == pytest.approx([loss(THETA + a * d + b * e) for a in grid.places], rel=1e-12)


def test_random_lines_have_the_present_loss_in_the_middle():
    _, at = small()
    assert line(at, points=3).losses[1] == pytest.approx(at.loss(), rel=1e-12)
    grid = plane(at, points=3)
    assert grid.losses[1][1] == pytest.approx(at.loss(), rel=1e-12)
    assert len({x for row in grid.losses for x in row}) == 9
    assert line(at, points=3, seed=1).losses != line(at, points=3).losses


@pytest.mark.parametrize("arguments", [{"points": 1}, {"span": 0}, {"span": math.inf}])
def test_refused(arguments):
    with pytest.raises(ValueError, match="a line needs"):
        line(quadratic(THETA, [A]), **arguments)


def test_a_watch_during_training():
    model, at = small()
    _, other = small(batches=(7,))
    test = Objective(model, entropy, other._data)
    watch = Watch(
        {"sharpness": lambda: along_gradient(at, 0.1).value, "gap": lambda: generalisation_gap(at, test).value}, every=3
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = {}
    for step in range(7):
        if step % 3 == 0:
            expected[step] = along_gradient(at, 0.1).value, test.loss() - at.loss()
        watch()
        optimizer.zero_grad()
        entropy(model.train(), at._data[0]).backward()
        optimizer.step()
    assert [(r["step"], (r["sharpness"], r["gap"])) for r in watch.records] == list(expected.items())
    assert all(r["seconds"] > 0 for r in watch.records) and 0 < watch.share < 1
    assert len({r["sharpness"] for r in watch.records}) == 3


@pytest.mark.parametrize("flatten", [False, True])
def test_a_training_that_is_watched_is_the_same_training(flatten):
    """Bit for bit, with dropout, batch norm, momentum and a radius that moves."""

    def train(watched):
        model, at = small(torch.float32, dropout=0.2)
        options = {"rho": "auto", "lr": 0.1, "momentum": 0.9, "flatten": flatten, "model": model}
        optimizer = SAM(model.parameters(), torch.optim.SGD, **options)
        measures = {
            "ball": lambda: in_ball(at, 0.05, steps=1).value,
            "largest": lambda: float(eigenvalues(at, steps=3).values[0]),
        }
        watch = Watch(measures, every=2)

        def closure():
            optimizer.zero_grad()
            loss = entropy(model, at._data[0])
            loss.backward()
            return loss

        for _ in range(4):
            if watched:
                watch()
            optimizer.step(closure)
        return state(model), float(optimizer.rho), len(watch.records)

    (plain, rho, none), (watched, same, records) = train(False), train(True)
    assert_same(plain, watched)
    assert (rho, none) == (same, 0) and records == 2


def test_a_watch_that_cannot_be():
    with pytest.raises(ValueError, match="every"):
        Watch({}, every=0)
    with pytest.raises(ValueError, match="'seconds'"):
        Watch({"seconds": float})
    assert Watch({}).share == 0
