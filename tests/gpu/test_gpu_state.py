"""State, faults and places on a GPU, by each backend; tests/support/accelerator.py tells how to try it without."""

import copy
import io
import math

import pytest
import torch

import lets_kernels as lk
from support.accelerator import (
    BACKENDS,
    DEVICE,
    DRY,
    loss_of,
    needs_gpu,
    plain_float32,  # noqa: F401
    sam,
    side_stream,
    steady_step,
    toy_on,
    without_waits,
)
from support.conv_net import Task
from support.core_methods import BASES
from support.given_gradients import Toy, snapshot, weights
from support.guard_bands import same_bits

pytestmark = [*needs_gpu, pytest.mark.parametrize("name", BACKENDS)]


def on_cpu(tensors):
    return [t.detach().cpu() for t in tensors]


@pytest.mark.parametrize("through", [None, "cpu"], ids=["same-device", "through-the-cpu"])
@pytest.mark.parametrize("learning", [None, {}, {"reuse_train_gradient": True}, {"amsgrad": True}], ids=str)
@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_training_resumes_to_the_bit(name, base, learning, through):
    def make(toy):
        return sam(toy, name, base=base, **({} if learning is None else {"rho": lk.LearnedRadius(0.1, **learning)}))

    toy, resumed = toy_on(), toy_on()
    opt, file = make(toy), io.BytesIO()
    loss, grads = loss_of(toy), [[toy.grads(4 * i + k) for k in range(4)] for i in range(4)]
    for i in range(2):
        steady_step(toy, opt, grads[i], loss)
    torch.save(opt.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        [q.copy_(p) for p, q in zip(toy.params, resumed.params, strict=True)]
    other = make(resumed)
    other.load_state_dict(torch.load(file, map_location=through, weights_only=False))
    for i in range(2, 4):
        steady_step(toy, opt, grads[i], loss)
        steady_step(resumed, other, grads[i], loss)
    assert same_bits(snapshot(opt), snapshot(other))
    assert same_bits(snapshot(copy.deepcopy(opt)), snapshot(opt))


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_an_exception_in_a_closure_restores_the_weights_to_the_bit(name, call):
    """In the first two calls nothing has happened; in the others the base optimizer has stepped, the radius has not."""
    task, other = (Task(torch.float32, steps=2, device=DEVICE) for _ in range(2))
    opts = [lk.LETSASAM(t.net.parameters(), torch.optim.SGD, backend=name, lr=0.1) for t in (task, other)]
    for t, opt in zip((task, other), opts, strict=True):
        t.run(opt, t.batches[:1], learned=True)
    (batch, val_batch), calls = task.batches[1], []

    def failing(inner):
        def run():
            calls.append(1)
            loss = inner()
            if len(calls) == call:
                raise KeyboardInterrupt
            return loss

        return run

    before, rho = weights(task), opts[0].rho.item()
    with pytest.raises(KeyboardInterrupt):
        opts[0].step(failing(task.closure(batch)), failing(task.closure(val_batch)))
    assert same_bits(weights(task), before) is (call <= 2)
    assert opts[0].rho.item() == rho
    task.run(opts[0], task.batches[:1], learned=True)
    assert all(bool(p.isfinite().all()) for p in task.net.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1], ids=["first-pass", "second-pass"])
@pytest.mark.parametrize("base", ["momentum", "adamw", "rmsprop"])
def test_gradients_that_are_not_finite_skip_the_step_on_the_device(name, base, which, bad):
    toy = toy_on()
    opt = sam(toy, name, base=base, rho=lk.LearnedRadius(0.1))
    grads, loss = [[toy.grads(4 * i + k) for k in range(4)] for i in range(4)], loss_of(toy)
    grads[2][which][3][1, 1] = bad
    for i in range(2):
        steady_step(toy, opt, grads[i], loss)
    before = snapshot(opt)
    with without_waits():
        steady_step(toy, opt, grads[2], loss)
    after = snapshot(opt)
    # RMSprop's step count lies on the host, where it counts on; its step does not read it.
    here = [i for i, t in enumerate(before) if t.device.type == DEVICE]
    assert len(before) - len(here) == (len(toy.params) if base == "rmsprop" and not DRY else 0)
    assert same_bits([after[i] for i in here], [before[i] for i in here])
    assert opt.metrics()["skipped_steps"].item() == 1
    steady_step(toy, opt, grads[3], loss)
    assert opt.metrics()["skipped_steps"].item() == 1 and all(bool(p.isfinite().all()) for p in toy.params)
    assert not same_bits(snapshot(opt), before)


