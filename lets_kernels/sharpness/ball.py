"""How far the loss rises in a ball around the weights: sharpness as SAM and ASAM define it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lets_kernels.sharpness.objective import Objective, finite
from lets_kernels.sharpness.snapshot import held


@dataclass(frozen=True)
class Rise:
    """The largest loss that was found in the ball ‖T⁻¹ε‖ ≤ ρ, with T = 1 (SAM) or |θ| + ξ (ASAM).

    Attributes:
        value: sharpness, max L(θ + ε) − L(θ), in units of the loss; infinite where the loss is not a number.
        loss: L(θ).
        worst: L(θ + ε).
        epsilon: ε, flat.
    """

    value: float
    loss: float
    worst: float
    epsilon: Tensor


def along_gradient(at: Objective, rho: float, *, p: float = 2.0, adaptive: bool = False, xi: float = 0.01) -> Rise:
    """How far the loss rises over SAM's own perturbation (Foret et al., ICLR 2021, Eq. 2): one gradient, one loss.

    ε = ρ T²g/‖Tg‖ for p = 2, ρ T sign(g) for p = ∞. Unlike :func:`in_ball` the value can be negative, where ρ leads
    beyond the top of a curved slope.

    Args:
        at: the objective.
        rho: the radius ρ > 0.
        p: the norm of the ball, 2 or infinity.
        adaptive: ASAM's T = |θ| + ξ for every weight (Kwon et al., ICML 2021, §3); False: T = 1.
        xi: ξ ≥ 0.

    Raises:
        ValueError: ρ, p or ξ is out of range.
    """
    return _along_gradient(at, _Geometry(rho, p, adaptive, xi))


@held
def _along_gradient(at: Objective, ball: "_Geometry") -> Rise:
    scale = ball.scale(at)
    loss, gradient = at.gradient()
    epsilon = scale * ball.towards(torch.zeros_like(gradient), scale * gradient, ball.rho)
    at.move(epsilon)
    worst = finite(at.loss())
    return Rise(worst - loss, loss, worst, epsilon)


def in_ball(
    at: Objective,
    rho: float,
    *,
    p: float = 2.0,
    adaptive: bool = False,
    xi: float = 0.01,
    steps: int = 20,
    starts: int = 2,
    seed: int = 0,
) -> Rise:
    """Sharpness: max L(θ + ε) − L(θ) over the ball, by projected ascent (as in Andriushchenko et al., ICML 2023).

    The ascent is in u = T⁻¹ε: a step of length a_k along Tg (for p = ∞, its signs), then back into the ball. a_k falls
    linearly from 2ρ, so the first point of the ascent from θ is :func:`along_gradient`'s. The largest loss of all
    points counts: the value is a lower bound of the maximum, at least 0 and at least that along the gradient. It costs
    (1 + starts) · steps gradients and 1 + starts losses.

    Args:
        at: the objective.
        rho: the radius ρ > 0.
        p: the norm of the ball, 2 or infinity.
        adaptive: ASAM's T, as for :func:`along_gradient`.
        xi: ξ ≥ 0.
        steps: steps of each ascent.
        starts: how many ascents begin at random points (on the sphere for p = 2, anywhere for p = ∞), beside the one
            from θ itself. At an exact minimum only they find a way up.
        seed: of the random starts.

    Raises:
        ValueError: an argument is out of range.
    """
    if steps < 1 or starts < 0:
        raise ValueError(f"an ascent needs steps >= 1 and starts >= 0, not steps={steps}, starts={starts}")
    return _in_ball(at, _Geometry(rho, p, adaptive, xi), steps, starts, seed)


@held
def _in_ball(at: Objective, ball: "_Geometry", steps: int, starts: int, seed: int) -> Rise:
    generator = torch.Generator().manual_seed(seed)
    scale = ball.scale(at)
    start = torch.zeros(at.numel, dtype=at.dtype, device=at.device)
    worst, best, base = -math.inf, start, math.nan
    for attempt in range(1 + starts):
        u = ball.anywhere(start, generator) if attempt else start
        for step in range(steps + 1):
            at.move(scale * u)
            loss, gradient = at.gradient() if step < steps else (at.loss(), start)
            if attempt == step == 0:
                base = loss
            if finite(loss) > worst:
                worst, best = finite(loss), scale * u
            u = ball.towards(u, scale * gradient, 2 * ball.rho * (1 - step / steps))
    return Rise(worst - base, base, worst, best)


def m_sharpness(
    at: Objective,
    rho: float,
    *,
    p: float = 2.0,
    adaptive: bool = False,
    xi: float = 0.01,
    steps: int = 20,
    starts: int = 2,
    seed: int = 0,
) -> float:
    """m-sharpness (Foret et al., ICLR 2021, §4.1): the mean over batches of m samples of each batch's own sharpness.

    m is the batch size of the data: give the objective a loader with ``batch_size=m``. A smaller last batch counts for
    as many samples as it has. Each batch's sharpness is :func:`in_ball`'s, with the same arguments, at its cost.

    Raises:
        ValueError: an argument is out of range.
    """
    rises = [
        (share, in_ball(one, rho, p=p, adaptive=adaptive, xi=xi, steps=steps, starts=starts, seed=seed).value)
        for one, share in at.each()
    ]
    return sum(share * value for share, value in rises)


class _Geometry:
    """The ball ‖u‖_p ≤ ρ, and ε = T u."""

    def __init__(self, rho: float, p: float, adaptive: bool, xi: float) -> None:
        if not (0 < rho < math.inf):
            raise ValueError(f"rho must be more than 0 and finite, not {rho}")
        if p not in (2, math.inf):
            raise ValueError(f"p must be 2 or infinity, not {p}: steps into other balls are not projected here")
        if not (0 <= xi < math.inf):
            raise ValueError(f"xi must be from 0 and finite, not {xi}")
        self.rho, self.p, self._xi = float(rho), p, xi if adaptive else None

    def scale(self, at: Objective) -> Tensor:
        """T, flat."""
        theta = at.weights
        return torch.ones_like(theta) if self._xi is None else theta.abs() + self._xi

    def towards(self, u: Tensor, gradient: Tensor, length: float) -> Tensor:
        """A step of this length from u along a gradient in u, and back into the ball."""
        if self.p == 2:
            norm = float(torch.linalg.vector_norm(gradient))
            u = u + gradient * (length / norm if norm > 0 else 0.0)
            reached = float(torch.linalg.vector_norm(u))
            return u * (self.rho / reached) if reached > self.rho else u
        return (u + length * gradient.sign()).clamp(-self.rho, self.rho)

    def anywhere(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """A random point: on the sphere for p = 2, in the ball for p = ∞."""
        if self.p == 2:
            drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
            drawn *= self.rho / torch.linalg.vector_norm(drawn)
        else:
            drawn = self.rho * (2 * torch.rand(like.shape, generator=generator, dtype=torch.float64) - 1)
        return drawn.to(like)
