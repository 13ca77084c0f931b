"""step([closures]): every micro-batch is perturbed along its own gradient (m-sharpness, Foret et al. 2021, §4.1)."""

import math

import pytest
import torch

import lets_kernels as lk
from support import family, oracle
from support.conv_net import Task
from support.core_methods import BASES, METHODS, build
from support.family import ONE_EACH
from support.given_gradients import snapshot, weights
from support.guard_bands import same_bits

STEPS = 6


def micro(task, step):
    """The three micro-batches of one step."""
    return [*task.batches[step], task.batches[step + 1][0]]


def closures(task, step, **options):
    return [task.closure(batch, **options) for batch in micro(task, step)]


def m_sharpness(task, method, base):
    """θ ← base(θ, mean_i ∇L_i(θ + ε_i)), ε_i from ∇L_i(θ); the weights after it, and the norms and losses of a step."""
    options = {"T": oracle.identity, "p": 2.0, **METHODS[method][2]}
    loss, at = task.functional(), task.weights()
    for step in range(STEPS):
        here, hats, squares, losses = at, [], [], []
        for batch in micro(task, step):
            value, g = oracle.gradient(loss, here, batch)
            scaled = {k: options["T"](here)[k] * g[k] for k in g}
            eps = oracle.unit(g, options["T"](here), options["p"])
            perturbed, hat = oracle.gradient(loss, {k: here[k] + options["rho"] * eps[k] for k in here}, batch)
            hats.append(hat)
            squares.append(oracle.dot(scaled, scaled))
            losses.append((value, perturbed))
        at = base.step(here, {k: sum(hat[k] for hat in hats) / len(hats) for k in here})
    mean, perturbed_mean = (sum(each) / 3 for each in zip(*losses, strict=True))
    return at, {
        "grad_norm": (sum(squares) / 3).sqrt(),
        "loss": mean,
        "perturbed_loss": perturbed_mean,
        "loss_gap": perturbed_mean - mean,
    }


