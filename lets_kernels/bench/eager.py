"""The alternatives: SAM in eager PyTorch, as people write it and as well as it can be written.

Every class has ``params``, ``first_step()`` and ``second_step()``; gradients are read from ``p.grad``.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

Base = Callable[[Sequence[Tensor]], torch.optim.Optimizer]


def gradients(params: Sequence[Tensor]) -> list[Tensor]:
    return [cast(Tensor, p.grad) for p in params]


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm over all tensors: the norm of the stack of their norms."""
    return torch.norm(torch.stack([t.norm(p=2) for t in tensors]), p=2)


def foreach_total_norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(tensors))).norm()


class PerTensor:
    """The algorithm of the SAM that most PyTorch code uses: a Python loop over parameters for each pass.

    The old weights are a new clone every step, the restore re-points ``p.data`` to it, and T enters as a product even
    where it is one. With torch's fused SGD: 17 parameter-sized reads and writes.
    """

    def __init__(self, params: Sequence[Tensor], base: Base, rho: float, adaptive: bool = False) -> None:
        self.params, self.base, self.rho, self.adaptive = list(params), base(params), rho, adaptive
        self.old: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def first_step(self) -> None:
        grads = gradients(self.params)
        norm = total_norm([(p.abs() if self.adaptive else 1.0) * g for p, g in zip(self.params, grads, strict=True)])
        scale = self.rho / (norm + 1e-12)
        for p, g in zip(self.params, grads, strict=True):
            self.old[p] = p.data.clone()
            e_w = (torch.pow(p, 2) if self.adaptive else 1.0) * g * scale.to(p)
            p.add_(e_w)

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.params:
            p.data = self.old[p]
        self.base.step()


class Foreach:
    """The best that torch's own lists of tensors give: one call a pass, buffers kept, no product that is not needed."""

    def __init__(self, params: Sequence[Tensor], base: Base, rho: float, adaptive: bool = False) -> None:
        self.params, self.base, self.rho, self.adaptive = list(params), base(params), rho, adaptive
        self.saved = [torch.empty_like(p) for p in params]

    @torch.no_grad()
    def first_step(self) -> None:
        data, grads = [p.data for p in self.params], gradients(self.params)
        if self.adaptive:
            scaled = torch._foreach_mul(data, grads)  # ‖|θ| g‖ = ‖θ g‖
            scale = float(self.rho / (foreach_total_norm(scaled) + 1e-12))
            torch._foreach_copy_(self.saved, data)
            torch._foreach_addcmul_(data, scaled, self.saved, scale)
        else:
            scale = float(self.rho / (foreach_total_norm(grads) + 1e-12))
            torch._foreach_copy_(self.saved, data)
            torch._foreach_add_(data, grads, alpha=scale)

    @torch.no_grad()
    def second_step(self) -> None:
        torch._foreach_copy_([p.data for p in self.params], self.saved)
        self.base.step()


class ForeachSwap(Foreach):
    """Nothing is saved and nothing restored: θ + ε is written into a second list of tensors, to which ``p.data`` points
    for the second pass, and back. ``p.data_ptr()`` changes twice a step, which parameters that are sharded, flattened
    or captured in a graph do not allow. On a CPU a call a tensor is what a foreach call does as well.
    """

    @torch.no_grad()
    def first_step(self) -> None:
        data, grads = [p.data for p in self.params], gradients(self.params)
        if self.adaptive:
            along = torch._foreach_mul(data, grads)
            scale = float(self.rho / (foreach_total_norm(along) + 1e-12))
            for p, x, moved in zip(data, along, self.saved, strict=True):
                torch.addcmul(p, x, p, value=scale, out=moved)
        else:
            scale = float(self.rho / (foreach_total_norm(grads) + 1e-12))
            for p, g, moved in zip(data, grads, self.saved, strict=True):
                torch.add(p, g, alpha=scale, out=moved)
        self._exchange()

    @torch.no_grad()
    def second_step(self) -> None:
        self._exchange()
        self.base.step()

    def _exchange(self) -> None:
        for i, p in enumerate(self.params):
            p.data, self.saved[i] = self.saved[i], p.data


class Compiled:
    """Both passes through torch.compile, SGD's arithmetic with them; what the compiler makes of the plain loops."""

    def __init__(self, params: Sequence[Tensor], rho: float, lr: float, momentum: float, weight_decay: float) -> None:
        self.params = list(params)
        self.saved = [torch.empty_like(p) for p in params]
        self.momenta = [torch.zeros_like(p) for p in params]

        def first(params: list[Tensor], grads: list[Tensor], saved: list[Tensor]) -> None:
            scale = rho / (torch.stack([g.square().sum() for g in grads]).sum().sqrt() + 1e-12)
            for p, g, old in zip(params, grads, saved, strict=True):
                old.copy_(p)
                p.add_(g * scale)

        def second(params: list[Tensor], grads: list[Tensor], saved: list[Tensor], momenta: list[Tensor]) -> None:
            for p, g, old, m in zip(params, grads, saved, momenta, strict=True):
                m.mul_(momentum).add_(g + weight_decay * old)
                p.copy_(old - lr * m)

        self._first, self._second = torch.compile(first), torch.compile(second)

    @torch.no_grad()
    def first_step(self) -> None:
        self._first(self.params, gradients(self.params), self.saved)

    @torch.no_grad()
    def second_step(self) -> None:
        self._second(self.params, gradients(self.params), self.saved, self.momenta)