@pytest.mark.parametrize("check_finite", [False, True])
def test_an_optimizer_that_steps_by_itself_takes_its_own_step(name, check_finite):
    """With the gate open, and without one: as RMSprop alone on the second gradients."""
    toy, alone = toy_on(), toy_on()
    opt = sam(toy, name, base="rmsprop", check_finite=check_finite)
    base, _, options, _ = BASES["rmsprop"]
    expected = base(alone.params, **options)
    toy.steps(opt, 3)
    for i in range(3):
        alone.set_grads(alone.grads(2 * i + 1))
        expected.step()
    assert not opt.fused and same_bits(weights(toy), weights(alone))


def test_a_learning_rate_on_the_device_leaves_the_step_to_the_base_optimizer(name):
    toy, alone = toy_on(), toy_on()
    lr = torch.full((), 0.01, device=DEVICE)
    options = {"lr": lr} if DRY else {"lr": lr, "capturable": True}
    opt = lk.SAM(toy.params, torch.optim.Adam, backend=name, **options)
    expected = torch.optim.Adam(alone.params, **options)
    toy.steps(opt, 3)
    for i in range(3):
        alone.set_grads(alone.grads(2 * i + 1))
        expected.step()
    if not DRY:  # on the CPU such a learning rate can simply be read
        assert not opt.fused and "lr is a tensor" in opt.fused_reason
        assert same_bits(weights(toy), weights(alone))


def test_a_side_stream_changes_nothing(name):
    ends = []
    for aside in (False, True):
        toy = toy_on()
        opt = sam(toy, name, rho=lk.LearnedRadius(0.1))
        loss, grads = loss_of(toy), [[toy.grads(4 * i + k) for k in range(4)] for i in range(3)]
        steady_step(toy, opt, grads[0], loss)
        if aside:
            with side_stream():
                steady_step(toy, opt, grads[1], loss)
        else:
            steady_step(toy, opt, grads[1], loss)
        steady_step(toy, opt, grads[2], loss)
        ends.append(snapshot(opt))
    assert same_bits(*ends)


@pytest.mark.parametrize("learned", [False, True])
def test_parameters_on_two_devices_take_one_step(name, learned):
    """As on the CPU alone, in float64: sums over two devices differ by their order. 1e-13 is 450 roundings of one."""
    other = "cpu" if DRY or torch.cuda.device_count() < 2 else "cuda:1"
    ends = []
    for places in ((DEVICE, other), ("cpu", "cpu"), (other, DEVICE)):
        toys = [toy_on(place, torch.float64, seed=seed) for seed, place in enumerate(places)]
        params = [p for toy in toys for p in toy.params]
        backend = "auto" if places != ("cpu", "cpu") else "reference"
        rho = lk.LearnedRadius(0.1) if learned else 0.5
        opt = lk.ASAM(params, torch.optim.SGD, rho, backend=backend, lr=0.1, momentum=0.9)
        loss = loss_of(toys[0])
        for i in range(3):
            both = [[g for toy in toys for g in toy.grads(4 * i + k)] for k in range(4)]
            pair = Pair(params, toys[0].device)
            steady_step(pair, opt, both, loss)
        ends.append(on_cpu(snapshot(opt)))
    for found, expected in zip(ends[0], ends[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    for found, expected in zip(ends[2], ends[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    bad = [[g for toy in toys for g in toy.grads(k)] for k in range(4)]
    bad[1][0][0, 0, 0, 0] = math.nan
    before = weights(params)
    steady_step(pair, opt, bad, loss)
    assert same_bits(weights(params), before) and opt.metrics()["skipped_steps"].item() == 1


class Pair:
    """Two toys' parameters, as one."""

    def __init__(self, params, device):
        self.params, self.device = params, device

    set_grads = Toy.set_grads


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_model_that_moves_after_the_optimizer_was_built_takes_everything_along(name, amsgrad):
    """Built on the CPU, moved, trained: as one that was built there."""
    ends = []
    for moves in (False, True):
        task = Task(torch.float32, steps=3, device="cpu" if moves else DEVICE)
        radius = lk.LearnedRadius(0.1, amsgrad=amsgrad)
        opt = lk.LETSASAM(task.net.parameters(), torch.optim.SGD, radius, lr=0.1, momentum=0.9)
        if moves:
            task.net.to(DEVICE)
            task.batches = Task(torch.float32, steps=3, device=DEVICE).batches
        task.run(opt, learned=True)
        assert opt.skipped.device.type == DEVICE and radius.nu[0].device.type == DEVICE
        ends.append([*weights(task), opt.rho])
    # The same arithmetic; should cuDNN choose another algorithm, some fifty roundings of float32 a step may differ.
    for found, expected in zip(*ends, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
