"""A gradient scaler changes nothing but what float16 can hold: same bits, and a pass that overflows costs one step."""

import pytest
import torch

import lets_kernels as lk
from support import family
from support.call_shapes import SHAPES, Passes, run
from support.conv_net import Task
from support.core_methods import BASES
from support.family import FAMILY, ONE_EACH
from support.given_gradients import snapshot, weights
from support.guard_bands import same_bits
from support.inside import progress
from support.lengths import at_length, pairwise

BUILDS = {
    "sam": lambda params, *rest, **options: lk.SAM(params, *rest, rho=0.1, **options),
    "asam": lambda params, *rest, **options: lk.ASAM(params, *rest, rho=0.5, filterwise=True, **options),
    "lets-secant": lambda params, *rest, **options: lk.SAM(
        params, *rest, rho=lk.LearnedRadius(0.1, curvature="secant"), **options
    ),
    "lets-asam": lambda params, *rest, **options: lk.LETSASAM(params, *rest, 0.1, **options),
    "auto": lambda params, *rest, **options: lk.SAM(params, *rest, rho="auto", **options),
}


def scaler_of(scale=2.0**16, **options):
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


def built(method, base="momentum", steps=3, **options):
    task = Task(torch.float32, steps=steps)
    if method in FAMILY:
        return task, family.build(method, task, base, **family.ALWAYS.get(method, {}), **options)
    cls, _, base_options, _ = BASES[base]
    return task, BUILDS[method](task.net.parameters(), cls, model=task.net, **options, **base_options)


def seen(opt):
    """Weights, state, radius, and every number that the step reports."""
    numbers = [value.clone() for _, value in sorted(opt.metrics().items())]
    return [*snapshot(opt), *family.held(opt).values(), *numbers]


# A list of micro-batches has no one pair of gradients for a radius to learn from.
COMBINATIONS = [(s, m) for s in SHAPES for m in BUILDS if s != "micro-batches" or m in ("sam", "asam")]


CASES = [(*combination, base) for combination in COMBINATIONS for base in ("momentum", "adamw", "rmsprop")]
#: One base optimizer, and one shape in turn with the other.
MEMBERS = [(("closure", "two-steps")[i % 2], name) for i, name in enumerate(ONE_EACH)]
CASES += [(*member, "momentum") for member in MEMBERS]


@pytest.mark.parametrize("shape, method, base", CASES)
def test_a_scale_that_is_a_power_of_two_changes_no_bit(shape, method, base):
    """Such scales go through backward without rounding, also where they grow between the steps."""
    ends = []
    for scaler in (None, scaler_of(8.0), scaler_of(growth_interval=2), scaler_of(enabled=False)):
        task, opt = built(method, base)
        run(shape, opt, task, slice(None), scaler)
        assert opt.fused is (base != "rmsprop")
        ends.append(seen(opt))
        if scaler is not None and scaler.is_enabled() and scaler.get_growth_interval() == 2:
            assert scaler.get_scale() == 2.0**17
    assert all(same_bits(ends[0], end) for end in ends[1:])


OVERFLOWS = [
    (*combination, where, base, check)
    for combination in COMBINATIONS
    for where in (1, 2)
    for base in ("momentum", "rmsprop")
    for check in (True, False)
]
OVERFLOWS = at_length(OVERFLOWS, [OVERFLOWS[i] for i in pairwise(OVERFLOWS)])


@pytest.mark.parametrize("shape, method, where, base, check_finite", OVERFLOWS)
def test_an_overflow_in_either_pass_skips_the_step_and_the_scale_backs_off(shape, method, where, base, check_finite):
    """Also where the optimizer itself checks nothing: the steps around it are those of a run without the bad one."""
    ends = []
    for bad in (False, True):
        task, opt = built(method, base, check_finite=check_finite)
        scaler = scaler_of()
        run(shape, opt, task, slice(0, 1), scaler)
        if bad:
            before = snapshot(opt)
            run(shape, opt, task, slice(1, 2), scaler, spoil=where)
            assert same_bits(snapshot(opt), before)
            assert scaler.get_scale() == 2.0**15
            assert opt.metrics()["skipped_steps"].item() == 1
        run(shape, opt, task, slice(2, 3), scaler)
        ends.append(snapshot(opt))
    assert same_bits(*ends)
    assert scaler.get_scale() == 2.0**15


@pytest.mark.parametrize("where", [1, 2])
@pytest.mark.parametrize("shape, method", MEMBERS)
def test_an_overflow_in_a_pass_of_any_method(shape, method, where):
    """As above, but that what a method draws or counts is its own: weights and the base optimizer's state stay."""
    where = min(where, 2 if method not in family.ONE_PASS else 1)
    task, opt = built(method, check_finite=False)
    scaler = scaler_of()
    run(shape, opt, task, slice(0, 1), scaler)
    before = family.held(opt)
    run(shape, opt, task, slice(1, 2), scaler, spoil=where)
    changed = {k for k, v in family.held(opt).items() if not same_bits(v, before[k])}
    counted = family.COUNTED.get(method, set()) if where == 2 else set()
    counted = counted | ({"random.count"} if progress(opt).random.used else set())
    assert {k.split(".", 1)[1] if k[0].isdigit() else k for k in changed} == counted
    assert scaler.get_scale() == 2.0**15 and opt.metrics()["skipped_steps"].item() == 1
    run(shape, opt, task, slice(2, 3), scaler)
    assert not same_bits(family.held(opt)["weights.0"], before["weights.0"])
    assert scaler.get_scale() == 2.0**15 and opt.metrics()["skipped_steps"].item() == 1


