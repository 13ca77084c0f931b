"""Runs for the op tests: tensors of every layout inside guard bands, their table, and their values in memory order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lets_kernels.ops.declared import ELEMENT_WISE, FISHER, UNSCALED

GUARD = -77.0  # stands around every run, and in the padding of every flat buffer; exact in each dtype
BAND = 32
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ARITHMETIC = {torch.float64: torch.float64}  # anything else computes in float32
U64 = 2.0**-53


def unit_roundoff(dtype):
    return torch.finfo(dtype).eps / 2


def arithmetic(dtype):
    """The unit round-off of the arithmetic: float64 for float64, float32 for the rest."""
    return unit_roundoff(ARITHMETIC.get(dtype, torch.float32))


def storage(dtype, values):
    """The bound on rounding `values` to the parameter's dtype: relative, and half of its smallest subnormal."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return unit_roundoff(dtype) * values.abs() + smallest / 2


@dataclass(frozen=True)
class Run:
    """One parameter: its shape, its filters as the table has them, its dimensions from slowest to fastest in memory."""

    shape: tuple = ()
    filters: tuple = (1, 1)  # (filter_length, filter_count), as the run table has them
    order: tuple | None = None
    offset: int = 0  # elements past an aligned address

    @property
    def numel(self):
        return torch.Size(self.shape).numel()


