"""LE-SAM, USAM and LightSAM: where they are SAM, what they do at their bounds, and what LightSAM keeps."""

import copy
import math

import pytest
import torch

import lets_kernels as lk
from support.given_gradients import Toy, snapshot, weights
from support.guard_bands import same_bits

SGD = torch.optim.SGD


def stepped(cls, steps=4, factors=(), **options):
    """A toy after steps along θ³, and its optimizer; ``factors``: of the gradients of each step's first pass."""
    toy = Toy(torch.float32)
    opt = cls(toy.params, SGD, lr=0.1, momentum=0.9, **options)
    for t in range(steps):
        factor = factors[t] if t < len(factors) else 1.0
        toy.set_grads([factor * p.detach() ** 3 for p in toy.params])
        opt.first_step()
        toy.set_grads([p.detach() ** 3 for p in toy.params])
        opt.second_step()
    return toy, opt


@pytest.mark.parametrize(
    "cls, options, rho",
    [
        (lk.USAM, {"rho": 0.2, "lam": 1.0}, 0.2),
        (lk.LESAM, {"rho": 1e6, "rho_max": 0.25}, 0.25),  # a rise that no gradient here reaches within ρ_max
        (lk.LESAM, {"rho": 0.0}, 0.0),
    ],
    ids=["usam", "le-sam-capped", "le-sam-zero"],
)
def test_where_they_are_sam_to_the_bit(cls, options, rho):
    toy, _ = stepped(cls, **options)
    assert same_bits(weights(toy), weights(stepped(lk.SAM, rho=rho)[0]))


def test_the_linearised_loss_rises_by_sigma():
    toy = Toy(torch.float64)
    opt, grads = lk.LESAM(toy.params, SGD, rho=0.3, rho_max=9.0, lr=0.1), [p.detach() ** 3 for p in toy.params]
    before = [p.detach().clone() for p in toy.params]
    toy.set_grads(grads)
    opt.first_step()
    rise = sum(float(((p.detach() - b) * g).sum()) for p, b, g in zip(toy.params, before, grads, strict=True))
    assert rise == pytest.approx(0.3, rel=1e-12)  # sums of some hundred float64 products
    length = torch.cat([(p.detach() - b).flatten() for p, b in zip(toy.params, before, strict=True)]).norm()
    opt.restore()
    assert float(length) == pytest.approx(0.3 / float(torch.cat([g.flatten() for g in grads]).norm()), rel=1e-12)


def test_in_another_geometry_the_norm_is_that_of_the_direction():
    """ASAM's ε = ℓ T²g/‖Tg‖ raises the linearised loss by ℓ ‖Tg‖."""
    toy = Toy(torch.float64)
    opt = lk.ASAM(toy.params, SGD, rho=0.3, xi=0.1, length=lk.LossEquated(9.0), lr=0.1)
    grads, before = [p.detach() ** 3 for p in toy.params], [p.detach().clone() for p in toy.params]
    toy.set_grads(grads)
    opt.first_step()
    rise = sum(float(((p.detach() - b) * g).sum()) for p, b, g in zip(toy.params, before, grads, strict=True))
    opt.restore()
    assert rise == pytest.approx(0.3, rel=1e-12)


def test_what_is_shown():
    """``rho`` is σ, ``applied_rho`` the length of ε; of each group where groups have their own."""
    _, opt = stepped(lk.LESAM, 1, rho=0.3, rho_max=9.0)
    norm = opt.metrics()["grad_norm"]
    assert float(opt.rho) == 0.3
    assert float(opt.metrics()["applied_rho"]) == pytest.approx(0.3 / float(norm), rel=1e-15)
    assert "applied_rho" not in stepped(lk.SAM, 1)[1].metrics()


@pytest.mark.parametrize("cls", [lk.LESAM, lk.USAM, lk.LightSAM])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step_and_leaves_no_trace(cls, factor):
    toy, opt = stepped(cls, 2, [1.0, factor])
    twin, other = stepped(cls, 1)
    assert same_bits(weights(toy), weights(twin)) and int(opt.skipped) == 1
    assert math.isfinite(opt.metrics()["applied_rho"])
    assert opt.length.state_dict() == other.length.state_dict()
    toy.set_grads([p.detach() ** 3 for p in toy.params])
    opt.first_step()
    opt.second_step()
    assert all(bool(w.isfinite().all()) for w in weights(toy)) and float(opt.metrics()["applied_rho"]) > 0


@pytest.mark.parametrize("cls", [lk.LESAM, lk.USAM, lk.LightSAM])
def test_a_gradient_of_zero_moves_nothing(cls):
    toy, opt = Toy(torch.float32), None
    opt, before = cls(toy.params, SGD, lr=0.1), [p.detach().clone() for p in toy.params]
    toy.set_grads([torch.zeros_like(p) for p in toy.params])
    opt.first_step()
    assert same_bits(weights(toy), before)
    opt.second_step()
    assert same_bits(weights(toy), before) and int(opt.skipped) == 0


