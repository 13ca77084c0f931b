"""Float64 oracles of the ops on two vectors, averages, noise and masks, from the papers and from nothing else.

Values are float64 vectors in memory order, as in oracle.py. The random words are computed twice: here by Python's
integers, one call of Philox at a time. Nothing here imports `lets_kernels`.
"""

import functools
import math
import struct

import torch

# ------------------------------------------------------------------------------------- averages, steps, combinations


def combined(a, x, b, y):
    """a x + b y, and the sum of its terms' magnitudes, to which rounding errors are proportional."""
    return a * x + b * y, (a * x).abs() + (b * y).abs()


def displacement_terms(g, theta, saved):
    """The terms of g g, g d and d d; d = theta - saved is what a step has moved. The caller sums (and bounds) them."""
    d = theta - saved
    return g * g, g * d, d * d


def ascent(s, g, beta2, damping):
    """Moellenhoff & Khan 2023, Algorithm 1: the ascent direction g/s, and the precision after it."""
    return g / s, beta2 * s + (1 - beta2) * (s.sqrt() * g.abs() + damping)


def bsam(theta, g, m, s, lr, beta1, weight_decay):
    """The descent of the same algorithm: the average and the weights after it."""
    average = beta1 * m + (1 - beta1) * (g + weight_decay * theta)
    return average, theta - lr * average / s


def lion(theta, g, m, lr, beta1, beta2, weight_decay):
    """Chen et al. (2023), Algorithm 2: the update's mixture, the average and the weights after it."""
    mixed = beta1 * m + (1 - beta1) * g
    return mixed, beta2 * m + (1 - beta2) * g, theta - lr * (mixed.sign() + weight_decay * theta)


# --------------------------------------------------------------------------------------------------- random numbers


def philox(counter, key):
    """Philox 4x32-10 (Salmon et al., SC 2011, section 4.3): four 32-bit words from four of counter and two of key."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@functools.cache
def _block(k, seed, count, stream):
    return philox((k % 2**32, k >> 32, count % 2**32, stream), (seed % 2**32, (seed >> 32) % 2**32))


@functools.cache
def words(start, numel, draw):
    """The words of the positions from ``start``, as Python integers; draw: (seed, count, stream)."""
    return [w for k in range(start // 4, -(-(start + numel) // 4)) for w in _block(k, *draw)][:numel]


@functools.cache
def normals(start, numel, draw):
    """Box and Muller (1958) in float64, r cos and r sin of each pair of words, and the radius r of each.

    The first word is the square of the radius, the second the angle; which of the four right angles it is in is told by
    its upper two bits, and the quarter turns are centred on the axes.
    """
    w = torch.tensor(words(start, numel + numel % 2, draw), dtype=torch.float64).reshape(-1, 2)
    radius = (-2 * ((w[:, 0] + 0.5) / 2**32).log()).sqrt()
    angle = 2 * math.pi * w[:, 1] / 2**32 - math.pi / 4
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return pairs.reshape(-1)[:numel], radius.repeat_interleave(2)[:numel]


U = 2.0**-24


def normal_bound(radius):
    """How far float32 Box-Muller may be from the above.

    The word rounds to u (twice: 2 U of it, so 2 U of ln u), the logarithm's own operations are good to 10 U of it (two
    of k ln 2, which may be twice of what is left after the sum; four of the series, its truncation, the sum). That is
    4 U + 10 U r^2 of r^2, which moves r down by more than up. The angle is off by 3 U (the word, the half, the factor),
    sine and cosine by 4 U (their terms; truncation), and the product and the root of r add one each: 9 U r.
    """
    square = 4 * U + 10 * U * radius**2
    return radius - (radius**2 - square).clamp_min(0).sqrt() + 9 * U * radius


# ------------------------------------------------------------------------------------------------------------- masks


def keys(v, start, numel, draw):
    """The numbers by which elements are ranked: the bits of |v| as float32 above a random word, or that word alone."""
    found = words(start, numel, draw)
    if v is None:
        return [w << 31 for w in found]
    magnitudes = (struct.unpack("<I", struct.pack("<f", abs(x)))[0] for x in v.float().tolist())
    return [m << 32 | w for m, w in zip(magnitudes, found, strict=True)]
