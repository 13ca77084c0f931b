"""Other parameters have a gradient in the second pass than in the first (layer drop, experts): what was perturbed is
restored to the bit, and nothing else changes but what has a second gradient."""

import pytest
import torch

import lets_kernels as lk
from support import family
from support.core_methods import BASES
from support.family import ALWAYS, BESIDE, ONE_EACH
from support.given_gradients import Toy, weights
from support.guard_bands import same_bits

SHAPES = ((4, 2, 3, 3), (5,), (6, 7), (3,), ())
FIRST = {0, 1, 2}  # of the first group; the second has no gradient at all, so that its bucket is not perturbed
SECOND = {
    "others": {1, 2, 3},
    "another-group": {3, 4},
    "none": set(),
    "all": {0, 1, 2, 3, 4},
    "fewer": {2},
}


class Sets(Toy):
    """Five parameters in two groups; `pass_(n, those)` leaves the n-th gradients of those parameters alone."""

    def __init__(self, dtype=torch.float64):
        super().__init__(dtype, SHAPES)
        self.groups = [{"params": self.params[:3]}, {"params": self.params[3:]}]
        self.seen = []

    def given(self, number, those):
        return [g if i in those else None for i, g in enumerate(self.grads(number))]

    def pass_(self, number, those):
        self.seen.append(weights(self))
        self.set_grads(self.given(number, those))
        return torch.tensor(float(number))


def by_closure(opt, toy, number, sets, learned):
    again = opt.direction.ascents - 1
    numbers = iter([number, *[number + 1] * (1 + again), number + 2])
    left = iter([sets[0], *[sets[0]] * again, *sets[1:]])

    def closure():
        return toy.pass_(next(numbers), next(left))

    def validation():
        return toy.pass_(number + 3, sets[3])

    opt.zero_grad()
    opt.step(*((closure, validation) if learned else (closure,)))


def by_two_steps(opt, toy, number, sets, learned, context=False):
    with opt.first_pass():
        toy.pass_(number, sets[0])
    for _ in range(opt.direction.ascents - 1):
        with opt.perturbed():
            toy.pass_(number + 1, sets[0])
    if context:
        with opt.perturbed():
            toy.pass_(number + 1, sets[1])
        opt.step()
    else:
        opt.first_step(zero_grad=True)
        toy.pass_(number + 1, sets[1])
        opt.second_step()
    if learned:
        opt.radius_step(lambda: toy.pass_(number + 2, sets[2]), lambda: toy.pass_(number + 3, sets[3]))


def by_context(*args):
    by_two_steps(*args, context=True)


TAKES = (by_closure, by_two_steps, by_context)


def states(optimizer, params):
    """What the optimizer, or the base optimizer of a method, holds for each parameter."""
    state = getattr(optimizer, "base_optimizer", optimizer).state
    return [sorted((k, v) for k, v in state.get(p, {}).items() if torch.is_tensor(v)) for p in params]


def copied(states):
    return [[(k, v.clone()) for k, v in state] for state in states]


def alike(a, b):
    return [k for k, _ in a] == [k for k, _ in b] and same_bits([v for _, v in a], [v for _, v in b])


