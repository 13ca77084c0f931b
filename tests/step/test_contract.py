"""The optimizer contract: call shapes, base optimizers, groups, rho = 0, lr = 0, what a user may read."""

import math

import pytest
import torch

import lets_kernels as lk
from support import oracle
from support.conv_net import Task
from support.core_methods import BASES, METHODS, build
from support.given_gradients import Toy, snapshot, weights
from support.guard_bands import DTYPES, same_bits, unit_roundoff

LETS = {
    "none": None,
    "secant": {"curvature": "secant"},
    "diagonal": {"curvature": "diagonal", "metric": "gap"},
    "algorithm1": {"curvature": "diagonal", "direction": "algorithm1", "metric": "validation_loss"},
    "every-second": {"curvature": "secant", "interval": 2},
}


def closures(task, batch, val_batch, learned):
    return (task.closure(batch), task.closure(val_batch)) if learned else (task.closure(batch),)


def by_closure(opt, task, batch, val_batch, learned):
    opt.step(*closures(task, batch, val_batch, learned))


def by_old_closure(opt, task, batch, val_batch, learned):
    """The first backward is the caller's, and the closure (which need not zero) does the second."""
    task.loss(batch).backward()

    def run():
        loss = task.loss(batch)
        loss.backward()
        return loss

    opt.step(*((run, task.closure(val_batch)) if learned else (run,)))
    opt.zero_grad()


def by_two_steps(opt, task, batch, val_batch, learned, in_place=False):
    opt.zero_grad()
    task.loss(batch).backward()
    opt.first_step(zero_grad=not in_place)
    if in_place:
        opt.zero_grad(set_to_none=False)
    task.loss(batch).backward()
    opt.second_step()
    if learned:
        opt.radius_step(*closures(task, batch, val_batch, learned))


def by_two_steps_zeroing_in_place(*args):
    by_two_steps(*args, in_place=True)


def by_context(opt, task, batch, val_batch, learned):
    opt.zero_grad()
    task.loss(batch).backward()
    with opt.perturbed():
        opt.zero_grad()
        task.loss(batch).backward()
    opt.step()
    if learned:
        opt.radius_step(*closures(task, batch, val_batch, learned))


OTHER_SHAPES = (by_old_closure, by_two_steps, by_two_steps_zeroing_in_place, by_context)


@pytest.mark.parametrize("shape", OTHER_SHAPES)
@pytest.mark.parametrize("learning", LETS)
@pytest.mark.parametrize("base", ["momentum", "adamw", "rmsprop"])
def test_the_call_shapes_are_the_same_to_the_bit(backend, base, learning, shape):
    ends = []
    for take in (by_closure, shape):
        task = Task(torch.float32, steps=4)
        options = {} if LETS[learning] is None else {"rho": lk.LearnedRadius(0.1, **LETS[learning])}
        opt = build("asam-filterwise", task, base, backend.name, **options)
        for batch, val_batch in task.batches:
            take(opt, task, batch, val_batch, LETS[learning] is not None)
        ends.append(snapshot(opt))
    assert same_bits(*ends)


def test_the_closure_is_called_once_for_each_gradient_and_the_first_loss_comes_back(backend):
    """Two gradients for SAM; ḡ_tr and ḡ_vl beside them for LETS, ḡ_tr only where the metric holds it, and on no step
    that the radius does not learn from. Torch's convention holds from step to step, with gradients left in place."""
    cases = [
        (None, 2, 0),
        ({}, 3, 1),
        ({"metric": "validation_loss"}, 2, 1),
        ({"metric": "gap", "reuse_train_gradient": True}, 2, 1),
    ]
    for options, train_calls, val_calls in cases:
        task = Task(torch.float32, steps=3)
        radius = 0.1 if options is None else lk.LearnedRadius(0.1, **options)
        opt = lk.SAM(task.net.parameters(), torch.optim.SGD, radius, backend=backend.name, lr=0.1)
        for batch, val_batch in task.batches:
            train, val = [], []
            expected = task.loss(batch).item()
            arguments = [task.closure(batch, calls=train)]
            if options is not None:
                arguments.append(task.closure(val_batch, calls=val))
            assert opt.step(*arguments).item() == expected
            assert (len(train), len(val)) == (train_calls, val_calls)


def test_the_gradient_left_behind_is_that_of_the_perturbed_weights(backend):
    """After a LETS step as after a SAM step: the closures at theta_{t+1} leave no trace in p.grad."""
    ends = []
    for radius in (0.1, lk.LearnedRadius(0.1)):
        task = Task(torch.float32, steps=1)
        opt = lk.SAM(task.net.parameters(), torch.optim.SGD, radius, backend=backend.name, lr=0.1)
        by_closure(opt, task, *task.batches[0], opt.radius.learns)
        ends.append([p.grad for p in task.net.parameters()])
    assert same_bits(*ends)


