"""masked_, count_above and select_: which elements take part, exactly, and what becomes of the others."""

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
FORMS = {"runs": ("list", "list"), "flat-out": ("flat", "list"), "flat": ("flat", "flat")}
DRAW = (-987654321987654321, 12, 4)  # seed, count, stream
PADDING = 7  # of the mask, between the runs and behind them: no member of anything


def integer(x):
    return guarded(torch.tensor(x))


class Masked:
    """Vectors, a mask of two thirds ones (any number but zero is one), and a draw."""

    def __init__(self, bucket, forms=FORMS["runs"], draw=DRAW, vectors=None):
        self.bucket, self.draw, self.forms = bucket, draw, forms
        self.v = bucket.values() if vectors is None else vectors
        self.vectors = bucket.give(self.v, forms[1])
        self.members = [(torch.arange(r.numel) + i) % 3 for i, r in enumerate(bucket.runs)]
        self.mask = guarded(torch.full((bucket.total + 5,), PADDING, dtype=torch.uint8))
        for (start, numel, *_), member in zip(bucket.table.tolist(), self.members, strict=True):
            self.mask[start : start + numel] = member
        self.random = guarded(torch.tensor(draw[:2]))

    def original(self):
        return [v.to(self.bucket.dtype) for v in self.v]

    def spans(self):
        return [(start, start + numel) for start, numel, *_ in self.bucket.table.tolist()]

    def masked(self, backend, share=None):
        """masked_ with the mask or, by chance, with a share; the output and the total."""
        out = self.bucket.give(None, self.forms[0])
        mask, before = (self.mask, self.mask.clone()) if share is None else (None, None)
        options = self.bucket.table, self.random, self.draw[2], 0.0 if share is None else share
        total = backend.masked_(out, self.vectors, mask, *options)
        assert mask is None or same_bits(mask, before), "the mask was written to"
        assert same_bits(self.bucket.read(self.vectors), self.original()), "the vectors were written to"
        self.bucket.assert_guards()
        exact = float(sum((v**2).sum() for v in self.v))
        assert total.shape == () and total.dtype == torch.float64
        assert abs(total.item() - exact) <= (self.bucket.total + 1) * U64 * exact
        return [*self.bucket.read(out), total]

    def keys(self, vectors=True):
        runs = zip(self.v, self.bucket.table.tolist(), strict=True)
        return [
            torch.tensor(oracle.keys(v if vectors else None, start, numel, self.draw), dtype=torch.int64)
            for v, (start, numel, *_) in runs
        ]

    def count(self, backend, threshold, member=-1, vectors=True):
        lists, before = (self.vectors if vectors else [], self.mask), self.mask.clone()
        options = self.bucket.table, integer(threshold), self.random, self.draw[2], member
        found = backend.count_above(*lists, *options)
        assert found.shape == () and found.dtype == torch.float64 and same_bits(self.mask, before)
        return found.item()

    def select(self, backend, threshold, member=-1, value=1, vectors=True):
        lists = self.mask, self.vectors if vectors else []
        options = self.bucket.table, integer(threshold), self.random, self.draw[2], member, value
        backend.select_(*lists, *options)
        assert same_bits(self.bucket.read(self.vectors), self.original()), "the vectors were written to"
        self.bucket.assert_guards()


