"""Param groups: their options travel with the parameters, and their number costs no calls."""

import importlib

import pytest
import torch

import lets_kernels as lk
from support.backends import MODULES
from support.core_methods import BASES
from support.given_gradients import Toy, snapshot, weights
from support.guard_bands import same_bits
from support.inside import space

pytestmark = pytest.mark.own
SHAPES = ((4, 2, 3, 3), (5,), (6, 7), (3,), (), (2, 2))
SGD = torch.optim.SGD
ASAM = {"adaptive": True, "xi": 0.1}


def toys(*options, dtype=torch.float64, flatten=False, method=lk.SAM, base=torch.optim.SGD, backend="auto", **given):
    """A Toy, and an optimizer over as many groups of its parameters as there are options."""
    toy = Toy(dtype, SHAPES)
    groups = [{"params": toy.params[i :: len(options)], **own} for i, own in enumerate(options)]
    return toy, method(groups, base, backend=backend, flatten=flatten, **{"lr": 0.1, **given})


def dropped(*args, **options):
    """Drawn tensors are perturbed, and no others."""
    return lk.SAM(*args, direction=lk.Dropped(0.5, granularity="tensor"), **options)


def group_of(options, i):
    return options[i % len(options)]


def counted(monkeypatch, backend):
    """The calls of every op, from now on."""
    module, calls = importlib.import_module(MODULES[backend]), {}
    for op in ("grad_norm", "perturb_", "restore_sgd_", "restore_adamw_", "all_finite_"):
        original = getattr(module, op)

        def call(*args, op=op, original=original):
            calls[op] = calls.get(op, 0) + 1
            return original(*args)

        monkeypatch.setattr(module, op, call)
    return calls


