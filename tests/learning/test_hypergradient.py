"""The gradient in the radius: against finite differences of the objective, and the diagonal as the paper prints it."""

import math
import statistics

import pytest
import torch

import lets_kernels as lk
from support import oracle
from support.conv_net import TRANSPOSED, Task, conv_net
from support.core_methods import CURVATURES, METRICS


def slope_in_nu(task, backend, rho, eta, where=None, nu_lr=1.0, **learning):
    """dF/dnu as the optimizer took it: nu moves by exactly -lr dF/dnu under plain SGD."""
    radius = lk.LearnedRadius(rho, optimizer=torch.optim.SGD, lr=nu_lr, **learning)
    opt = lk.SAM(
        task.net.parameters(), torch.optim.SGD, radius, direction=where, backend=backend, model=task.net, lr=eta
    )
    train, val = task.batches[0]
    before = opt.radius.nu[0].item()
    opt.step(task.closure(train), task.closure(val))
    slope = (before - opt.radius.nu[0].item()) / nu_lr
    assert opt.metrics()["rho_grad"].item() == pytest.approx(slope / rho, rel=1e-6)
    return slope


def objective(loss, theta, eps, radius, eta, batches, metric):
    """F at theta_{t+1}(rho), after one plain SGD step along the gradient at theta_t + rho eps_hat."""
    train, val = batches
    _, g_hat = oracle.gradient(loss, {k: theta[k] + radius * eps[k] for k in theta}, train)
    after = {k: theta[k] - eta * g_hat[k] for k in theta}
    l_train, l_val = loss(after, train), loss(after, val)
    value = {"squared_gap": 0.5 * (l_val - l_train) ** 2, "gap": l_val - l_train, "validation_loss": l_val}
    return value[metric].item()


def finite_difference(task, T, rho, eta, metric, h=1e-5):
    """dF/dnu = rho dF/drho by central differences; their own error is of the order of h^2."""
    loss, theta = task.functional(), task.weights()
    _, g = oracle.gradient(loss, theta, task.batches[0][0])
    eps = oracle.unit(g, T(theta))
    up, down = (objective(loss, theta, eps, rho + s, eta, task.batches[0], metric) for s in (h, -h))
    return rho * (up - down) / (2 * h)


