"""noise_ against the float64 oracle: the same numbers at the same positions, whatever holds them."""

import itertools

import pytest
import torch

from support import oracle_vectors as oracle
from support.backends import plain
from support.guard_bands import (
    DTYPES,
    LAYOUTS,
    U64,
    Bucket,
    Run,
    arithmetic,
    assert_within,
    guarded,
    same_bits,
    storage,
)

pytestmark = [pytest.mark.ops, pytest.mark.pairwise]
FORMS = {"runs": ("list",) * 3, "flat-out": ("flat", "list", "list"), "flat": ("flat",) * 3}
KINDS = ("plain", "filter", "precision")
A, STD = 0.4, 0.05
DRAW = (0x0123456789ABCDEF, 7, 2)  # seed, count, stream


class Noise:
    """noise_'s arguments on random values, `out` full of NaN; kind: what stands for S."""

    def __init__(self, bucket, kind="plain", forms=FORMS["runs"], vectors=True, draw=DRAW):
        self.bucket, self.kind, self.stream = bucket, kind, draw[2]
        self.v, self.s = bucket.values() if vectors else None, bucket.positive(0.1, 2.0)
        self.norms = bucket.norms()
        self.out = bucket.give(None, forms[0])
        self.vectors = bucket.give(self.v, forms[1]) if vectors else []
        self.precisions = bucket.give(self.s, forms[2]) if kind == "precision" else []
        self.random = guarded(torch.tensor(draw[:2]))
        self.draw = draw

    def run(self, backend, a=A, std=STD):
        lists = self.out, self.vectors, self.precisions
        norms = self.norms if self.kind == "filter" else None
        self.total = backend.noise_(*lists, self.bucket.table, norms, self.random, self.stream, a, std)
        assert self.total.shape == () and self.total.dtype == torch.float64
        assert self.random.tolist() == list(self.draw[:2])
        self.bucket.assert_guards()
        return self

    def read(self):
        return self.bucket.read(self.out)

    def check(self, a=A, std=STD):
        """6 u of the noise without its number's own error (std, S of a root and a reciprocal, two products, the sum),
        3 u of a v, and the storage."""
        bucket, u = self.bucket, arithmetic(self.bucket.dtype)
        out = self.read()
        for i, (start, numel, length, count, first) in enumerate(bucket.table.tolist()):
            n, radius = oracle.normals(start, numel, self.draw)
            scale = torch.tensor(std, dtype=torch.float64)
            if self.kind == "precision":
                scale = std / self.s[i].sqrt()
            elif length > 0:
                scale = std * self.norms.double()[first + torch.arange(numel) // length % count]
            kept = a * self.v[i] if self.v is not None else torch.zeros(numel, dtype=torch.float64)
            expected = kept + scale * n
            bound = 6.01 * u * (scale * n).abs() + 3.01 * u * kept.abs() + scale * oracle.normal_bound(radius)
            assert_within([out[i]], [expected], [bound + storage(bucket.dtype, expected)])
        exact = float(sum(x.double().square().sum() for x in out))
        assert abs(self.total.item() - exact) <= (bucket.total + 1) * U64 * exact
        for values, argument in ((self.v, self.vectors), (self.s, self.precisions)):
            if argument:
                assert same_bits(bucket.read(argument), [x.to(bucket.dtype) for x in values]), "an input was written to"


def bucket_of(layout, dtype, kind):
    """Of the kinds only filters have filters; beside them stand rows of every other row length, which take S = 1."""
    return Bucket(LAYOUTS[layout], dtype, "all" if kind == "filter" else "plain")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_on_every_layout(backend, layout, dtype):
    Noise(Bucket(LAYOUTS[layout], dtype, "filter"), "filter").run(backend).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_noise_of_every_kind(backend, kind, forms, dtype):
    """With vectors and, into a flat buffer, without."""
    Noise(bucket_of("several", dtype, kind), kind, FORMS[forms], forms != "flat-out").run(backend).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_noise_bit_for_bit_as_plain_torch_does(backend, kind, dtype):
    """Also where a and std are no float32 numbers, without vectors, and at other seeds, counts and streams."""
    for draw, vectors, (a, std) in (
        (DRAW, True, (A, STD)),
        ((-(2**63), 2**31, 0), False, (1.0, 1.0)),
        ((2**63 - 1, 2**32 - 1, 2**32 - 1), True, (-1 / 3, 1e-3)),
    ):
        results = []
        for one in (backend, plain()):
            results.append(Noise(bucket_of("several", dtype, kind), kind, vectors=vectors, draw=draw).run(one, a, std))
        assert same_bits(*(r.read() for r in results))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_numbers_are_those_of_float32_in_every_dtype(backend, dtype):
    """std = 1 and no vectors: the same float32 numbers, rounded where they are stored."""
    numbers = Noise(Bucket(LAYOUTS["several"], torch.float32), vectors=False).run(backend, 1.0, 1.0).read()
    found = Noise(Bucket(LAYOUTS["several"], dtype), vectors=False).run(backend, 1.0, 1.0).read()
    assert same_bits(found, [n.to(dtype) for n in numbers])


def test_a_position_has_its_number_however_runs_are_cut(backend):
    """One run of 4,096; runs of 1 to 100 that pad to 16; runs of which the first does not start at zero."""
    whole = Noise(Bucket([Run((4096,))], torch.float32), vectors=False).run(backend).read()[0]
    for sizes, first in (([1 + 13 * i % 100 for i in range(50)], 0), ([15, 33, 16, 1, 700], 1024), ([2048] * 2, 0)):
        bucket = Bucket([Run((n,), offset=i % 3) for i, n in enumerate(sizes)], torch.float32, first_start=first)
        for form in FORMS.values():
            found = Noise(bucket, forms=form, vectors=False).run(backend).read()
            cut = [whole[start : start + numel] for start, numel, *_ in bucket.table.tolist()]
            assert same_bits(found, cut)


@pytest.mark.parametrize("start", [2**34 - 32, 2**34, 2**40 + 48, 2**55])
def test_positions_beyond_32_bits(backend, start):
    """Four positions share a call of Philox, whose second word of counter is the first that moves from 2^34 on."""
    bucket = Bucket([Run((100,))], torch.float32, first_start=start)
    noise = Noise.__new__(Noise)
    noise.bucket, noise.kind, noise.stream, noise.draw = bucket, "plain", DRAW[2], DRAW
    noise.v = noise.s = None
    noise.out, noise.vectors, noise.precisions = bucket.give(None, "list"), [], []
    noise.random = guarded(torch.tensor(DRAW[:2]))
    noise.run(backend).check()


def test_every_part_of_a_draw_makes_other_numbers(backend):
    """Seed (both halves), count, stream, position: no two share a number at the same place."""
    base = (5, 3, 1)
    draws = [base, (6, 3, 1), (5 + 2**32, 3, 1), (5, 4, 1), (5, 3, 2), (3, 5, 1), (5, 1, 3), (1, 3, 5)]
    found = [
        Noise(Bucket([Run((1000,))], torch.float32), vectors=False, draw=draw).run(backend, 1.0, 1.0).read()[0]
        for draw in draws
    ]
    for one, other in itertools.combinations(found, 2):
        assert int((one == other).sum()) <= 1
    again = Noise(Bucket([Run((1000,))], torch.float32), vectors=False, draw=base).run(backend, 1.0, 1.0).read()[0]
    assert same_bits(again, found[0])


def test_a_count_that_goes_on_makes_other_numbers_at_once(backend):
    """The draw is read where the op runs: what the caller adds to the count in place, the next call knows."""
    noise = Noise(Bucket(LAYOUTS["several"], torch.float32), vectors=False)
    first = noise.run(backend).read()
    noise.random[1] += 1
    noise.draw = (DRAW[0], DRAW[1] + 1, DRAW[2])
    noise.run(backend).check()
    assert not same_bits(noise.read(), first)


@pytest.mark.parametrize("a, std", [(1.0, 0.0), (0.0, 1.0)])
def test_either_part_may_be_nothing(backend, a, std):
    noise = Noise(Bucket(LAYOUTS["several"], torch.float32)).run(backend, a, std)
    noise.check(a, std)
    if std == 0:
        assert all(bool((x.double() == v).all()) for x, v in zip(noise.read(), noise.v, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_is_the_same_bits_for_every_thread_count_and_form(backend, dtype, threads):
    for kind in KINDS:
        results = []
        for count, forms in itertools.product((2, 1) if backend.name != "reference" else (1,), FORMS.values()):
            threads(count)
            noise = Noise(bucket_of("several", dtype, kind), kind, forms).run(backend)
            results.append([*noise.read(), noise.total])
        assert all(same_bits(results[0], other) for other in results[1:])