@pytest.mark.parametrize("base", ["momentum", "adamw", "rmsprop"])
def test_a_base_optimizer_may_be_a_class_or_an_instance(backend, base):
    cls, _, options, _ = BASES[base]
    ends = []
    for instance in (False, True):
        task = Task(torch.float32, steps=3)
        params = list(task.net.parameters())
        if instance:
            inner = cls(params, **options)
            opt = lk.SAM(params, inner, rho=0.1, backend=backend.name)
            assert opt.base_optimizer is inner
        else:
            opt = lk.SAM(params, cls, rho=0.1, backend=backend.name, **options)
            assert type(opt.base_optimizer) is cls
        assert isinstance(opt, torch.optim.Optimizer)
        assert opt.param_groups is opt.base_optimizer.param_groups and opt.state is opt.base_optimizer.state
        task.run(opt)
        ends.append(snapshot(opt))
    assert same_bits(*ends)


def test_groups_have_their_own_rho_adaptive_and_xi_under_one_norm(backend):
    """eps of group i is rho_i T_i^2 g / ||T g||, the norm over all groups: ten steps against the transcription."""
    task = Task()
    named = dict(task.net.named_parameters())
    names = list(named)
    settings = [
        (names[:2], {"rho": 0.3, "adaptive": True, "xi": 0.05}),
        (names[2:5], {"rho": 0.02, "adaptive": False}),
        (names[5:], {"rho": 0.1, "adaptive": True, "xi": 0.0, "lr": 0.05}),
    ]
    xi = {k: s.get("xi") if s["adaptive"] else None for keys, s in settings for k in keys}
    rho = {k: s["rho"] for keys, s in settings for k in keys}
    lr = {k: s.get("lr", 0.1) for keys, s in settings for k in keys}

    def T(theta):
        return {k: torch.ones_like(x) if xi[k] is None else x.abs() + xi[k] for k, x in theta.items()}

    loss, theta = task.functional(), task.weights()
    for batch, _ in task.batches:
        _, g = oracle.gradient(loss, theta, batch)
        eps = oracle.unit(g, T(theta))
        _, g_hat = oracle.gradient(loss, {k: theta[k] + rho[k] * eps[k] for k in theta}, batch)
        theta = {k: theta[k] - lr[k] * g_hat[k] for k in theta}
    groups = [{"params": [named[k] for k in keys], **s} for keys, s in settings]
    opt = lk.ASAM(groups, torch.optim.SGD, backend=backend.name, lr=0.1)
    task.run(opt)
    assert opt.rho.tolist() == [0.3, 0.02, 0.1]
    for k, p in named.items():
        torch.testing.assert_close(p.detach(), theta[k], rtol=0, atol=1e-12)


@pytest.mark.parametrize("names", ["model", "named_parameters", "dimensions"])
def test_how_a_bias_is_told_from_a_weight(backend, names):
    """By name, from model= or named parameters; without names, by having at most one dimension."""
    task = Task(steps=1)
    T = oracle.elementwise(0.02, scale_bias=False)
    if names == "dimensions":
        T = lambda theta: {k: x.abs() + 0.02 if x.ndim > 1 else torch.ones_like(x) for k, x in theta.items()}  # noqa: E731
    theta, (batch, _) = task.weights(), task.batches[0]
    _, g = oracle.gradient(task.functional(), theta, batch)
    eps = oracle.unit(g, T(theta))
    params = task.net.named_parameters() if names == "named_parameters" else task.net.parameters()
    model = task.net if names == "model" else None
    options = {"rho": 0.5, "xi": 0.02, "scale_bias": False, "model": model, "backend": backend.name}
    opt = lk.ASAM(params, torch.optim.SGD, **options, lr=0.1)
    task.loss(batch).backward()
    with opt.perturbed():
        for k, p in task.net.named_parameters():
            torch.testing.assert_close(p.detach(), theta[k] + 0.5 * eps[k], rtol=0, atol=1e-14)


