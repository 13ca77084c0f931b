"""Every method on gradients that are missing, zero or not finite, on frozen weights and on other dtypes."""

import contextlib
import math

import pytest
import torch

import lets_kernels as lk
from support.family import BESIDE, FAMILY, ONE_EACH, ONE_PASS, assert_same, build, held, plainest, takes
from support.given_gradients import Toy

SHAPES = ((3, 4, 2, 2), (7,), (5, 6))
#: What a method has counted of a first gradient though its step is skipped for the second one, as its docstring says.
COUNTED = {
    lk.FriendlySAM: (".lets_kernels.average", "direction.updates"),
    lk.VaSSO: (".lets_kernels.average", "direction.updates"),
    lk.AESAM: ("schedule.mean", "schedule.variance"),
    lk.AELookSAM: ("schedule.mean", "schedule.variance"),
    lk.BSAM: (".precision",),
    lk.LightSAM: ("length.sum",),
    lk.SAMPa: (".lets_kernels.ahead",),
}


def step(opt, toy, first, second):
    """One step in the two-step shape with gradients by hand, both passes in any case; theta + eps."""
    opt.zero_grad()
    if opt.direction.needs_gradient:
        with opt.first_pass() if opt.direction.starts else contextlib.nullcontext():
            toy.set_grads(first)
    opt.first_step(zero_grad=True)
    moved = [p.detach().clone() for p in toy.params]
    toy.set_grads(second)
    while opt.ascents_left:
        opt.first_step(zero_grad=True)
        toy.set_grads(second)
    opt.second_step(zero_grad=True)
    return moved


def made(name, steps=0, dtype=torch.float32, base="momentum", shapes=SHAPES, **options):
    toy = Toy(dtype, shapes)
    opt = build(name, toy.params, base, **options)
    for i in range(steps):
        step(opt, toy, toy.grads(2 * i), toy.grads(2 * i + 1))
    return toy, opt


def without(state, *suffixes):
    return {k: v for k, v in state.items() if not k.endswith(("random.count", *suffixes))}


def weights(toy):
    return [p.detach().clone() for p in toy.params]


def same(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [name for name in ONE_EACH if name not in ONE_PASS])
def test_a_first_gradient_that_is_not_finite_skips_the_step(backend, name, value):
    """Weights, the base optimizer's state and all that a part keeps stay as they are, to the bit; though the second
    gradient is sound. The step after it is taken. (Those with one pass have no first gradient.)"""
    toy, opt = made(name, 1, backend=backend.name)
    before, grads = held(opt), toy.grads(10)
    grads[1][3] = value
    moved = step(opt, toy, grads, toy.grads(11))
    assert same(moved, [before[f"weights.{i}"] for i in range(3)])
    assert_same(without(before), without(held(opt)))
    assert opt.skipped == 1
    step(opt, toy, toy.grads(12), toy.grads(13))
    after = held(opt)
    assert opt.skipped == 1 and not torch.equal(after["weights.0"], before["weights.0"])
    assert all(torch.isfinite(v).all() for v in after.values())