@pytest.mark.parametrize("take", TAKES)
@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("base", ["momentum", "adamw", "rmsprop"])
@pytest.mark.parametrize("method", ["sam", "asam", "flat", "letssam"])
def test_what_was_perturbed_is_restored_and_only_what_has_a_second_gradient_steps(backend, method, base, second, take):
    """First without any state, then after a step of all. The step is torch's own, to float64's rounding."""
    cls, _, options, op = BASES[base]
    toy, plain = Sets(), Sets()
    inner = cls(plain.groups, **options)
    if method == "letssam":
        opt = lk.LETSSAM(toy.groups, cls, 0.5, backend=backend.name, **options)
    else:
        kinds = {"sam": {}, "asam": {"adaptive": True}, "flat": {"flatten": True}}[method]
        opt = lk.SAM(toy.groups, cls, rho=0.5, backend=backend.name, **kinds, **options)
    everyone = set(range(len(SHAPES)))
    for number, first, those in ((0, FIRST, SECOND[second]), (10, everyone, everyone), (20, FIRST, SECOND[second])):
        before, held = weights(toy), copied(states(opt, toy.params))
        toy.seen.clear()
        take(opt, toy, number, (first, those, first, everyone), method == "letssam")
        moved = {i for i, (a, b) in enumerate(zip(toy.seen[1], before, strict=True)) if not same_bits(a, b)}
        assert moved == first and same_bits(toy.seen[0], before)
        assert opt.fused == (op is not None)
        plain.set_grads(plain.given(number + 1, those))
        inner.step()
        after = states(opt, toy.params)
        for i, (p, q) in enumerate(zip(toy.params, plain.params, strict=True)):
            if i in those:
                torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-14, atol=1e-14)
                assert not same_bits(p.detach(), before[i])
            else:
                assert same_bits(p.detach(), before[i]) and alike(after[i], held[i])
    assert opt.metrics()["skipped_steps"].item() == 0


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("name", ONE_EACH)
def test_other_gradients_in_the_second_pass_of_any_method(name, second):
    """What has no second gradient keeps its bits, state and all, but for bSAM's precision, which the first moves; what
    has none in the first pass is perturbed by noise alone, and is moved for it by a start."""
    toy, take = Sets(), TAKES[[*SECOND].index(second) % 3]
    if take is by_closure and name in (*family.PER_SAMPLE, *family.ONE_PASS):  # which call it in another way, or once
        take = by_context
    opt = family.build(name, toy.groups, **ALWAYS.get(name, {}))
    everyone, last = set(range(len(SHAPES))), set()
    for number, first, those in ((0, FIRST, SECOND[second]), (10, everyone, everyone), (20, FIRST, SECOND[second])):
        before, held = weights(toy), copied(states(opt, toy.params))
        toy.seen.clear()
        take(opt, toy, number, (first, those), False)
        moved = {i for i, (a, b) in enumerate(zip(toy.seen[1], before, strict=True)) if not same_bits(a, b)}
        if name in ("esam", "sparse"):
            assert moved <= first and {0, 2} & first <= moved
        else:
            begun = {i for i, own in enumerate(held) if own}
            known = begun if name in family.BY_STATE else first & last if name in family.STILL_AT_FIRST else first
            assert moved == (everyone if name == "random-sam" else known)
        assert same_bits(toy.seen[0], before) is (name not in BESIDE)
        after, last = states(opt, toy.params), first
        reached = those | first if name == "lookbehind" else those  # by any pass at θ + ε
        for i, p in enumerate(toy.params):
            if i in reached:
                assert not same_bits(p.detach(), before[i])
            else:
                assert same_bits(p.detach(), before[i])
                assert alike(after[i], held[i]) or name == "bsam"
    assert opt.metrics()["skipped_steps"].item() == 0
    assert all(bool(v.double().isfinite().all()) for v in family.held(opt).values())


@pytest.mark.parametrize("take", TAKES)
@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("curvature", ["secant", "diagonal"])
def test_a_radius_learns_from_what_both_passes_have(backend, curvature, second, take):
    """−η (ḡ_vl − ḡ_tr)ᵀ H ε̂ over the parameters with both gradients, H ε̂ = (ĝ − g)/ρ or ĝ² g/‖g‖; the train and the
    validation gradient are zero where there is none."""
    toy, rho, lr = Sets(), 0.5, 0.1
    radius = lk.LearnedRadius(rho, metric="gap", curvature=curvature)
    opt = lk.SAM(toy.groups, torch.optim.SGD, radius, backend=backend.name, lr=lr)
    sets = (FIRST, SECOND[second], {0, 2, 3}, {1, 2, 4})
    take(opt, toy, 0, sets, True)
    g, hat, train, val = (toy.given(number, those) for number, those in enumerate(sets))
    norm = torch.stack([x.norm() for x in g if x is not None]).norm()
    expected = torch.zeros((), dtype=torch.float64)
    for i in FIRST & SECOND[second]:
        inner = (hat[i] - g[i]) / rho if curvature == "secant" else hat[i] ** 2 * g[i] / norm
        outer = sum(sign * x[i] for sign, x in ((1, val), (-1, train)) if x[i] is not None)
        expected -= lr * (outer * inner).sum()
    torch.testing.assert_close(opt.metrics()["rho_grad"], expected, rtol=1e-12, atol=1e-14)
    assert bool(expected == 0) == bool(opt.rho == torch.tensor(rho, dtype=torch.float64).log().exp())
    assert same_bits(weights(toy), toy.seen[2])
