"""Random numbers that are computed wherever they are used (csrc/random.h has the same for the CPU)."""

import triton.language as tl

from lets_kernels.ops.triton.device import divide, helper, square_root


@helper
def draw_at(random, stream):
    """The source of a draw: the halves of the optimizer's seed, the step's count and the stream, in 32 bits each."""
    seed, count = tl.load(random), tl.load(random + 1)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32), count.to(tl.uint32), stream.to(tl.uint32)


@helper
def _quads(draw, position, BLOCK: tl.constexpr):
    """The four words of each quad of the block at a position, which is a multiple of four."""
    seed, upper, count, stream = draw
    none = tl.full([BLOCK // 4], 0, tl.uint32)
    k = (position >> 2) + tl.arange(0, BLOCK // 4)
    c0, c1, c2, c3 = k.to(tl.uint32), (k >> 32).to(tl.uint32), none + count, none + stream
    k0, k1 = none + seed, none + upper
    m0, m1 = none + 0xD2511F53, none + 0xCD9E8D57
    for _ in tl.static_range(10):
        high0, low0, high1, low1 = tl.umulhi(m0, c0), m0 * c0, tl.umulhi(m1, c2), m1 * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@helper
def _in_order(first, second, third, fourth, BLOCK: tl.constexpr):
    """The values of all quads, one value a lane."""
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [BLOCK])


@helper
def words(draw, position, BLOCK: tl.constexpr):
    """The 32-bit words of the block at a position, as int64."""
    c0, c1, c2, c3 = _quads(draw, position, BLOCK)
    return _in_order(c0, c1, c2, c3, BLOCK).to(tl.int64)


@helper
def _logarithm(u):
    """ln u: ln(2^e m) with m within sqrt 2 of 1, and ln m = 2 artanh((m - 1)/(m + 1))."""
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    m = (bits - e * 0x800000).to(tl.float32, bitcast=True)
    s = divide(m - 1.0, m + 1.0, tl.float32)
    z = s * s
    series = ((((1 / 9) * z + (1 / 7)) * z + (1 / 5)) * z + (1 / 3)) * z + 1.0
    return e.to(tl.float32) * 0.6931471805599453 + (s + s) * series


@helper
def _normal_pair(a, b):
    """Two standard-normal numbers from two words: Box and Muller (1958)."""
    u = a.to(tl.float32) * (2.0**-32) + (2.0**-33)
    radius = square_root(-2.0 * _logarithm(u), tl.float32)
    quadrant = b >> 30
    x = ((b & 0x3FFFFFFF).to(tl.float32) * (2.0**-30) - 0.5) * 1.5707963267948966
    z = x * x
    sine = x * (((((1 / 362880) * z - (1 / 5040)) * z + (1 / 120)) * z - (1 / 6)) * z + 1.0)
    cosine = ((((1 / 40320) * z - (1 / 720)) * z + (1 / 24)) * z - 0.5) * z + 1.0
    swap = (quadrant & 1) != 0
    # Products, as the unary minus of Triton 3.6 loses the sign of zero.
    sign = tl.where(quadrant >= 2, -1.0, 1.0)
    c, s = tl.where(swap, sine * -1.0, cosine), tl.where(swap, cosine, sine)
    return radius * (c * sign), radius * (s * sign)


@helper
def normals(draw, position, BLOCK: tl.constexpr):
    """Standard-normal float32 numbers for the block at a position."""
    c0, c1, c2, c3 = _quads(draw, position, BLOCK)
    first, second = _normal_pair(c0, c1)
    third, fourth = _normal_pair(c2, c3)
    return _in_order(first, second, third, fourth, BLOCK)
