"""Sharpness in balls: quadratics whose maximum is known, brute force, and SAM's own perturbation."""

import math

import pytest
import torch

from lets_kernels import ASAM, SAM
from lets_kernels.sharpness import Objective, along_gradient, in_ball, m_sharpness
from support.known_minima import entropy, largest_in_ball, quadratic, small, symmetric

VALUES = [0.1, 0.5, 1.0, 2.0, 4.0]
A = symmetric(VALUES)
THETA = torch.tensor([0.3, -0.2, 0.5, 0.1, -0.4], dtype=torch.float64)
RHO = 0.3


def test_at_the_minimum_it_is_half_the_largest_eigenvalue():
    """½ λ_max ρ². From the minimum itself there is no way up: it takes the random starts."""
    at = quadratic(torch.zeros(5, dtype=torch.float64), [A])
    found = in_ball(at, RHO, steps=40)
    # The ascent is a power iteration whose error shrinks by (1 + 2/4)/2 in a step on average: below 1e-4 after 40.
    assert found.value == pytest.approx(0.5 * 4 * RHO**2, rel=1e-4)
    assert found.value <= 0.5 * 4 * RHO**2 * (1 + 1e-12), "a point outside of the ball"
    assert in_ball(at, RHO, starts=0).value == 0


def test_beside_the_minimum_it_is_the_trust_region_problem():
    at = quadratic(THETA, [A])
    found = in_ball(at, RHO, steps=60)
    known = largest_in_ball(A, THETA, RHO)
    assert known * (1 - 1e-4) <= found.value <= known * (1 + 1e-12)
    assert found.epsilon.norm() <= RHO * (1 + 1e-12)
    assert found.loss == pytest.approx(float(0.5 * THETA @ A @ THETA), rel=1e-14)
    assert found.worst - found.loss == found.value


