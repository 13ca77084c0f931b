"""Curvature against exact Hessians in float64: matrices that are known, and a network's row by row."""

import math

import pytest
import torch
from scipy.sparse.linalg import eigsh

from lets_kernels.sharpness import Objective, eigenvalues, spectrum, trace
from support.known_minima import exact_hessian, quadratic, small, symmetric

VALUES = [-2.0, -0.5, 0.0, 0.3, 0.31, 1.0, 3.0, 5.0]
A = symmetric(VALUES)
AT = torch.linspace(-1, 1, 8, dtype=torch.float64)


@pytest.fixture(scope="module")
def network():
    """(objective, exact Hessian) of a small network with batch norm, in evaluation mode."""
    model, at = small()
    model.eval()
    hessian = exact_hessian(at, at._data)
    model.train()
    return at, hessian


def test_a_product_is_the_hessians(network):
    at, hessian = network
    vector = torch.randn(at.numel, dtype=torch.float64)
    # Errors of float64 in some hundred sums of numbers of size 1.
    torch.testing.assert_close(at.product(vector), hessian @ vector, rtol=1e-10, atol=1e-12)


def test_eigenvalues_of_a_matrix():
    found = eigenvalues(quadratic(AT, [A]), 3, tolerance=1e-12)
    torch.testing.assert_close(found.values, torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64), rtol=1e-10, atol=0)
    assert found.converged and found.products <= 8 and found.smallest == pytest.approx(-2, rel=1e-2)
    for value, vector in zip(found.values, found.vectors, strict=True):
        torch.testing.assert_close(A @ vector, value * vector, rtol=0, atol=1e-10)
        assert float(vector.norm()) == pytest.approx(1, rel=1e-12)


def test_eigenvalues_of_a_network(network):
    at, hessian = network
    exact = torch.linalg.eigvalsh(hessian).flip(0)
    found = eigenvalues(at, 4, tolerance=1e-6)
    assert found.converged and found.products < at.numel
    assert (found.values - exact[:4]).abs().max() <= 1e-6 * exact[0]
    oracle = torch.from_numpy(eigsh(hessian.numpy(), k=4, which="LA")[0].copy()).flip(0)
    assert (found.values - oracle).abs().max() <= 1e-6 * exact[0]


def test_errors_bound_how_far_off_it_is(network):
    at, hessian = network
    exact = torch.linalg.eigvalsh(hessian)
    found = eigenvalues(at, 2, steps=6, tolerance=1e-12)
    assert not found.converged and found.products == 6
    for value, error in zip(found.values, found.errors, strict=True):
        assert float((exact - value).abs().min()) <= error
    assert found.errors.max() > 1e-9, "nothing was left to bound"


def test_an_eigenvalue_that_occurs_often_is_found_as_often():
    """The vectors that H makes of one start end after two; new starts go on."""
    a = symmetric([1.0] * 5 + [3.0] * 3)
    found = eigenvalues(quadratic(AT, [a]), 8, steps=8)
    torch.testing.assert_close(
        found.values, torch.tensor([3.0] * 3 + [1.0] * 5, dtype=torch.float64), rtol=1e-9, atol=0
    )
    flat = eigenvalues(quadratic(AT, [torch.zeros(8, 8, dtype=torch.float64)]), 2)
    assert flat.values.tolist() == [0, 0] and flat.converged


def test_float32_stays_orthogonal():
    """Plain Lanczos finds the largest eigenvalue again and again; the second is not among its first two."""
    values = torch.cat([torch.linspace(0, 0.01, 58), torch.tensor([0.5, 1.0])])
    at = quadratic(torch.zeros(60), [symmetric(values).float()])
    found = eigenvalues(at, 2, steps=40, tolerance=0)
    # The matrix is rounded to float32, which moves eigenvalues by some 60 · 6e-8.
    torch.testing.assert_close(found.values, torch.tensor([1.0, 0.5], dtype=torch.float64), rtol=0, atol=1e-5)


def test_the_trace(network):
    """Within four standard errors, which random signs miss once in 16,000 seeds; with a diagonal it is exact."""
    at, hessian = network
    found = trace(at, samples=60)
    assert abs(found.value - float(hessian.trace())) < 4 * found.error
    assert found.value == pytest.approx(float(found.samples.mean()))
    # The variance of zᵀHz is twice the squares beside the diagonal.
    beside = hessian - torch.diag(hessian.diagonal())
    assert found.error == pytest.approx(math.sqrt(2 * float((beside**2).sum()) / 60), rel=0.4)
    diagonal = trace(quadratic(AT, [torch.diag(torch.tensor(VALUES, dtype=torch.float64))]), samples=2)
    assert (diagonal.value, diagonal.error) == (pytest.approx(sum(VALUES), rel=1e-12), pytest.approx(0, abs=1e-12))


def test_the_spectrum_has_the_moments_of_its_matrix(network):
    """Gauss quadrature with m nodes: zᵀHʲz for j < 2m, exactly; their mean over the signs z is the trace of Hʲ."""
    at, hessian = network
    found = spectrum(at, runs=1, steps=6)
    assert found.products == 6 and float(found.weights.sum()) == pytest.approx(1, rel=1e-12)
    signs = (2 * torch.randint(2, (at.numel,), generator=torch.Generator().manual_seed(0)) - 1).double()
    vector = signs
    for j in range(11):
        moment = float((found.nodes**j * found.weights).sum()) * at.numel
        assert moment == pytest.approx(float(signs @ vector), rel=1e-8), j
        vector = hessian @ vector


def test_the_spectrum_with_all_steps_is_where_the_eigenvalues_are():
    at = quadratic(AT, [A])
    found = spectrum(at, runs=3, steps=20)
    distances = (found.nodes[:, None] - torch.tensor(VALUES, dtype=torch.float64)).abs().amin(1)
    assert (distances[found.weights > 1e-8] < 1e-7).all()
    hutchinson = trace(at, samples=3).value  # of the same three vectors
    assert float((found.nodes * found.weights).sum()) * 8 == pytest.approx(hutchinson, rel=1e-12)
    places, density = found.density(points=4000, width=0.05)
    assert float(torch.trapezoid(density, places)) == pytest.approx(1, rel=1e-6)
    assert float(torch.trapezoid(density * places, places)) == pytest.approx(
        float((found.nodes * found.weights).sum()), rel=1e-6
    )


def test_attention_has_a_second_derivative():
    """torch's fast attention has none, on the CPU either."""
    layer = torch.nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 3, 4, dtype=torch.float64)

    def loss(model, x):
        return model(x, x, x, need_weights=False)[0].square().mean()

    assert eigenvalues(Objective(layer, loss, [x])).values[0] > 0


def test_a_linear_loss_has_no_curvature():
    at = Objective(torch.nn.Linear(3, 1), lambda model, x: model(x).mean(), [torch.randn(5, 3)])
    assert eigenvalues(at).values.tolist() == [0]


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda at: eigenvalues(at, 0), "k must be"),
        (lambda at: eigenvalues(at, 9), "k must be"),
        (lambda at: eigenvalues(at, 4, steps=3), "steps"),
        (lambda at: trace(at, samples=1), "standard error"),
        (lambda at: spectrum(at, runs=0), "runs"),
        (lambda at: eigenvalues(quadratic(AT, [A * math.inf])), "not finite"),
        (lambda at: at.product(torch.ones(3)), "8 elements"),
    ],
)
def test_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call(quadratic(AT, [A]))
