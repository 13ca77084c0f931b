"""Losses whose sharpness and curvature are known, as a model, a loss and data."""

import torch
from scipy.optimize import brentq
from torch import nn
from torch.nn.functional import cross_entropy

from lets_kernels.sharpness import Objective


class Point(nn.Module):
    """Weights and nothing else, in two parameters, as real models have several."""

    def __init__(self, theta):
        super().__init__()
        self.first = nn.Parameter(theta[:2].clone())
        self.second = nn.Parameter(theta[2:].clone())

    def forward(self):
        return torch.cat([self.first, self.second])


def quadratic(theta, matrices):
    """½ θᵀAθ, where each batch has its own A and counts as one sample."""

    def loss(model, matrix):
        theta = model()
        return 0.5 * theta @ (matrix @ theta)

    return Objective(Point(theta), loss, matrices, size=lambda matrix: 1)


def symmetric(values, seed=0):
    """A symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return q @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ q.T


def largest_in_ball(a, theta, rho):
    """max ½ (θ+ε)ᵀA(θ+ε) − ½ θᵀAθ over ‖ε‖ ≤ ρ, for a positive definite A: on the sphere, where (s − A) ε = A θ.

    s > λ_max is the only root of ‖(s − A)⁻¹Aθ‖ = ρ there (the trust-region problem).
    """
    values, vectors = torch.linalg.eigh(a)
    b = vectors.T @ (a @ theta)

    def excess(s):
        return float((b / (s - values)).norm()) - rho

    top = float(values[-1])
    s = brentq(excess, top * (1 + 1e-13) + 1e-13, top + float(b.norm()) / rho + 1, xtol=1e-14)
    epsilon = vectors @ (b / (s - values))
    return float(theta @ a @ epsilon + 0.5 * epsilon @ a @ epsilon)


class Small(nn.Module):
    """A convolution, batch norm and dropout in front of a linear layer: [n, 1, 4, 4] to three logits."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Tanh(), nn.Dropout(dropout), nn.Flatten()
        )
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.body(x))


def small(dtype=torch.float64, dropout=0.0, batches=(8, 8, 5), **options):
    """(model, objective) on random images and labels, the last batch smaller; running statistics are not the first."""
    torch.manual_seed(3)
    model = Small(dropout).to(dtype)
    data = [(torch.randn(n, 1, 4, 4, dtype=dtype), torch.randint(3, (n,))) for n in batches]
    for images, _ in data:
        model(images)
    return model, Objective(model, entropy, data, **options)


def entropy(model, batch):
    images, labels = batch
    return cross_entropy(model(images), labels)


def exact_hessian(at, data):
    """The Hessian of the mean over all samples, row by row in float64, of the model as it stands."""
    names = [name for name, p in at.model.named_parameters() if p.requires_grad]
    images, labels = (torch.cat(part) for part in zip(*data, strict=True))

    def loss(vector):
        params = dict(zip(names, at.split(vector), strict=True))
        return cross_entropy(torch.func.functional_call(at.model, params, (images,)), labels)

    return torch.autograd.functional.hessian(loss, at.weights)


def state(model):
    """Everything a measurement must leave as it is."""
    return (
        [(name, t.clone()) for name, t in model.state_dict().items()],
        [m.training for m in model.modules()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        torch.get_rng_state(),
    )


def assert_same(before, after):
    for (name, a), (other, b) in zip(before[0], after[0], strict=True):
        assert name == other and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if a.dim() else torch.equal(a, b)
    assert before[1] == after[1]
    for a, b in zip(before[2], after[2], strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    assert torch.equal(before[3], after[3]), "random numbers were drawn"
