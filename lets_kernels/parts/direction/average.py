"""Along moving averages of gradients: Friendly SAM and VaSSO."""

from typing import Any

import torch

from lets_kernels.parts.direction.base import Ascent, Perturbation, Scalable
from lets_kernels.parts.part import not_negative, share
from lets_kernels.parts.passes import FirstPass


class _Averaged(Scalable):
    """Along a·g + b·m, where m is the moving average of the first gradients, including the present one.

    A first gradient that is not finite leaves the average as it was. A finite first gradient is counted even if its
    step is given up or skipped later (an interrupt, a second gradient that is not finite). The average of a parameter
    that joins later begins at zero.
    """

    held = ("average",)
    remembers = True

    def __init__(self, decay: float, a: float, b: float) -> None:
        self._decay, self._a, self._b = decay, a, b
        #: The number of gradients in the averages; the first gradient begins the averages.
        self._updates = torch.zeros((), dtype=torch.int64, device="cpu")

    def prepare(self, first: FirstPass) -> Perturbation:
        finite = torch.isfinite(first.squared_norm)
        self._updates = updates = self._updates.to(first.home)
        gate = finite.double()
        ascents, shares = [], []
        for runs in first.runs:
            b = runs.bucket
            averages = first.held.tensors(runs, "average")
            # If a is 0, the average itself is the vector, and is in memory already.
            room = first.room(runs) if self._a else []
            table, seen = b.unscaled_table(runs.indices), updates.to(b.device, copy=True)
            lists = (b.pack(averages), runs.pack(runs.grads), room)
            numbers = (self._decay, self._a, self._b)
            squared = b.parts * b.ops.average_(*lists, seen, table, gate.to(b.device), *numbers)
            plain = Ascent.along(runs, room) if room else Ascent(runs, averages, 0.0, 2.0, scaled=False)
            ascent, share = self.scaled(plain, room or lists[0], first.groups)
            ascents.append(ascent)
            shares.append(squared if share is None else share)
        updates += finite  # in place, so that replays of a captured step go on counting
        return Perturbation(ascents, first.total(shares))

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._updates.fill_(state["updates"])  # a number, or a 0-d tensor


class Smoothed(_Averaged):
    """VaSSO: d ← (1 − θ) d + θ g, ε = ρ d/‖d‖, d₀ = g (Li & Giannakis, NeurIPS 2023).

    State: d, one parameter-sized buffer. Two gradients a step.

    Args:
        theta: θ in (0, 1], the weight of the new gradient; 1 is SAM. The paper tunes it between 0.2 and 0.9.

    Raises:
        ValueError: θ is out of its range.

    Examples:
        >>> opt = SAM([w], SGD, rho=5.0, direction=Smoothed(theta=0.5), lr=0.1)
        >>> loss = opt.step(closure)  # d₀ = g: SAM's step
        >>> print(w.data)
        tensor([2.4000, 0.8000])
    """

    def __init__(self, theta: float = 0.9) -> None:
        if not theta > 0:
            raise ValueError(f"theta must be in (0, 1], not {theta}: at 0 the direction never changes")
        self.theta = share(theta, "theta")
        super().__init__(1 - self.theta, 0.0, 1.0)


class Friendly(_Averaged):
    """Friendly SAM: ε = ρ d/‖d‖, d = g − σm, m ← λm + (1 − λ)g (Li et al., CVPR 2024).

    State: m, one parameter-sized buffer. Two gradients a step. The gradients themselves are left alone. In groups with
    ``adaptive=True`` it is ε = ρ T²d/‖Td‖ with ASAM's T, as in the authors' code.

    Args:
        sigma: σ ≥ 0; 0 is SAM.
        decay: λ in (0, 1).
        update_first: True for the order of the paper's text: d is computed with the new m, which includes g. False for
            the order of the authors' code: d is computed with the m of the step before. In both orders d and m of the
            first step are g; the paper does not say how m begins.

    Raises:
        ValueError: σ or λ is out of its range.

    Examples:
        >>> opt = SAM([w], SGD, rho=5.0, direction=Friendly(sigma=0.9, update_first=True), lr=0.1)
        >>> loss = opt.step(closure)  # the first m is g, so d = 0.1 g: SAM's step
        >>> print(w.data)
        tensor([2.4000, 0.8000])
    """

    def __init__(self, sigma: float = 1.0, decay: float = 0.9, *, update_first: bool = False) -> None:
        self.sigma = not_negative(sigma, "sigma")
        if not 0 < decay < 1:
            raise ValueError(f"decay must be in (0, 1), not {decay}")
        self.decay, self.update_first = float(decay), update_first
        # With m' = λm + (1 − λ)g, m = (m' − (1 − λ)g)/λ: both orders are combinations of g and m'.
        old = self.sigma / self.decay
        a, b = (1.0, -self.sigma) if update_first else (1 + old * (1 - self.decay), -old)
        super().__init__(self.decay, a, b)
