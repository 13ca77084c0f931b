"""What the kernels share: addresses, masked loads, T of ASAM, powers, rounding, sums.

Nothing here knows an op. ``DTYPE`` is the storage type and ``C`` the arithmetic type, float32 except for float64.
"""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton.language.extra import libdevice

from lets_kernels.ops.declared import ELEMENT_WISE, FISHER

INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)
_FISHER: tl.constexpr = tl.constexpr(FISHER)
_ELEMENT_WISE: tl.constexpr = tl.constexpr(ELEMENT_WISE)
_FAR: tl.constexpr = tl.constexpr(1 << 30)  # more elements than any chunk has
COLUMNS = 8  # of the table of numbers; more than any op has
_COLUMNS: tl.constexpr = tl.constexpr(COLUMNS)


def kernel(function: Callable[..., Any]) -> Any:
    """``triton.jit`` with one binary for every value and alignment of the arguments that are not constexpr."""
    parameters = inspect.signature(function).parameters.items()
    runtime = [name for name, p in parameters if p.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=runtime)


def helper(function: Callable[..., Any]) -> Any:
    """``triton.jit`` for helpers of kernels. Interpreted, a plain function, since patching costs 1 ms a call."""
    return function if INTERPRETED else triton.jit(function)


# ---- where the elements are


@helper
def chunk_at(chunks):
    """The run, the first element within it, and the number of elements of this program's chunk."""
    entry = chunks + 3 * tl.program_id(0).to(tl.int64)
    return tl.load(entry), tl.multiple_of(tl.load(entry + 1), 4096), tl.load(entry + 2).to(tl.int32)


