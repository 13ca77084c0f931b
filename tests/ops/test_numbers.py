"""What a norm can hold: the figures of docs/trust.md, and that what lies beyond them is skipped, counted, or said."""

import math

import pytest
import torch
from torch import nn

import lets_kernels as lk
from lets_kernels.ops import reference
from support.guard_bands import same_bits

pytestmark = [pytest.mark.own, pytest.mark.pairwise]
SGD = torch.optim.SGD
RHO = 0.05
SHAPE = torch.tensor([0.0, 1.0, -2.0, 0.5, 0.0, 2.0, -1.0, 0.25], dtype=torch.float64)


def perturbed(make, g, theta=0.0, second=1.0, **options):
    """By how much a step perturbs weights, and whether it was skipped. At zero nothing is lost by rounding."""
    p = nn.Parameter(torch.full_like(g, theta))
    opt = make([p], SGD, rho=RHO, lr=0.1, **options)
    start = p.detach().clone()
    p.grad = g.clone()
    opt.first_step(zero_grad=True)
    epsilon = p.detach() - start
    p.grad = torch.full_like(g, second)
    opt.second_step()
    assert theta or int(opt.skipped) == same_bits(p.detach(), start)
    return epsilon.double(), int(opt.skipped)


def unit(size, dtype, q=2.0):
    """A gradient whose q-norm is ``size``."""
    return (SHAPE / SHAPE.abs().pow(q).sum().pow(1 / q) * size).to(dtype)


def length(epsilon, p):
    top = epsilon.abs().max()
    if math.isinf(p) or top == 0:
        return top.item()
    return (top * (epsilon / top).abs().pow(p).sum().pow(1 / p)).item()


NARROW = (torch.float32, torch.bfloat16)


@pytest.mark.filterwarnings("ignore::lets_kernels.step.precision.PrecisionWarning")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-10, 1e20, 1e37])
@pytest.mark.parametrize("p", [1.0, 1.07, 1.15, 1.2, 1.5, 2.0, 3.0, math.inf])
def test_every_normal_float32_has_a_perturbation_of_length_rho(backend, p, size, dtype):
    q = math.inf if p == 1 else 1.0 if math.isinf(p) else p / (p - 1)
    g = unit(size, dtype, min(q, 40))
    epsilon, skipped = perturbed(lk.SAM, g, direction=lk.Gradient(p=p), backend=backend.name)
    assert not skipped
    # Rounded in float32 a few times, raised to q; weights of eight bits have 2^-9 each.
    assert length(epsilon, p) == pytest.approx(
        RHO, rel=(q if q < 100 else 1) * 2**-20 + (dtype != torch.float32) * 2**-8
    )
    assert torch.equal(epsilon.sign()[epsilon != 0], -(-g).sign()[epsilon != 0].double())


@pytest.mark.parametrize("rho, size", [(0.05, 1.4e-40), (1.0, 2.8e-39), (1e30, 2.8e-9)])
def test_where_rho_over_the_norm_overflows_nothing_is_perturbed(backend, rho, size):
    for factor, moves in ((1.0, False), (1.2, True)):
        g = unit(size * factor, torch.float32)
        p = nn.Parameter(torch.zeros(8))
        opt = lk.SAM([p], SGD, rho=rho, lr=0.1, backend=backend.name)
        p.grad = g
        opt.first_step()
        assert bool((p != 0).any()) == moves and bool(p.isfinite().all())
        opt.restore()


@pytest.mark.parametrize(
    "p, size, skipped", [(1.5, 2.8e-39, 0), (3.0, 2.8e-39, 0), (1.1, 2.8e-39, 1), (1.07, 2.8e-39, 1)]
)
def test_of_subnormal_gradients_other_norms_are_not_divided_by(backend, p, size, skipped):
    g = torch.tensor([0.0, size, 0.0])
    epsilon, found = perturbed(lk.SAM, g, direction=lk.Gradient(p=p), backend=backend.name)
    assert not epsilon.any() and found == skipped
    epsilon, found = perturbed(lk.SAM, 1.2 * g, direction=lk.Gradient(p=p), backend=backend.name)
    assert epsilon.any() and not found


FLOAT64 = {
    "sam": (2.0, 2.0, 1.5e-154, 1.5e-162, 1.34e154),
    "p1.5": (1.5, 3.0, 2.9e-103, 1.3e-108, 5.6e102),
    "p3": (3.0, 1.5, 8.1e-206, 2.8e-216, 3.19e205),
}


