"""``rho="auto"``: the rule against its formula, in every shape and over every backend's sums, and what it goes with."""

import copy
import itertools
import math

import pytest
import torch

import lets_kernels as lk
from support import family, oracle
from support.backends import Recorder
from support.conv_net import Task
from support.core_methods import BASES
from support.given_gradients import Toy, snapshot, weights
from support.guard_bands import LAYOUTS, Bucket, same_bits
from support.inside import held, now, progress, space
from support.moving_radii import auto
from support.nearness import assert_near

SGD = torch.optim.SGD
STEPS = 20
# As test_methods.py, of twenty steps.
TIGHT = 4e-12
#: All phases of the rule in twenty steps: the start, headway and overshooting, both bounds and the cap.
SHORT = lk.AutoConstants(start=4, most_change=0.3, headway_decay=0.8, start_bound=1.0, bound=0.5)
DIRECTIONS = {
    "sam": ({}, oracle.identity),
    "asam": ({"direction": lk.Adaptive(0.02)}, oracle.elementwise(0.02)),
}


def falling(t):
    """A learning rate that falls, and rises once."""
    return 0.1 * (1 + math.cos(math.pi * t / STEPS)) / 2 + (0.05 if t == 12 else 0.0)


def begin(rho):
    return {**dict.fromkeys(lk.AutoRadius.COLUMNS, 0.0), "log_rho": math.log(rho)}


def transcribed(task, base, rho, T, constants=SHORT, lr=falling):
    """Weights at the end, and what is remembered after every step."""
    loss, theta, now, before, found = task.functional(), task.weights(), begin(rho), None, []
    for t, (batch, _) in enumerate(task.batches):
        base.lr = lr(t)
        _, g = oracle.gradient(loss, theta, batch)
        eps = oracle.unit(g, T(theta))
        _, g_hat = oracle.gradient(loss, {k: theta[k] + math.exp(now["log_rho"]) * eps[k] for k in theta}, batch)
        delta = {k: theta[k] - (theta if before is None else before)[k] for k in theta}
        now = oracle.auto(g, g_hat, delta, base.lr, now, constants)
        before, theta = theta, base.step(theta, g_hat)
        found.append(now)
    return theta, found


def remembered(opt):
    state = opt.radius.state_dict()
    return {name: state[name][0].item() for name in lk.AutoRadius.COLUMNS}


