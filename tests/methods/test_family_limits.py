"""Where a method is another one: the base optimizer, SAM, or itself at another argument."""

import functools
import math

import pytest
import torch

import lets_kernels as lk
from support import family
from support.conv_net import Task
from support.core_methods import BASES
from support.family import FAMILY, PER_SAMPLE, SEED, build, few, held, take
from support.given_gradients import Toy
from support.inside import now, progress

# Two ways to the same gradient, in float64: sums in another order, a square root beside another. Ten steps, as in
# test_methods.py.
TIGHT = 1e-12


def ran(opt, task, steps):
    family.run(opt, task, task.batches[:steps])
    return [p.detach().clone() for p in task.net.parameters()]


def weights_after(name, backend, base="momentum", **options):
    task = Task(steps=4)
    opt = build(name, task, base, backend=backend.name, **options)
    return ran(opt, task, few(name, backend))


def sam(backend, base="momentum", rho=0.1, steps=4, **options):
    task = Task(steps=4)
    cls, _, base_options, _ = BASES[base]
    arguments = {"model": task.net, "backend": backend.name, **options}
    return ran(lk.SAM(task.net.parameters(), cls, rho, **arguments, **base_options), task, steps)


def bare(base="momentum", steps=4):
    """The base optimizer alone."""
    task = Task(steps=4)
    cls, _, options, _ = BASES[base]
    opt = cls(task.net.parameters(), **options)
    for batch, _ in task.batches[:steps]:
        task.closure(batch)()
        opt.step()
    return [p.detach().clone() for p in task.net.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def strayed(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


# name: arguments at which the method is SAM, with SAM's bits: the same gradients go the same way.
SAM_WHERE = {
    "rst": {"p": 1.0},
    "looksam": {"k": 1},
    "looksam-per-tensor": {"k": 1},
    "aesam": {"lambda1": -1e6, "lambda2": -1e6},
    "aelooksam": {"lambda1": -1e6, "lambda2": -1e6},
    "late-sam": {"fraction": 1.0},
    "gsam": {"alpha": 0.0},
    "norm-penalty": {"alpha": 1.0},
    "wsam-coupled": {"gamma": 0.5},
    "multi-step-sam": {"k": 1},
    "multi-step-sam-growing": {"k": 1, "rho": 0.1},
    "lookbehind": {"k": 1, "alpha": 1.0, "rho": 0.1},
    "rsam": {"gamma": 0.0},
    "friendly": {"sigma": 0.0},
    "friendly-text": {"sigma": 0.0},
    "vasso": {"theta": 1.0},
    "fisher-sam": {"eta": 0.0},
    "sparse": {"sparsity": 0.0},
    "sparse-dynamic": {"sparsity": 0.0},
    "esam": {"beta": 1.0, "gamma": 1.0},
    "esam-tensor": {"beta": 1.0, "gamma": 1.0},
    "delta-sam": {"power": 0.0},
}


@pytest.mark.parametrize("name", SAM_WHERE)
def test_where_a_method_is_sam(backend, name):
    found, expected = weights_after(name, backend, **SAM_WHERE[name]), sam(backend, steps=few(name, backend))
    if name in PER_SAMPLE:  # their gradient is that of losses averaged one by one, which torch sums in another order
        assert strayed(found, expected) <= TIGHT
    else:
        assert same(found, expected)


@pytest.mark.parametrize("name", ["friendly", "vasso", "esam", "esam-tensor"])
def test_where_an_adaptive_method_is_adaptive_sam(name, backend):
    """With a T for one group, another ξ for the next, and none for the last."""
    found = []
    for adaptive in (functools.partial(build, name, **SAM_WHERE[name]), adaptive_sam):
        task = Task(steps=4)
        p = list(task.net.parameters())
        groups = [{"params": p[:2]}, {"params": p[2:4], "xi": 0.05}, {"params": p[4:], "adaptive": False}]
        opt = adaptive(groups, adaptive=True, rho=0.5, model=task.net, backend=backend.name)
        found.append(ran(opt, task, 4))
    assert strayed(*found) <= TIGHT if name in PER_SAMPLE else same(*found)


def adaptive_sam(params, **options):
    return lk.SAM(params, BASES["momentum"][0], **options, **BASES["momentum"][2])


def test_p_2_is_sam(backend):
    assert same(sam(backend, direction=lk.Gradient(p=2.0)), sam(backend))


def test_where_r_gsam_is_gsam(backend):
    assert same(weights_after("rgsam", backend, gamma=0.0), weights_after("gsam", backend))
    assert same(weights_after("rgsam", backend, alpha=0.0), weights_after("rsam", backend))


def test_ae_looksam_without_reuse_is_ae_sam(backend):
    options = {"lambda1": -1.0, "lambda2": 2.0}
    a = weights_after("aelooksam", backend, **options, alpha=0.0)
    assert strayed(a, weights_after("aesam", backend, **options)) <= TIGHT


# bSAM has no base optimizer, R-GSAM goes along a gradient beside theta too. LookSAM's g_v is what is left of
# g_hat - g: nothing at all, where the two passes give the same bits.
AT_ZERO = [name for name in FAMILY if name not in ("bsam", "rgsam")]
#: What they add to the plain gradient cancels out but for rounding.
ROUNDS = ("gsam", "lookbehind", "norm-penalty", "wsam-coupled", *PER_SAMPLE)


@pytest.mark.parametrize("name", AT_ZERO)
def test_rho_0_is_the_base_optimizer(name, backend):
    """With the bits of its own fused step; and those are the base optimizer's but for rounding."""
    base, steps = "adamw" if backend.name == "cpu" else "momentum", few(name, backend)
    whole = {"gamma": 1.0} if FAMILY[name].cls is lk.ESAM else {}
    whole |= {"alpha": 1 / 3} if name == "lookbehind" else {}  # the mean of its three gradients
    whole |= {"lam": 0.0} if name == "sampa" else {}
    found = weights_after(name, backend, base, rho=0.0, **whole)
    expected = sam(backend, base, rho=0.0, steps=steps)
    assert strayed(found, expected) <= TIGHT if name in ROUNDS else same(found, expected)
    assert strayed(found, bare(base, steps)) <= TIGHT


def test_p_0_of_rst_is_the_base_optimizer(backend):
    assert same(weights_after("rst", backend, p=0.0), sam(backend, rho=0.0))


@pytest.mark.parametrize(
    "name, options", [("norm-penalty", {"normalized": True}), ("esam-tensor", {"drawn_norm": True})]
)
def test_where_what_the_authors_code_does_is_sam_too(name, options, backend):
    """To the bits of the method without this option, which is SAM there."""
    options = {**options, **SAM_WHERE[name]}
    assert same(weights_after(name, backend, **options), weights_after(name, backend, **SAM_WHERE[name]))


def test_no_late_step_is_the_base_optimizer(backend):
    assert same(weights_after("late-sam", backend, fraction=0.0), sam(backend, rho=0.0))


def test_gamma_0_of_wsam_is_the_base_optimizer(backend):
    """Decoupled with its bits; coupled but for rounding, as the norm penalty."""
    assert same(weights_after("wsam", backend, gamma=0.0), sam(backend, rho=0.0))
    assert strayed(weights_after("wsam-coupled", backend, gamma=0.0), bare()) <= TIGHT


def test_wsam_is_the_same_either_way_with_plain_sgd(backend):
    either = [weights_after("wsam", backend, "sgd", gamma=0.7, decouple=d) for d in (True, False)]
    assert strayed(*either) <= TIGHT


def test_alpha_0_of_the_norm_penalty_is_the_base_optimizer(backend):
    assert strayed(weights_after("norm-penalty", backend, alpha=0.0), bare()) <= TIGHT


@pytest.mark.parametrize(("limit", "near"), [(1.0, 1.01), (math.inf, 1e5)])
def test_the_ends_of_p_are_its_limits(backend, limit, near):
    """At p = 1.01 an element counts |g|^100 times as much as the largest, 1, and here at most 2^-100; at p = 1e5 the
    exponents of |g| and of the sum are 1e-5, so what is lost of rho is 1e-5 ln(1e6) for |g| >= 1e-6, and less."""
    toy, rho, ends = Toy(torch.float64), 0.01, []
    grads = [g / 10 for g in toy.grads(0)]
    grads[3][2, 1] = -1.0
    flat = torch.cat([g.reshape(-1) for g in grads])
    assert flat.abs().min() > 1e-6 and (flat.abs() > 0.5).sum() == 1
    before = torch.cat([p.detach().reshape(-1) for p in toy.params])
    for p in (limit, near):
        opt = lk.SAM(toy.params, torch.optim.SGD, rho, direction=lk.Gradient(p), backend=backend.name, lr=0.1)
        toy.set_grads(grads)
        opt.first_step()
        ends.append((torch.cat([p.detach().reshape(-1) for p in toy.params]) - before) / rho)
        opt.restore()
    exact, close = ends
    rounding = 1e-13  # of weights of about one, over rho
    assert (close - exact).abs().max() <= (rounding if limit == 1 else 2e-4)
    expected = flat.sign() * (flat.abs() == 1) if limit == 1 else flat.sign()
    assert (exact - expected).abs().max() <= rounding


def test_bsam_of_infinite_data_samples_nothing(backend):
    """The first pass is at the mean then, and needs no context; another seed changes nothing."""
    task = Task(steps=3)
    opt = build("bsam", task, data_size=math.inf, backend=backend.name)
    weights, seen = task.bits(), []

    def closure():
        seen.append([p.detach().clone() for p in task.net.parameters()])
        return task.closure(task.batches[0][0])()

    opt.step(closure)
    assert same(seen[0], weights) and not same(seen[1], weights)
    options = {"data_size": math.inf}
    assert same(weights_after("bsam", backend, seed=1, **options), weights_after("bsam", backend, seed=2, **options))
    assert not same(weights_after("bsam", backend, seed=1), weights_after("bsam", backend, seed=2))


@pytest.mark.parametrize("name", FAMILY)
def test_a_learning_rate_of_0_leaves_the_weights_as_they_are(backend, name):
    """To the bit, at every step: nothing of a perturbation or of a random start stays behind."""
    task = Task(steps=2)
    opt = build(name, task, family.plainest(name), backend=backend.name)
    for group in opt.param_groups:
        group["lr"] = 0.0
    before = task.bits()
    for batch, _ in task.batches[: few(name, backend)]:
        take(opt, task.net, batch)
        assert same(task.bits(), before)


@pytest.mark.parametrize("name", FAMILY)
def test_arguments_matter(name):
    """What stands in the registry is no limit: another rho and, where it draws, another seed give other weights."""
    ends = []
    for options in ({}, {"rho": 0.02}, {"seed": SEED + 1}):
        task = Task()
        opt = build(name, task, **options)
        family.run(opt, task, task.batches[:6])
        ends.append(held(opt))
    assert not torch.equal(ends[0]["weights.0"], ends[1]["weights.0"])
    draws = progress(opt).random.used and name != "sparse" and name != "sparse-interval"
    assert torch.equal(ends[0]["weights.0"], ends[2]["weights.0"]) is not draws


@pytest.mark.parametrize("p", [1.06, 1.01, 1.001])
def test_p_near_1_perturbs_by_small_gradients_too(backend, p):
    """|g|^q, with q of a thousand, is zero in float64 for most gradients; the direction is one all the same."""
    gradient = torch.tensor([1e-4, -3e-4, 2e-4, 2.9e-4], dtype=torch.float64)
    w = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    opt = lk.SAM([w], torch.optim.SGD, 0.5, direction=lk.Gradient(p=p), backend=backend.name, lr=0.1)
    w.grad = gradient.clone()
    opt.first_step()
    scaled, q = gradient / gradient.abs().max(), p / (p - 1)
    expected = 0.5 * scaled.sign() * scaled.abs() ** (q - 1) / (scaled.abs() ** q).sum() ** (1 / p)
    torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=1e-300)  # powers of 1000 times a rounding
    assert float(w.detach().abs().pow(p).sum() ** (1 / p)) == pytest.approx(0.5, rel=1e-12)
    norm = float(now(opt).step.metrics()["grad_norm"])
    assert norm == pytest.approx(float(gradient.abs().max() * (scaled.abs() ** q).sum() ** (1 / q)), rel=1e-12)
    opt.restore()
