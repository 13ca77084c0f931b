"""DistributedDataParallel: ranks stay the same to the bit, and take the step of the formulas over all of them."""

import math

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from support import oracle
from support.ddp_training import (
    BESIDE_SAM,
    VALIDATION,
    base_of,
    batch,
    by_parts,
    closure,
    ended,
    joined,
    net,
    optimizer,
    replica,
    train,
)
from support.family import ONE_EACH, assert_same, held
from support.given_gradients import snapshot, weights
from support.guard_bands import same_bits
from support.lengths import at_length

BOTH = pytest.mark.parametrize("sync", [True, False], ids=["one-perturbation", "one-a-rank"])
PAIRS = [("sam", "momentum"), ("asam", "rmsprop"), ("lets-sam", "adam"), ("lets-asam", "momentum")]
#: The other methods, each on one of the base optimizers.
OTHERS = [(method, base_of(method, i)) for i, method in enumerate(BESIDE_SAM)]
#: Of these, what each rank can go along by its own first gradient.
ALONE = [pair for pair in OTHERS if pair[0].startswith(("rsam", "fisher-sam", "esam", "delta-sam", "p-1"))]
STEPS = at_length(200, 50)
RUNS = [
    *((*pair, sync, STEPS) for pair in PAIRS for sync in (True, False)),
    *((*pair, True, 30) for pair in OTHERS),
    *((*pair, False, 30) for pair in ALONE),
]


def functional(dtype=torch.float64):
    """loss(weights, batch) for the oracle."""
    module = net(dtype)
    return lambda theta, data: cross_entropy(functional_call(module, theta, data[0]), data[1])


def theta(dtype=torch.float64):
    return {name: p.detach().clone() for name, p in net(dtype).named_parameters()}


# ---- replicas never drift ------------------------------------------------------------------------------------------


def trained(rank, method, base, sync, steps, dtype=torch.float32, seed=None):
    torch.manual_seed(7 + rank)  # from which an optimizer without a seed draws one
    model = replica(dtype)
    opt = optimizer(model, method, base, sync_perturbation=sync, seed=seed)
    train(opt, model, lambda step: batch(rank, step, dtype), steps)
    return ended(opt)


def subtracted(rank, steps):
    """SAM whose ranks perturb along gradients of their own, and restore by θ ← (θ + ε) − ε."""
    model = replica()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        backward = closure(model, batch(rank, step))
        with model.no_sync():
            backward()
        with torch.no_grad():
            norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
            eps = [0.05 * p.grad / norm for p in model.parameters()]
            torch._foreach_add_(list(model.parameters()), eps)
        backward()
        with torch.no_grad():
            torch._foreach_sub_(list(model.parameters()), eps)
        base.step()
    return weights(model)


@pytest.mark.parametrize(("method", "base", "sync", "steps"), RUNS)
def test_replicas_are_equal_to_the_bit(ranks, method, base, sync, steps):
    """Weights, the base optimizer's state, the radius and its optimizer's state, what a method keeps, and its seed."""
    first, second = ranks.run(trained, method, base, sync, steps)
    assert same_bits(first, second)
    assert all(map(torch.isfinite, map(torch.sum, first)))


def test_replicas_that_restore_by_subtraction_drift(ranks):
    """The control of the test above: its check sees what it is there for."""
    assert not same_bits(*ranks.run(subtracted, STEPS))


# ---- the step is that of the formulas over all ranks ---------------------------------------------------------------


@pytest.mark.parametrize(("method", "base"), [*PAIRS, *((method, "momentum") for method in BESIDE_SAM)])
def test_two_ranks_take_the_step_of_one_process_on_the_joined_batch(ranks, method, base):
    """In float64, where the means of halves differ from one mean by some units of 1e-16. The same random numbers; ESAM
    and δ-SAM choose and weight among the samples of a rank, so there one process does so in each half."""
    found, _ = ranks.run(trained, method, base, True, 10, torch.float64, 3)
    alone = net(torch.float64)
    opt = by_parts(optimizer(alone, method, base, seed=3))
    train(opt, alone, lambda step: joined(step, torch.float64), 10)
    torch.testing.assert_close(found, ended(opt), rtol=1e-10, atol=1e-13)


MICRO = [("sam", "momentum"), ("sam", "adam"), ("asam", "rmsprop"), ("fisher-sam", "momentum"), ("rsam", "momentum")]


