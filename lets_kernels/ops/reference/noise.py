"""Random numbers that are computed from a counter wherever they are used: Philox 4x32-10 (Salmon et al., SC 2011).

Element e of a run has the position ``start + e`` in its bucket. Positions 4k to 4k + 3 share one call of Philox, with
counter (k mod 2^32, k div 2^32, count, stream) and key (seed mod 2^32, seed div 2^32); ``random`` holds seed and count.
The normal numbers are float32, computed by Box and Muller with operations whose rounding is fixed, so they have the
same bits everywhere.
"""

import torch
from torch import Tensor

from lets_kernels.ops.reference.shared import Tensors, filter_of, root, runs, wide

__all__ = ["noise_"]

_LOW = 0xFFFFFFFF


def _product(c: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower half of the 64-bit product of two 32-bit numbers."""
    low, high = m * (c & 0xFFFF), m * (c >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def words(start: int, numel: int, random: Tensor, stream: int) -> Tensor:
    """One 32-bit word for each of the positions from ``start``, a multiple of four: int64."""
    k = torch.arange(start // 4, (start + numel + 3) // 4, device=random.device)
    seed, count = random.unbind()
    c = [k & _LOW, k >> 32, (count & _LOW).expand_as(k), torch.full_like(k, stream)]
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(c[0], 0xD2511F53), _product(c[2], 0xCD9E8D57)
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack(c, dim=1).reshape(-1)[:numel]


def _logarithm(u: Tensor) -> Tensor:
    """ln u in float32: ln(2^e m) with m within sqrt 2 of 1, and ln m = 2 artanh((m - 1)/(m + 1))."""
    bits = u.view(torch.int32)
    e = (bits - 0x3F3504F3) >> 23
    m = (bits - (e << 23)).view(torch.float32)
    s = (m - 1) / (m + 1)
    z = s * s
    series = (((1 / 9 * z + 1 / 7) * z + 1 / 5) * z + 1 / 3) * z + 1
    return e.float() * 0.6931471805599453 + (s + s) * series


def normals(start: int, numel: int, random: Tensor, stream: int) -> Tensor:
    """Standard-normal float32 numbers for the positions from ``start``: Box and Muller (1958) on pairs of words."""
    first, second = words(start, -(-numel // 2) * 2, random, stream).reshape(-1, 2).unbind(1)
    u = first.float() * 2.0**-32 + 2.0**-33
    radius = root(-2 * _logarithm(u))
    quadrant = second >> 30
    x = ((second & 0x3FFFFFFF).float() * 2.0**-30 - 0.5) * 1.5707963267948966
    z = x * x
    sine = x * ((((1 / 362880 * z - 1 / 5040) * z + 1 / 120) * z - 1 / 6) * z + 1)
    cosine = (((1 / 40320 * z - 1 / 720) * z + 1 / 24) * z - 1 / 2) * z + 1
    swap, flip = quadrant % 2 == 1, quadrant >= 2
    c, s = torch.where(swap, -sine, cosine), torch.where(swap, cosine, sine)
    pairs = torch.stack([radius * torch.where(flip, -c, c), radius * torch.where(flip, -s, s)], dim=1)
    return pairs.reshape(-1)[:numel]


def noise_(
    out: Tensors, vectors: Tensors, precisions: Tensors, table: Tensor, filter_norms: Tensor | None, random: Tensor,
    stream: int, a: float, std: float,
) -> Tensor:  # fmt: skip
    """out <- a v + std S n with n standard normal. Returns Σ out², of the stored values.

    S is the norm of the element's filter if its run has filters, 1/√s if precisions s are given, and otherwise 1.
    Without ``vectors`` v is zero. ``random`` holds seed and count. n is the number of :func:`normals` for the element's
    position in its bucket and for the stream, the same in every backend. Returns a 0-d float64 tensor.

    Raises:
        RuntimeError: a table has filters, but neither norms nor precisions are given (compiled and Triton backends).
    """
    total = torch.zeros((), dtype=torch.float64, device=random.device)
    vs = runs(vectors, table) if len(vectors) else [None] * len(table)
    ss = runs(precisions, table) if len(precisions) else [None] * len(table)
    for to, v, s, row in zip(runs(out, table), vs, ss, table.tolist(), strict=True):
        c = wide(to).dtype
        scale: Tensor | float = std
        if s is not None:
            scale = std * root(wide(s)).reciprocal()
        elif row[2] > 0:
            assert filter_norms is not None
            scale = std * filter_norms[filter_of(row, random.device)]
        moved = scale * normals(row[0], row[1], random, stream).to(c)
        to.copy_((moved if v is None else a * wide(v) + moved).to(to.dtype))
        total += to.double().square().sum()
    return total
