"""Every op in plain PyTorch: the formulas as the papers print them, the oracle's counterpart and the fallback.

The functions, their arguments and their meaning are those of :mod:`lets_kernels.ops.native`; see
:mod:`lets_kernels.ops` for what a run, a table and a gate are. Nothing here reads a value on the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def _runs(tensors: Sequence[Tensor], table: Tensor) -> list[Tensor]:
    """One 1-d view a row of the table, in memory order, of a list of dense tensors or of one flat buffer."""
    rows = table.tolist()
    if len(tensors) == 1 and (len(rows) != 1 or tensors[0].numel() != rows[0][1]):
        return [tensors[0][start : start + numel] for start, numel, *_ in rows]
    return [t.as_strided((t.numel(),), (1,)) for t in tensors]


def _wide(x: Tensor) -> Tensor:
    """The values in the arithmetic type: float64 stays, everything else is computed in float32."""
    return x if x.dtype == torch.float64 else x.float()


def _scaling(
    theta: Tensor | None, filter_norms: Tensor | None, row: Sequence[int], xi: float, device: torch.device
) -> Tensor | float:
    """T of ASAM for one run (Kwon et al., 2021; LETS Eq. 7)."""
    _, numel, row_length, row_count, row_start = row
    if row_length < 0:
        return 1.0
    if row_length == 0:
        assert theta is not None
        return _wide(theta).abs() + xi
    assert filter_norms is not None
    index = torch.arange(numel, device=device).div(row_length, rounding_mode="floor") % row_count
    return filter_norms[row_start + index] + xi


def _dual(x: Tensor, q: float) -> Tensor:
    """sign(x) |x|^(q-1), the gradient of |x|^q / q (Foret et al., 2021, Eq. 2)."""
    return x if q == 2 else x.sign() * x.abs().pow(q - 1)


def pack(tensors: list[Tensor], anchor: Tensor) -> list[Tensor]:
    """As :func:`lets_kernels.ops.native.pack`; here a list stays a list."""
    return tensors


def grad_norm(
    vectors: Sequence[Tensor],
    params: Sequence[Tensor],
    table: Tensor,
    filter_norms: Tensor | None,
    xi: float,
    q: float,
) -> Tensor:
    thetas = _runs(params, table) if len(params) else [None] * len(table)
    total = torch.zeros((), dtype=torch.float64, device=vectors[0].device if len(vectors) else None)
    for v, theta, row in zip(_runs(vectors, table), thetas, table.tolist(), strict=True):
        scaled = _wide(v) * _scaling(theta, filter_norms, row, xi, v.device)
        total += scaled.double().abs().pow(q).sum()
    return total


def filter_norms(params: Sequence[Tensor], table: Tensor, out: Tensor) -> None:
    for theta, (_, _, row_length, row_count, row_start) in zip(_runs(params, table), table.tolist(), strict=True):
        if row_length > 0:
            filters = theta.double().reshape(-1, row_count, row_length)
            out[row_start : row_start + row_count] = filters.square().sum(dim=(0, 2)).sqrt()


def perturb_(
    params: Sequence[Tensor],
    vectors: Sequence[Tensor],
    saved: Tensor,
    dirty: Tensor,
    table: Tensor,
    filter_norms: Tensor | None,
    xi: float,
    q: float,
    total: Tensor,
    rho: Tensor,
) -> None:
    thetas = _runs(params, table)
    for theta, old in zip(thetas, _runs([saved], table), strict=True):
        old.copy_(theta)
    dirty.fill_(1)
    usable = torch.isfinite(total) & (total > 0)
    # For q other than 2 and 1 the norm divides before the power is taken, which could underflow.
    length = rho / total.sqrt() if q == 2 else rho
    shrink = total.pow(-1 / q) if q not in (1, 2) else torch.ones_like(total)
    for theta, v, row in zip(thetas, _runs(vectors, table), table.tolist(), strict=True):
        t = _scaling(theta, filter_norms, row, xi, v.device)
        factor, inner = length.to(_wide(v).dtype), shrink.to(_wide(v).dtype)
        scaled = t * _wide(v) if q in (1, 2) else inner * (t * _wide(v))
        ascended = _wide(theta) + factor * (t * _dual(scaled, q))
        moves = usable & (factor != 0) & factor.isfinite() & inner.isfinite()
        theta.copy_(torch.where(moves, ascended.to(theta.dtype), theta))


def restore_(params: Sequence[Tensor], saved: Tensor, dirty: Tensor, table: Tensor) -> None:
    for theta, old in zip(_runs(params, table), _runs([saved], table), strict=True):
        theta.copy_(torch.where(dirty != 0, old, theta))
    dirty.fill_(0)


def restore_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    saved: Tensor,
    dirty: Tensor,
    table: Tensor,
    gate: Tensor,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    go, from_saved = gate != 0, dirty != 0
    buffers = _runs(momenta, table) if momentum else [None] * len(table)
    for theta, g, m, old in zip(_runs(params, table), _runs(grads, table), buffers, _runs([saved], table), strict=True):
        old = torch.where(from_saved, old, theta)
        weights, step = _wide(old), -_wide(g) if maximize else _wide(g)
        if weight_decay:
            step = step + weight_decay * weights
        if m is not None:
            average = momentum * _wide(m) + step
            step = step + momentum * average if nesterov else average
            m.copy_(torch.where(go, average.to(m.dtype), m))
        new = weights - lr * step if lr else weights
        theta.copy_(torch.where(go, new.to(theta.dtype), old))
    dirty.fill_(0)


def restore_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    saved: Tensor,
    dirty: Tensor,
    table: Tensor,
    gate: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
) -> None:
    go, from_saved = gate != 0, dirty != 0
    lists = (params, grads, exp_avgs, exp_avg_sqs, [saved])
    for theta, g, m, v, old, t in zip(*(_runs(x, table) for x in lists), steps, strict=True):
        t.add_(go.to(t.dtype))
        old = torch.where(from_saved, old, theta)
        weights, step = _wide(old), -_wide(g) if maximize else _wide(g)
        if decoupled:
            weights = weights * (1 - lr * weight_decay)
        elif weight_decay:
            step = step + weight_decay * weights
        average = _wide(m) + (1 - beta1) * (step - _wide(m))
        square = beta2 * _wide(v) + (1 - beta2) * (step * step)
        count = t.double()
        step_size = (lr / (1 - beta1**count)).to(weights.dtype)
        root_bias = (1 - beta2**count).sqrt().to(weights.dtype)
        new = weights - step_size * (average / (square.sqrt() / root_bias + eps)) if lr else weights
        m.copy_(torch.where(go, average.to(m.dtype), m))
        v.copy_(torch.where(go, square.to(v.dtype), v))
        theta.copy_(torch.where(go, new.to(theta.dtype), old))
    dirty.fill_(0)


def rho_grad_diagonal(
    val: Sequence[Tensor],
    train: Sequence[Tensor],
    perturbed: Sequence[Tensor],
    vectors: Sequence[Tensor],
    params: Sequence[Tensor],
    table: Tensor,
    filter_norms: Tensor | None,
    xi: float,
    q: float,
) -> Tensor:
    thetas = _runs(params, table) if len(params) else [None] * len(table)
    units = []
    for v, theta, row in zip(_runs(vectors, table), thetas, table.tolist(), strict=True):
        t = _scaling(theta, filter_norms, row, xi, v.device)
        scaled = t * _wide(v)
        units.append((t * _dual(scaled, q)).double() if q in (1, 2) else t * _dual(scaled.double(), q))
    curved = [h.double().square() * unit for h, unit in zip(_runs(perturbed, table), units, strict=True)]
    return _outer_product(val, train, curved, table)


def rho_grad_secant(
    val: Sequence[Tensor], train: Sequence[Tensor], perturbed: Sequence[Tensor], first: Sequence[Tensor], table: Tensor
) -> Tensor:
    pairs = zip(_runs(perturbed, table), _runs(first, table), strict=True)
    return _outer_product(val, train, [h.double() - g.double() for h, g in pairs], table)


def _outer_product(val: Sequence[Tensor], train: Sequence[Tensor], inner: list[Tensor], table: Tensor) -> Tensor:
    """(val - train)^T inner over all runs, in float64; no `train` stands for zero."""
    trains = _runs(train, table) if len(train) else [None] * len(table)
    total = torch.zeros((), dtype=torch.float64, device=val[0].device if len(val) else None)
    for a, b, x in zip(_runs(val, table), trains, inner, strict=True):
        outer = a.double() if b is None else a.double() - b.double()
        total += (outer * x).sum()
    return total


def all_finite_(values: Sequence[Tensor], skipped: Tensor) -> Tensor:
    finite = torch.stack([v.isfinite() for v in values]).all()
    skipped.add_((~finite).to(skipped.dtype))
    return finite.double()
