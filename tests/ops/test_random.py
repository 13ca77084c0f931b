"""The random numbers: words by known answers and by Python's integers, normal numbers by their statistics.

All draws are fixed, so a test that passes once passes always. Limits are set so that of good numbers one draw in 10^5
would go beyond: 4.42 standard deviations, or a p-value of 1e-5.
"""

import functools
import itertools
import math

import pytest
import torch

from lets_kernels.ops.reference.noise import words
from support import oracle_vectors as oracle
from support.backends import BACKENDS, Backend, plain
from support.guard_bands import guarded, same_bits

Z, P = 4.42, 1e-5
MILLIONS = 1 << 22
DRAW = (1234567890123456789, 11, 1)

KNOWN = [  # counter, key, words: kat_vectors of Random123, the authors' library
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.fixture(scope="module")
def stats():
    """scipy's, which a machine that tests the GPU backends alone may lack."""
    from scipy import stats

    return stats


# ---- words


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_the_oracle_gives_the_known_answers(counter, key, expected):
    assert oracle.philox(counter, key) == expected


@pytest.mark.parametrize("start", [0, 16, 4096, 2**34 - 64, 2**56])
@pytest.mark.parametrize(
    "draw", [(0, 0, 0), (-1, -1, 2**32 - 1), DRAW, (2**63 - 1, 2**40 + 5, 3), (-(2**63), 2**31, 2**31)]
)
def test_words_are_those_of_the_oracle(draw, start):
    found = words(start, 1001, torch.tensor(draw[:2]), draw[2])
    assert found.tolist() == oracle.words(start, 1001, draw)


@pytest.mark.ops
def test_every_backend_has_the_words_of_the_known_answer(backend):
    """Counter and key of zero are the first four positions of draw (0, 0) in stream 0. Without vectors the key of an
    element is its word times 2^31: counting what is above a threshold, for one member at a time, finds each bit."""
    table, random = torch.tensor([[0, 4, -1, 0, 0]]), guarded(torch.tensor([0, 0]))
    for position, expected in enumerate(KNOWN[0][2]):
        mask = torch.zeros(16, dtype=torch.uint8)
        mask[position] = 1
        found = 0
        for bit in reversed(range(32)):
            threshold = guarded(torch.tensor(((found | 1 << bit) << 31) - 1))
            if backend.count_above([], mask, table, threshold, random, 0, 1).item():
                found |= 1 << bit
        assert found == expected


@functools.cache
def million_words(stream=DRAW[2], count=DRAW[1], seed=DRAW[0]):
    return words(0, MILLIONS, torch.tensor([seed, count]), stream)


def test_every_value_of_a_words_bytes_is_as_frequent(stats):
    for shift in (0, 8, 16, 24):
        found = torch.bincount(million_words() >> shift & 0xFF, minlength=256)
        assert stats.chisquare(found.numpy()).pvalue > P


def test_every_bit_is_set_in_half_of_the_words():
    limit = Z / 2 * math.sqrt(MILLIONS)
    for bit in range(32):
        assert abs(int((million_words() >> bit & 1).sum()) - MILLIONS / 2) < limit


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 16, 1024])
def test_words_near_each_other_have_nothing_in_common(stats, lag):
    """The upper four bits of one and of the other: each of 256 pairs is as frequent."""
    upper = million_words() >> 28
    found = torch.bincount(upper[:-lag] * 16 + upper[lag:], minlength=256)
    assert stats.chisquare(found.numpy()).pvalue > P


def test_streams_counts_and_seeds_repeat_no_call():
    """Of 2^21 pairs of words, in 63 bits, two are the same by a chance of 2^-22; a shared stretch would be more."""
    first = million_words()[: 1 << 19].reshape(-1, 2)
    draws = [(DRAW[0] + i, DRAW[1] + j, DRAW[2] + k) for i, j, k in itertools.product((0, 1), repeat=3)]
    pairs = [words(0, 1 << 19, torch.tensor(d[:2]), d[2]).reshape(-1, 2) for d in draws]
    assert torch.equal(pairs[0], first)
    joined = torch.cat([(p[:, 0] << 31) ^ p[:, 1] for p in pairs])
    assert joined.unique().numel() == joined.numel()


# ---- normal numbers


def numbers(backend, seed=DRAW[0], count=DRAW[1], stream=DRAW[2], numel=MILLIONS):
    out, table = torch.empty(numel), torch.tensor([[0, numel, -1, 0, 0]])
    backend.noise_([out], [], [], table, None, torch.tensor([seed, count]), stream, 0.0, 1.0)
    return out