# The radii are such that eps is about 0.02 long in all three: T is the norm of a whole filter in the last.
DIRECTIONS = {
    "sam": (None, oracle.identity, 0.02),
    "asam": (lk.Adaptive(0.02), oracle.elementwise(0.02), 0.05),
    "filterwise": (lk.Adaptive(0.02, True), oracle.filterwise(0.02, transposed=TRANSPOSED), 0.01),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_secant_is_the_slope_of_the_objective(backend, direction, metric):
    """A secant over [0, rho] for a derivative at rho: off by the curvature's change within the ball, of order rho (see
    the next test). Promised: under 10 % in the median over 20 random nets."""
    where, T, rho = DIRECTIONS[direction]
    errors = []
    for seed in range(20):
        task = Task(steps=1, net=conv_net(seed=seed), seed=seed)
        expected = finite_difference(task, T, rho, 0.1, metric)
        found = slope_in_nu(task, backend.name, rho, 0.1, where, curvature="secant", metric=metric)
        errors.append(abs(found - expected) / abs(expected))
    assert statistics.median(errors) < 0.1, f"median relative error {statistics.median(errors):.3f}"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_secant_becomes_exact_as_the_radius_shrinks(backend, direction):
    """Its error is proportional to rho: a radius 100 times smaller, an error about 100 (here: 20) times smaller."""
    where, T, rho = DIRECTIONS[direction]
    errors = []
    for radius in (rho, rho / 100):
        task = Task(steps=1)
        expected = finite_difference(task, T, radius, 0.1, "gap", h=1e-6)
        found = slope_in_nu(task, backend.name, radius, 0.1, where, curvature="secant", metric="gap")
        errors.append(abs(found - expected) / abs(expected))
    assert errors[1] < errors[0] / 20


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_formula_is_the_papers_to_rounding(backend, direction, curvature, metric):
    """-eta w (g_val - g_train)^T H eps_hat in float64: sums of a few hundred products; 1e-9 is far above rounding."""
    where, T, rho = DIRECTIONS[direction]
    kind, _ = CURVATURES[curvature]
    task, eta = Task(steps=1), 0.1
    loss, theta, (train, val) = task.functional(), task.weights(), task.batches[0]
    _, g = oracle.gradient(loss, theta, train)
    eps = oracle.unit(g, T(theta))
    _, g_hat = oracle.gradient(loss, {k: theta[k] + rho * eps[k] for k in theta}, train)
    after = {k: theta[k] - eta * g_hat[k] for k in theta}
    (l_train, g_train), (l_val, g_val) = oracle.gradient(loss, after, train), oracle.gradient(loss, after, val)
    parts = theta, T, g, g_hat, g_train, g_val, l_val - l_train, rho, eta, metric
    expected = rho * oracle.hypergradient(*parts, kind["curvature"], kind.get("direction")).item()
    found = slope_in_nu(task, backend.name, rho, eta, where, nu_lr=1e3, metric=metric, **kind)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("etas", [(0.1, 0.03), (0.1, 0.1)], ids=["own-lr", "one-lr"])
@pytest.mark.parametrize("xis", [None, (0.02, 0.3)], ids=["sam", "asam"])
def test_one_radius_a_group_learns_from_its_own_parameters(backend, xis, etas):
    """The hypergradient of a group sums over its parameters alone, with its own learning rate, radius and xi; eps_hat
    and the losses are those of all groups together."""
    task, rhos = Task(steps=1), (0.05, 0.02)
    names = [name for name, _ in task.net.named_parameters()]
    halves = names[:2], names[2:]
    loss, theta, (train, val) = task.functional(), task.weights(), task.batches[0]
    rho = {k: r for half, r in zip(halves, rhos, strict=True) for k in half}
    eta = {k: e for half, e in zip(halves, etas, strict=True) for k in half}
    _, g = oracle.gradient(loss, theta, train)
    T = oracle.identity(theta)
    if xis:
        T = {
            k: x
            for half, xi in zip(halves, xis, strict=True)
            for k, x in oracle.elementwise(xi)(theta).items()
            if k in half
        }
    eps = oracle.unit(g, T)
    _, g_hat = oracle.gradient(loss, {k: theta[k] + rho[k] * eps[k] for k in theta}, train)
    after = {k: theta[k] - eta[k] * g_hat[k] for k in theta}
    (l_train, g_train), (l_val, g_val) = oracle.gradient(loss, after, train), oracle.gradient(loss, after, val)
    parameters = dict(task.net.named_parameters())
    groups = [
        {"params": [parameters[k] for k in half], "rho": r, "lr": e}
        for half, r, e in zip(halves, rhos, etas, strict=True)
    ]
    for group, xi in zip(groups, xis or (), strict=bool(xis)):
        group["xi"] = xi
    radius = lk.LearnedRadius(per_group=True, optimizer=torch.optim.SGD, lr=1e3)
    direction = lk.Adaptive() if xis else None
    opt = lk.LETSSAM(groups, torch.optim.SGD, radius, direction=direction, backend=backend.name, lr=0.1)
    opt.step(task.closure(train), task.closure(val))
    assert opt.rho.shape == (2,)
    for half, r, e, found in zip(halves, rhos, etas, opt.rho.tolist(), strict=True):
        own = [{k: x[k] for k in half} for x in (eps, g_hat, g_train, g_val)]
        terms = sum(((own[3][k] - own[2][k]) * own[1][k] ** 2 * own[0][k]).sum() for k in half)
        slope = r * -e * (l_val - l_train) * terms
        assert math.log(found / r) == pytest.approx(-1e3 * slope.item(), rel=1e-9)


def test_the_learning_rate_of_a_group_enters_the_one_radius(backend):
    """dF/dnu is a sum over groups of eta_group times the group's share: additive in the learning rates, here so small
    that the gradients at theta_{t+1} are the same for all."""
    slopes = []
    for etas in ((1e-10, 1e-10), (1e-10, 0.0), (0.0, 1e-10)):
        task = Task(steps=1)
        ps, (train, val) = list(task.net.parameters()), task.batches[0]
        groups = [{"params": ps[:2], "lr": etas[0]}, {"params": ps[2:], "lr": etas[1]}]
        radius = lk.LearnedRadius(0.05, curvature="secant", metric="gap", optimizer=torch.optim.SGD, lr=1e9)
        opt = lk.LETSSAM(groups, torch.optim.SGD, radius, backend=backend.name, lr=0.1)
        opt.step(task.closure(train), task.closure(val))
        slopes.append(math.log(opt.rho.item() / 0.05))
    assert slopes[0] == pytest.approx(slopes[1] + slopes[2], rel=1e-6)
    assert min(map(abs, slopes)) > 1e-4