def test_asams_ball_is_the_ball_of_scaled_weights():
    """With ε = T u the quadratic is one in u, with T A T, at T⁻¹θ."""
    scale = THETA.abs() + 0.05
    found = in_ball(quadratic(THETA, [A]), RHO, adaptive=True, xi=0.05, steps=60)
    known = largest_in_ball(scale[:, None] * A * scale, THETA / scale, RHO)
    assert known * (1 - 1e-4) <= found.value <= known * (1 + 1e-12)
    assert (found.epsilon / scale).norm() <= RHO * (1 + 1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_box_has_its_maximum_in_a_corner(adaptive):
    """For a diagonal A each weight goes ρ T outwards: Σ a (|θ| ρT + ½ ρ²T²)."""
    a = torch.tensor(VALUES, dtype=torch.float64)
    reach = RHO * ((THETA.abs() + 0.05) if adaptive else torch.ones(5, dtype=torch.float64))
    known = float((a * (THETA.abs() * reach + 0.5 * reach**2)).sum())
    for found in (
        in_ball(quadratic(THETA, [torch.diag(a)]), RHO, p=math.inf, adaptive=adaptive, xi=0.05),
        along_gradient(quadratic(THETA, [torch.diag(a)]), RHO, p=math.inf, adaptive=adaptive, xi=0.05),
    ):
        assert found.value == pytest.approx(known, rel=1e-12)
        torch.testing.assert_close(found.epsilon, reach * THETA.sign(), rtol=1e-12, atol=0)


def test_the_box_at_a_minimum_by_brute_force():
    at = quadratic(torch.zeros(5, dtype=torch.float64), [A])
    corners = RHO * torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 5)
    known = float((0.5 * (corners @ A * corners).sum(1)).max())
    found = in_ball(at, RHO, p=math.inf, starts=12)  # the ascent ends in a corner, not always in the highest
    assert found.value == pytest.approx(known, rel=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
def test_along_the_gradient_is_the_step_of_the_optimizer(adaptive):
    """ε from the engine's own first_step, which ends in the same loss."""
    model, at = small(batches=(21,))
    found = along_gradient(at, RHO, adaptive=adaptive)
    model.eval()
    optimizer = (ASAM if adaptive else SAM)(model.parameters(), torch.optim.SGD, rho=RHO, lr=0.1)
    before = at.weights
    entropy(model, at._data[0]).backward()
    optimizer.first_step()
    epsilon = at.weights - before
    # Both are float64; the weights that ε is read from are about 1, so it has an absolute error of some 1e-16.
    torch.testing.assert_close(found.epsilon, epsilon, rtol=1e-12, atol=1e-15)
    assert found.worst == pytest.approx(float(entropy(model, at._data[0]).detach()), rel=1e-12)
    assert in_ball(at, RHO, adaptive=adaptive, steps=1, starts=0).value >= 0


def test_asams_ball_does_not_see_how_layers_are_scaled():
    """Factors 4 and 1/4 around a ReLU leave the function as it is, and T with ξ = 0 scales with the weights."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.ReLU(), torch.nn.Linear(4, 1, bias=False))
    at = Objective(model.double(), lambda model, x: model(x).square().mean(), [torch.randn(6, 3).double()])
    asam, sam = (in_ball(at, 0.1, adaptive=adaptive, xi=0, steps=4).value for adaptive in (True, False))
    with torch.no_grad():
        model[0].weight *= 4
        model[2].weight /= 4
    assert in_ball(at, 0.1, adaptive=True, xi=0, steps=4).value == pytest.approx(asam, rel=1e-12)
    assert in_ball(at, 0.1, steps=4).value != pytest.approx(sam, rel=0.05)


def test_more_steps_and_starts_find_no_less():
    _, at = small()
    along = along_gradient(at, 0.5).value
    one = in_ball(at, 0.5, steps=8, starts=0).value
    assert along <= one <= in_ball(at, 0.5, steps=8, starts=3).value
    assert along < one


def test_m_sharpness_is_the_mean_over_batches_of_their_own_maxima():
    """The A of the batches differ, and the largest eigenvalue of their mean is less than the mean of the largest."""
    matrices = [symmetric(VALUES, seed) for seed in (1, 2)]
    zero = torch.zeros(5, dtype=torch.float64)
    at = quadratic(zero, matrices)
    assert m_sharpness(at, RHO, steps=40) == pytest.approx(0.5 * 4 * RHO**2, rel=1e-4)  # as for the single matrix
    whole = 0.5 * float(torch.linalg.eigvalsh(sum(matrices) / 2)[-1]) * RHO**2
    assert in_ball(at, RHO, steps=60).value == pytest.approx(whole, rel=1e-3)
    assert whole < 0.9 * m_sharpness(at, RHO, steps=40)


def test_m_sharpness_counts_samples():
    """Brute force: each batch as an objective of its own, weighed by its size."""
    model, at = small(batches=(8, 5))
    by_hand = 0.0
    for batch in at._data:
        by_hand += len(batch[1]) / 13 * in_ball(Objective(model, entropy, [batch]), 0.4, steps=4).value
    assert m_sharpness(at, 0.4, steps=4) == pytest.approx(by_hand, rel=1e-12)
    assert by_hand > in_ball(at, 0.4, steps=4).value


def test_a_loss_that_is_no_number_is_no_flat_one():
    at = Objective(*_logarithm())
    assert along_gradient(at, 2.0).value == math.inf
    assert in_ball(at, 2.0, steps=2, starts=0).value == math.inf


def _logarithm():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    return model, lambda model, x: -model.weight.log().sum(), [torch.zeros(1)]


def test_it_costs_what_it_says():
    _, at = small()
    at.cost.clear()
    in_ball(at, 0.1, steps=4, starts=2)
    assert at.cost == {"gradients": 3 * 4 * 3, "losses": 3 * 3}  # three batches
    at.cost.clear()
    along_gradient(at, 0.1)
    assert at.cost == {"gradients": 3, "losses": 3}


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"rho": 0}, "rho"),
        ({"rho": math.inf}, "rho"),
        ({"rho": 0.1, "p": 1}, "p must be 2 or infinity"),
        ({"rho": 0.1, "adaptive": True, "xi": -1}, "xi"),
        ({"rho": 0.1, "steps": 0}, "steps"),
        ({"rho": 0.1, "starts": -1}, "starts"),
    ],
)
def test_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        in_ball(quadratic(THETA, [A]), **arguments)