@pytest.mark.parametrize("flatten", [False, True], ids=["apart", "flat"])
@pytest.mark.parametrize("base", ["momentum", "adamw", "rmsprop"])
@pytest.mark.parametrize("method", [lk.SAM, lk.ASAM, lk.LETSSAM, lk.SparseSAM, dropped])
def test_groups_that_agree_change_no_bit(backend, method, base, flatten):
    """Six groups in the order of the parameters are one: the weights, perturbed and stepped, the radius, the state."""
    cls, _, options, _ = BASES[base]
    ends = []
    for count in (1, 6):
        rho = lk.LearnedRadius(0.1, curvature="secant", validation="next") if method is lk.LETSSAM else 0.1
        given = {"rho": rho, **options, **({"seed": 3} if method in (lk.SparseSAM, dropped) else {})}
        toy = Toy(torch.float32, SHAPES)
        groups = [{"params": toy.params[i : i + 6 // count]} for i in range(0, 6, 6 // count)]
        opt = method(groups, cls, backend=backend.name, flatten=flatten, **given)
        found = []
        for step in range(3):
            toy.set_grads(toy.grads(2 * step))
            opt.first_step()
            found += weights(toy)
            toy.set_grads(toy.grads(2 * step + 1))
            opt.second_step()
            found += [*weights(toy), opt.rho.flatten()[:1]]
        assert len(opt.param_groups) == count and len(space(opt).buckets) == 1
        ends.append(found + snapshot(opt)[1:])
    assert same_bits(*ends)


@pytest.mark.parametrize(
    "base",
    [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.Adam, {}),
        (torch.optim.AdamW, {}),
    ],
    ids=["momentum", "nesterov", "adam", "adamw"],
)
def test_groups_step_by_their_own_options(backend, base):
    """As torch's optimizer on the same groups does along the second gradients, in float64: some roundings differ."""
    cls, given = base
    own = [{"lr": 0.1}, {"lr": 0.05, "weight_decay": 0.3}, {"lr": 0.2, "weight_decay": 0.01}]
    if cls is torch.optim.SGD:
        own[2]["momentum"] = 0.5
    else:
        own[1] |= {"betas": (0.5, 0.9), "eps": 1e-3}
    toy, opt = toys(*own, base=cls, backend=backend.name, rho=0.3, **given)
    plain = Toy(torch.float64, SHAPES)
    groups = [{"params": plain.params[i :: len(own)], **options} for i, options in enumerate(own)]
    theirs = cls(groups, foreach=False, **given)
    for step in range(4):
        toy.steps(opt, 1, start=step)
        plain.set_grads(plain.grads(2 * step + 1))
        theirs.step()
        assert opt.fused and [int(b.dirty) for b in space(opt).buckets] == [0]
    for ours, expected in zip(weights(toy), weights(plain), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("missing", [(), (0, 2)], ids=["all", "some-without-a-gradient"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam], ids=["sgd", "adam"])
def test_groups_of_other_kinds_are_steps_of_their_own(backend, monkeypatch, base, missing):
    """What an op takes for all runs at once (a flag, whether there is momentum) parts a bucket into a few calls. The
    parameter 2 is the only one of its group."""
    if base is torch.optim.SGD:
        own = [{"momentum": 0.9}, {"momentum": 0.0}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5}]
    else:
        own = [{"decoupled_weight_decay": i % 2 == 1, "weight_decay": 0.2} for i in range(4)]
    toy, opt = toys(*own, base=base, backend=backend.name, rho=0.3)
    plain = Toy(torch.float64, SHAPES)
    theirs = base([{"params": plain.params[i::4], **options} for i, options in enumerate(own)], lr=0.1, foreach=False)
    calls = counted(monkeypatch, backend.name)
    for step in range(3):
        first, second = ([None if i in missing else g for i, g in enumerate(toy.grads(2 * step + k))] for k in (0, 1))
        toy.two_steps(opt, first, second)
        plain.set_grads(second)
        theirs.step()
    assert opt.fused and [int(b.dirty) for b in space(opt).buckets] == [0]
    kinds = (2 if missing else 3) if base is torch.optim.SGD else 2
    if backend.name == "cpu":
        assert calls[f"restore_{'sgd' if base is torch.optim.SGD else 'adamw'}_"] == 3 * kinds
    for ours, expected in zip(weights(toy), weights(plain), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-14)


def test_kinds_of_the_same_shapes_keep_their_own_momentum(backend):
    own, shapes = [{}, {"nesterov": True}], [(3, 2)] * 2
    toy, plain = Toy(torch.float64, shapes), Toy(torch.float64, shapes)
    opt, theirs = (
        make([{"params": [p], **options} for p, options in zip(t.params, own, strict=True)], lr=0.1, momentum=0.9)
        for t, make in ((toy, lambda p, **o: lk.SAM(p, torch.optim.SGD, backend=backend.name, **o)), (plain, SGD))
    )
    for step in range(3):
        toy.steps(opt, 1, start=step)
        plain.set_grads(plain.grads(2 * step + 1))
        theirs.step()
    for ours, expected in zip(weights(toy), weights(plain), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("missing", [(), (0, 3)], ids=["all", "some-without-a-gradient"])
def test_groups_are_perturbed_by_their_own_radius_and_xi(backend, missing):
    """ε = ρ T²g/‖Tg‖ with one norm over all groups, from the formula in float64."""
    own = [{"rho": 0.3, **ASAM}, {"rho": 0.1, "adaptive": False}, {"rho": 0.5, "adaptive": True, "xi": 0.7}]
    toy, opt = toys(*own, method=lk.ASAM, backend=backend.name)
    before = weights(toy)
    grads = [None if i in missing else g for i, g in enumerate(toy.grads(0))]
    toy.set_grads(grads)
    opt.first_step()
    scales = []
    for i, w in enumerate(before):
        options = group_of(own, i)
        scales.append(w.abs() + options["xi"] if options["adaptive"] else torch.ones_like(w))
    pairs = [(t, g) for t, g in zip(scales, grads, strict=True) if g is not None]
    norm = sum(float((t * g).square().sum()) for t, g in pairs) ** 0.5
    for i, (w, t, g, moved) in enumerate(zip(before, scales, grads, weights(toy), strict=True)):
        expected = w if g is None else w + group_of(own, i)["rho"] * t * t * g / norm
        torch.testing.assert_close(moved, expected, rtol=1e-13, atol=1e-14)
    opt.restore()
    assert same_bits(weights(toy), before)


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_groups_cost_no_calls(backend, monkeypatch, base):
    cls, _, options, op = BASES[base]
    found = []
    for count in (1, 6):
        own = [{"lr": 0.1 / (1 + i), "weight_decay": 0.01 * i, "rho": 0.05 * (1 + i)} for i in range(count)]
        toy, opt = toys(*own, base=cls, backend=backend.name, **{k: v for k, v in options.items() if k != "lr"})
        toy.steps(opt, 1)
        with monkeypatch.context() as patch:
            calls = counted(patch, backend.name)
            toy.steps(opt, 2, start=1)
        found.append(calls)
    if backend.name == "foreach":  # torch's functions take one number for all, so it calls itself for each
        assert found[0][op] == 2
    else:
        assert found[0] == found[1] and found[0][op] == 2


def test_an_interrupt_between_the_kinds_of_a_bucket_restores_them_all(backend, monkeypatch):
    toy, opt = toys({"momentum": 0.9}, {"momentum": 0.0}, backend=backend.name, rho=3.0)
    toy.steps(opt, 1)
    before, module = weights(toy), importlib.import_module(MODULES[backend.name])
    original, calls = module.restore_sgd_, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    toy.set_grads(toy.grads(10))
    opt.first_step()
    toy.set_grads(toy.grads(11))
    with monkeypatch.context() as patch:
        patch.setattr(module, "restore_sgd_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.second_step()
    assert same_bits(weights(toy), before)
    toy.steps(opt, 1, start=3)


@pytest.mark.parametrize("radius", ["scheduled", "by-learning-rate", "tensors", "auto", "one-auto"])
def test_radii_that_move_are_those_of_every_group(backend, radius):
    """What `metrics` and `param_groups` show is what moved the weights: ‖ε‖² is Σ ρ² of the groups' shares of ‖g‖²."""
    rho = {
        "scheduled": lk.ScheduledRadius.linear(0.1, 0.5, 4),
        "by-learning-rate": lk.LearningRateRadius(0.4, 0.1),
        "tensors": 0.2,
        "auto": lk.AutoRadius(0.1, per_group=True),
        "one-auto": lk.AutoRadius(0.1),
    }[radius]
    toy, opt = toys({"lr": 0.1}, {"lr": 0.2}, backend=backend.name, rho=rho)
    if radius == "tensors":
        opt.param_groups[1]["rho"] = torch.tensor(0.7, dtype=torch.float64)
    for step in range(3):
        if radius == "by-learning-rate":
            opt.param_groups[0]["lr"] *= 0.5
        before, grads = weights(toy), toy.grads(2 * step)
        toy.set_grads(grads)
        opt.first_step()
        shown = [float(group["rho"]) for group in opt.param_groups]
        norm = sum(float(g.square().sum()) for g in grads) ** 0.5
        for i, (w, g, moved) in enumerate(zip(before, grads, weights(toy), strict=True)):
            torch.testing.assert_close(moved, w + shown[i % 2] * g / norm, rtol=1e-13, atol=1e-14)
        toy.set_grads(toy.grads(2 * step + 1))
        opt.second_step()


@pytest.mark.parametrize("radius", ["auto", "secant", "diagonal"])
def test_sums_of_a_group_are_those_of_its_own_parameters(backend, radius):
    """A parameter without a gradient, before others of its group, changes no radius."""
    ends = []
    for first in (0, 1):
        rho = lk.LearnedRadius(0.1, curvature=radius, validation="next", per_group=True) if radius != "auto" else None
        rho = rho or lk.AutoRadius(0.1, per_group=True)
        toy = Toy(torch.float64, SHAPES)
        groups = [{"params": toy.params[first:3]}, {"params": toy.params[3:], "lr": 0.03}]
        opt = lk.SAM(groups, torch.optim.SGD, rho, backend=backend.name, lr=0.1)
        for step in range(4):
            toy.two_steps(opt, *([None, *toy.grads(2 * step + k)[1:]] for k in (0, 1)))
        ends.append(opt.rho.tolist())
    assert ends[0] == pytest.approx(ends[1], rel=1e-12)  # float64 sums
    assert len({0.1, *ends[0]}) == 3


def test_a_bucket_of_one_group_adds_to_its_own_group(backend):
    """Of the second group only in one of the orders: weights of another dtype form a bucket of their own."""
    ends = []
    for order in (1, -1):
        toy = Toy([torch.float64, torch.float32, torch.float32], [(5,), (3, 2), (4,)])
        groups = [{"params": toy.params[:2]}, {"params": toy.params[2:], "lr": 0.03}][::order]
        opt = lk.SAM(groups, torch.optim.SGD, lk.AutoRadius(0.1, per_group=True), backend=backend.name, lr=0.1)
        toy.steps(opt, 4)
        assert [b.present for b in space(opt).buckets] in ([[0], [0, 1]], [[0, 1], [1]])
        ends.append(opt.rho.tolist()[::order])
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)  # sums in another order, of weights in float32
    assert ends[0][0] != pytest.approx(ends[0][1], rel=1e-3)


def test_a_shared_radius_that_rises_is_the_same_in_every_group(backend):
    toy, opt = toys({}, {}, {}, backend=backend.name, rho=lk.LearnedRadius(0.2, validation="next"), rho_warmup=4)
    before, grads = weights(toy), toy.grads(0)
    toy.set_grads(grads)
    opt.first_step()
    norm = sum(float(g.square().sum()) for g in grads) ** 0.5
    for w, g, moved in zip(before, grads, weights(toy), strict=True):
        torch.testing.assert_close(moved, w + 0.2 / 4 * g / norm, rtol=1e-13, atol=1e-14)
    opt.restore()


def test_the_precision_of_a_group_goes_by_its_own_weight_decay(backend):
    """s <- b s + (1 - b)(sqrt(s) |g| + damping + weight decay), from s = 4, in the groups of bSAM."""
    own = [{"weight_decay": 0.5}, {"weight_decay": 0.0}, {"weight_decay": 0.25}]
    toy = Toy(torch.float64, SHAPES)
    groups = [{"params": toy.params[i::3], **options} for i, options in enumerate(own)]
    opt = lk.BSAM(groups, lr=0.1, data_size=100, beta2=0.9, damping=0.1, precision=4.0, backend=backend.name)
    grads = [None if i == 1 else g for i, g in enumerate(toy.grads(0))]
    with opt.first_pass():
        toy.set_grads(grads)
    opt.first_step()
    toy.set_grads(grads)
    opt.second_step()
    for i, (p, g) in enumerate(zip(toy.params, grads, strict=True)):
        added = 0.1 + group_of(own, i)["weight_decay"]
        expected = torch.full_like(p, 4.0) if g is None else 0.9 * 4.0 + 0.1 * (2.0 * g.abs() + added)
        torch.testing.assert_close(opt.state[p]["precision"], expected.detach(), rtol=1e-14, atol=0)


def test_numbers_of_groups_are_one_where_they_agree_and_are_kept():
    toy, opt = toys({}, {}, {})
    toy.steps(opt, 1)
    (bucket,), all_runs = space(opt).buckets, tuple(range(len(SHAPES)))
    agreed, differ = {0: 0.5, 1: float("0.5"), 2: 0.5}, {0: 0.5, 1: 0.1, 2: 0.5}  # equal ones are two objects
    assert bucket.group_of == [0, 0, 1, 1, 2, 2] and bucket.by_run(agreed, all_runs) == 0.5
    assert bucket.by_run(differ, (1, 4, 2)) == [0.5, 0.5, 0.1]
    for given, expected in ((agreed, 0.5), (differ, [0.5, 0.5, 0.1, 0.1, 0.5, 0.5])):
        found = bucket.numbers(given)
        assert found.tolist() == expected and bucket.numbers(dict(given)) is found and found.dtype == torch.float64
        assert bucket.of_runs(found, all_runs) is found
        assert bucket.of_runs(found, (4, 2)).tolist() == (expected if given is agreed else [0.5, 0.1])
    one, other = torch.tensor(0.5), torch.tensor(0.25, dtype=torch.float64)
    assert bucket.numbers({0: one, 1: one, 2: one}).tolist() == 0.5
    assert bucket.numbers({0: one, 1: other, 2: 2.0}).tolist() == [0.5, 0.5, 0.25, 0.25, 2.0, 2.0]


def test_a_group_that_joins_takes_part_in_the_bucket(backend):
    toy, opt = toys({}, backend=backend.name, rho=0.1, momentum=0.9)
    toy.steps(opt, 1)
    more = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt.add_param_group({"params": [more], "lr": 0.01, "rho": 0.9})
    before = more.detach().clone()
    for step in (1, 2):
        toy.set_grads(toy.grads(2 * step))
        more.grad = torch.full_like(more, 2.0)
        opt.first_step()
        assert not torch.equal(more, before)
        more.grad = torch.full_like(more, 3.0)
        toy.set_grads(toy.grads(2 * step + 1))
        opt.second_step()
        before = more.detach().clone()
    (bucket,) = space(opt).buckets
    assert bucket.group_of == [0] * len(SHAPES) + [1] and bucket.places[-1] == 0
    momenta = 3.0 + (0.9 * 3.0 + 3.0)
    torch.testing.assert_close(
        more.detach(), 1 - 0.01 * torch.full((3,), momenta, dtype=torch.float64), rtol=1e-14, atol=0
    )
