"""Curvature: the largest eigenvalues of the Hessian, its trace, and the density of its spectrum.

All of them need only products H v. Lanczos' recurrence with full reorthogonalisation is 30 lines of torch, so there is
no library below it; docs/sharpness.md says which were looked at.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lets_kernels.sharpness.objective import Objective
from lets_kernels.sharpness.snapshot import held


@dataclass(frozen=True)
class Eigenvalues:
    """The largest eigenvalues of the Hessian.

    Attributes:
        values: the k largest, float64 [k], the largest first.
        errors: bounds, float64 [k]: there is an eigenvalue within this distance of each value.
        vectors: their unit vectors, [k, n], of the objective's dtype.
        smallest: the smallest eigenvalue that was seen: negative at a saddle. It is as good as the last steps made it.
        converged: whether all k errors are within the tolerance.
        products: how many products H v it took.
    """

    values: Tensor
    errors: Tensor
    vectors: Tensor
    smallest: float
    converged: bool
    products: int


@dataclass(frozen=True)
class Trace:
    """An estimate of the Hessian's trace, with its standard error, from as many products H v as there are samples."""

    value: float
    error: float
    samples: Tensor


@dataclass(frozen=True)
class Spectrum:
    """The distribution of the Hessian's eigenvalues, as weighted points.

    Attributes:
        nodes: where the points are, float64, ascending.
        weights: how much of the spectrum each stands for, float64; their sum is 1.
        products: how many products H v it took.
    """

    nodes: Tensor
    weights: Tensor
    products: int

    def density(self, points: int = 1000, width: float | None = None) -> tuple[Tensor, Tensor]:
        """A smooth density for drawing: each point becomes a normal distribution; the integral is 1.

        Args:
            points: how many places to give it at.
            width: the standard deviation; None: a hundredth of the range of the nodes.

        Returns:
            Places and densities, float64 [points] each.
        """
        low, high = float(self.nodes.min()), float(self.nodes.max())
        width = width or (high - low) / 100 or max(abs(high), 1.0) / 100
        places = torch.linspace(low - 5 * width, high + 5 * width, points, dtype=torch.float64)
        bumps = torch.exp(-0.5 * ((places[:, None] - self.nodes) / width) ** 2) / (width * math.sqrt(2 * math.pi))
        return places, bumps @ self.weights


@held
def eigenvalues(at: Objective, k: int = 1, *, steps: int = 100, tolerance: float = 1e-3, seed: int = 0) -> Eigenvalues:
    """The k largest eigenvalues of the Hessian at the weights, by Lanczos' method; the first is often called λ_max.

    It stops when each of the k has an error of at most ``tolerance`` times the largest magnitude, or after ``steps``
    products H v; ``converged`` tells which. Largest means algebraically: where the loss bends up most. An eigenvalue
    that occurs several times may be found once. Memory: ``steps`` vectors of all weights.

    Raises:
        ValueError: k or steps is out of range, or the Hessian has entries that are not finite.
    """
    if not 1 <= k <= at.numel:
        raise ValueError(f"k must be from 1 to the number of weights, {at.numel}, not {k}")
    if steps < k:
        raise ValueError(f"steps must be at least k={k}, not {steps}")

    def settled(diagonal: list[float], beside: list[float]) -> bool:
        if len(diagonal) < k:
            return False
        values, vectors = _tridiagonal(diagonal, beside[:-1])
        errors = beside[-1] * vectors[-1].abs()
        return bool((errors[-k:] <= tolerance * values.abs().max()).all())

    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(at.numel, generator=generator, dtype=torch.float64)
    diagonal, beside, basis = _lanczos(at, start, min(steps, at.numel), settled, generator)
    values, vectors = _tridiagonal(diagonal, beside[:-1])
    errors = beside[-1] * vectors[-1].abs()
    top = slice(-k, None)
    found = (vectors[:, top].T.flip(0).to(basis)) @ basis
    return Eigenvalues(
        values[top].flip(0),
        errors[top].flip(0),
        found,
        float(values[0]),
        bool((errors[top] <= tolerance * values.abs().max()).all()),
        len(diagonal),
    )