def _lines(*sizes, offset=0):
    """1-d runs, in filters of the smallest divisor above two (a table's filters always divide their run)."""
    lengths = [next((d for d in range(3, n) if n % d == 0), max(1, n)) for n in sizes]
    return [Run((n,), (d, max(1, n // d)), offset=offset) for n, d in zip(sizes, lengths, strict=True)]


_guards = []  # (buffer, mask of its guard bands) of the running test: conftest.py looks at them when it is over


def forget_guards():
    _guards.clear()


def _guard(dtype):
    return int(GUARD) % 256 if dtype is torch.uint8 else GUARD


def assert_guards():
    for buffer, mask in _guards:
        assert bool((buffer[mask] == _guard(buffer.dtype)).all()), "an element outside the runs was written"


def _banded(numel, dtype, offset=0):
    """A buffer full of guards, and the stretch of it that a run or a scalar may have."""
    buffer = torch.full((BAND + offset + numel + BAND,), _guard(dtype), dtype=dtype)
    mask = torch.ones(buffer.shape, dtype=torch.bool)
    mask[BAND + offset : BAND + offset + numel] = False
    _guards.append((buffer, mask))
    return buffer, mask


def guarded(values):
    """The values in memory of their own, between guard bands: scalars, flags and filter norms."""
    buffer, _ = _banded(values.numel(), values.dtype)
    return buffer[BAND : BAND + values.numel()].copy_(values.reshape(-1)).view(values.shape)


LAYOUTS = {
    **{f"numel-{n}": _lines(n) for n in (0, 1, 15, 16, 17, 65535, 65536, 65537)},
    "0-d": [Run(())],
    "300-filters-of-9": [Run((300, 1, 3, 3), (9, 300))],
    "filters-of-1": [Run((70, 1), (1, 70))],
    "filters-longer-than-a-chunk": [Run((2, 70001), (70001, 2))],
    "filters-across-chunks": [Run((700, 100), (100, 700))],
    "transposed-conv": [Run((6, 5, 3, 3), (9, 5))],
    "channels-last": [Run((8, 3, 5, 5), (75, 8), (0, 2, 3, 1))],
    "transposed-conv-channels-last": [Run((6, 5, 3, 3), (1, 5), (0, 2, 3, 1))],
    "dense-permuted": [Run((7, 11, 13), (11, 7), (2, 0, 1))],
    "unaligned": _lines(1003, offset=1),
    "unaligned-large": _lines(70000, offset=3),
    "several": [
        *_lines(15, 0, 17),
        Run((8, 3, 5, 5), (75, 8), (0, 2, 3, 1)),
        Run(()),
        Run((6, 5, 3, 3), (9, 5), offset=1),
        Run((33, 17), (1, 33), (1, 0)),
        *_lines(65537, 1),
        Run((40, 2, 3, 3), (18, 40)),
    ],
    "many-small": [_lines(1 + 7 * i % 40, offset=i % 3)[0] for i in range(120)],
}


# Scales by the row lengths of the run table; 1 stands for the run's own.
KINDS = {
    "plain": [UNSCALED],
    "element": [ELEMENT_WISE],
    "filter": [1],
    "mixed": [1, ELEMENT_WISE, UNSCALED],
    "fisher": [FISHER],
    "all": [1, FISHER, ELEMENT_WISE, UNSCALED],
}


@dataclass
class Bucket:
    """The runs of one bucket, the table over them, and what allocates tensors for them in the two argument forms."""

    runs: list
    dtype: torch.dtype
    scale: str = (
        "plain"  # plain: T = 1; element: |theta| + xi; filter: of the run; mixed: each in turn; fisher; all: all four
    )
    first_start: int = 0
    seed: int = 0

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)
        kinds = KINDS[self.scale]
        rows, start, first_filter = [], self.first_start, 0
        for i, run in enumerate(self.runs):
            kind = kinds[i % len(kinds)]
            length, count = run.filters if kind == 1 else (kind, 0)
            rows.append((start, run.numel, length, count, first_filter if kind == 1 else 0))
            start += -(-run.numel // 16) * 16
            first_filter += count
        self.table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)
        self.total, self.filter_count = start, first_filter

    @property
    def roundings(self):
        """Of T v, in units of u.  ASAM: xi, |theta| + xi, the product.  Fisher: xi, v^2, their product and the sum, of
        which the root leaves half; root, reciprocal, the product."""
        return 5 if FISHER in KINDS[self.scale] else 3

    def values(self, spread=1.0, zeros=True):
        """Random values of every run, exact in the dtype, in memory order; each seventh is a zero (of either sign)."""
        result = []
        for run in self.runs:
            x = torch.randn(run.numel, generator=self.generator, dtype=torch.float64) * spread
            if zeros:
                x[3::7] = 0.0
                x[10::14] *= -1
            result.append(x.to(self.dtype).double())
        return result

    def positive(self, low, high):
        """Values uniform between two positive bounds, exact in the dtype: second moments, gradients kept off zero."""
        uniform = (torch.rand(r.numel, generator=self.generator, dtype=torch.float64) for r in self.runs)
        return [(low + (high - low) * x).to(self.dtype).double() for x in uniform]

    def norms(self):
        """Filter norms of arbitrary positive values, and T's constant: each op is tested on its own arguments."""
        dtype = ARITHMETIC.get(self.dtype, torch.float32)
        return guarded(torch.empty(max(1, self.filter_count), dtype=dtype).uniform_(0.1, 3.0, generator=self.generator))

    def give(self, values, form, dtype=None):
        """The values (None: NaN) as an argument: "list" (a tensor a run, as it lies) or "flat" (one padded buffer)."""
        dtype = dtype or self.dtype
        values = [torch.full((r.numel,), torch.nan) for r in self.runs] if values is None else values
        if form == "flat":
            buffer, mask = _banded(self.total, dtype)
            mask[:] = True  # what pads the runs is nobody's either
            for value, (start, numel, *_) in zip(values, self.table.tolist(), strict=True):
                buffer[BAND + start : BAND + start + numel] = value.to(dtype)
                mask[BAND + start : BAND + start + numel] = False
            return [buffer[BAND : BAND + self.total]]
        return [self._tensor(run, value.to(dtype)) for run, value in zip(self.runs, values, strict=True)]

    def _tensor(self, run, value):
        buffer, _ = _banded(run.numel, value.dtype, run.offset)
        begin = BAND + run.offset
        buffer[begin : begin + run.numel] = value
        order = run.order or tuple(range(len(run.shape)))
        strides, step = [0] * len(order), 1
        for dimension in reversed(order):
            strides[dimension] = step
            step *= max(1, run.shape[dimension])
        return torch.as_strided(buffer, run.shape, strides, begin)

    def read(self, argument):
        """The values of an argument, run by run in memory order, in its own dtype."""
        if len(argument) == 1 and (
            len(self.runs) != 1 or (argument[0].ndim == 1 and argument[0].numel() == self.total)
        ):
            return [argument[0][s : s + n].clone() for s, n, *_ in self.table.tolist()]
        return [t.as_strided((t.numel(),), (1,), t.storage_offset()).clone() for t in argument]

    def assert_guards(self):
        assert_guards()


def assert_within(actual, expected, bound):
    """|actual - expected| <= bound for every element of every run; NaN (an element nobody wrote) fails."""
    for i, (a, e, b) in enumerate(zip(actual, expected, bound, strict=True)):
        ok = (a.double() - e).abs() <= b
        assert bool(ok.all()), (
            f"run {i}: {int((~ok).sum())} of {ok.numel()} elements off, the first at {int((~ok).nonzero()[0])}: "
            f"{a[~ok][0].item()!r} is not {e[~ok][0].item()!r} to {torch.as_tensor(b).expand_as(e)[~ok][0].item():.3g}"
        )


def bits(x):
    """A tensor's bit patterns, so that -0.0 differs from 0.0 and NaN equals itself."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().contiguous().view(width)


def same_bits(a, b):
    """Bitwise equality of two tensors, or of two lists of them."""
    if torch.is_tensor(a):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