@pytest.mark.parametrize("rho", [0.005, 1.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("base", ["sgd", "momentum", "adamw", "rmsprop"])
def test_twenty_steps_are_those_of_the_formula(backend, direction, base, rho):
    task, (options, T) = Task(steps=STEPS), DIRECTIONS[direction]
    optimizer, transcription, base_options, op = BASES[base]
    scale = base_options["lr"] / 0.1
    own = transcription(**base_options)
    theta, expected = transcribed(task, own, rho, T, lr=lambda t: scale * falling(t))
    radius = lk.AutoRadius(rho, constants=SHORT)
    opt = lk.SAM(task.net.parameters(), optimizer, radius, backend=backend.name, **options, **base_options)
    found = []
    with backend.watch("perturb_", op or "restore_", "dots", "displacement_dots"):
        for t, (batch, _) in enumerate(task.batches):
            opt.param_groups[0]["lr"] = scale * falling(t)
            opt.step(task.closure(batch))
            found.append(remembered(opt))
    assert_near(task, opt, theta, own, TIGHT)
    for name in lk.AutoRadius.COLUMNS:
        values = [now[name] for now in expected]
        # Of the headway, sums of numbers of either sign, what rounding leaves is relative to the sum of their sizes.
        assert [now[name] for now in found] == pytest.approx(values, rel=1e-8, abs=1e-10), name
    assert opt.rho.item() == pytest.approx(math.exp(expected[-1]["log_rho"]), rel=1e-9)
    assert opt.metrics()["gradients"] == 2 * STEPS
    nus = [now["log_rho"] for now in expected]
    assert all(a != b for a, b in itertools.pairwise(nus)), "a step did not move the radius"


def test_a_step_reads_no_vector_that_it_need_not(backend):
    """The norm comes with the sums over what the weights have moved, where it is that of the gradient alone."""
    found = {}
    directions = {"sam": lk.Gradient(), "asam": lk.Adaptive(0.02), "max norm": lk.Gradient(p=math.inf)}
    for name, direction in directions.items():
        toy = Toy()
        opt = lk.SAM(toy.params, SGD, "auto", direction=direction, backend=backend.name, lr=0.1, momentum=0.9)
        toy.steps(opt, 1)
        with Recorder() as recorder:
            toy.steps(opt, 1)
        found[name] = sorted(op for op in recorder.ops if op != "all_finite_")  # one of four scalars
    step = ["displacement_dots", "dots", "perturb_", "restore_sgd_"]
    norm = sorted([*step, "grad_norm"])
    ran = {"sam": step, "asam": norm, "max norm": norm}
    assert found == ({name: [] for name in ran} if backend.name == "reference" else ran)


@pytest.mark.parametrize("p", [1.5, 4.0, math.inf])
def test_the_norm_is_that_of_the_direction(backend, p):
    """The first step goes as far as with a fixed radius."""
    perturbed = []
    for rho in (lk.AutoRadius(0.3), 0.3):
        toy = Toy()
        opt = lk.SAM(toy.params, SGD, rho, direction=lk.Gradient(p=p), backend=backend.name, lr=0.1)
        toy.set_grads(toy.grads(0))
        opt.first_step()
        perturbed.append(weights(toy))
        opt.restore()
    assert same_bits(*perturbed)


def test_the_transcription_has_been_through_every_phase():
    """So that the tests above test every line: each bound and each case is met in some of these steps."""
    met = set()
    for base in ("sgd", "momentum", "adamw"):
        task = Task(steps=STEPS)
        scale = BASES[base][2]["lr"] / 0.1
        own = BASES[base][1](**BASES[base][2])
        for rho in (0.005, 1.0):
            _, found = transcribed(task, own, rho, oracle.identity, lr=lambda t, scale=scale: scale * falling(t))
            nus = [math.log(rho), *(now["log_rho"] for now in found)]
            moves = [b - a for a, b in itertools.pairwise(nus)]
            met |= {"bound of the start"} if max(map(abs, moves[:4])) == pytest.approx(1.0) else set()
            met |= {"headway"} if any(now["headway"] > 0 for now in found[4:]) else set()
            met |= {"overshooting"} if any(now["headway"] < 0 for now in found[4:]) else set()
            met |= {"most headway"} if any(now["headway"] > 0.1 for now in found[4:]) else set()
            met |= {"bound"} if any(abs(move) == pytest.approx(0.075) for move in moves[4:]) else set()
    assert met == {"bound of the start", "headway", "overshooting", "most headway", "bound"}


@pytest.mark.ops
@pytest.mark.parametrize("layout", ["several", "0-d", "many-small"])
def test_twenty_steps_of_the_rule_by_the_sums_of_every_backend(backend, layout):
    """Random gradients in place of a network's: what the kernels sum up, and what becomes of it."""
    bucket = Bucket(LAYOUTS[layout], torch.float32)
    radius = lk.AutoRadius(0.05, constants=SHORT)
    group = {"rho": radius.rho, "lr": 0.1}
    radius.bind([group], torch.device("cpu"))
    now, gate = begin(0.05), torch.ones((), dtype=torch.float64)
    table = bucket.table.clone()
    for t in range(STEPS):
        g, noise, delta = (bucket.values(zeros=False) for _ in range(3))
        g_hat = [(a + (0.02 + 0.01 * t) * b).float().double() for a, b in zip(g, noise, strict=True)]
        delta = [(t % 3) * (b - 0.1 * a).float().double() for a, b in zip(g, delta, strict=True)]
        first = backend.dots(bucket.give(g_hat, "list"), bucket.give(g, "list"), table)
        saved = bucket.values(zeros=False)
        now_at = [(a + b).float().double() for a, b in zip(saved, delta, strict=True)]
        delta = [(a - b).float().double() for a, b in zip(now_at, saved, strict=True)]
        lists = bucket.give(g, "list"), bucket.give(now_at, "list"), bucket.give(saved, "flat")[0]
        second = backend.displacement_dots(*lists, table)
        group["lr"] = falling(t)
        products = torch.stack([*first, second[1], second[2]])[None]
        radius.compare(products, gate, [group])
        now = oracle.auto(*(dict(enumerate(x)) for x in (g, g_hat, delta)), falling(t), now, SHORT)
        state = radius.state_dict()
        found = {name: state[name][0].item() for name in now}
        # d = g_hat - g is a difference of sums here: its square has their rounding, 1e-15 of them, over 4e-4 of them.
        assert found == pytest.approx(now, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("method", [lk.SAM, lk.GSAM, lk.ASAM])
@pytest.mark.parametrize("shape", family.SHAPES[1:])
def test_all_call_shapes_find_the_same_radius_to_the_bit(backend, method, shape):
    ends = []
    for each in ("closure", shape):
        task = Task(torch.float32, steps=STEPS)
        opt = method(task.net.parameters(), SGD, auto(), lr=0.1, momentum=0.9, backend=backend.name)
        for batch, _ in task.batches:
            family.take(opt, task.net, batch, each)
        ends.append([*snapshot(opt), opt.radius.memory.clone()])
    assert same_bits(*ends)


@pytest.mark.parametrize(
    "schedule",
    [lk.Every(3), lk.Bernoulli(0.5), lk.NormThreshold(STEPS), lk.Tail(STEPS, 0.5)],
    ids=lambda s: type(s).__name__,
)
def test_steps_that_do_not_perturb_do_not_count(schedule):
    task = Task(torch.float32, steps=STEPS)
    opt = lk.SAM(task.net.parameters(), SGD, auto(), schedule=schedule, seed=3, lr=0.1)
    counts = []
    for batch, _ in task.batches:
        before = opt.radius.memory.clone()
        opt.step(task.closure(batch))
        if not now(opt).decision[1]:
            assert same_bits(before, opt.radius.memory)
        counts.append(now(opt).decision[1])
    assert remembered(opt)["steps"] == sum(counts)
    assert 0 < sum(counts) < STEPS


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("check_finite", [True, False])
def test_a_step_that_is_skipped_moves_nothing(which, check_finite):
    """Without the check the weights are lost with the second gradient, as everywhere, but never the radius."""
    toy = Toy()
    opt = lk.SAM(toy.params, SGD, auto(), lr=0.1, check_finite=check_finite)
    toy.steps(opt, 6)
    before = opt.radius.memory.clone()
    both = [toy.grads(20), toy.grads(21)]
    both[which][0][0, 0, 0, 0] = math.nan
    toy.two_steps(opt, *both)
    assert same_bits(before, opt.radius.memory)


def test_gradients_of_zero_move_nothing():
    toy = Toy()
    opt = lk.SAM(toy.params, SGD, auto(), lr=0.1)
    toy.steps(opt, 6)
    before = opt.radius.memory.clone()
    nothing = [torch.zeros_like(g) for g in toy.grads(0)]
    toy.two_steps(opt, nothing, nothing)
    assert same_bits(before, opt.radius.memory)


def test_a_loss_that_does_not_bend_stops_at_the_largest_radius():
    """κ = 0 says nothing of where to stop; ν does, and comes back as soon as something bends."""
    toy = Toy()
    opt = lk.SAM(toy.params, SGD, lk.AutoRadius(), lr=1e-3)
    for _ in range(80):
        toy.two_steps(opt, toy.grads(0), toy.grads(0))
    assert opt.rho.item() == pytest.approx(100.0)
    for _ in range(60):
        toy.two_steps(opt, toy.grads(0), toy.grads(1))
    assert opt.rho.item() < 10.0


def test_a_run_that_never_overshoots_keeps_a_small_perturbation():
    """c = 1 at every step, and κ* = 0.15 exp(-20 * 0.1): far above what rounding leaves of float32 gradients."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    opt = lk.SAM([p], SGD, rho="auto", lr=1e-3)
    for _ in range(150):

        def closure():
            opt.zero_grad()
            loss = p.square().sum() / 2
            loss.backward()
            return loss

        opt.step(closure)
    assert opt.metrics()["headway"].item() == pytest.approx(1.0, abs=1e-5)
    # The radius follows weights that shrink by 1e-3 a step, some fifteen steps behind.
    assert opt.rho.item() / p.detach().norm().item() == pytest.approx(0.15 * math.exp(-2), rel=0.03)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scale_of_the_loss_does_not_matter(scale):
    """With plain SGD and a learning rate that makes up for it, the radii are the same but for rounding."""
    found = []
    for factor in (1.0, scale):
        task = Task(steps=STEPS)
        opt = lk.SAM(task.net.parameters(), SGD, auto(), lr=0.1 / factor)
        for batch, _ in task.batches:

            def closure(batch=batch, factor=factor):
                opt.zero_grad()
                loss = factor * task.loss(batch)
                loss.backward()
                return loss

            opt.step(closure)
        found.append(opt.rho.item())
    assert found[1] == pytest.approx(found[0], rel=1e-9)


@pytest.mark.parametrize("rho", [0.005, 0.02, 0.2, 1.0, 30.0])
def test_the_first_radius_is_forgotten(rho):
    """On a quadratic κ is proportional to the radius: one step finds κ = 0.1, unless it lies further than its bound.

    Of the rest of the way each later step leaves t/(t + 1).
    """
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    opt = lk.SAM([p], SGD, lk.AutoRadius(rho), lr=1e-6)

    def closure():
        opt.zero_grad()
        loss = p.square().sum() / 2
        loss.backward()
        return loss

    for _ in range(9):
        opt.step(closure)
    wanted = math.log(0.1 * math.sqrt(14))
    left = max(abs(math.log(rho) - wanted) - 3.0, 0.0) / 9
    assert abs(math.log(opt.rho.item()) - wanted) == pytest.approx(left, abs=1e-4)  # the weights have moved by 1e-5


def test_a_radius_a_group_goes_by_its_own_gradients():
    """As two optimizers that share one norm: of the first group the products are those of its own tensors."""
    toy = Toy(torch.float64)
    groups = [{"params": toy.params[:2]}, {"params": toy.params[2:], "lr": 0.03}]
    opt = lk.SAM(groups, SGD, lk.AutoRadius(0.05, per_group=True, constants=SHORT), lr=0.1)
    assert opt.rho.shape == (2,)
    nows, before = [begin(0.05), begin(0.05)], [p.detach().clone() for p in toy.params]
    for t in range(STEPS):
        g = toy.grads(2 * t)
        g_hat = [a + 0.05 * b for a, b in zip(g, toy.grads(2 * t + 1), strict=True)]
        delta = [p.detach() - b for p, b in zip(toy.params, before, strict=True)]
        before = [p.detach().clone() for p in toy.params]
        toy.two_steps(opt, g, g_hat)
        for k, (part, lr) in enumerate(((slice(0, 2), 0.1), (slice(2, None), 0.03))):
            own = [dict(enumerate(x[part])) for x in (g, g_hat, delta)]
            nows[k] = oracle.auto(*own, lr, nows[k], SHORT)
    assert opt.rho.tolist() == pytest.approx([math.exp(now["log_rho"]) for now in nows], rel=1e-9)
    state = opt.radius.state_dict()
    for name in lk.AutoRadius.COLUMNS:
        assert [value.item() for value in state[name]] == pytest.approx([now[name] for now in nows], rel=1e-9), name
    assert opt.rho[0].item() != pytest.approx(opt.rho[1].item(), rel=0.01)
    assert [group["rho"].item() for group in opt.param_groups] == opt.rho.tolist()
    assert [opt.radius.value(k, {}, STEPS).item() for k in range(2)] == opt.rho.tolist()


def test_weights_before_the_last_step_are_where_perturbations_are_undone_from():
    """No buffer of their own: what a state dict holds are views of it."""
    toy = Toy()
    opt = lk.SAM(toy.params, SGD, auto(), lr=0.1)
    toy.steps(opt, 1)
    before = weights(toy)
    toy.steps(opt, 1, start=1)
    bucket = space(opt).buckets[0]
    kept = [held(opt)[p]["before"] for p in toy.params]
    assert same_bits(kept, before)
    assert {k.untyped_storage().data_ptr() for k in kept if k.numel()} == {bucket.saved.untyped_storage().data_ptr()}
    saved = opt.state_dict()["state"]
    assert same_bits([saved[i]["lets_kernels.before"] for i in range(len(kept))], before)


def test_a_state_without_the_weights_before_the_last_step_is_refused():
    toy = Toy()
    opt = lk.SAM(toy.params, SGD, auto(), lr=0.1)
    toy.steps(opt, 2)
    saved = copy.deepcopy(opt.state_dict())
    for entry in saved["state"].values():
        del entry["lets_kernels.before"]
    with pytest.raises(ValueError, match="nothing of it was loaded: the radius has lost the before"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("change", [{"log_rho": [torch.tensor(math.nan)]}, {"steps": []}, {"headway": "much"}], ids=str)
def test_a_damaged_state_is_refused(change):
    toy = Toy()
    opt = lk.SAM(toy.params, SGD, auto(), lr=0.1)
    toy.steps(opt, 3)
    saved, before = copy.deepcopy(opt.state_dict()), opt.radius.memory.clone()
    saved["lets_kernels"]["radius"].update(change)
    with pytest.raises(ValueError, match=f"nothing of it was loaded: the radius: {next(iter(change))}"):
        opt.load_state_dict(saved)
    assert same_bits(before, opt.radius.memory)


# ---- what it goes with ---------------------------------------------------------------------------------------------

CONSTRUCTORS = [name for name in family.ONE_EACH if name not in family.ONE_PASS]


@pytest.mark.parametrize("name", CONSTRUCTORS)
@pytest.mark.filterwarnings("ignore::lets_kernels.CurvatureWarning")
def test_auto_goes_with_every_method_that_has_a_first_gradient(name):
    task = Task(torch.float32)
    opt = family.build(name, task, rho="auto")
    family.run(opt, task)
    assert isinstance(opt.radius, lk.AutoRadius)
    assert remembered(opt)["steps"] == progress(opt).perturbed_steps >= 2
    assert opt.rho.item() != pytest.approx(0.005)
    metrics = opt.metrics()
    assert {"relative_change", "headway", "aimed_rho"} <= metrics.keys()
    assert all(bool(torch.isfinite(metrics[k])) for k in ("relative_change", "headway", "aimed_rho"))


@pytest.mark.parametrize("cls", [lk.RSAM, lk.RGSAM, lk.ESAM, lk.DeltaSAM, lk.FunctionalSAM])
def test_where_the_two_gradients_differ_in_more_than_the_perturbation_a_warning_says_so(cls):
    with pytest.warns(lk.CurvatureWarning, match="rho='auto' takes the difference of the two gradients"):
        cls(Toy().params, SGD, rho="auto", lr=0.1)


def test_what_it_does_not_go_with_is_refused():
    toy = Toy()
    for build, match in (
        (lambda: lk.RandomSAM(toy.params, SGD, rho="auto", lr=0.1), "this direction takes one: give rho a number"),
        (lambda: lk.SAM(toy.params, SGD, rho="auto", rho_warmup=5, lr=0.1), "begins small by itself"),
        (lambda: lk.SAM(toy.params, SGD, lk.AutoRadius(), rho_warmup=5, lr=0.1), "begins small by itself"),
        (lambda: lk.SAM([{"params": toy.params, "rho": 0.1}], SGD, rho="auto", lr=0.1), "a group has its own rho"),
        (lambda: lk.LETSSAM(toy.params, SGD, rho="auto", lr=0.1), r"SAM\(rho='auto'\)"),
        (lambda: lk.LETSASAM(toy.params, SGD, rho="auto", lr=0.1), r"ASAM\(rho='auto'\)"),
        (lambda: lk.AutoRadius(0.0), "must be above 0"),
        (lambda: lk.AutoRadius(-1.0), "finite number >= 0"),
        (lambda: lk.AutoConstants(slope=0.0), "slope must be a positive finite number"),
        (lambda: lk.AutoConstants(headway_decay=1.0), "headway_decay must be below 1"),
    ):
        with pytest.raises(ValueError, match=match):
            build()
    with pytest.raises(ValueError, match="compares two gradients of the whole batch"):
        auto().check_passes(False, lk.Gradient(), lk.Samples())
    with pytest.raises(TypeError, match="rho must be a number, a Radius or 'auto', not 'automatic'"):
        lk.SAM(toy.params, SGD, rho="automatic", lr=0.1)
    opt = lk.SAM(toy.params, SGD, auto(), lr=0.1)
    with pytest.raises(ValueError, match="belongs to another optimizer"):
        lk.SAM(Toy().params, SGD, opt.radius, lr=0.1)
    with pytest.raises(ValueError, match="AutoRadius compares the two gradients of one step"):
        opt.step([lambda: torch.zeros(())])
    with pytest.raises(ValueError, match="val_closure is for a learned radius"):
        opt.step(lambda: torch.zeros(()), lambda: torch.zeros(()))


def test_a_group_that_is_added_later_shares_the_radius_or_begins_its_own():
    for per_group in (False, True):
        toy = Toy()
        opt = lk.SAM(toy.params[:3], SGD, auto(per_group=per_group), lr=0.1)
        for i in range(3):
            toy.two_steps(opt, toy.grads(2 * i), toy.grads(2 * i + 1))
        found = opt.rho.clone()
        opt.add_param_group({"params": toy.params[3:]})
        assert opt.rho.tolist() == ([found.item(), pytest.approx(0.05)] if per_group else found.item())
        toy.steps(opt, 3, start=3)
        assert remembered(opt)["steps"] == 6


def test_nothing_parameter_sized_but_the_first_gradient_lives_through_the_second_pass():
    """Beside the saved weights, that is, which a fixed radius has too."""
    kept = {}
    for rho in (0.05, "auto"):
        toy = Toy(shapes=((1000,), (500,)))
        opt = lk.SAM(toy.params, SGD, rho, lr=0.1)
        toy.steps(opt, 2)
        toy.set_grads(toy.grads(10))
        opt.first_step(zero_grad=True)
        kept[rho] = sum(g.numel() for runs in now(opt).step.first for g in runs.grads)
        opt.restore()
    assert kept == {0.05: 0, "auto": 1500}
