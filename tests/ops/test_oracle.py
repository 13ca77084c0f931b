"""The oracle is held to what defines it: maximisers, finite differences, torch's own optimizers."""

import math

import pytest
import torch

from support import oracle
from support.conv_net import TRANSPOSED, Task


def shifted(theta, eps, factor=1.0):
    return {k: theta[k] + factor * eps[k] for k in theta}


@pytest.mark.parametrize("p", [1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("T", [oracle.identity, oracle.elementwise(0.01), oracle.filterwise(0.01, False, TRANSPOSED)])
def test_the_perturbation_maximises_the_linearised_loss_on_its_ball(T, p):
    """||T^-1 eps||_p = 1, and <g, eps> is ||T g||_q, which by Hoelder no other point of the ball exceeds."""
    task = Task()
    theta = task.weights()
    _, g = oracle.gradient(task.functional(), theta, task.batches[0][0])
    scale = T(theta)
    eps = oracle.unit(g, scale, p)
    flat = torch.cat([(eps[k] / scale[k]).flatten() for k in g])
    dual = torch.cat([(scale[k] * g[k]).flatten() for k in g])
    q = 1.0 if p == math.inf else p / (p - 1)
    torch.testing.assert_close(torch.linalg.vector_norm(flat, p).item(), 1.0, rtol=1e-12, atol=0)
    torch.testing.assert_close(oracle.dot(g, eps), torch.linalg.vector_norm(dual, q), rtol=1e-12, atol=0)


def test_a_filter_is_a_row_of_its_convolution():
    weight = torch.arange(24.0, dtype=torch.float64).reshape(2, 3, 2, 2)
    forward = oracle.filterwise(0.5)({"weight": weight})["weight"]
    backward = oracle.filterwise(0.5, transposed=("weight",))({"weight": weight})["weight"]
    assert all(bool((forward[i] == weight[i].norm() + 0.5).all()) for i in range(2))
    assert all(bool((backward[:, i] == weight[:, i].norm() + 0.5).all()) for i in range(3))


@pytest.mark.parametrize("metric", ["squared_gap", "gap", "validation_loss"])
def test_the_hypergradient_with_the_true_hessian_is_the_derivative_in_rho(metric):
    """The skeleton of the formula (signs, eta, w) against central differences: H eps by differences of the gradient."""
    task, rho, eta, h = Task(), 0.1, 0.05, 1e-5
    loss, theta, (train, val) = task.functional(), task.weights(), task.batches[0]
    _, g = oracle.gradient(loss, theta, train)
    eps = oracle.unit(g, oracle.identity(theta))

    def objective(radius):
        _, g_hat = oracle.gradient(loss, shifted(theta, eps, radius), train)
        after = shifted(theta, g_hat, -eta)
        (l_train, g_train), (l_val, g_val) = oracle.gradient(loss, after, train), oracle.gradient(loss, after, val)
        gap = l_val - l_train
        value = {"squared_gap": 0.5 * gap**2, "gap": gap, "validation_loss": l_val}[metric]
        return value, gap, g_hat, g_train, g_val

    _, gap, _, g_train, g_val = objective(rho)
    # the secant around rho, of width 2h: given g_hat(rho + h), g_hat(rho - h) and 2h, (g_hat - g) / rho is right to h^2
    up, down = objective(rho + h)[2], objective(rho - h)[2]
    slope = oracle.hypergradient(
        theta, oracle.identity, down, up, g_train, g_val, gap, 2 * h, eta, metric, "secant", "epsilon"
    )
    difference = (objective(rho + h)[0] - objective(rho - h)[0]) / (2 * h)
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=0)


BASES = {
    "sgd": (torch.optim.SGD, oracle.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, oracle.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
    "dampening": (torch.optim.SGD, oracle.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "maximize": True}),
    "adam": (torch.optim.Adam, oracle.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, lambda **k: oracle.Adam(decoupled=True, **k), {"lr": 0.01, "weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, oracle.RMSprop, {"lr": 0.01}),
}


@pytest.mark.parametrize("name", BASES)
def test_the_base_optimizers_are_those_of_torch(name):
    cls, transcription, options = BASES[name]
    x = torch.randn(50, dtype=torch.float64)
    parameter, mine, theta = torch.nn.Parameter(x.clone()), transcription(**options), {"x": x}
    theirs = cls([parameter], **options)
    for _ in range(10):
        parameter.grad = torch.randn(50, dtype=torch.float64)
        theta = mine.step(theta, {"x": parameter.grad.clone()})
        theirs.step()
    torch.testing.assert_close(parameter.detach(), theta["x"], rtol=1e-12, atol=1e-14)
    for key, value in mine.state("x").items():
        torch.testing.assert_close(theirs.state[parameter][key], value, rtol=1e-12, atol=1e-14, check_dtype=False)