@helper
def typed(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address from a table as a pointer. An aligned pointer may be read and written 16 bytes at a time."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@helper
def elements(addresses, run, begin, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to element ``begin`` of a run."""
    return typed(tl.load(addresses + run), DTYPE, ALIGNED) + begin


@helper
def load(pointer, at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """The block at element ``at`` of a chunk, one element a lane; zero from element ``count`` on where masked."""
    lane = tl.arange(0, BLOCK)
    place = pointer + at + lane
    return tl.load(place, mask=lane < count - at, other=0.0) if MASKED else tl.load(place)


@helper
def store(pointer, value, at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Write a block to the place where :func:`load` reads it."""
    lane = tl.arange(0, BLOCK)
    if MASKED:
        tl.store(pointer + at + lane, value, mask=lane < count - at)
    else:
        tl.store(pointer + at + lane, value)


@helper
def narrow(x, DTYPE: tl.constexpr):
    """Cast to the storage type, to nearest, ties to even. The interpreter's own cast to bfloat16 truncates."""
    if _INTERPRETED and DTYPE.is_bf16():
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@helper
def number(numbers, per_run, run, COLUMN: tl.constexpr, value):
    """A number of a run, in double: its own, from the table, if bit COLUMN of ``per_run`` is set, otherwise ``value``.

    The table has int64 words, as all tables, so that any of them may stand where there is none. Which numbers differ by
    run is not constexpr: they may agree at some steps and not at others, and a kernel would be compiled for each case.
    """
    own = (per_run >> COLUMN) & 1 != 0
    word = tl.load(numbers + (run * _COLUMNS + COLUMN), mask=own, other=0)
    return tl.where(own, word.to(tl.float64, bitcast=True), tl.full([], value, tl.float64))


# ---- arithmetic (csrc/math.h has the same on the CPU)


@helper
def power(x, y):
    """x^y for x >= 0 and y > 0, in the type of x."""
    if _INTERPRETED:  # the interpreter has no device library; double costs no accuracy in float
        wide = tl.exp2(y * tl.log2(tl.where(x > 0, x, 1.0).to(tl.float64)))
        result = tl.where(x > 0, wide, x.to(tl.float64)).to(x.dtype)
    else:
        result = libdevice.pow(x, y)
    return result


@helper
def square_root(x, C: tl.constexpr):
    """Correctly rounded, in both types."""
    return tl.sqrt(x) if C.is_fp64() else tl.sqrt_rn(x)


@helper
def divide(x, y, C: tl.constexpr):
    """Correctly rounded, in both types."""
    return x / y if C.is_fp64() else tl.div_rn(x, y)


@helper
def dual(x, q, POWER: tl.constexpr):
    """sign(x) |x|^(q-1); ``POWER`` is q if q is 1 or 2, otherwise 0."""
    if POWER == 2:
        result = x
    else:
        result = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(x.dtype)
        if POWER != 1:
            result = result * power(tl.abs(x), q - 1)
    return result


# ---- T of ASAM, and of the Fisher information


@helper
def cyclic(position, period):
    """A place in a cycle, in 32 bits. Places less than ``_FAR`` ahead of it keep their places in the cycle."""
    short = tl.minimum(period, _FAR)
    return (short - tl.minimum(period - position, short)).to(tl.int32), short.to(tl.int32)


@helper
def scaling_at(runs, run, begin):
    """How T scales a chunk: the filter length, then where the chunk begins within its filter and among the filters."""
    row = runs + 5 * run
    length, count, start = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    each, filters = tl.maximum(length, 1), tl.maximum(count, 1)
    inner, period = cyclic(begin % each, each)
    first = begin // each % filters
    outer, cycle = cyclic(first, filters)
    return length, inner, period, outer, cycle, start, first - outer


@helper
def filters_of(scaling, at, BLOCK: tl.constexpr):
    """Which filter each element of the block at element ``at`` of a chunk belongs to."""
    _, inner, period, outer, cycle, _, far = scaling
    filter = outer + (at + inner + tl.arange(0, BLOCK)) // period
    # `far` is not 0 only in cycles too long for 32 bits; it counts down to the end of the cycle.
    return filter % cycle + tl.where(filter < cycle, far, 0)


@helper
def scale(scaling, theta, v, norms, xi, at, SCALED: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """T of the block at element ``at`` of a chunk; ``theta`` matters only where T = |theta| + xi.

    SCALED: 1 if no run has filters, 2 if some runs have; 4 more if T of some runs is that of the Fisher information.
    """
    length, start = scaling[0], scaling[5]
    t = tl.full([BLOCK], 1, C)
    if length == _ELEMENT_WISE:
        t = tl.abs(theta) + xi
    if SCALED % 4 == 2:  # noqa: SIM102 (this one is decided when the kernel is compiled, the next one when it runs)
        if length > 0:
            t = tl.load(norms + start + filters_of(scaling, at, BLOCK)) + xi
    if SCALED >= 4:  # noqa: SIM102
        if length == _FISHER:
            f = xi * (v * v)
            far = divide(divide(t, square_root(t * xi, C), C), tl.abs(v), C)  # where f overflows, and so 1 + f = f
            t = tl.where(f - f == 0, divide(t, square_root(1 + f, C), C), far)
    return t


@helper
def theta_for(scaling, pointer, at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """The weights if T needs them, otherwise zeros."""
    theta = tl.full([BLOCK], 0.0, C)
    if scaling[0] == _ELEMENT_WISE:
        theta = load(pointer, at, count, MASKED, BLOCK).to(C)
    return theta


# ---- blocks and sums


@helper
def for_blocks(body: tl.constexpr, arguments, kinds, count, BLOCK: tl.constexpr):
    """Call ``body`` for every block of a chunk; passes also the block's first element, the count, MASKED and BLOCK.

    ``kinds`` are the body's constexpr arguments.
    """
    whole = count // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):
        body(*arguments, *kinds, at, count, False, BLOCK)
    if whole < count:
        body(*arguments, *kinds, whole, count, True, BLOCK)


@helper
def sum_blocks(slots, body: tl.constexpr, arguments, kinds, count, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Like :func:`for_blocks`, for a body that returns a double for each element: writes their sum to the slot."""
    whole = count // BLOCK * BLOCK
    total = tl.full([BLOCK], 0.0, tl.float64)
    for at in range(0, whole, BLOCK):
        total += body(*arguments, *kinds, at, count, False, BLOCK)
    if whole < count:
        term = body(*arguments, *kinds, whole, count, True, BLOCK)
        total += tl.where(tl.arange(0, BLOCK) < count - whole, term, 0.0)
    tl.store(slots + tl.program_id(0).to(tl.int64), tree_sum(total, BLOCK, STAGES))


@helper
def _copy(to, source, at, count, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    store(to, load(source, at, count, MASKED, BLOCK), at, count, MASKED, BLOCK)


@helper
def copy_chunk(to, source, count, BLOCK: tl.constexpr):
    for_blocks(_copy, (to, source), (), count, BLOCK)


@helper
def tree_sum(x, N: tl.constexpr, STAGES: tl.constexpr):
    """The sum of N = 2^STAGES values, pair by pair: the order is the same for any layout, alignment and device."""
    for stage in tl.static_range(STAGES):
        x = tl.sum(tl.reshape(x, [N >> (stage + 1), 2]), axis=1)
    return tl.sum(x, axis=0)


@kernel
def add_slots(out, slots, count, N: tl.constexpr, STAGES: tl.constexpr):
    """One program for each sum: adds ``count`` slots, in their order."""
    index = tl.program_id(0).to(tl.int64)
    lane, first = tl.arange(0, N), slots + index * count
    total = tl.full([N], 0.0, tl.float64)
    for begin in range(0, count, N):
        total += tl.load(first + begin + lane, mask=begin + lane < count, other=0.0)
    tl.store(out + index, tree_sum(total, N, STAGES))
