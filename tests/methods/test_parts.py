"""A method is made of parts: each can be one's own, and plugs in without the optimizer knowing its name."""

import math

import pytest
import torch

import lets_kernels as lk
from lets_kernels.parts.direction import Ascent
from support import oracle
from support.conv_net import Task
from support.given_gradients import Toy, snapshot, weights
from support.guard_bands import same_bits


class EveryOther(lk.Schedule):
    def perturbs(self, step):
        return step % 2 == 0


class Downhill(lk.Direction):
    """Minus the gradient, in the infinity norm: eps = -rho sign(g)."""

    q = 1.0

    def ascent(self, runs, group):
        return Ascent(runs, [-g for g in runs.grads], 0.0, self.q)


class Half(lk.Descent):
    """Half of the way between the two gradients."""

    holds_first = True

    def choose(self, second):
        if second.perturbed:
            second.step_along([second.firsts(runs) for runs in second.runs], second.numbers(0.5, 0.5))


class Harmonic(lk.Radius):
    rho = 1.0

    def value(self, index, group, moment):
        return 1.0 / (1 + moment.step)


def transcription(toy, steps, perturbs=lambda t: True, sign=False, half=False, rho=lambda t: 0.5, lr=0.1):
    """What the parts say, on L(theta) = sum theta^4 / 4 with gradient theta^3, in float64."""
    theta = {str(i): p.detach().clone() for i, p in enumerate(toy.params)}
    for t in range(steps):
        g = {k: x**3 for k, x in theta.items()}
        if perturbs(t):
            eps = {k: -x.sign() for k, x in g.items()} if sign else oracle.unit(g, oracle.identity(theta))
            g_hat = {k: (x + rho(t) * eps[k]) ** 3 for k, x in theta.items()}
            d = {k: 0.5 * (g[k] + g_hat[k]) for k in g} if half else g_hat
        else:
            d = g
        theta = {k: x - lr * d[k] for k, x in theta.items()}
    return list(theta.values())


CASES = {
    "schedule": ({"schedule": EveryOther()}, {"perturbs": lambda t: t % 2 == 0}),
    "direction": ({"direction": Downhill()}, {"sign": True}),
    "descent": ({"descent": Half()}, {"half": True}),
    "radius": ({"rho": Harmonic()}, {"rho": lambda t: 1 / (1 + t)}),
    "all-four": (
        {"schedule": EveryOther(), "direction": Downhill(), "descent": Half(), "rho": Harmonic()},
        {"perturbs": lambda t: t % 2 == 0, "sign": True, "half": True, "rho": lambda t: 1 / (1 + t)},
    ),
}


@pytest.mark.parametrize("shape", ["closure", "two-steps", "context"])
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_part_of_ones_own_plugs_in(backend, case, flatten, shape):
    parts, formula = CASES[case]
    toy = Toy(torch.float64)
    expected = transcription(toy, 4, **formula)
    options = {"rho": 0.5, **parts, "backend": backend.name, "flatten": flatten}
    opt = lk.SAM(toy.params, torch.optim.SGD, **options, lr=0.1)
    calls = []

    def closure():
        calls.append(1)
        toy.set_grads([p.detach() ** 3 for p in toy.params])
        return torch.tensor(0.0)

    for _ in range(4):
        if shape == "closure":
            opt.step(closure)
        elif shape == "two-steps":
            closure()
            opt.first_step(zero_grad=True)
            closure()
            opt.second_step(zero_grad=True)
        else:
            closure()
            with opt.perturbed():
                closure()
            opt.step()
    for p, x in zip(toy.params, expected, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-13, atol=1e-14)
    if shape == "closure":  # a step without perturbation needs one gradient, and takes one
        assert len(calls) == (6 if "schedule" in parts else 8)


def test_lets_learns_on_a_direction_and_a_descent_of_ones_own(backend):
    """theta_{t+1} = theta - eta d, so what is differentiated is d(rho), here half of g + g_hat(rho): its secant from
    d(0) = g is half of g_hat - g."""
    task = Task(torch.float64, steps=3)
    options = {"direction": Downhill(), "descent": Half(), "backend": backend.name}
    radius = lk.LearnedRadius(0.02, curvature="secant", metric="gap", optimizer=torch.optim.SGD, lr=1.0)
    opt = lk.SAM(task.net.parameters(), torch.optim.SGD, radius, **options, lr=0.1)
    loss, theta, nu = task.functional(), task.weights(), math.log(0.02)
    for batch, val_batch in task.batches:
        _, g = oracle.gradient(loss, theta, batch)
        _, g_hat = oracle.gradient(loss, {k: x - math.exp(nu) * g[k].sign() for k, x in theta.items()}, batch)
        theta = {k: x - 0.1 * 0.5 * (g[k] + g_hat[k]) for k, x in theta.items()}
        (_, g_train), (_, g_val) = oracle.gradient(loss, theta, batch), oracle.gradient(loss, theta, val_batch)
        nu += 0.1 * sum(((g_val[k] - g_train[k]) * 0.5 * (g_hat[k] - g[k])).sum().item() for k in g)
    task.run(opt, learned=True)
    assert opt.rho.item() == pytest.approx(math.exp(nu), rel=1e-10) and abs(nu - math.log(0.02)) > 1e-4


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_scheduled_radii_go_from_start_to_end_and_stay(backend, kind):
    toy = Toy()
    radius = getattr(lk.ScheduledRadius, kind)(0.4, 0.1, 4)
    opt = lk.SAM(toy.params, torch.optim.SGD, radius, backend=backend.name, lr=0.1)
    found = []
    for i in range(6):
        toy.two_steps(opt, toy.grads(2 * i), toy.grads(2 * i + 1))
        found.append(opt.rho.item())
    part = {"linear": lambda t: t / 4, "cosine": lambda t: (1 - math.cos(math.pi * t / 4)) / 2}[kind]
    assert found == pytest.approx([0.4 - 0.3 * part(min(t, 4)) for t in range(6)], rel=1e-14)