@pytest.mark.parametrize(("method", "base"), MICRO)
def test_a_perturbation_a_rank_is_that_of_micro_batches_in_one_process(ranks, method, base):
    """m-sharpness either way: in float64 the same to rounding, and not what one perturbation for all gives."""
    found, _ = ranks.run(trained, method, base, False, 10, torch.float64, 3)
    alone = net(torch.float64)
    opt = optimizer(alone, method, base, seed=3)
    for step in range(10):
        opt.step([closure(alone, batch(rank, step, torch.float64)) for rank in (0, 1)])
    torch.testing.assert_close(found, ended(opt), rtol=1e-10, atol=1e-13)
    other, _ = ranks.run(trained, method, base, True, 10, torch.float64, 3)
    assert not torch.allclose(found[1], other[1], rtol=1e-5, atol=0)


def slope(rank):
    """∂F/∂ρ of the first step."""
    model = replica(torch.float64)
    opt = optimizer(model, "lets-sam")
    train(opt, model, lambda step: batch(rank, step, torch.float64), 1)
    return opt.metrics()["rho_grad"]


def test_gradients_are_reduced_first_and_multiplied_after(ranks):
    """The mean over ranks of products of their own gradients is the slope of something else."""
    loss, start = functional(), theta()

    def product(train_batch, val_batch):
        _, g = oracle.gradient(loss, start, train_batch)
        eps = oracle.unit(g, oracle.identity(start))
        _, hat = oracle.gradient(loss, {k: start[k] + 0.05 * eps[k] for k in start}, train_batch)
        there = {k: start[k] - 0.1 * (hat[k] + 0.01 * start[k]) for k in start}
        (train_loss, after), (val_loss, val) = (oracle.gradient(loss, there, b) for b in (train_batch, val_batch))
        difference, change = ({k: a[k] - b[k] for k in start} for a, b in ((val, after), (hat, g)))
        return -0.1 * (val_loss - train_loss) * oracle.dot(difference, change) / 0.05

    found, again = ranks.run(slope)
    assert torch.equal(found, again)
    whole = product(joined(0, torch.float64), joined(VALIDATION, torch.float64))
    torch.testing.assert_close(found, whole, rtol=1e-9, atol=0)
    own = [product(*(batch(rank, step, torch.float64) for step in (0, VALIDATION))) for rank in (0, 1)]
    assert abs(sum(own) / 2 - whole) > 0.01 * abs(whole)


@pytest.mark.parametrize("method", ["lets-sam", "lets-asam"])
def test_a_radius_learns_from_perturbations_of_the_ranks(ranks, method):
    """Of ε_r on rank r, with Δ = ḡ_vl − ḡ_tr: secant Δᵀ(ĝ − mean g_r)/ρ, diagonal Δᵀ diag(ĝ²) mean ε̂_r."""
    found, _ = ranks.run(trained, method, "momentum", False, 8, torch.float64)
    loss, at = functional(), theta()
    secant, rho = method == "lets-sam", 0.05 if method == "lets-sam" else 0.5
    T = oracle.identity if secant else oracle.filterwise(0.01)
    base, learner = oracle.SGD(lr=0.1, momentum=0.9, weight_decay=0.01), oracle.Adam(lr=0.05)

    def over_ranks(of):
        values = [of(0), of(1)]
        return {k: (values[0][k] + values[1][k]) / 2 for k in at}

    for step in range(8):
        here, own = at, [oracle.gradient(loss, at, batch(rank, step, torch.float64))[1] for rank in (0, 1)]
        hats = [oracle.unit(g, T(here)) for g in own]
        perturbed = [{k: here[k] + rho * e[k] for k in here} for e in hats]
        hat = over_ranks(lambda r, p=perturbed, s=step: oracle.gradient(loss, p[r], batch(r, s, torch.float64))[1])
        at = base.step(here, hat)
        train_loss, after = oracle.gradient(loss, at, joined(step, torch.float64))
        val_loss, val = oracle.gradient(loss, at, joined(step + VALIDATION, torch.float64))
        first, direction = over_ranks(own.__getitem__), over_ranks(hats.__getitem__)
        product = {k: (hat[k] - first[k]) / rho if secant else hat[k] ** 2 * direction[k] for k in at}
        rate = -0.1 * (val_loss - train_loss) * oracle.dot({k: val[k] - after[k] for k in at}, product)
        rho = (
            learner.step({"nu": torch.tensor(math.log(rho), dtype=torch.float64)}, {"nu": rho * rate})["nu"]
            .exp()
            .item()
        )
    assert found[0].item() == pytest.approx(rho, rel=1e-9)
    torch.testing.assert_close(found[1 : 2 * len(at) : 2], list(at.values()), rtol=1e-9, atol=1e-12)