@pytest.mark.parametrize("name", ["friendly", "vasso", "sparse", "bsam", "looksam", "aesam"])
def test_nor_does_one_in_the_very_first_step_begin_anything(backend, name):
    """Averages still begin with the first gradient that is finite, and the mask is still to be selected."""
    toy, opt = made(name, backend=backend.name)
    grads = toy.grads(10)
    grads[1][3] = math.nan
    step(opt, toy, grads, toy.grads(11))
    twin, other = made(name, backend=backend.name)
    for a, b in ((toy, opt), (twin, other)):
        a.set_grads(a.grads(12))
        with b.first_pass() if b.direction.starts else contextlib.nullcontext():
            a.set_grads(a.grads(12))
        b.first_step()
    if name == "looksam":  # whose second step is none that perturbs
        assert same(weights(toy), weights(Toy(torch.float32, SHAPES)))
    else:
        assert same(weights(toy), weights(twin)) and not same(weights(toy), weights(Toy(torch.float32, SHAPES)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ONE_EACH)
def test_a_second_gradient_that_is_not_finite_skips_the_step(backend, name, value):
    """Weights and the base optimizer's state stay, and LookSAM's g_v. Averages have counted the first gradient."""
    toy, opt = made(name, 1, backend=backend.name)
    before, grads = held(opt), toy.grads(11)
    grads[1][3] = value
    step(opt, toy, toy.grads(10), grads)
    after, counted = held(opt), COUNTED.get(FAMILY[name].cls, ())
    assert opt.skipped == 1
    assert_same(without(before, *counted), without(after, *counted))
    for suffix in counted:
        assert any(k.endswith(suffix) and not torch.equal(v, after[k]) for k, v in before.items()), suffix
    assert all(torch.isfinite(v).all() for v in after.values())
    step(opt, toy, toy.grads(12), toy.grads(13))
    assert not torch.equal(held(opt)["weights.0"], before["weights.0"])


@pytest.mark.parametrize("name", [name for name in ONE_EACH if takes(name, "sgd")])
def test_zero_gradients_leave_the_weights_where_they_are(backend, name):
    """No NaN, and not by a bit: from the very first step on, and after steps whose gradients were not zero."""
    own = {"weight_decay": 0.0, "beta1": 0.0} if name == "bsam" else {}
    toy, opt = made(name, backend=backend.name, base="sgd", **own)
    zeros = [torch.zeros(s) for s in SHAPES]
    for i in range(3):
        before = weights(toy)
        moved = step(opt, toy, zeros, zeros)
        still = name not in ("rgsam", "rsam", "random-sam")  # these move along random numbers
        still &= not (name in ("friendly", "vasso", "sampa") and i > 0)  # and these along what they remember
        assert same(moved, before) or not still
        assert same(weights(toy), before)
        assert all(torch.isfinite(v).all() for v in held(opt).values())
        step(opt, toy, toy.grads(2 * i), toy.grads(2 * i + 1))


# Others go along random numbers, or have no base optimizer.
@pytest.mark.parametrize("name", [n for n in ONE_EACH if n not in (*BESIDE, *ONE_PASS)])
def test_a_zero_first_gradient_perturbs_nothing_and_the_step_is_taken(backend, name):
    """Along the second gradient: epsilon is zero, not NaN."""
    toy, opt = made(name, backend=backend.name, base="sgd")
    before, grads = weights(toy), toy.grads(1)
    assert same(step(opt, toy, [torch.zeros(s) for s in SHAPES], grads), before)
    factor = {"norm-penalty": 0.8, "wsam": 1.5, "stable-sam": 0.0, "lookbehind": 0.6 * 3}.get(name, 1.0)
    for p, x, g in zip(toy.params, before, grads, strict=True):
        torch.testing.assert_close(p.detach(), x - 0.1 * factor * g)


def test_a_zero_first_gradient_has_no_unit_vector(backend):
    """The normalised part of the gradient penalty is zero, not NaN."""
    toy, opt = made("norm-penalty", backend=backend.name, base="sgd", normalized=True)
    before, grads = weights(toy), toy.grads(1)
    assert same(step(opt, toy, [torch.zeros(s) for s in SHAPES], grads), before)
    for p, x, g in zip(toy.params, before, grads, strict=True):
        torch.testing.assert_close(p.detach(), x - 0.08 * g)


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_gradient_in_one_pass_only_leaves_nothing_perturbed(backend, name):
    """Of the three parameters one has a gradient in the first pass only, one in the second only, one in both; then in
    other roles. A parameter without a second gradient stays where it was, to the bit; all stay finite."""
    toy, opt = made(name, backend=backend.name, base=plainest(name))
    for i in range(3):
        before, first, second = weights(toy), toy.grads(2 * i), toy.grads(2 * i + 1)
        lacks_second, lacks_first = i % 3, (i + 1) % 3
        first[lacks_first], second[lacks_second] = None, None
        step(opt, toy, first, second)
        assert torch.equal(toy.params[lacks_second], before[lacks_second])
        assert not torch.equal(toy.params[(i + 2) % 3], before[(i + 2) % 3])
        assert all(torch.isfinite(v).all() for v in held(opt).values())


@pytest.mark.parametrize("name", [n for n in ONE_EACH if n not in (*BESIDE, *ONE_PASS, "sparse")])
def test_a_first_gradient_that_is_missing_counts_as_zero(backend, name):
    """Also in the products of a descent, and in an average that begins without it. (Noise moves a parameter that takes
    part, and a mask is a share of those that do.)"""
    ends = []
    for missing in (None, torch.zeros(SHAPES[1])):
        toy, opt = made(name, backend=backend.name, base="sgd")
        for i in range(2):
            first = toy.grads(2 * i)
            first[1] = missing if i == 0 else first[1]
            moved = step(opt, toy, first, toy.grads(2 * i + 1))
            ends.append([*moved, *weights(toy)])
    assert same(ends[0], ends[2]) and same(ends[1], ends[3])


@pytest.mark.parametrize("name", ONE_EACH)
def test_no_gradients_at_all(backend, name):
    """In a step between others: nothing moves, and the next step is taken."""
    toy, opt = made(name, 1, backend=backend.name)
    before, none = weights(toy), [None] * 3
    step(opt, toy, none, none)
    assert same(weights(toy), before)
    step(opt, toy, toy.grads(4), toy.grads(5))
    assert not same(weights(toy), before) and all(torch.isfinite(v).all() for v in held(opt).values())


@pytest.mark.parametrize("name", ONE_EACH)
def test_frozen_parameters_take_no_part(backend, name):
    """One that is frozen, last in its group, changes no bit of the others and no bit itself: no norm, no draw and no
    mask counts it."""
    toy, opt = made(name, 3, backend=backend.name)
    expected = weights(toy)
    twin = Toy(torch.float32, SHAPES)
    frozen = torch.nn.Parameter(torch.ones(4), requires_grad=False)
    opt = build(name, [*twin.params, frozen], backend=backend.name)
    for i in range(3):
        step(opt, twin, twin.grads(2 * i), twin.grads(2 * i + 1))
    assert same(weights(twin), expected) and torch.equal(frozen, torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ONE_EACH)
def test_narrow_dtypes_stay_within_their_rounding(backend, name, dtype):
    """Against the same three steps in float64 from the same numbers: weights below eight, and some twenty roundings of
    half a unit each in them and in what they are moved by. The draws are the same; so is theta + epsilon, so far."""
    narrow, opt = made(name, dtype=dtype, backend=backend.name)
    wide = Toy(torch.float64, SHAPES)
    for p, x in zip(wide.params, narrow.params, strict=True):
        p.data.copy_(x.detach())
    other = build(name, wide.params, backend="cpu")
    bound = 20 * 8 * torch.finfo(dtype).eps / 2
    for i in range(3):
        first, second = narrow.grads(2 * i), narrow.grads(2 * i + 1)
        found = step(opt, narrow, first, second)
        expected = step(other, wide, [g.double() for g in first], [g.double() for g in second])
        for x, y in zip([*found, *weights(narrow)], [*expected, *weights(wide)], strict=True):
            assert x.dtype is dtype and (x.double() - y).abs().max() <= bound
    assert max(float(x.abs().max()) for x in weights(wide)) < 8
    for k, v in held(opt).items():
        assert torch.isfinite(v).all() and (v.dtype == dtype or not k.endswith(("average", "orthogonal", "precision")))