def test_a_constant_radius_may_be_changed_in_its_group_at_any_time(backend):
    """As users of the common SAM do: param_groups[0]["rho"] = ..."""
    ends = []
    for rho in (0.1, 0.7):
        toy = Toy()
        opt = lk.SAM(toy.params, torch.optim.SGD, rho=rho, backend=backend.name, lr=0.1)
        opt.param_groups[0]["rho"] = 0.7
        toy.steps(opt, 2)
        ends.append(snapshot(opt))
    assert same_bits(*ends)


def test_the_presets_are_the_parts_they_say(backend):
    """LETSSAM(...) is SAM(rho=LearnedRadius(...)), LETSASAM(...) is filter-wise ASAM with one; to the bit."""
    pairs = [
        (lambda p, **k: lk.LETSSAM(p, torch.optim.SGD, 0.1, **k),
         lambda p, **k: lk.SAM(p, torch.optim.SGD, lk.LearnedRadius(0.1), **k)),
        (lambda p, **k: lk.LETSASAM(p, torch.optim.SGD, 0.3, 0.02, **k),
         lambda p, **k: lk.ASAM(p, torch.optim.SGD, lk.LearnedRadius(0.3), 0.02, filterwise=True, **k)),
        (lambda p, **k: lk.ASAM(p, torch.optim.SGD, 0.3, 0.02, **k),
         lambda p, **k: lk.SAM(p, torch.optim.SGD, 0.3, direction=lk.Adaptive(0.02), **k)),
        (lambda p, **k: lk.SAM(p, torch.optim.SGD, 0.3, adaptive=True, **k),
         lambda p, **k: lk.ASAM(p, torch.optim.SGD, 0.3, 0.0, **k)),
    ]  # fmt: skip
    for pair in pairs:
        ends = []
        for make in pair:
            task = Task(torch.float32, steps=3)
            opt = make(task.net.parameters(), backend=backend.name, lr=0.1, momentum=0.9)
            task.run(opt, learned=opt.radius.learns)
            ends.append(snapshot(opt))
        assert same_bits(*ends)


def test_the_defaults_are_the_papers(backend):
    params = lambda: [torch.nn.Parameter(torch.ones(3))]  # noqa: E731
    make = {"base_optimizer": torch.optim.SGD, "lr": 0.1, "backend": backend.name}
    assert lk.SAM(params(), **make).rho.item() == pytest.approx(0.05)
    asam = lk.ASAM(params(), **make)
    assert (asam.rho.item(), asam.param_groups[0]["xi"]) == (0.5, 0.01)
    assert lk.LETSSAM(params(), **make).rho.item() == pytest.approx(0.05)
    lets = lk.LETSASAM(params(), **make)
    assert lets.rho.item() == pytest.approx(0.5) and type(lets.radius.optimizer) is torch.optim.Adam
    assert lets.radius.optimizer.param_groups[0]["lr"] == 0.01
    assert weights(params()) and lk.Gradient().p == 2.0


@pytest.mark.parametrize(("p", "norm"), [(2.0, 5.0), (3.0, (3**1.5 + 4**1.5) ** (1 / 1.5)), (math.inf, 7.0)])
def test_the_norm_in_the_metrics_is_the_dual_one(backend, p, norm):
    """‖g‖ in the q-norm, 1/p + 1/q = 1 (Foret et al., Eq. 2), of g = (3, −4)."""
    theta = torch.nn.Parameter(torch.zeros(2))
    opt = lk.SAM([theta], torch.optim.SGD, rho=0.1, direction=lk.Gradient(p), lr=0.1, backend=backend.name)
    theta.grad = torch.tensor([3.0, -4.0])
    opt.first_step()
    opt.second_step()
    # Powers of float32 numbers, 4 ulp each.
    assert opt.metrics()["grad_norm"].item() == pytest.approx(norm, rel=1e-6)