# ---- what a mask keeps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_on_every_layout(backend, layout, dtype):
    """By a mask the elements that are kept keep their bits. By chance those are kept whose word is below the share of
    2^32, and divided by the share: 1/share and the product round, then the storage does."""
    given = Masked(Bucket(LAYOUTS[layout], dtype))
    *kept, _ = given.masked(backend)
    expected = [torch.where(m != 0, v, 0.0) for m, v in zip(given.members, given.original(), strict=True)]
    assert same_bits(kept, expected)
    *kept, _ = given.masked(backend, 0.3)
    for i, (start, numel, *_) in enumerate(given.bucket.table.tolist()):
        below = torch.tensor(oracle.words(start, numel, given.draw), dtype=torch.float64) < int(0.3 * 2**32)
        expected = torch.where(below, given.v[i] / 0.3, 0.0)
        bound = 2.01 * arithmetic(dtype) * expected.abs() + storage(dtype, expected)
        assert_within([kept[i]], [expected], [torch.where(below, bound, 0.0)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("share", [None, 1e-9, 0.25, 1 / 3, 1.0])
def test_masked_bit_for_bit_as_plain_torch_does_in_every_form(backend, share, forms, dtype):
    ours, theirs = (
        Masked(Bucket(LAYOUTS["several"], dtype), FORMS[forms]).masked(b, share) for b in (backend, plain())
    )
    assert same_bits(ours[:-1], theirs[:-1])
    if share == 1.0:
        assert same_bits(ours[:-1], Masked(Bucket(LAYOUTS["several"], dtype)).original())


@pytest.mark.parametrize("share", [None, 0.5])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_kept_is_zero_and_still_in_the_total(backend, bad, share):
    """Not a product with zero, which of infinity is none; and a gradient that is not finite shows, kept or not."""
    bucket = Bucket(LAYOUTS["several"], torch.float32)
    bads = [torch.full((r.numel,), bad, dtype=torch.float64) for r in bucket.runs]
    given = Masked(bucket, vectors=bads)
    out = bucket.give(None, "list")
    mask = given.mask if share is None else None
    total = backend.masked_(out, given.vectors, mask, bucket.table, given.random, DRAW[2], share or 0.0)
    assert not total.isfinite()
    kept = torch.cat(bucket.read(out))
    assert bool((kept[kept.isfinite()] == 0).all()) and 0 < int(kept.isfinite().sum()) < kept.numel()


# ---- keys and thresholds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_count_above_on_every_layout(backend, layout, dtype):
    """Exactly: at a key that is there, it is not above itself."""
    given = Masked(Bucket(LAYOUTS[layout], dtype))
    keys, members = torch.cat(given.keys()), torch.cat(given.members)
    threshold = int(keys.median()) if keys.numel() else 0
    assert given.count(backend, threshold, 1) == int(((keys > threshold) & (members == 1)).sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [0.0, 0.1, 0.5, 0.95, 1.0])
def test_thresholds_at_below_and_above_a_key(backend, rank, dtype):
    """Exactly, from the least key, among zeros that differ by their words, to the largest; and at both ends."""
    given = Masked(Bucket(LAYOUTS["several"], dtype))
    keys, members = torch.cat(given.keys()), torch.cat(given.members)
    key = int(keys.sort().values[round(rank * (len(keys) - 1))])
    for threshold, member in ((key - 1, -1), (key, -1), (key + 1, 1), (-1, 0), (-1, -1), (2**63 - 1, -1)):
        expected = int(((keys > threshold) & ((members == member) | (member < 0))).sum())
        assert given.count(backend, threshold, member) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("member, form", [(-1, "list"), (0, "flat"), (1, "list"), (2, "flat")])
def test_counts_and_selections_of_members(backend, member, form, vectors, dtype):
    """count_above counts and select_ sets the elements above the threshold whose mask is the member's, and no others;
    without vectors the key is the word alone. The padding of the mask stays."""
    given = Masked(Bucket(LAYOUTS["several"], dtype), (form, form))
    keys = given.keys(vectors)
    threshold = int(torch.cat(keys).sort().values[given.bucket.table[:, 1].sum() // 3])
    before, expected = given.mask.clone(), given.mask.clone()
    total = 0
    for (begin, end), key, own in zip(given.spans(), keys, given.members, strict=True):
        chosen = (key > threshold) & ((own == member) | (member < 0))
        total += int(chosen.sum())
        expected[begin:end][chosen] = 5
    assert given.count(backend, threshold, member, vectors) == total > 100
    given.select(backend, threshold, member, 5, vectors)
    assert same_bits(given.mask, expected) and not same_bits(given.mask, before)


def test_keys_of_double_precision_are_those_of_their_float32(backend):
    """Neighbours in float64 are one float32 number; words decide between them. Larger than all float32 is infinite."""
    v = torch.tensor([1.0, 1 + 2**-30, -(1 - 2**-30), 1e300, -1e-300, 0.0, 2.0], dtype=torch.float64)
    bucket = Bucket([Run((7,))], torch.float64)
    given = Masked(bucket, vectors=[v])
    (keys,) = given.keys()
    assert [int(k) >> 32 for k in keys] == [0x3F800000] * 3 + [0x7F800000, 0, 0, 0x40000000]
    for key in keys.tolist():
        assert given.count(backend, key) == int((keys > key).sum())
        assert given.count(backend, key - 1) == int((keys > key).sum()) + 1


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.4, 0.9, 1.0])
def test_bisection_selects_exactly_as_many_as_wanted(backend, share, vectors):
    """Also where the threshold falls among thousands of zeros: no two keys are the same."""
    bucket = Bucket([Run((5000,)), Run((33, 17), (1, 33), (1, 0)), Run((1,))], torch.bfloat16)
    v = [x * (torch.arange(x.numel()) % 2) for x in bucket.values()]  # more than half zeros
    given = Masked(bucket, vectors=v)
    given.mask.zero_()
    wanted = round(share * (5000 + 33 * 17 + 1))
    low, high = -1, 2**63 - 1  # the count above low is at least wanted, above high at most
    while high - low > 1:
        middle = (low + high) // 2
        enough = given.count(backend, middle, -1, vectors) >= wanted
        low, high = (middle, high) if enough else (low, middle)
    given.select(backend, low, -1, 1, vectors)
    assert int(given.mask.sum()) == wanted
    if vectors and 0 < share < 0.4:
        chosen = torch.cat([given.mask[a:b] for a, b in given.spans()]) == 1
        magnitudes = torch.cat(v).abs()
        assert float(magnitudes[chosen].min()) >= float(magnitudes[~chosen].max())


def test_selections_among_members_refine_each_other(backend):
    """As a mask is drawn anew: clear some of the ones, set as many of the zeros; the rest stays."""
    given = Masked(Bucket(LAYOUTS["several"], torch.float32))
    given.mask.remainder_(2)
    before = given.mask.clone()
    words = [w << 31 for start, end in given.spans() for w in oracle.words(start, end - start, given.draw)]
    threshold = sorted(words)[len(words) // 2]
    given.select(backend, threshold, 1, 3, vectors=False)
    given.select(backend, threshold, 0, 1, vectors=False)
    given.select(backend, -1, 3, 0, vectors=False)
    above = torch.tensor(words) > threshold
    inside = torch.cat([torch.arange(start, end) for start, end in given.spans()])
    expected = before.clone()
    expected[inside] = torch.where(above, 1 - before[inside], before[inside])
    assert same_bits(given.mask, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_and_counts_are_the_same_bits_for_every_thread_count_and_form(backend, dtype, threads):
    results = []
    for count in (2, 1) if backend.name != "reference" else (1,):
        threads(count)
        for forms in FORMS.values():
            given = Masked(Bucket(LAYOUTS["several"], dtype), forms)
            kept = [*given.masked(backend), *given.masked(backend, 0.5)]
            given.select(backend, 0x3F000000 << 32, 1, 9)
            results.append([*kept, given.mask])
    assert all(same_bits(results[0], other) for other in results[1:])