def test_lightsam_goes_on_from_its_sum():
    toy, opt = stepped(lk.LightSAM, 3)
    twin = Toy(torch.float32)
    other = lk.LightSAM(twin.params, SGD, lr=0.1, momentum=0.9)
    with torch.no_grad():
        for p, q in zip(twin.params, toy.params, strict=True):
            p.copy_(q)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert float(other.length.state_dict()["sum"]) > 1
    for each, o in ((toy, opt), (twin, other)):
        each.set_grads([p.detach() ** 3 for p in each.params])
        o.first_step()
        o.second_step()
    assert all(map(same_bits, snapshot(opt), snapshot(other)))


def test_a_state_of_another_length_is_refused_and_one_without_is_that_of_sam():
    _, light = stepped(lk.LightSAM, 1)
    _, plain = stepped(lk.SAM, 1)
    for opt, state, word in ((plain, light, "unknown length"), (light, plain, "lacks length")):
        before = snapshot(opt)
        with pytest.raises(ValueError, match=f"nothing of it was loaded: .*{word}"):
            opt.load_state_dict(state.state_dict())
        assert all(map(same_bits, before, snapshot(opt)))
    stepped(lk.LESAM, 1)[1].load_state_dict(plain.state_dict())  # keeps nothing


def test_the_budget_rises_and_falls():
    sigma = lk.ScheduledRadius.trapezoid(0.4, 100, warmup=0.1, decay=0.2).schedule
    assert [sigma(t) for t in (0, 4, 9, 10, 79, 80)] == pytest.approx([0.04, 0.2, 0.4, 0.4, 0.4, 0.4], rel=1e-15)
    assert sigma(90) == pytest.approx(0.2, rel=1e-15) and 0 < sigma(99) < 0.01 and sigma(100) == sigma(500) == 0
    assert lk.ScheduledRadius.trapezoid(0.4, 100, warmup=0, decay=0).schedule(0) == 0.4
    opt = lk.LESAM(Toy(torch.float32).params, SGD, rho=0.4, steps=100, warmup=0.1, lr=0.1)
    assert float(opt.rho) == pytest.approx(0.04, rel=1e-15)


@pytest.mark.parametrize(
    "make, error, match",
    [
        (lambda p: lk.LESAM(p, SGD, rho=-1.0, lr=0.1), ValueError, "rho must be a finite number >= 0"),
        (lambda p: lk.LESAM(p, SGD, rho_max=math.inf, lr=0.1), ValueError, "rho_max must be a finite number >= 0"),
        (lambda p: lk.LESAM(p, SGD, rho="auto", steps=9, lr=0.1), TypeError, "leave one of the two out"),
        (lambda p: lk.LESAM(p, SGD, steps=9, warmup=0.9, lr=0.1), ValueError, "at most 1 together"),
        (lambda p: lk.USAM(p, SGD, lam=1.5, lr=0.1), ValueError, r"lam must be in \[0, 1\]"),
        (lambda p: lk.LightSAM(p, SGD, eps=-1.0, lr=0.1), ValueError, "eps must be a finite number >= 0"),
        (
            lambda p: lk.RandomSAM(p, SGD, length=lk.Unified(), lr=0.1),
            ValueError,
            "Unified needs a first gradient, and Gaussian takes none",
        ),
    ],
)
def test_what_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make(Toy(torch.float32).params)


@pytest.mark.parametrize("curvature", ["diagonal", "secant"])
@pytest.mark.parametrize("rho_max, moves", [(9.0, True), (1e-6, False)])
def test_a_learned_rise_stays_where_the_length_is_capped(curvature, rho_max, moves):
    """Below ρ_max σ moves as a radius does; at ρ_max the loss does not depend on it."""
    toy = Toy(torch.float64)
    opt = lk.LESAM(toy.params, SGD, lk.LearnedRadius(0.3, curvature=curvature, lr=0.1), rho_max, lr=0.1)

    def closure(factor):
        def run():
            toy.set_grads([factor * p.detach() ** 3 for p in toy.params])
            return torch.tensor(factor)

        return run

    opt.step(closure(1.0), closure(2.0))
    assert (float(opt.metrics()["rho_grad"]) != 0) is moves and (float(opt.rho) != pytest.approx(0.3)) is moves


class Rising(lk.Length):
    """A length of one's own: with the loss that the optimizer has seen."""

    fixed = False

    def of(self, rho, norm):
        return rho * norm


class ByLoss(lk.Radius):
    """A radius that sees the step: its number, ‖g‖² and the loss, all on the device."""

    rho = 1.0

    def value(self, index, group, moment):
        return moment.loss / moment.first.squared_norm.sqrt() / (1 + moment.step)


def test_ones_own_length_and_radius_plug_in():
    toy = Toy(torch.float64)
    opt = lk.SAM(toy.params, SGD, ByLoss(), length=Rising(), lr=0.1)
    for t in range(2):
        before = [p.detach().clone() for p in toy.params]
        toy.set_grads([p.detach() ** 3 for p in toy.params])
        opt.first_step(loss=torch.tensor(0.6))
        moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(toy.params, before, strict=True)]).norm()
        assert float(moved) == pytest.approx(0.6 / (1 + t), rel=1e-7)  # the loss is a float32
        toy.set_grads([p.detach() ** 3 for p in toy.params])
        opt.second_step()
