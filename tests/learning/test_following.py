"""LETS whose validation gradient is the next step's first one, and radii that rise over the first steps."""

import copy
import math
import warnings

import pytest
import torch

import lets_kernels as lk
from support import family, oracle
from support.conv_net import TRANSPOSED, Task
from support.core_methods import BASES, CURVATURES, NU
from support.given_gradients import Toy, snapshot, weights
from support.guard_bands import same_bits
from support.inside import now
from support.moving_radii import following
from support.nearness import assert_near

SGD = torch.optim.SGD
KINDS = {name: CURVATURES[name] for name in ("secant", "diagonal")}
# As test_methods.py, of twenty steps: rounding adds up, or grows, from step to step.
TIGHT = 4e-12


def learned(curvature, nu="adam", rho=0.1, **options):
    kind, lr = CURVATURES[curvature]
    nu_class, _, nu_options = NU[nu]
    return lk.LearnedRadius(rho, validation="next", **kind, optimizer=nu_class, **nu_options(lr), **options)


def transcribed(task, curvature, nu="adam", rho=0.1, base="momentum", T=oracle.identity, **options):
    kind, lr = CURVATURES[curvature]
    _, transcription, base_options, _ = BASES[base]
    own, nu_base = transcription(**base_options), NU[nu][1](**NU[nu][2](lr))
    theta, radii = oracle.lets(
        *(task.functional(), task.weights(), task.batches, own, rho, nu_base, "validation_loss"),
        **kind,
        T=T,
        following=True,
        **options,
    )
    return theta, own, radii


@pytest.mark.parametrize("nu", NU)
@pytest.mark.parametrize("curvature", KINDS)
@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_twenty_steps_are_those_of_the_formula(backend, curvature, nu, base):
    task = Task(steps=20)
    theta, own, radii = transcribed(task, curvature, nu, base=base)
    optimizer, _, options, op = BASES[base]
    opt = lk.SAM(task.net.parameters(), optimizer, learned(curvature, nu), backend=backend.name, **options)
    found = []
    with backend.watch("perturb_", op, "rho_grad_secant" if curvature == "secant" else "rho_grad_diagonal"):
        for batch, _ in task.batches:
            opt.step(task.closure(batch))
            found.append(opt.rho.item())
    assert_near(task, opt, theta, own, TIGHT)
    moved = [math.log(r / 0.1) for r in radii]
    assert abs(moved[0]) < 1e-15, "the first step has no step before it to learn from"
    assert max(map(abs, moved)) > 1e-3, "the radius did not move: nothing was tested"
    assert [math.log(r / 0.1) for r in found] == pytest.approx(moved, rel=1e-8, abs=1e-11)
    assert opt.metrics()["gradients"] == 40


@pytest.mark.parametrize("curvature", KINDS)
def test_and_of_asam_at_every_third_step(backend, curvature):
    task = Task(steps=20)
    theta, own, radii = transcribed(
        task, curvature, rho=0.3, T=oracle.filterwise(0.02, transposed=TRANSPOSED), interval=3
    )
    _, _, options, _ = BASES["momentum"]
    radius = learned(curvature, rho=0.3, interval=3)
    opt = lk.ASAM(
        *(task.net.parameters(), SGD, radius, 0.02), filterwise=True, model=task.net, backend=backend.name, **options
    )
    task.run(opt)
    assert_near(task, opt, theta, own, TIGHT)
    assert opt.rho.item() == pytest.approx(radii[-1].item(), rel=1e-9)


@pytest.mark.parametrize("shape", family.SHAPES[1:])
@pytest.mark.parametrize("curvature", KINDS)
def test_all_call_shapes_learn_the_same_to_the_bit(backend, curvature, shape):
    ends = []
    for each in ("closure", shape):
        task = Task(torch.float32)
        opt = lk.SAM(task.net.parameters(), SGD, following(0.1, curvature), lr=0.1, backend=backend.name)
        for batch, _ in task.batches:
            family.take(opt, task.net, batch, each)
        ends.append(snapshot(opt))
    assert same_bits(*ends)
    assert opt.rho.item() != pytest.approx(0.1, rel=1e-3)


def test_gradients_that_the_user_zeroes_or_changes_after_the_step_are_not_learned_from():
    """What waits is the package's own copy."""
    ends = []
    for spoil in (False, True):
        toy = Toy()
        opt = lk.SAM(toy.params, SGD, following(), lr=0.1)
        for i in range(4):
            toy.set_grads(toy.grads(2 * i))
            opt.first_step(zero_grad=True)
            toy.set_grads(toy.grads(2 * i + 1))
            opt.second_step()
            if spoil:
                for p in toy.params:
                    p.grad.fill_(7.0)
            opt.zero_grad()
        ends.append(snapshot(opt))
    assert same_bits(*ends)