@pytest.fixture(scope="module")
def normal():
    """Four million numbers, of which every backend has the bits."""
    first, *others = (numbers(Backend(name)) for name in BACKENDS)
    assert all(same_bits(first, other) for other in others)
    return first.double()


def test_normal_numbers_follow_the_normal_distribution(stats, normal):
    """By Kolmogorov and Smirnov, who look at the middle, and Anderson and Darling, who look at the tails: their
    statistic is above 10.0 in one of 10^5 draws (by its tail, which falls as e^-x: 6.0 is exceeded by one in 10^3)."""
    assert stats.kstest(normal.numpy(), "norm").pvalue > P
    x = normal.sort().values
    log_below, log_above = torch.special.log_ndtr(x), torch.special.log_ndtr(-x)
    odd = 2 * torch.arange(1, x.numel() + 1, dtype=torch.float64) - 1
    anderson = -x.numel() - float((odd * (log_below + log_above.flip(0))).sum()) / x.numel()
    assert anderson < 10.0


def test_moments(normal):
    """x^k has the mean (k - 1)!! (even k; else 0) and the variance (2k - 1)!! less its square."""
    for k in range(1, 7):
        mean = math.prod(range(1, k, 2)) if k % 2 == 0 else 0
        deviation = math.sqrt((math.prod(range(1, 2 * k, 2)) - mean**2) / normal.numel())
        assert abs(float((normal**k).mean()) - mean) < Z * deviation, k


def test_tails_are_as_long_as_they_should_be(stats, normal):
    """How many are beyond t is Poisson's; no number exceeds the radius of the least word, sqrt(66 ln 2) = 6.76."""
    for t in (3.0, 4.0, 4.5, 5.0):
        for side in (normal, -normal):
            expected = normal.numel() * float(torch.special.ndtr(torch.tensor(-t, dtype=torch.float64)))
            found = int((side > t).sum())
            assert stats.poisson.sf(found - 1, expected) > P
            assert stats.poisson.cdf(found, expected) > P
    assert float(normal.abs().max()) < math.sqrt(66 * math.log(2)) * (1 + 1e-6)


def correlation(x, y):
    return float((x * y).mean()) * math.sqrt(x.numel())  # of unit variance, in standard deviations


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 16, 64, 4096])
def test_positions_near_each_other_are_independent(normal, lag):
    """Also in their squares, (x^2 - 1)/sqrt 2: two numbers of one pair share the radius, which must not show."""
    assert abs(correlation(normal[:-lag], normal[lag:])) < Z
    square = (normal**2 - 1) / math.sqrt(2)
    assert abs(correlation(square[:-lag], square[lag:])) < Z


def test_the_numbers_of_one_call_are_independent(stats, normal):
    """The four of a call, each against each, and each by itself normal."""
    four = normal.reshape(-1, 4).T
    for x, y in itertools.combinations(four, 2):
        assert abs(correlation(x, y)) < Z
        assert abs(correlation((x**2 - 1) / math.sqrt(2), (y**2 - 1) / math.sqrt(2))) < Z
    for x in four:
        assert stats.kstest(x[: 1 << 17].numpy(), "norm").pvalue > P


def test_streams_counts_and_seeds_are_independent(normal):
    """Neighbours in each part of the draw, as steps, buckets and runs take them."""
    size = 1 << 20
    seed, count, stream = DRAW
    others = [(seed, count, stream + 1), (seed, count + 1, stream), (seed + 1, count, stream)]
    others += [(seed + 2**32, count, stream), (seed, stream, count)]
    drawn = [normal[:size], *(numbers(plain(), *draw, numel=size).double() for draw in others)]
    for x, y in itertools.combinations(drawn, 2):
        assert abs(correlation(x, y)) < Z
        assert int((x == y).sum()) < 10  # float32 numbers: equal by chance about once in 10^7


def test_kept_elements_are_as_many_as_the_share_says(backend):
    """masked_ without a mask: binomial, for shares of every size; all for a share of one."""
    numel = 1 << 18
    v, table = torch.ones(numel), torch.tensor([[0, numel, -1, 0, 0]])
    for i, share in enumerate((1e-4, 0.01, 0.5, 0.9, 1.0)):
        out = torch.empty(numel)
        backend.masked_([out], [v], None, table, torch.tensor([3, i]), 0, share)
        kept = int((out != 0).sum())
        assert abs(kept - share * numel) <= Z * math.sqrt(numel * share * (1 - share))