@held
def trace(at: Objective, *, samples: int = 50, seed: int = 0) -> Trace:
    """The trace of the Hessian: the mean of zᵀHz over vectors z of random signs (Hutchinson, 1990).

    Raises:
        ValueError: fewer than two samples, from which there is no standard error.
    """
    if samples < 2:
        raise ValueError(f"a standard error needs samples >= 2, not {samples}")
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(samples):
        z = _signs(at, generator)
        drawn.append(float(torch.dot(z.double(), at.product(z).double())))
    found = torch.tensor(drawn, dtype=torch.float64)
    return Trace(float(found.mean()), float(found.std()) / math.sqrt(samples), found)


@held
def spectrum(at: Objective, *, runs: int = 4, steps: int = 60, seed: int = 0) -> Spectrum:
    """The spectral density by stochastic Lanczos quadrature (Ghorbani et al., ICML 2019, §2; PyHessian, 2020).

    Each run starts from random signs; the eigenvalues of its tridiagonal matrix are the points, the squares of the
    first components of its eigenvectors their weights. The mean of the points estimates the mean eigenvalue. It takes
    ``runs`` times ``steps`` products H v. Memory: ``steps`` vectors of all weights.

    Raises:
        ValueError: runs or steps is out of range.
    """
    if runs < 1 or steps < 1:
        raise ValueError(f"runs and steps must be at least 1, not runs={runs}, steps={steps}")
    generator = torch.Generator().manual_seed(seed)
    nodes, weights, products = [], [], 0
    for _ in range(runs):
        diagonal, beside, _basis = _lanczos(at, _signs(at, generator), min(steps, at.numel), lambda *_: False)
        values, vectors = _tridiagonal(diagonal, beside[:-1])
        nodes.append(values)
        weights.append(vectors[0].square() / runs)
        products += len(diagonal)
    order = torch.cat(nodes).argsort()
    return Spectrum(torch.cat(nodes)[order], torch.cat(weights)[order], products)


def _lanczos(
    at: Objective,
    start: Tensor,
    steps: int,
    settled: Callable[[list[float], list[float]], bool],
    more: torch.Generator | None = None,
) -> tuple[list[float], list[float], Tensor]:
    """H in an orthonormal basis that begins with ``start``: its diagonal, what stands beside it, and the basis [m, n].

    The last number beside the diagonal belongs to the vector that would come next. It is 0 where the basis holds all
    that H makes of the start; then this is the end, or with ``more`` a new random vector goes on.
    """
    basis = torch.empty(steps, at.numel, dtype=at.dtype, device=at.device)
    v = start.to(basis)
    diagonal: list[float] = []
    beside: list[float] = []
    largest = 0.0
    for m in range(steps):
        basis[m] = v / torch.linalg.vector_norm(v)
        w = at.product(basis[m])
        diagonal.append(float(torch.dot(basis[m], w)))
        length = float(torch.linalg.vector_norm(w))
        if not math.isfinite(length):
            raise ValueError(
                "the Hessian is not finite at these weights; look at the loss, and at the dtype of autocast"
            )
        largest = max(largest, length)
        v = _apart(w, basis[: m + 1])
        rest = float(torch.linalg.vector_norm(v))
        exhausted = rest <= 10 * torch.finfo(at.dtype).eps * largest * math.sqrt(m + 1)  # rounding is all that is left
        beside.append(0.0 if exhausted else rest)
        if settled(diagonal, beside) or (exhausted and more is None):
            break
        if exhausted:
            v = _apart(torch.randn(at.numel, generator=more, dtype=torch.float64).to(v), basis[: m + 1])
    return diagonal, beside, basis[: len(diagonal)]


def _apart(w: Tensor, basis: Tensor) -> Tensor:
    """What of a vector is orthogonal to the basis. Once leaves rounding; twice is enough (Parlett, 1998, §6.9)."""
    for _ in range(2):
        w = w - basis.T @ (basis @ w)
    return w


def _tridiagonal(diagonal: list[float], beside: list[float]) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors (columns) of a symmetric tridiagonal matrix, in float64."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        off = torch.tensor(beside, dtype=torch.float64)
        matrix += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def _signs(at: Objective, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(2, (at.numel,), generator=generator)
    return (2 * drawn - 1).to(at.device, at.dtype)