@pytest.mark.parametrize("curvature", KINDS)
def test_two_gradients_wait_and_nothing_else(curvature):
    """As large as the parameters, both; the diagonal's vectors are the first one."""
    toy = Toy(shapes=((1000,), (500,)))
    opt = lk.SAM(toy.params, SGD, following(curvature=curvature), lr=0.1)
    toy.steps(opt, 2)
    trial, val = opt.radius._pending
    lists = [*trial.first, *trial.perturbed, *trial.stepped]
    waiting = [g for each in lists for g in each.values()] + [v for a in trial.ascents for v in a.vectors]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in waiting}
    assert sum(storages.values()) == 2 * 1500 * 4
    assert val is None


def test_a_step_that_is_skipped_teaches_nothing():
    toy = Toy()
    opt = lk.SAM(toy.params, SGD, following(), lr=0.1)
    toy.steps(opt, 2)
    before = opt.rho.clone()
    spoiled = toy.grads(5)
    spoiled[0][0, 0, 0, 0] = math.nan
    toy.two_steps(opt, toy.grads(4), spoiled)
    between = opt.rho.clone()  # learned from the second step, by the third one's first gradient
    assert between != before
    toy.steps(opt, 1, start=3)
    assert opt.rho == between
    toy.steps(opt, 1, start=4)
    assert opt.rho != between


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"metric": "squared_gap"}, "metric='squared_gap' needs the gradient of this step's batch"),
        ({"metric": "gap"}, "metric='gap' needs"),
        ({"direction": "algorithm1"}, "direction='algorithm1' needs"),
        ({"reuse_train_gradient": True}, "reuse_train_gradient=True needs"),
        ({"validation": "nothing"}, "validation must be one of closure, next"),
    ],
    ids=str,
)
def test_what_needs_another_gradient_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        lk.LearnedRadius(0.1, **{"validation": "next", **options})


def test_it_says_what_it_goes_with():
    toy = Toy()
    with pytest.raises(ValueError, match=r"validation='next' takes a step's first gradient .*another: leave it out"):
        lk.RSAM(toy.params, SGD, rho=following(curvature="diagonal"), lr=0.1)
    with pytest.raises(ValueError, match="validation='next' takes a first gradient for that of the whole batch"):
        following().check_passes(False, lk.Gradient(), lk.Samples())
    with pytest.raises(ValueError, match="needs a first gradient, and this direction takes none"):
        lk.RandomSAM(toy.params, SGD, rho=following(), lr=0.1)
    opt = lk.SAM(toy.params, SGD, rho=following(), lr=0.1)
    toy.steps(opt, 1)
    with pytest.raises(RuntimeError, match="validation='next' and rho='auto' the steps themselves are enough"):
        opt.radius_step(None, lambda: None)
    with pytest.raises(ValueError, match="val_closure is for a learned radius that takes its validation gradient"):
        opt.step(lambda: torch.zeros(()), lambda: torch.zeros(()))


def test_a_waiting_step_of_the_other_kind_of_validation_is_refused():
    toy = Toy()
    opts = [
        lk.SAM(toy.params, SGD, rho=radius, lr=0.1)
        for radius in (following(), lk.LearnedRadius(0.1, curvature="secant", reuse_train_gradient=True))
    ]
    toy.steps(opts[0], 1)
    saved = opts[0].state_dict()
    assert saved["lets_kernels"]["radius"]["pending"] is not None
    with pytest.raises(ValueError, match="nothing of it was loaded: the step that waits"):
        opts[1].load_state_dict(saved)


def reusing(**options):
    """A step that waits for its training gradient; the loss is of both parameters, and the gradients are not alike."""
    params = [torch.linspace(-1, 1, 3, dtype=dtype).requires_grad_() for dtype in (torch.float32, torch.float64)]
    radius = lk.LearnedRadius(0.1, metric="gap", reuse_train_gradient=True, optimizer=SGD, lr=0.3, **options)
    opt = lk.SAM(params[:1], SGD, radius, lr=0.1)

    def closure(target):
        opt.zero_grad()
        loss = sum((p - target).pow(4).sum() for p in params)
        loss.backward()
        return loss

    opt.step(lambda: closure(2.0), lambda: closure(-1.0))
    return opt, params, closure