# ---- where a gradient is not finite, or zero, or not there ---------------------------------------------------------


def faulty(rank, method, base, sync, factor, which, options=None):
    """Two good steps, one with a factor on rank 1's loss in one pass, two good ones: before, after, and at the end."""
    model = replica()
    opt = optimizer(model, method, base, sync_perturbation=sync, **(options or {}))
    train(opt, model, lambda step: batch(rank, step), 2)
    before = snapshot(opt)
    factors = [factor if rank == 1 and call == which else 1.0 for call in range(3)]
    val = [closure(model, batch(rank, VALIDATION))] if opt.radius.learns else []
    opt.step(closure(model, batch(rank, 2), factors), *val)
    after, skipped = snapshot(opt), int(opt.metrics()["skipped_steps"])
    train(opt, model, lambda step: batch(rank, step), 2, start=3)
    return before, after, snapshot(opt), skipped


def spoiled(rank, method, which):
    """As ``faulty``, for the other methods: the seed draws a step that perturbs; by name, with what the parts keep."""
    model, found = replica(), []
    opt = optimizer(model, method, "momentum", seed=3, **({"k": 2} if method.startswith("looksam") else {}))
    last = 2 if method.startswith("esam") else 1  # after a pass without gradients
    for step in range(5):
        before, calls = held(opt), opt.metrics()["gradients"]
        factors = [math.inf if (rank, step, call) == (1, 2, which * last) else 1.0 for call in range(6)]
        opt.step(closure(model, batch(rank, step), factors, opt.samples))
        if step == 2:
            found = [before, held(opt), int(opt.metrics()["gradients"] - calls)]
    return *found, held(opt), int(opt.metrics()["skipped_steps"])


#: What has counted a first gradient that was finite, also where the step is skipped for the second.
COUNTED = (
    "average",
    "ahead",
    "precision",
    "direction.updates",
    "schedule.",
    "mask",
    "direction.selected",
    "length.sum",
)


@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("method", ONE_EACH)
def test_what_is_not_finite_on_one_rank_skips_the_step_of_every_method(ranks, method, which):
    """On both ranks; nothing moves but the count of random steps, and what a finite first gradient has moved."""
    (before, after, passes, end, skipped), other = ranks.run(spoiled, method, which)
    assert_same(after, other[1])
    assert_same(end, other[3])
    assert (passes, skipped) == (other[2], other[4])
    assert skipped == (passes > which)
    if skipped:
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        assert all(name == "random.count" or (which and any(part in name for part in COUNTED)) for name in moved), moved
    assert not torch.equal(after["weights.0"], end["weights.0"]) and torch.isfinite(end["weights.0"]).all()


@BOTH
@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize(
    ("method", "base", "factor"),
    [("sam", "momentum", math.inf), ("asam", "rmsprop", math.nan), ("lets-sam", "adam", math.inf)],
)
def test_what_is_not_finite_on_one_rank_skips_the_step_on_all(ranks, method, base, factor, which, sync):
    """Weights, state, radius and its optimizer stay; both count it; training goes on, and the same on both."""
    (before, after, end, skipped), other = ranks.run(faulty, method, base, sync, factor, which)
    assert (skipped, other[-1]) == (1, 1)
    assert same_bits(before, after)
    assert same_bits([before, after, end], list(other[:-1]))
    assert not same_bits(after, end)


def test_what_is_not_finite_in_a_pass_of_the_radius_leaves_the_radius(ranks):
    (before, after, end, skipped), other = ranks.run(faulty, "lets-sam", "momentum", True, math.nan, 2)
    assert skipped == 0
    assert torch.equal(before[0], after[0])
    assert not same_bits(before, after)
    assert same_bits([before, after, end], list(other[:-1]))
    assert all(map(torch.isfinite, map(torch.sum, end)))


@pytest.mark.parametrize("method", ["sam", "asam", "lets-sam", "lets-asam"])
def test_a_gradient_of_zero_on_one_rank_is_no_perturbation_there(ranks, method):
    (_, after, end, skipped), other = ranks.run(faulty, method, "momentum", False, 0.0, 0)
    assert skipped == 0
    assert same_bits([after, end], list(other[1:-1]))
    assert all(map(torch.isfinite, map(torch.sum, end)))
    if not method.startswith("lets"):
        alone = net()
        opt = optimizer(alone, method)
        for step in range(3):
            factors = [0.0, 1.0] if step == 2 else 1.0
            opt.step([closure(alone, batch(0, step)), closure(alone, batch(1, step), factors)])
        torch.testing.assert_close(after, snapshot(opt), rtol=1e-5, atol=1e-6)
