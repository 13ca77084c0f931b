"""The step in float64, by its formulas: what every contender's weights are compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lets_kernels.bench.contenders import Base


class Oracle:
    """SAM (Foret et al., 2021): ε = ρ g/‖g‖, then the base optimizer's step from θ along ĝ, the gradient at θ + ε.

    Args:
        params: θ, of any dtype; copied.
        base: SGD with momentum, m ← μm + (ĝ + λθ) and θ ← θ − ηm; or AdamW (Loshchilov and Hutter, 2019) with torch's
            default betas and ε.
        rho: ρ.
    """

    BETAS, EPS = (0.9, 0.999), 1e-8

    def __init__(self, params: Sequence[Tensor], base: Base, rho: float) -> None:
        if base.name not in ("SGD", "AdamW"):
            raise ValueError(f"the oracle knows SGD and AdamW, not {base.name}")
        self.theta = [p.detach().to(torch.float64, copy=True) for p in params]
        self.first = [torch.zeros_like(t) for t in self.theta]
        self.second = [torch.zeros_like(t) for t in self.theta] if base.name == "AdamW" else []
        self.base, self.rho, self.steps = base, rho, 0

    def perturbed(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """θ + ε."""
        total = sum(float(g.double().square().sum()) for g in grads)
        return [t + (self.rho / total**0.5) * g.double() for t, g in zip(self.theta, grads, strict=True)]

    def step(self, grads: Sequence[Tensor]) -> None:
        """The base optimizer's step, along ĝ."""
        self.steps += 1
        for i, (theta, g) in enumerate(zip(self.theta, grads, strict=True)):
            o, m, g = self.base.of(i), self.first[i], g.double()
            if self.base.name == "SGD":
                m.mul_(o["momentum"]).add_(g + o["weight_decay"] * theta)
                theta.sub_(o["lr"] * m)
                continue
            v, (beta1, beta2) = self.second[i], self.BETAS
            m.mul_(beta1).add_((1 - beta1) * g)
            v.mul_(beta2).add_((1 - beta2) * g.square())
            mean, square = m / (1 - beta1**self.steps), v / (1 - beta2**self.steps)
            theta.mul_(1 - o["lr"] * o["weight_decay"]).sub_(o["lr"] * mean / (square.sqrt() + self.EPS))