def test_a_step_that_waits_is_saved_as_a_number_a_radius():
    """In place of the validation gradient, which states from before have instead: those are learned from alike."""
    ends = []
    for older in (False, True):
        opt, (p, _), closure = reusing()
        state = opt.state_dict()
        pending = state["lets_kernels"]["radius"]["pending"]
        assert [(s.dtype, s.dim()) for s in pending["val"]["sums"]] == [(torch.float64, 0)]
        if older:  # the gradient at the new weights, by bucket and parameter
            closure(-1.0)
            pending["val"] = [{0: p.grad.clone()}]
        opt.load_state_dict(state)
        rho = opt.rho.clone()
        opt.step(lambda: closure(2.0), lambda: closure(-1.0))
        assert opt.rho != rho
        ends.append([p.detach().clone(), opt.rho])
    assert same_bits(*ends)


@pytest.mark.parametrize(
    ("options", "damage", "match"),
    [
        ({"curvature": "secant"}, {}, "sums with curvature='diagonal', and this radius needs curvature='secant'"),
        ({"direction": "algorithm1"}, {}, "needs the gradient itself"),
        ({}, {"sums": []}, "no list of 1 sums"),
        ({}, {"sums": [torch.zeros((), dtype=torch.float64)] * 2}, "no list of 1 sums"),
    ],
)
def test_sums_that_wait_are_those_of_the_radius(options, damage, match):
    state, (opt, *_) = reusing()[0].state_dict(), reusing(**options)
    state["lets_kernels"]["radius"]["pending"]["val"].update(damage)
    before = opt.rho.clone()
    with pytest.raises(ValueError, match=rf"nothing of it was loaded: .*{match}"):
        opt.load_state_dict(state)
    assert opt.rho == before


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("load", [False, True])
def test_a_step_from_before_a_group_was_added_is_not_learned_from(load, frozen):
    """Its sums are not for each radius that there is now, also if the new group has no gradient. The next one is."""
    opt, (_, other), closure = reusing(per_group=True)
    opt.add_param_group({"params": [other.requires_grad_(not frozen)], "rho": 0.2})
    if load:
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    for learned in (False, True):
        rho = opt.rho.clone()
        opt.step(lambda: closure(2.0), lambda: closure(-1.0))
        assert (opt.rho != rho).tolist() == [learned, learned and not frozen]


# ---- a radius that nobody lets learn -------------------------------------------------------------------------------


