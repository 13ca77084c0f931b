"""LR schedulers on the wrapper, on its base, on the optimizer of nu: read at every step, and no warning."""

import functools
import types
import warnings
from pathlib import Path

import pytest
import torch

import lets_kernels as lk
from support import family
from support.conv_net import Task
from support.core_methods import BASES
from support.family import ONE_EACH
from support.given_gradients import Toy, snapshot, weights
from support.guard_bands import same_bits

SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=8),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 2), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)],
        [2],
    ),
}


@pytest.mark.parametrize("of", ["wrapper", "base"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("base", ["momentum", "adamw", "rmsprop"])
def test_a_scheduler_on_the_wrapper_or_on_its_base_drives_the_step(backend, base, scheduler, of):
    """The same as writing the same numbers into the groups by hand; and no warning about the order of calls."""
    cls, _, options, op = BASES[base]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy = Toy()
        opt = lk.SAM(toy.params, cls, rho=0.3, backend=backend.name, **options)
        drive = SCHEDULERS[scheduler](opt if of == "wrapper" else opt.base_optimizer)
        by_hand = Toy()
        other = lk.SAM(by_hand.params, cls, rho=0.3, backend=backend.name, **options)
        seen = set()
        for i in range(6):
            for key in ("lr", "momentum", "betas"):
                if key in opt.param_groups[0]:
                    other.param_groups[0][key] = opt.param_groups[0][key]
            seen.add(opt.param_groups[0]["lr"])
            toy.steps(opt, 1, start=i)
            by_hand.steps(other, 1, start=i)
            drive.step()
    assert len(seen) >= 3 and opt.fused is (op is not None)
    assert same_bits(snapshot(opt), snapshot(other))


@pytest.mark.parametrize("shape", family.SHAPES)
@pytest.mark.parametrize("name", ONE_EACH)
def test_a_scheduler_drives_every_method(name, shape):
    """As the same numbers written by hand, and without a warning."""
    ends = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for by_hand in (False, True):
            task = Task(torch.float32, steps=4)
            opt = family.build(name, task)
            lr = opt.param_groups[0]["lr"]
            drive = None if by_hand else SCHEDULERS["lambda"](opt)
            for step, (batch, _) in enumerate(task.batches):
                family.take(opt, task.net, batch, shape)
                if by_hand:
                    opt.param_groups[0]["lr"] = lr / (2 + step)
                else:
                    drive.step()
            ends.append(family.held(opt))
    family.assert_same(*ends)


def test_a_scheduler_works_with_every_call_shape(backend):
    """torch warns where a scheduler steps before its optimizer; none of the shapes may look like that."""
    for shape in ("closure", "two-steps", "context"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            task = Task(torch.float32, steps=1)
            opt = lk.SAM(task.net.parameters(), torch.optim.SGD, backend=backend.name, lr=0.1)
            drive = torch.optim.lr_scheduler.StepLR(opt, 1, 0.1)
            closure = task.closure(task.batches[0][0])
            if shape == "closure":
                opt.step(closure)
            elif shape == "two-steps":
                closure()
                opt.first_step()
                closure()
                opt.second_step()
            else:
                closure()
                with opt.perturbed():
                    closure()
                opt.step()
            drive.step()
        assert opt.param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_scheduler_on_the_optimizer_of_nu(backend):
    """Under SGD with lr 0 from the second step on, rho moves once and never again."""
    task = Task(torch.float32, steps=4)
    radius = lk.LearnedRadius(0.1, curvature="secant", optimizer=torch.optim.SGD, lr=1.0)
    opt = lk.LETSSAM(task.net.parameters(), torch.optim.SGD, radius, backend=backend.name, lr=0.1)
    assert opt.radius is radius
    drive = torch.optim.lr_scheduler.LambdaLR(radius.optimizer, lambda t: float(t == 0))
    seen = [opt.rho.item()]
    for pair in task.batches:
        task.run(opt, [pair], learned=True)
        drive.step()
        seen.append(opt.rho.item())
    assert seen[0] != seen[1] and len(set(seen[1:])) == 1


def test_a_tensor_learning_rate_is_read_at_every_step(backend):
    """Some schedulers fill a tensor in place; a cached float of it would go stale."""
    ends = []
    for tensor in (False, True):
        toy = Toy()
        lr = torch.tensor(0.1) if tensor else 0.1
        opt = lk.SAM(toy.params, torch.optim.SGD, rho=0.3, backend=backend.name, lr=lr, foreach=False)
        toy.steps(opt, 1)
        if tensor:
            lr.fill_(0.5)
        else:
            opt.param_groups[0]["lr"] = 0.5
        toy.steps(opt, 1, start=1)
        ends.append(weights(toy))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # 0.1 in float32 and in float64


PATCHED = {
    "on the instance": lambda base, step: base.__dict__.__setitem__("step", types.MethodType(step, base)),
    "on the instance, in torch's clothes": lambda base, step: base.__dict__.__setitem__(
        "step", types.MethodType(functools.wraps(type(base).step)(step), base)
    ),
    "on the class": lambda base, step: setattr(type(base), "step", step),
    "on the class, in torch's clothes": lambda base, step: setattr(
        type(base), "step", functools.wraps(type(base).step)(step)
    ),
}


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("patch", PATCHED)
def test_a_step_that_was_replaced_is_the_one_that_runs(monkeypatch, patch, scheduled):
    """Whether or not a scheduler has wrapped it since, and whatever attributes it has copied."""
    theta = torch.nn.Parameter(torch.ones(4))
    base = torch.optim.SGD([theta], lr=0.1)
    monkeypatch.setattr(torch.optim.SGD, "step", torch.optim.SGD.step)  # put back, whatever the patch does
    ran, original = [], torch.optim.SGD.step

    def step(self, closure=None):
        ran.append(1)
        return original(self, closure)

    PATCHED[patch](base, step)
    opt = lk.SAM([theta], base, rho=0.5)
    assert opt.base_optimizer is base
    if scheduled:
        torch.optim.lr_scheduler.StepLR(base, 1)
    for _ in range(3):
        for half in (opt.first_step, opt.second_step):
            theta.grad = torch.ones(4)
            half()
    assert len(ran) == 3
    assert not opt.fused and opt.fused_reason == "the base optimizer's step was replaced"
    assert torch.allclose(theta, torch.full((4,), 0.7))


def test_a_package_whose_name_begins_as_torchs_is_not_torch():
    theta = torch.nn.Parameter(torch.ones(4))
    base, scope = torch.optim.SGD([theta], lr=0.1), {}
    code = compile("def step(self, closure=None): self.ran = True", f"{Path(torch.__file__).parent}_ema/x.py", "exec")
    exec(code, scope)
    base.step = types.MethodType(scope["step"], base)
    opt = lk.SAM([theta], base, rho=0.5)
    for half in (opt.first_step, opt.second_step):
        theta.grad = torch.ones(4)
        half()
    assert base.ran and not opt.fused
