"""Whole steps on a GPU, by each of its backends. tests/support/accelerator.py tells how to try it without one."""

import math

import pytest
import torch

import lets_kernels as lk
from support import oracle
from support.accelerator import (
    BACKENDS,
    DEVICE,
    DRY,
    loss_of,
    needs_gpu,
    plain_float32,  # noqa: F401
    sam,
    steady_step,
    toy_on,
    without_waits,
)
from support.conv_net import TRANSPOSED, Task
from support.core_methods import BASES, CURVATURES, METHODS, METRICS, build
from support.given_gradients import snapshot, weights
from support.guard_bands import arithmetic, same_bits, storage

pytestmark = [*needs_gpu, pytest.mark.parametrize("name", BACKENDS)]

# As in test_methods.py: both sides compute in float64 and differ by the order of their operations, which moves the end
# of ten steps by 2e-12 at most per 1e-13 of disturbance; a device that sums in another order disturbs no more.
TIGHT = 1e-12


def norm(tensors):
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors))


# ---- the results


@pytest.mark.parametrize("base", ["momentum", "adamw", "rmsprop"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_its_papers_ten_steps(name, method, base):
    exact, task = Task(), Task(device=DEVICE)
    _, transcription, options, op = BASES[base]
    theta, own = exact.weights(), transcription(**options)
    theta = oracle.sam(exact.functional(), theta, exact.batches, own, **METHODS[method][2])
    opt = build(method, task, base, name)
    task.run(opt)
    assert opt.backend == name and bool(opt.fused) is (op is not None)
    for key, p in task.net.named_parameters():
        pairs = {"weights": (p, theta[key])}
        pairs |= {k: (opt.base_optimizer.state[p][k], value) for k, value in own.state(key).items()}
        for what, (found, expected) in pairs.items():
            off = norm([found.detach().cpu().double() - expected.double()])
            assert off <= TIGHT, f"{what} of {key}: off by {off:.3g}"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("preset", ["sam", "asam"])
def test_lets_takes_its_papers_ten_steps(name, preset, curvature, metric):
    exact, task = Task(), Task(device=DEVICE)
    kind, _ = CURVATURES[curvature]
    T = oracle.filterwise(0.02, transposed=TRANSPOSED) if preset == "asam" else oracle.identity
    theta, nu, loss = exact.weights(), oracle.Adam(lr=0.05), exact.functional()
    base = oracle.SGD(lr=0.1, momentum=0.9)
    theta, radii = oracle.lets(loss, theta, exact.batches, base, 0.1, nu, metric, **kind, T=T)
    radius = lk.LearnedRadius(0.1, metric=metric, **kind, lr=0.05)
    options = {"backend": name, "model": task.net, "lr": 0.1, "momentum": 0.9}
    cls, scaling = (lk.LETSASAM, {"xi": 0.02}) if preset == "asam" else (lk.LETSSAM, {})
    opt = cls(task.net.parameters(), torch.optim.SGD, radius, **scaling, **options)
    task.run(opt, learned=True)
    assert norm([p.detach().cpu() - theta[k] for k, p in task.net.named_parameters()]) <= TIGHT
    moved = math.log(radii[-1] / 0.1)
    assert abs(moved) > 1e-3, "the radius did not move: nothing was tested"
    assert math.log(opt.rho.item() / 0.1) == pytest.approx(moved, rel=1e-8, abs=1e-11)
    assert radius.nu[0].device.type == DEVICE and opt.metrics()["rho_grad"].device.type == DEVICE


@pytest.mark.parametrize("base", ["momentum", "adamw", "rmsprop"])
def test_float32_stays_within_its_own_rounding(name, base):
    """Eight times as far as the transcription strays when it is run in float32: see test_methods.py."""
    _, transcription, options, _ = BASES[base]
    start = {k: v.double() for k, v in Task(torch.float32).weights().items()}
    ends = []
    for dtype in (torch.float64, torch.float32):
        exact = Task(torch.float32)
        batches = [[(x.to(dtype), y) for x, y in pair] for pair in exact.batches]
        exact.net.to(dtype)
        theta = {k: v.to(dtype) for k, v in start.items()}
        ends.append(oracle.sam(exact.functional(), theta, batches, transcription(**options), **METHODS["asam"][2]))
    allowed = 8 * norm([ends[1][k].double() - ends[0][k] for k in ends[0]])
    task = Task(torch.float32, device=DEVICE)
    task.run(build("asam", task, base, name))
    strayed = norm([p.detach().cpu().double() - ends[0][k] for k, p in task.net.named_parameters()])
    assert 0 < strayed <= allowed, f"off by {strayed:.3g}, allowed {allowed:.3g}"


def test_two_groups_of_two_dtypes_are_perturbed_with_one_norm(name):
    """Against the reference on the CPU in float64, on the same values. The bound: ten roundings in the arithmetic type
    (T, its square, the root, their products, the sum) of epsilon and the weight, and the rounding to its dtype."""
    plain, half = toy_on(), toy_on(dtype=torch.bfloat16, seed=1)
    toys = (plain, half)
    exact = [torch.nn.Parameter(p.detach().cpu().double()) for t in toys for p in t.params]
    count = len(plain.params)
    opt = lk.ASAM(
        [{"params": [*plain.params[:2], *half.params], "rho": 0.3}, {"params": plain.params[2:], "xi": 0.1}],
        torch.optim.SGD, rho=2.0, backend=name, lr=0.1,
    )  # fmt: skip
    expected = lk.ASAM(
        [{"params": [*exact[:2], *exact[count:]], "rho": 0.3}, {"params": exact[2:count], "xi": 0.1}],
        torch.optim.SGD, rho=2.0, backend="reference", lr=0.1,
    )  # fmt: skip
    for toy in toys:
        toy.set_grads(toy.grads(0))
    found = [p for t in toys for p in t.params]
    for p, q in zip(found, exact, strict=True):
        q.grad = p.grad.cpu().double()
    before, start = weights(found), weights(exact)
    with opt.perturbed(), expected.perturbed():
        for p, q, theta in zip(found, exact, start, strict=True):
            q = q.detach()
            bound = 10 * arithmetic(p.dtype) * ((q - theta).abs() + theta.abs()) + storage(p.dtype, q)
            assert bool(((p.detach().cpu().double() - q).abs() <= bound).all())
            assert p.numel() == 0 or bool((q != theta).any())
    assert same_bits(weights(found), before)
    assert opt.metrics()["rho"].tolist() == [0.3, 2.0]


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_flattened_parameters_give_the_same_bits(name, base):
    ends = []
    for flatten in (False, True):
        toy = toy_on()
        opt = sam(toy, name, base=base, flatten=flatten)
        toy.steps(opt, 3)
        ends.append(snapshot(opt))
    assert same_bits(*ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_rho_of_zero_is_the_base_optimizer_and_lr_of_zero_moves_nothing(name, base, dtype):
    toy, at_zero = toy_on(dtype=dtype), toy_on(dtype=dtype)
    opt, still = sam(toy, name, base=base, rho=0.0), sam(at_zero, name, base=base)
    still.param_groups[0]["lr"] = 0.0
    before = weights(toy)
    toy.set_grads(toy.grads(0))
    with opt.perturbed():
        assert same_bits(weights(toy), before)
    at_zero.steps(still, 3)
    assert same_bits(weights(at_zero), before)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("base", ["momentum", "adamw", "rmsprop"])
def test_ten_runs_give_the_same_bits(name, base, learned):
    ends = []
    for _ in range(10):
        toy = toy_on()
        rho = {"rho": lk.LearnedRadius(0.1)} if learned else {}
        opt = sam(toy, name, base=base, **rho)
        for i in range(3):
            steady_step(toy, opt, [toy.grads(4 * i + k) for k in range(4)], loss_of(toy))
        ends.append(snapshot(opt))
    assert all(same_bits(ends[0], end) for end in ends[1:])


# ---- nothing waits


STEADY = {
    "sam": (lk.SAM, {}),
    "sam-p3": (lk.SAM, {"direction": lk.Gradient(p=3.0)}),
    "asam": (lk.ASAM, {}),
    "asam-filterwise": (lk.ASAM, {"filterwise": True}),
    "flattened": (lk.ASAM, {"flatten": True}),
    "scheduled": (lk.SAM, {"rho": lambda: lk.ScheduledRadius.linear(0.5, 0.1, 20)}),
    "rho-on-the-device": (lk.SAM, {}),
    "lets-diagonal": (lk.LETSASAM, {"rho": lambda: lk.LearnedRadius(0.1)}),
    "lets-algorithm1": (lk.LETSASAM, {"rho": lambda: lk.LearnedRadius(0.1, direction="algorithm1")}),
    "lets-secant": (lk.LETSSAM, {"rho": lambda: lk.LearnedRadius(0.1, curvature="secant")}),
    "lets-sgd": (lk.LETSSAM, {"rho": lambda: lk.LearnedRadius(0.1, optimizer=torch.optim.SGD)}),
    "lets-rmsprop": (lk.LETSSAM, {"rho": lambda: lk.LearnedRadius(0.1, optimizer=torch.optim.RMSprop)}),
    "lets-amsgrad": (lk.LETSSAM, {"rho": lambda: lk.LearnedRadius(0.1, amsgrad=True)}),
    "lets-interval": (lk.LETSSAM, {"rho": lambda: lk.LearnedRadius(0.1, interval=2)}),
    "lets-reuse": (lk.LETSSAM, {"rho": lambda: lk.LearnedRadius(0.1, reuse_train_gradient=True)}),
}


@pytest.mark.parametrize("base", ["momentum", "adamw", "rmsprop"])
@pytest.mark.parametrize("method", STEADY)
def test_a_step_waits_for_nothing(name, method, base):
    toy, (cls, options) = toy_on(), STEADY[method]
    opt = sam(toy, name, cls, base, **{k: v() if callable(v) else v for k, v in options.items()})
    if method == "rho-on-the-device":
        opt.param_groups[0]["rho"] = torch.full((), 0.5, dtype=torch.float64, device=DEVICE)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    grads, loss = [[toy.grads(4 * i + k) for k in range(4)] for i in range(6)], loss_of(toy)
    for i in range(3):
        steady_step(toy, opt, grads[i], loss)
        scheduler.step()
    before = weights(toy)
    with without_waits():
        for i in range(3, 6):
            steady_step(toy, opt, grads[i], loss)
            scheduler.step()
        toy.set_grads(grads[0][0])
        with opt.perturbed(loss=loss):
            toy.set_grads(grads[0][1])
        opt.step()
    assert not same_bits(weights(toy), before) and opt.metrics()["skipped_steps"].item() == 0


@pytest.mark.skipif(DRY, reason="there is nothing to wait for on the CPU")
def test_the_guard_itself_raises(name):
    with pytest.raises(RuntimeError), without_waits():
        torch.zeros((), device=DEVICE).item()