def test_a_radius_that_nobody_lets_learn_says_so_once():
    toy = Toy()
    opt = lk.LETSSAM(toy.params, SGD, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy.steps(opt, 10)
    with pytest.warns(lk.RadiusWarning, match=r"call opt.radius_step\(closure, val_closure\) after every second_step"):
        toy.steps(opt, 1, start=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy.steps(opt, 15, start=11)
    assert not now(opt).step


@pytest.mark.parametrize("interval", [1, 4])
def test_one_that_learns_says_nothing(interval):
    toy = Toy()
    opt = lk.SAM(toy.params, SGD, lk.LearnedRadius(0.1, interval=interval), lr=0.1)

    def closure():
        toy.set_grads(toy.grads(1))
        return torch.ones(())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(15 * interval):
            toy.steps(opt, 1, start=i)
            if (i + 1) % interval == 0:  # whoever knows the interval may leave the other calls out
                opt.radius_step(closure, closure)


def test_one_that_has_learned_may_pause():
    toy = Toy()
    opt = lk.SAM(toy.params, SGD, lk.LearnedRadius(0.1), lr=0.1)

    def closure():
        toy.set_grads(toy.grads(1))
        return torch.ones(())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy.steps(opt, 1)
        opt.radius_step(closure, closure)
        toy.steps(opt, 15, start=1)


# ---- a radius that rises -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.1, lambda t: 0.2 - 0.15 * min(t, 5) / 5], ids=["constant", "scheduled"])
def test_a_radius_rises_in_equal_parts(backend, rho):
    task = Task()
    _, transcription, options, op = BASES["momentum"]
    theta, base = task.weights(), transcription(**options)
    shares = [min(1.0, (t + 1) / 4) for t in range(10)]
    radius = rho if callable(rho) else lambda t: rho
    theta = oracle.sam(task.functional(), theta, task.batches, base, lambda t: radius(t) * shares[t])
    given = lk.ScheduledRadius.linear(0.2, 0.05, 5) if callable(rho) else rho
    opt = lk.SAM(task.net.parameters(), SGD, given, rho_warmup=4, backend=backend.name, **options)
    applied = []
    with backend.watch("perturb_", op):
        for batch, _ in task.batches:
            opt.step(task.closure(batch))
            applied.append(opt.metrics()["applied_rho"].item())
    assert_near(task, opt, theta, base, 1e-12)
    assert applied == pytest.approx([radius(t) * shares[t] for t in range(10)], rel=1e-15)
    assert opt.rho.item() == pytest.approx(radius(9), rel=1e-15)


def test_a_learned_radius_rises_too(backend):
    """∂F/∂ν is that of the radius that was applied; ν itself does not wait for the end of the rise."""
    task = Task()
    share = lambda t: min(1.0, (t + 1) / 6)  # noqa: E731
    theta, own, radii = transcribed(task, "secant", share=share)
    opt = lk.SAM(
        task.net.parameters(), SGD, learned("secant"), rho_warmup=6, backend=backend.name, **BASES["momentum"][2]
    )
    task.run(opt)
    assert_near(task, opt, theta, own, 1e-12)
    assert opt.rho.item() == pytest.approx(radii[-1].item(), rel=1e-9)


def test_it_goes_on_where_a_resumed_run_stood():
    task = Task(torch.float32)
    opts = [lk.SAM(task.net.parameters(), SGD, 0.1, rho_warmup=8, lr=0.1) for _ in range(2)]
    task.run(opts[0], task.batches[:5])
    opts[1].load_state_dict(opts[0].state_dict())
    task.run(opts[1], task.batches[5:6])
    assert opts[1].metrics()["applied_rho"].item() == pytest.approx(0.1 * 6 / 8, rel=1e-15)


def test_a_step_that_does_not_perturb_applies_nothing_and_counts():
    task = Task(torch.float32)
    opt = lk.SAM(task.net.parameters(), SGD, 0.1, schedule=lk.Every(2), rho_warmup=4, lr=0.1)
    applied = []
    for batch, _ in task.batches[:6]:
        opt.step(task.closure(batch))
        applied.append(opt.metrics()["applied_rho"].item())
    assert applied == pytest.approx([0.1 * 1 / 4, 0.0, 0.1 * 3 / 4, 0.0, 0.1, 0.0])


@pytest.mark.parametrize("steps", [-1, 2.5, True, "ten"])
def test_a_warmup_is_a_number_of_steps(steps):
    toy = Toy()
    before = weights(toy)
    with pytest.raises(ValueError, match="rho_warmup must be a number of steps >= 0"):
        lk.SAM(toy.params, SGD, rho_warmup=steps, lr=0.1)
    assert same_bits(weights(toy), before)


def test_groups_rise_each_to_its_own():
    toy = Toy()
    groups = [{"params": toy.params[:2], "rho": 0.2}, {"params": toy.params[2:], "rho": 0.4}]
    opt = lk.SAM(groups, SGD, rho_warmup=2, lr=0.1)
    toy.steps(opt, 1)
    assert opt.metrics()["applied_rho"].tolist() == pytest.approx([0.1, 0.2])
    assert opt.rho.tolist() == pytest.approx([0.2, 0.4])


@pytest.mark.parametrize("options", [{"validation": "next"}, {"metric": "gap", "reuse_train_gradient": True}])
@pytest.mark.parametrize("value", [2.0, math.nan])
def test_a_first_gradient_that_is_not_finite_moves_no_radius(backend, options, value):
    """Also where its bad element has no part in what is learned: that parameter had no second gradient before."""
    a, b = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    radius = lk.LearnedRadius(0.1, curvature="secant", optimizer=torch.optim.SGD, lr=0.3, **options)
    opt = lk.SAM([a, b], torch.optim.SGD, radius, lr=0.1, backend=backend.name)

    def give(x, y):
        a.grad, b.grad = x, y
        return torch.ones(())

    give(torch.ones(2), torch.ones(2))
    opt.first_step(zero_grad=True)
    give(None, torch.full((2,), 3.0))
    opt.second_step(zero_grad=True)
    if radius.learns:
        opt.radius_step(None, lambda: give(torch.ones(2), torch.full((2,), 4.0)))
    before = opt.rho.clone()
    give(torch.full((2,), value), torch.ones(2))
    opt.first_step(zero_grad=True)
    assert (opt.rho == before) == math.isnan(value)
    give(torch.ones(2), torch.ones(2))
    opt.second_step(zero_grad=True)
    assert opt.metrics()["skipped_steps"] == math.isnan(value)
