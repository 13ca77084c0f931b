"""Every method against a float64 transcription of its paper: ten steps on a conv net with batch norm."""

import math

import pytest
import torch

import lets_kernels as lk
from support import oracle
from support.conv_net import TRANSPOSED, Task
from support.core_methods import BASES, CURVATURES, METHODS, METRICS, NU, build
from support.nearness import assert_near, norm

# Both sides compute in float64 and differ by the order of their operations. Disturbing every weight of the start by
# 1e-13 of itself moves the end of the ten steps by 2e-12 at most (measured on the transcriptions, all methods and
# bases); rounding disturbs each step by about 5e-16, so 1e-13 in all. Ten times that is allowed.
TIGHT = 1e-12


def check_sam(backend, method, base_name, task):
    _, transcription, options, op = BASES[base_name]
    theta, base = task.weights(), transcription(**options)
    theta = oracle.sam(task.functional(), theta, task.batches, base, **METHODS[method][2])
    opt = build(method, task, base_name, backend.name)
    with backend.watch("grad_norm", "perturb_", op or "restore_"):
        task.run(opt)
    assert bool(opt.fused) is (op is not None)
    assert_near(task, opt, theta, base, TIGHT)
    rho = METHODS[method][2]["rho"]
    assert opt.rho.dtype == torch.float64
    assert opt.rho.item() == pytest.approx(rho(9) if callable(rho) else rho, rel=1e-15)


@pytest.mark.parametrize("base", ["momentum", "adamw"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_its_papers_ten_steps(backend, method, base):
    check_sam(backend, method, base, Task())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ["sam", "asam-filterwise"])
def test_every_base_optimizer_takes_its_own_ten_steps(backend, method, base):
    check_sam(backend, method, base, Task(seed=1))


PRESETS = {
    "lets-sam": (lk.LETSSAM, 0.1, {}, oracle.identity),
    "lets-asam": (lk.LETSASAM, 0.3, {"xi": 0.02}, oracle.filterwise(0.02, transposed=TRANSPOSED)),
    "lets-asam-elementwise": (lk.LETSASAM, 0.5, {"xi": 0.02, "filterwise": False}, oracle.elementwise(0.02)),
}


def check_lets(backend, preset, metric, curvature, nu="adam", base_name="momentum", task=None, **learning):
    task = task or Task()
    cls, rho, arguments, T = PRESETS[preset]
    kind, lr = CURVATURES[curvature]
    nu_class, nu_transcription, nu_options = NU[nu]
    optimizer, transcription, options, op = BASES[base_name]
    theta, base, nu_base = task.weights(), transcription(**options), nu_transcription(**nu_options(lr))
    oracle_options = {"reuse" if k == "reuse_train_gradient" else k: v for k, v in learning.items()}
    theta, radii = oracle.lets(
        *(task.functional(), theta, task.batches, base, rho, nu_base, metric), **kind, T=T, **oracle_options
    )

    radius = lk.LearnedRadius(rho, metric=metric, **kind, optimizer=nu_class, **nu_options(lr), **learning)
    opt = cls(task.net.parameters(), optimizer, radius, **arguments, **options, model=task.net, backend=backend.name)
    found = []
    rho_grad = "rho_grad_secant" if curvature == "secant" else "rho_grad_diagonal"
    with backend.watch("grad_norm", "perturb_", op or "restore_", rho_grad):
        for batch, val_batch in task.batches:
            opt.step(task.closure(batch), task.closure(val_batch))
            found.append(opt.rho.item())
    assert_near(task, opt, theta, base, TIGHT)
    moved = [math.log(r / rho) for r in radii]
    assert max(map(abs, moved)) > 1e-3, "the radius did not move: nothing was tested"
    assert [math.log(r / rho) for r in found] == pytest.approx(moved, rel=1e-8, abs=1e-11)


@pytest.mark.parametrize("nu", NU)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("preset", ["lets-sam", "lets-asam"])
def test_lets_takes_its_papers_ten_steps(backend, preset, curvature, metric, nu):
    check_lets(backend, preset, metric, curvature, nu)


@pytest.mark.parametrize("base", ["adamw", "rmsprop", "dampening"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_lets_with_other_base_optimizers(backend, curvature, base):
    check_lets(backend, "lets-asam-elementwise", "squared_gap", curvature, base_name=base)


@pytest.mark.parametrize("learning", [{"interval": 3}, {"reuse_train_gradient": True}], ids=str)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_cost_levers_of_lets(backend, preset, curvature, learning):
    check_lets(backend, preset, "squared_gap", curvature, **learning)


@pytest.mark.parametrize("metric", ["squared_gap", "gap"])
def test_interval_and_reuse_together(backend, metric):
    """In steps 4, 7 and 10 the radius learns from steps 3, 6 and 9."""
    check_lets(backend, "lets-sam", metric, "secant", interval=3, reuse_train_gradient=True)


@pytest.mark.parametrize("direction", [lk.Gradient(p=1.5), lk.Gradient(p=math.inf)], ids=["p1.5", "p-inf"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_lets_works_with_every_direction(backend, curvature, direction):
    task, p, rho = Task(), direction.p, 0.02
    kind, _ = CURVATURES[curvature]
    theta, base = task.weights(), oracle.SGD(lr=0.1)
    nu_base = oracle.Adam(lr=0.05)
    theta, radii = oracle.lets(task.functional(), theta, task.batches, base, rho, nu_base, "squared_gap", **kind, p=p)
    radius = lk.LearnedRadius(rho, **kind, lr=0.05)
    opt = lk.SAM(task.net.parameters(), torch.optim.SGD, radius, direction=direction, backend=backend.name, lr=0.1)
    task.run(opt, learned=True)
    assert_near(task, opt, theta, base, TIGHT)
    assert opt.rho.item() == pytest.approx(radii[-1].item(), rel=1e-9)


@pytest.mark.parametrize("method", ["sam", "sam-p1.5", "asam-filterwise"])
@pytest.mark.parametrize("base", ["momentum", "adamw", "rmsprop"])
def test_float32_stays_within_its_own_rounding(backend, method, base):
    """The transcription, run in float32, strays from its float64 self by the rounding errors of ten such steps. The
    kernels compute in float32 too, with sums in float64: they may stray eight times as far, and no further."""
    _, transcription, options, _ = BASES[base]
    ends = []
    for dtype in (torch.float64, torch.float32):
        task = Task(dtype)
        own = transcription(**options)
        start = {k: v.to(torch.float32).to(dtype) for k, v in Task(torch.float32).weights().items()}
        if dtype == torch.float64:
            batches = [[(x.float().double(), y) for x, y in pair] for pair in task.batches]
        else:
            batches = task.batches
        ends.append(oracle.sam(task.functional(), start, batches, own, **METHODS[method][2]))
    exact, rounded = ends
    allowed = 8 * norm([rounded[k].double() - exact[k] for k in exact])
    task = Task(torch.float32)
    opt = build(method, task, base, backend.name)
    task.run(opt)
    strayed = norm([p.detach().double() - exact[k] for k, p in task.net.named_parameters()])
    assert 0 < strayed <= allowed, f"off by {strayed:.3g}, allowed {allowed:.3g}"
