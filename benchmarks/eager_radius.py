"""The gradient in LETS's radius in eager PyTorch, as people write it and as well as it can be written.

The eager steps of SAM are in :mod:`lets_kernels.bench.eager`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lets_kernels.bench.eager import foreach_total_norm, total_norm


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