@pytest.mark.parametrize("name", FLOAT64)
def test_float64_beyond_its_sums(backend, name):
    """Too large is skipped and counted; too small is a step of the base optimizer."""
    p, q, least, nothing, most = FLOAT64[name]
    options = {"backend": backend.name, **({} if p == 2 else {"direction": lk.Gradient(p=p)})}
    for size in (least, least * 1e10, 1.0, most * 0.98 if q != 1.5 else 1e150):  # the second gradient is squared too
        epsilon, skipped = perturbed(lk.SAM, unit(size, torch.float64, q), **options)
        assert not skipped
        assert length(epsilon, p) == pytest.approx(RHO, rel=1e-9)
    for size in (nothing * 0.3, nothing * 1e-10, 0.0):  # no element's power is a number
        epsilon, skipped = perturbed(lk.SAM, unit(size, torch.float64, q), **options)
        assert not epsilon.any() and not skipped
    for size in (most * 1.02, 1e300):
        epsilon, skipped = perturbed(lk.SAM, unit(size, torch.float64, q), **options)
        assert not epsilon.any() and skipped


@pytest.mark.parametrize("p", [1.0, 1.07, 1.15, math.inf])
def test_other_norms_of_float64_hold_what_the_second_gradient_holds(backend, p):
    for size in (1e-300, 1e-200, 1e150):
        g = SHAPE * size
        epsilon, skipped = perturbed(lk.SAM, g, direction=lk.Gradient(p=p), backend=backend.name)
        assert not skipped and length(epsilon, p) == pytest.approx(RHO, rel=1e-9)
    _, skipped = perturbed(lk.SAM, SHAPE, direction=lk.Gradient(p=p), second=1.0e154, backend=backend.name)
    assert skipped  # 8 · 1e308


@pytest.mark.parametrize("theta, g, skipped", [(1e20, 3.3e18, 0), (1e20, 3.5e18, 1), (3e18, 1.2e20, 1)])
def test_adaptive_products_that_overflow_float32_are_skipped(backend, theta, g, skipped):
    gradient = torch.tensor([0.0, g])
    epsilon, found = perturbed(lk.SAM, gradient, theta=theta, adaptive=True, backend=backend.name)
    assert found == skipped
    assert bool(epsilon.any()) != skipped


@pytest.mark.parametrize("theta, g, what", [(1e19, 3.3, "finite"), (1e19, 3.5, "infinite"), (1e-20, 1e-7, "none")])
def test_adaptive_products_beside_float32(backend, theta, g, what):
    p = nn.Parameter(torch.tensor([theta, theta]))
    opt = lk.SAM([p], SGD, rho=RHO, adaptive=True, lr=0.1, backend=backend.name)
    p.grad = torch.tensor([0.0, g])
    opt.first_step()
    moved = (p.detach() - theta)[1].item()
    expected = {"finite": pytest.approx(RHO * theta, rel=1e-4), "infinite": math.inf, "none": 0.0}[what]
    assert moved == expected
    p.grad = torch.where(p.detach().isfinite(), 1.0, torch.nan)
    opt.second_step()
    assert int(opt.skipped) == (what == "infinite") and bool(p.isfinite().all())


@pytest.mark.parametrize(
    "dtype, sizes", [(torch.float32, (1e15, 1e20, 1e37)), (torch.float64, (1e120, 1e153))], ids=str
)
@pytest.mark.parametrize("eta", [1e-4, 1.0, 100.0])
def test_fisher_of_gradients_whose_squares_overflow(backend, eta, dtype, sizes):
    """ε = ρ F⁻¹g/√(gᵀF⁻¹g): with g² far above 1/η, F⁻¹g = 1/(ηg) and gᵀF⁻¹g = d/η."""
    for size in sizes:
        g = torch.tensor([1.0, -2.0, 3.0, -1.0], dtype=torch.float64).mul(size).to(dtype)
        epsilon, skipped = perturbed(lk.FisherSAM, g, eta=eta, backend=backend.name)
        expected = RHO / (g.double() * eta) * math.sqrt(eta / 4)
        assert not skipped
        assert torch.allclose(epsilon, expected, rtol=1e-3 if size > 1e30 and dtype == torch.float32 else 1e-5, atol=0)


@pytest.mark.ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("xi", [1e-4, 1.0, 7.0])
def test_every_backend_has_the_same_fisher_scale(backend, xi, dtype):
    top = 1e38 if dtype == torch.float32 else 1e300
    v = torch.tensor([0.0, 1.0, -(top**0.4), top**0.51, -(top**0.7), top], dtype=dtype)
    table = torch.tensor([[0, 6, -2, 0, 0]])
    number = torch.ones((), dtype=torch.float64)
    found = []
    for ops in (backend, reference):
        theta, saved = torch.zeros(6, dtype=dtype), torch.full((16,), torch.nan, dtype=dtype)
        dirty = torch.zeros((), dtype=torch.int64)
        ops.perturb_([theta], [v], saved, dirty, table, None, xi, 2.0, number, number)
        found.append(theta)
        total = ops.grad_norm([v], [], table, None, xi, 2.0).item()
        exact = sum(x * x / (1 + xi * x * x) if abs(x) < 1e100 else 1 / xi for x in v.tolist())
        assert total == pytest.approx(exact, rel=1e-5)
    assert same_bits(*found)
    assert bool((found[0] != 0)[1:].all() & found[0].isfinite().all())