@pytest.mark.parametrize("where", [3, 4])
@pytest.mark.parametrize("method", ["lets-secant", "lets-asam"])
@pytest.mark.parametrize("shape", ["closure", "two-steps", "context"])
def test_an_overflow_in_the_passes_of_the_radius_leaves_the_radius(shape, method, where):
    """The step before them stands; the radius and its optimizer keep their bits, and the scale backs off."""
    task, opt = built(method)
    scaler = scaler_of()
    run(shape, opt, task, slice(0, 1), scaler)

    def learned():
        return [opt.rho.clone(), *(t.clone() for t in next(iter(opt.radius.optimizer.state.values())).values())]

    before, old = learned(), weights(task)
    run(shape, opt, task, slice(1, 2), scaler, spoil=where)
    assert same_bits(learned(), before) and not same_bits(weights(task), old)
    assert scaler.get_scale() == 2.0**15
    run(shape, opt, task, slice(2, 3), scaler)
    assert not same_bits(learned(), before)
    assert opt.metrics()["skipped_steps"].item() == 0 and scaler.get_scale() == 2.0**15


@pytest.mark.parametrize("shape", ["two-steps", "context"])
@pytest.mark.parametrize("method", ["sam", "lets-secant"])
def test_clipping_between_unscale_and_step_is_that_without_a_scaler(shape, method):
    ends = []
    for scaler in (None, scaler_of()):
        task, opt = built(method)
        run(shape, opt, task, slice(None), scaler, clip=0.1)
        ends.append(seen(opt))
    assert same_bits(*ends)
    task, opt = built(method)
    run(shape, opt, task, slice(None))
    assert not same_bits(seen(opt), ends[0])


@pytest.mark.parametrize("where", [1, 2])
def test_clipping_an_overflow_by_hand_skips_the_step_too(where):
    task, opt = built("sam")
    scaler, before = scaler_of(), weights(task)
    run("two-steps", opt, task, slice(0, 1), scaler, spoil=where, clip=0.1)
    assert same_bits(weights(task), before) and scaler.get_scale() == 2.0**15


def test_the_second_gradients_are_unscaled_as_the_scaler_rounds():
    """A scale that is no power of two: by scaler.step alone, and by scaler.unscale_ before it, to the bit."""
    ends = []
    for clip in (None, torch.inf):
        task, opt = built("sam")
        run("two-steps", opt, task, slice(None), scaler_of(1000.0), clip=clip)
        ends.append(snapshot(opt))
    assert same_bits(*ends)


@pytest.mark.parametrize("shape", SHAPES)
def test_public_methods_of_the_scaler_are_enough(shape):
    """Anything with them will do; the package itself asks for no more than unscale_ and is_enabled."""

    class Public:
        def __init__(self, inner):
            for name in ("scale", "unscale_", "step", "update", "is_enabled", "get_scale"):
                setattr(self, name, getattr(inner, name))

    ends = []
    for scaler in (None, Public(scaler_of())):
        task, opt = built("sam")
        run(shape, opt, task, slice(None), scaler)
        ends.append(seen(opt))
    assert same_bits(*ends)

    asked = []

    class Watched:
        def __getattr__(self, name):
            asked.append(name)
            return getattr(inner, name)

    inner, (task, opt) = scaler_of(), built("sam")
    passes = Passes(task, inner)
    opt.step(passes.closure(task.batches[0][0]), scaler=Watched())
    passes(task.batches[1][0])
    inner.update()
    opt.unscale_first(Watched())
    assert set(asked) == {"unscale_", "is_enabled"}


@pytest.mark.parametrize("shape", SHAPES)
def test_float16_autocast_finds_its_scale(shape):
    """A true overflow in backward: steps are skipped until the scale has come down, and then training goes on."""
    task, opt = built("sam", steps=16)
    original = task.loss

    def loss(batch):
        with torch.autocast("cpu", torch.float16):
            return original(batch)

    task.loss = loss
    scaler, scales, moved = scaler_of(2.0**24), [], []
    for step in range(16):
        before = weights(task)
        scales.append(scaler.get_scale())
        run(shape, opt, task, slice(step, step + 1), scaler)
        moved.append(not same_bits(weights(task), before))
        assert moved[-1] == (scaler.get_scale() == scales[-1])
    assert not moved[0] and sum(moved) >= 4 and opt.metrics()["skipped_steps"].item() == moved.count(False)
    assert all(bool(w.isfinite().all()) for w in weights(task))
