"""What the formulas share: views of runs, the arithmetic type, T of ASAM, powers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lets_kernels.ops.declared import ELEMENT_WISE, FISHER, UNSCALED

Tensors = Sequence[Tensor]  # one dense tensor a run, or one flat buffer
PerRun = float | Sequence[float]  # one number, or one a run


def runs(tensors: Tensors, table: Tensor) -> list[Tensor]:
    """One 1-d view for each row of the table, in memory order, from a list of dense tensors or from one flat buffer."""
    rows = table.tolist()
    if len(tensors) == 1 and (len(rows) != 1 or tensors[0].numel() != rows[0][1]):
        return [tensors[0][start : start + numel] for start, numel, *_ in rows]
    return [t.as_strided((t.numel(),), (1,)) for t in tensors]


def per_run(number: PerRun, table: Tensor) -> list[float]:
    """The number of each run.

    Raises:
        RuntimeError: there are as many numbers neither as runs nor as one.
    """
    given = list(number) if isinstance(number, Sequence) else [number]
    _check_count(len(given), table)
    return given * len(table) if len(given) == 1 else given


def each_radius(rho: Tensor, table: Tensor) -> Sequence[Tensor]:
    """The same for numbers on the device: 0-d tensors.

    Raises:
        RuntimeError: as :func:`per_run`.
    """
    _check_count(rho.numel(), table)
    return rho.flatten().expand(len(table)).unbind()


def _check_count(count: int, table: Tensor) -> None:
    if count not in (1, len(table)):
        raise RuntimeError(f"{count} numbers for {len(table)} rows of the run table: pass one, or one for each")


def wide(x: Tensor) -> Tensor:
    """The values in the arithmetic type: float64 for float64, float32 for every other dtype."""
    return x if x.dtype == torch.float64 else x.float()


def root(x: Tensor) -> Tensor:
    """The correctly rounded square root; torch's own square root on the CPU is not always correctly rounded."""
    r = x.double().sqrt()
    if x.dtype != torch.float64:
        return r.to(x.dtype)
    # x - r^2 without rounding, by the halves of r (Dekker, 1971), is the error of r.
    shifted = r * 134217729.0
    high = shifted - (shifted - r)
    low = r - high
    square = r * r
    error = ((high * high - square) + 2 * high * low) + low * low
    lacks = ((x - square) - error) / (2 * r)
    return torch.where(lacks.isfinite(), r + lacks, r)


def scaling(
    theta: Tensor | None, filter_norms: Tensor | None, row: Sequence[int], xi: float, vector: Tensor
) -> Tensor | float:
    """T of ASAM for one run (Kwon et al., 2021; LETS Eq. 7), or of the Fisher information (Kim et al., 2022)."""
    filter_length = row[2]
    if filter_length == FISHER:
        v = wide(vector)
        f = xi * (v * v)
        far = root(torch.full_like(v, xi)).reciprocal() / v.abs()  # for an f that overflows, so that 1 + f = f
        return torch.where(f - f == 0, root(1 + f).reciprocal(), far)
    if filter_length == UNSCALED:
        return 1.0
    if filter_length == ELEMENT_WISE:
        assert theta is not None
        return wide(theta).abs() + xi
    assert filter_norms is not None
    return filter_norms[filter_of(row, vector.device)] + xi


def dual(x: Tensor, q: float) -> Tensor:
    """sign(x) |x|^(q-1), the gradient of |x|^q / q (Foret et al., 2021, Eq. 2)."""
    return x if q == 2 else x.sign() * x.abs().pow(q - 1)


def filter_of(row: Sequence[int], device: torch.device) -> Tensor:
    """For each element of a run, the place of its filter in the filter norms."""
    _, numel, filter_length, filter_count, filter_start = row
    elements = torch.arange(numel, device=device)
    return filter_start + elements.div(filter_length, rounding_mode="floor") % filter_count