def test_a_bias_is_whatever_is_not_called_a_weight(backend):
    """As the authors' code has it: a matrix called "gain" is not scaled, a vector called "weight" is."""
    named = [(name, torch.nn.Parameter(torch.randn(*shape))) for name, shape in (("gain", (3, 4)), ("a.weight", (5,)))]
    before = weights(p for _, p in named)
    opt = lk.ASAM(named, torch.optim.SGD, rho=1.0, xi=0.5, scale_bias=False, backend=backend.name, lr=0.1)
    for _, p in named:
        p.grad = torch.ones_like(p)
    T = [torch.ones(3, 4), before[1].abs() + 0.5]
    total = math.sqrt(sum(float((t**2).sum()) for t in T))
    with opt.perturbed():
        for (_, p), x, t in zip(named, before, T, strict=True):
            torch.testing.assert_close(p.detach(), x + t**2 / total, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("base", ["dampening", "rmsprop"])
def test_at_rho_zero_a_base_optimizer_that_steps_itself_gives_its_own_bits(backend, base):
    cls, _, options, _ = BASES[base]
    task, plain = Task(torch.float32), Task(torch.float32)
    opt = lk.SAM(task.net.parameters(), cls, rho=0.0, backend=backend.name, **options)
    inner = cls(plain.net.parameters(), **options)
    task.run(opt)
    for batch, _ in plain.batches:
        inner.step(plain.closure(batch))
    assert not opt.fused and same_bits(weights(task), weights(plain))
    for p, q in zip(task.net.parameters(), plain.net.parameters(), strict=True):
        assert all(
            same_bits(v, opt.base_optimizer.state[p][k]) for k, v in inner.state[q].items() if torch.is_tensor(v)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("base", ["sgd", "momentum", "nesterov", "adam", "adamw"])
def test_at_rho_zero_a_fused_step_is_the_base_optimizers_to_a_few_ulp(backend, base, dtype):
    """On given gradients, so that no network amplifies a rounding: each of the ten steps rounds the weight, and each of
    the update's eight operations, once: 10 (|theta| + 8 |updates|) u in all, at the largest weight and update seen."""
    cls, _, options, op = BASES[base]
    toy, plain = Toy(dtype), Toy(dtype)
    opt = lk.SAM(toy.params, cls, rho=0.0, backend=backend.name, **options)
    inner = cls(plain.params, **options)
    largest = [p.detach().abs() for p in plain.params]
    moved = [torch.zeros_like(p) for p in largest]
    with backend.watch(op):
        for i in range(10):
            toy.two_steps(opt, toy.grads(i), toy.grads(i))
            before = weights(plain)
            plain.set_grads(plain.grads(i))
            inner.step()
            largest = [torch.maximum(a, p.detach().abs()) for a, p in zip(largest, plain.params, strict=True)]
            steps = zip(moved, before, plain.params, strict=True)
            moved = [torch.maximum(m, (b - p.detach()).abs()) for m, b, p in steps]
    assert opt.fused
    for p, q, size, update in zip(toy.params, plain.params, largest, moved, strict=True):
        bound = 10 * unit_roundoff(dtype) * (size + 8 * update)
        assert bool(((p - q).detach().abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rho", [0.0, 0.05, 10.0])
def test_at_lr_zero_the_weights_keep_their_bits(backend, rho, base, dtype):
    cls, _, options, _ = BASES[base]
    toy = Toy(dtype)
    before = weights(toy)
    opt = lk.SAM(toy.params, cls, rho=rho, adaptive=True, backend=backend.name, **{**options, "lr": 0.0})
    toy.steps(opt, 3)
    assert same_bits(weights(toy), before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", ["momentum", "adamw", "rmsprop"])
def test_flattened_parameters_give_the_same_bits(backend, base, method):
    ends = []
    for flatten in (False, True):
        task = Task(torch.float32, steps=4)
        opt = build(method, task, base, backend.name, flatten=flatten)
        task.run(opt)
        ends.append(snapshot(opt))
    assert same_bits(*ends)


def test_parameters_of_several_dtypes_share_one_norm(backend):
    """Three buckets, one norm; each dtype's perturbation to its own rounding. A frozen parameter is left alone."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    params = [torch.nn.Parameter(torch.randn(40, dtype=torch.float64).to(d)) for d in dtypes]
    frozen = torch.nn.Parameter(torch.randn(3), requires_grad=False)
    before = weights([*params, frozen])
    for p in params:
        p.grad = torch.randn(40, dtype=torch.float64).to(p.dtype)
    opt = lk.SAM([*params, frozen], torch.optim.SGD, rho=2.0, backend=backend.name, lr=0.1)
    total = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in params))
    with opt.perturbed():
        for p, x in zip(params, before, strict=False):
            expected = x.double() + 2.0 * p.grad.double() / total
            bound = 8 * unit_roundoff(torch.float64 if p.dtype == torch.float64 else torch.float32)
            bound = (bound + unit_roundoff(p.dtype)) * expected.abs() + bound * x.double().abs()
            assert bool(((p.detach().double() - expected).abs() <= bound).all())
        assert same_bits(frozen.detach(), before[-1])
    assert same_bits(weights([*params, frozen]), before)


@pytest.mark.parametrize("p", [1.5, 3.0, math.inf])
def test_the_gradient_norm_that_is_reported_is_the_dual_one(backend, p):
    """‖Tg‖_q, 1/p + 1/q = 1: what the perturbation was divided by, each term good to some roundings to the power q."""
    toy = Toy()
    opt = lk.SAM(toy.params, torch.optim.SGD, direction=lk.Gradient(p), backend=backend.name, lr=0.1)
    toy.steps(opt, 1)
    q = 1.0 if p == math.inf else p / (p - 1)
    expected = sum(float((g.double().abs() ** q).sum()) for g in toy.grads(0)) ** (1 / q)
    assert opt.metrics()["grad_norm"].item() == pytest.approx(expected, rel=(3 * q + 4) * unit_roundoff(torch.float32))


def test_what_a_user_reads_is_tensors(backend):
    task = Task(torch.float32, steps=2)
    opt = lk.LETSSAM(task.net.parameters(), torch.optim.SGD, 0.1, backend=backend.name, lr=0.1)
    batch, val_batch = task.batches[0]
    theta = task.weights()
    loss, g = oracle.gradient(task.functional(), theta, batch)
    opt.step(task.closure(batch), task.closure(val_batch))
    metrics = opt.metrics()
    assert all(torch.is_tensor(v) for v in metrics.values()) and torch.is_tensor(opt.rho)
    assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["loss_gap"].item() == pytest.approx(metrics["perturbed_loss"].item() - metrics["loss"].item())
    assert metrics["loss_gap"].item() > 0  # uphill
    norm = math.sqrt(sum(float((x.double() ** 2).sum()) for x in g.values()))
    assert metrics["grad_norm"].item() == pytest.approx(norm, rel=1e-6)
    assert metrics["skipped_steps"].item() == 0 and metrics["rho"].item() == opt.rho.item()
    after = task.weights()
    assert metrics["train_loss"].item() == pytest.approx(task.functional()(after, batch).item(), rel=1e-6)
    assert metrics["val_loss"].item() == pytest.approx(task.functional()(after, val_batch).item(), rel=1e-6)
    assert {"rho_grad"} <= set(metrics)
    opt.rho.fill_(-1.0)  # a copy: nobody's radius changes by it
    assert opt.rho.item() > 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn, torch.bool])
def test_a_frozen_parameter_may_have_any_dtype(backend, dtype):
    """As torch's optimizers take it: quantised weights and buffers that are parameters."""
    frozen = torch.nn.Parameter(torch.ones(4).to(dtype), requires_grad=False)
    theta = torch.nn.Parameter(torch.ones(4))
    opt = lk.SAM([theta, frozen], torch.optim.SGD, rho=0.5, backend=backend.name, lr=0.1)
    for half in (opt.first_step, opt.second_step):
        theta.grad = torch.ones(4)
        half()
    assert torch.allclose(theta, torch.full((4,), 0.9))
    opt.load_state_dict(opt.state_dict())


def test_sparse_parameters_are_told_what_they_are():
    sparse = torch.nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match=r"layout torch.sparse_coo cannot be perturbed; make it dense"):
        lk.SAM([sparse], torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("what", ["rho", "metrics", "state_dict", "load_state_dict", "add_param_group"])
@pytest.mark.parametrize("radius", [0.5, "auto"])
def test_a_group_that_the_base_optimizer_was_given_is_taken_in_at_once(what, radius):
    thetas = [torch.nn.Parameter(torch.ones(4)) for _ in range(3)]
    opt = lk.SAM(thetas[:1], torch.optim.SGD, radius, lr=0.1)
    saved = lk.SAM([{"params": p} for p in thetas[:2]], torch.optim.SGD, radius, lr=0.1).state_dict()
    opt.base_optimizer.add_param_group({"params": thetas[1]})
    calls = {
        "rho": lambda: opt.rho,
        "metrics": opt.metrics,
        "state_dict": opt.state_dict,
        "load_state_dict": lambda: opt.load_state_dict(saved),
        "add_param_group": lambda: opt.add_param_group({"params": thetas[2]}),
    }
    calls[what]()
    rho = 0.005 if radius == "auto" else 0.5
    assert [float(group["rho"]) for group in opt.param_groups] == pytest.approx([rho] * len(opt.param_groups))


def test_looksam_by_tensor_with_everything_frozen(backend):
    theta = torch.nn.Parameter(torch.ones(4), requires_grad=False)
    opt = lk.LookSAM([theta], torch.optim.SGD, per_tensor=True, backend=backend.name, lr=0.1)
    for _ in range(6):
        opt.first_step()
        opt.second_step()
    assert bool((theta == 1).all())
