"""The alternatives: SAM and LETS in eager PyTorch, as people write them and as well as it can be written.

Every class has ``params``, ``first_step()`` and ``second_step()``; gradients are read from ``p.grad``.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Base = Callable[[Sequence[Tensor]], torch.optim.Optimizer]


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
        norm = total_norm([(p.abs() if self.adaptive else 1.0) * p.grad for p in self.params])
        scale = self.rho / (norm + 1e-12)
        for p in self.params:
            self.old[p] = p.data.clone()
            e_w = (torch.pow(p, 2) if self.adaptive else 1.0) * p.grad * scale.to(p)
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
        data, grads = [p.data for p in self.params], [p.grad for p in self.params]
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
    """As :class:`Foreach`, but the restore exchanges pointers and moves nothing; ``p.data_ptr()`` alternates."""

    @torch.no_grad()
    def second_step(self) -> None:
        for i, p in enumerate(self.params):
            p.data, self.saved[i] = self.saved[i], p.data
        self.base.step()


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
        self._first(self.params, [p.grad for p in self.params], self.saved)

    @torch.no_grad()
    def second_step(self) -> None:
        self._second(self.params, [p.grad for p in self.params], self.saved, self.momenta)


# ---- LETS: the gradient in the radius --------------------------------------------------------------------------------


def rho_grad(
    val: Sequence[Tensor],
    train: Sequence[Tensor],
    perturbed: Sequence[Tensor],
    direction: Sequence[Tensor],
) -> Tensor:
    """(ḡ_vl − ḡ_tr)ᵀ diag(ĝ²) ε̂, one expression a tensor."""
    rows = zip(val, train, perturbed, direction, strict=True)
    return sum(((gv - gt) * gh**2 * e).sum() for gv, gt, gh, e in rows)  # type: ignore[return-value]


def unit_direction(grads: Sequence[Tensor], scales: Sequence[Tensor | float]) -> list[Tensor]:
    """ε̂ = T²g/‖Tg‖, one tensor a parameter."""
    norm = total_norm([t * g for t, g in zip(scales, grads, strict=True)])
    return [t**2 * g / norm for t, g in zip(scales, grads, strict=True)]


def foreach_rho_grad(
    val: Sequence[Tensor],
    train: Sequence[Tensor],
    perturbed: Sequence[Tensor],
    grads: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
) -> Tensor:
    """As :func:`rho_grad` of :func:`unit_direction`, in place wherever it can be; ``scales`` None: T = 1."""
    product = torch._foreach_sub(list(val), list(train))
    torch._foreach_mul_(product, list(perturbed))
    torch._foreach_mul_(product, list(perturbed))
    scaled = list(grads) if scales is None else torch._foreach_mul(list(scales), list(grads))
    torch._foreach_mul_(product, scaled)
    if scales is not None:
        torch._foreach_mul_(product, list(scales))
    return torch.stack([x.sum() for x in product]).sum() / foreach_total_norm(scaled)


def rho_grad_secant(
    val: Sequence[Tensor], train: Sequence[Tensor], perturbed: Sequence[Tensor], first: Sequence[Tensor]
) -> Tensor:
    """(ḡ_vl − ḡ_tr)ᵀ(ĝ − g), one expression a tensor."""
    rows = zip(val, train, perturbed, first, strict=True)
    return sum(((gv - gt) * (gh - g)).sum() for gv, gt, gh, g in rows)  # type: ignore[return-value]


def foreach_rho_grad_secant(
    val: Sequence[Tensor], train: Sequence[Tensor], perturbed: Sequence[Tensor], first: Sequence[Tensor]
) -> Tensor:
    product = torch._foreach_sub(list(val), list(train))
    torch._foreach_mul_(product, torch._foreach_sub(list(perturbed), list(first)))
    return torch.stack([x.sum() for x in product]).sum()
