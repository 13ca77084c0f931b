"""The loss along one and two directions through the weights (Li et al., NeurIPS 2018)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lets_kernels.sharpness.objective import Objective, finite
from lets_kernels.sharpness.snapshot import held

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Line:
    """L(θ + a d): ``losses[i]`` at a = ``places[i]``."""

    places: list[float]
    losses: list[float]


@dataclass(frozen=True)
class Plane:
    """L(θ + a d + b e): ``losses[j][i]`` at a = ``places[i]``, b = ``places[j]``."""

    places: list[float]
    losses: list[list[float]]


def direction(at: Objective, seed: int = 0) -> Tensor:
    """A random filter-normalised direction (Li et al., 2018, §4), flat.

    Normal numbers, of which each filter gets the norm of the model's: d ← d ‖θ‖/‖d‖ for each slice of a weight along
    its first dimension (the second for transposed convolutions). Biases and the parameters of normalisation layers, all
    that have at most one dimension, do not move, as in the authors' code. A step of 1 is then as long as the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    turned = {id(m.weight) for m in at.model.modules() if isinstance(m, _TRANSPOSED)}
    made = []
    for p, theta in zip(at.params, at.split(at.weights), strict=True):
        d = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(theta)
        if p.dim() <= 1:
            made.append(torch.zeros_like(theta))
            continue
        others = [i for i in range(p.dim()) if i != (1 if id(p) in turned else 0)]
        norms = [torch.linalg.vector_norm(t, dim=others, keepdim=True) for t in (theta, d)]
        made.append(d * norms[0] / norms[1])
    return at.flat(made)


@held
def line(at: Objective, along: Tensor | None = None, *, span: float = 1.0, points: int = 51, seed: int = 0) -> Line:
    """The loss along one direction, from −span to span; one loss for each point.

    Args:
        at: the objective.
        along: a flat vector, such as one of ``eigenvalues(at).vectors``, or the way to another model's weights; None
            for a random one, filter-normalised.
        span: how far to go to both sides, in lengths of the direction.
        points: how many points; an odd number has θ in the middle.
        seed: of the random direction.

    Raises:
        ValueError: fewer than two points, no span, or a vector of another length.
    """
    places = _places(span, points)
    along = direction(at, seed) if along is None else along
    return Line(places, [_loss(at, a * along) for a in places])


@held
def plane(
    at: Objective, along: Sequence[Tensor] | None = None, *, span: float = 1.0, points: int = 21, seed: int = 0
) -> Plane:
    """The loss over the plane of two directions; points² losses. Arguments and errors as for :func:`line`.

    Two random directions are drawn independently, as in the paper: in so many dimensions they are nearly orthogonal.
    """
    places = _places(span, points)
    d, e = (direction(at, 2 * seed), direction(at, 2 * seed + 1)) if along is None else along
    return Plane(places, [[_loss(at, a * d + b * e) for a in places] for b in places])


def _loss(at: Objective, epsilon: Tensor) -> float:
    at.move(epsilon)
    return finite(at.loss())


def _places(span: float, points: int) -> list[float]:
    if points < 2 or not 0 < span < math.inf:
        raise ValueError(f"a line needs points >= 2 and a finite span > 0, not points={points}, span={span}")
    return [span * (2 * i / (points - 1) - 1) for i in range(points)]