@pytest.mark.parametrize("base", ["momentum", "adam", "rmsprop"])
@pytest.mark.parametrize("method", ["sam", "asam", "asam-filterwise"])
def test_the_step_is_along_the_mean_of_gradients_at_perturbations_of_their_own(backend, method, base):
    """Against the float64 oracle to rounding: weights, metrics and losses; the last step is fused where it can be."""
    task = Task(torch.float64, steps=STEPS + 1, device=backend.device)
    _, transcription, options, fused = BASES[base]
    expected, figures = m_sharpness(task, method, transcription(**options))
    opt = build(method, task, base, backend.name)
    for step in range(STEPS):
        calls = []
        losses = opt.step(closures(task, step, calls=calls))
        assert [id(c) for c in calls] == [id(b) for b in micro(task, step) for _ in range(2)]
    assert opt.fused is (fused is not None)
    for name, value in task.weights().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
    assert len(losses) == 3
    torch.testing.assert_close(torch.stack(losses).mean().detach(), figures["loss"], rtol=1e-9, atol=0)
    for name, value in figures.items():
        torch.testing.assert_close(opt.metrics()[name], value, rtol=1e-7, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_it_is_not_the_step_of_the_whole_batch():
    """Several gradients of unit length are not the unit length of their mean."""
    ends = []
    for whole in (False, True):
        task = Task(torch.float64, steps=2)
        opt = build("sam", task)
        together = tuple(torch.cat(parts) for parts in zip(*micro(task, 0), strict=True))
        opt.step(task.closure(together) if whole else closures(task, 0))
        ends.append(torch.cat([w.flatten() for w in weights(task)]))
    assert (ends[0] - ends[1]).norm() > 1e-4


@pytest.mark.parametrize("base", ["momentum", "rmsprop"])
def test_a_list_of_one_closure_is_a_step_with_it(backend, base):
    ends = []
    for wrap in (lambda c: c, lambda c: [c], lambda c: (c,)):
        task = Task(torch.float32, steps=3, device=backend.device)
        opt = build("asam", task, base, backend.name)
        for batch, _ in task.batches:
            opt.step(wrap(task.closure(batch)))
        ends.append(snapshot(opt))
    assert same_bits(ends[0], ends[1])
    assert same_bits(ends[0], ends[2])


def spoiling(task, step, call, value):
    """Closures of which the call-th spoils one gradient."""
    calls = []

    def wrap(closure):
        def run():
            loss = closure()
            calls.append(1)
            if len(calls) == call:
                task.net[0].weight.grad.view(-1)[3] = value
            return loss

        return run

    return [wrap(c) for c in closures(task, step)]


@pytest.mark.parametrize("call", range(1, 7))
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("base", ["momentum", "rmsprop"])
def test_what_is_not_finite_in_one_micro_batch_skips_the_whole_step(backend, base, value, call):
    task = Task(torch.float32, steps=5, device=backend.device)
    opt = build("sam", task, base, backend.name)
    opt.step(closures(task, 0))
    before = snapshot(opt)
    opt.step(spoiling(task, 1, call, value))
    assert same_bits(before, snapshot(opt))
    assert int(opt.metrics()["skipped_steps"]) == 1
    opt.step(closures(task, 2))
    assert int(opt.metrics()["skipped_steps"]) == 1
    assert not same_bits(before, snapshot(opt))


class Stopping:
    """A closure that raises on its n-th call."""

    def __init__(self, closure, call):
        self.closure, self.left = closure, call

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt("stop")
        return self.closure()


@pytest.mark.parametrize("call", range(1, 7))
def test_an_exception_in_one_micro_batch_leaves_the_weights_and_a_usable_optimizer(call):
    ends = []
    for fails in (False, True):
        task = Task(torch.float32, steps=5)
        opt = build("asam", task)
        opt.step(closures(task, 0))
        if fails:
            before, statistics = snapshot(opt), [b.clone() for b in task.net.buffers()]
            failing = closures(task, 1)
            failing[(call - 1) // 2] = Stopping(failing[(call - 1) // 2], 2 - call % 2)
            with pytest.raises(KeyboardInterrupt, match="stop"):
                opt.step(failing)
            assert same_bits(snapshot(opt), before)
            for buffer, value in zip(task.net.buffers(), statistics, strict=True):
                buffer.copy_(value)
        opt.step(closures(task, 2))
        ends.append(snapshot(opt))
    assert same_bits(*ends)


def test_gradients_that_lie_around_and_gradients_that_are_missing():
    """Old gradients do not count, though no closure zeroes them; one that a micro-batch lacks is zero in the mean."""
    ends = []
    for careless in (False, True):
        pair = [torch.nn.Parameter(torch.tensor([1.0, -2.0])), torch.nn.Parameter(torch.tensor([0.5]))]
        opt = lk.SAM(pair, torch.optim.SGD, 0.1, lr=0.1, momentum=0.9)
        for p in pair if careless else ():
            p.grad = torch.full_like(p, 7.0)

        def run(uses, pair=pair, opt=opt, careless=careless):
            if not careless:
                opt.zero_grad()
            loss = pair[0].square().sum() + (pair[1].square().sum() * uses if uses or not careless else 0.0)
            loss.backward()
            return loss

        for _ in range(3):
            opt.step([lambda: run(0.0), lambda: run(1.0)])
        ends.append(weights(pair))
    assert same_bits(*ends)
    assert not torch.equal(ends[0][1], torch.tensor([0.5]))


def test_running_statistics_count_every_micro_batch_once():
    """The passes at θ, one a micro-batch; the first layer's depend on the batches and its weights, set apart here."""
    task = Task(torch.float64, steps=2)
    opt = build("sam", task)
    opt.step(closures(task, 0))
    counts = [m.num_batches_tracked.item() for m in task.net if isinstance(m, torch.nn.BatchNorm2d)]
    assert counts == [3, 3]
    other = Task(torch.float64, steps=2)
    for batch in micro(other, 0):
        other.net(batch[0])
    for found, expected in zip(task.net.buffers(), other.net.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_gradient_scaler_changes_no_bit():
    """A power of two; every pass is unscaled, and an overflow in one backs off."""
    ends = []
    for scale in (None, 2.0**10):
        task = Task(torch.float32, steps=4)
        opt = build("sam", task)
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)

        def closure(batch, task=task, scaler=scaler):
            def run():
                task.net.zero_grad()
                loss = task.loss(batch)
                (loss if scaler is None else scaler.scale(loss)).backward()
                return loss

            return run

        for step in range(3):
            opt.step([closure(b) for b in micro(task, step)], scaler=scaler)
            if scaler is not None:
                scaler.update()
        ends.append(snapshot(opt))
    assert same_bits(*ends)
    opt.step(spoiling(task, 0, 1, math.inf), scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert same_bits(snapshot(opt), ends[1])


def test_what_compares_two_gradients_of_one_step_is_refused():
    """Before a weight moves, with the way out."""
    task = Task(torch.float32, steps=2)
    opt = build("sam", task, rho=lk.LearnedRadius(0.1))
    before = snapshot(opt)
    with pytest.raises(ValueError, match="give step\\(\\) one closure, not a list"):
        opt.step(closures(task, 0), task.closure(task.batches[1][0]))
    with pytest.raises(ValueError, match="needs a validation closure"):
        opt.step(closures(task, 0))
    plain = build("sam", task)
    with pytest.raises(ValueError, match="no closures"):
        plain.step([])
    with pytest.raises(ValueError, match="for a learned radius"):
        plain.step(closures(task, 0), task.closure(task.batches[1][0]))
    assert same_bits(before, snapshot(opt))


#: Why the others have no step over micro-batches.
ALONE = {
    "looksam": "compares the two gradients",
    "aesam": "decides by the gradient of the whole batch",
    "aelooksam": "compares the two gradients",
    "gsam": "compares the two gradients",
    "rgsam": "compares the two gradients",
    "stable-sam": "compares the two gradients",
    "wsam": "compares the two gradients",
    "wsam-coupled": "compares the two gradients",
    "sampa": "compares the two gradients",
    "norm-penalty": "compares the two gradients",
    **dict.fromkeys(family.ONE_PASS, "perturbs all micro-batches alike"),
    **dict.fromkeys(family.SEVERAL, "takes several gradients before the last one"),
    "esam": "looks at the samples",
    "delta-sam": "looks at the samples",
    **dict.fromkeys(("friendly", "vasso", "sparse", "bsam", "lightsam"), "remembers one first gradient"),
}


@pytest.mark.parametrize("name", ALONE)
def test_methods_that_have_no_step_over_micro_batches_say_so(name):
    task = Task(torch.float32, steps=2)
    opt = family.build(name, task)
    before, calls = family.held(opt), []
    with pytest.raises(ValueError, match=rf"{ALONE[name]}.*one closure, not a list"):
        opt.step(closures(task, 0, calls=calls))
    assert not calls
    family.assert_same(before, family.held(opt))


@pytest.mark.parametrize("name", [name for name in ONE_EACH if name not in ALONE])
def test_the_other_methods_take_them(name):
    """One is a step with it; what is not finite in any skips the step; an exception in any leaves the weights."""
    ends = []
    for one in (False, True):
        task = Task(torch.float32, steps=4)
        opt = family.build(name, task, **family.ALWAYS.get(name, {}))
        for batch, _ in task.batches[:2]:
            opt.step([task.closure(batch)] if one else task.closure(batch))
        ends.append(family.held(opt))
    family.assert_same(*ends)
    before, here = snapshot(opt), weights(task)
    for call in (1, 4):
        opt.step(spoiling(task, 1, call, math.nan))
        assert same_bits(snapshot(opt), before) and same_bits(weights(task), here)
    for call in (3, 6):
        failing = closures(task, 1)
        failing[(call - 1) // 2] = Stopping(failing[(call - 1) // 2], 2 - call % 2)
        with pytest.raises(KeyboardInterrupt, match="stop"):
            opt.step(failing)
        assert same_bits(weights(task), here)
    opt.step(closures(task, 1))
    assert int(opt.metrics()["skipped_steps"]) == 2 and not same_bits(weights(task), here)


class Counting(lk.Schedule):
    """Perturbs at every second step, and counts how often it is asked."""

    asked = 0

    def perturbs(self, step):
        self.asked += 1
        return step % 2 == 1


def test_a_schedule_is_asked_once_a_step():
    theta = torch.nn.Parameter(torch.ones(3))
    schedule = Counting()
    opt = lk.SAM([theta], torch.optim.SGD, schedule=schedule, lr=0.1)

    def closure():
        opt.zero_grad()
        loss = theta.square().sum()
        loss.backward()
        return loss

    for count in (1, 2):
        opt.step([closure, closure, closure])
        assert schedule.asked == count


def test_the_norm_of_several_passes_is_their_power_mean():
    """In the norm that the perturbation's is dual to: for p = inf the sum of absolute values."""
    task = Task(steps=2)
    opt = build("sam", task, direction=lk.Gradient(p=math.inf), rho=0.01)
    norms = []
    for batch in micro(task, 0):
        task.closure(batch)()
        norms.append(sum(p.grad.abs().sum() for p in task.net.parameters()))
    opt.zero_grad()
    opt.step(closures(task, 0))
    torch.testing.assert_close(opt.metrics()["grad_norm"], sum(norms) / 3, rtol=1e-12, atol=0)
