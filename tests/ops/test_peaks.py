"""largest and peaks_: exactly, for the perturbation of the 1-norm."""

import pytest
import torch

from support.backends import plain
from support.guard_bands import DTYPES, LAYOUTS, Bucket, Run, guarded, same_bits

pytestmark = [pytest.mark.ops, pytest.mark.pairwise]
FORMS = {"runs": ("list", "list"), "flat-out": ("flat", "list"), "flat": ("flat", "flat")}


def scalar(x):
    return guarded(torch.tensor(x, dtype=torch.float64))


def peaks(backend, bucket, vectors, highest, forms=FORMS["runs"]):
    out, given = bucket.give(None, forms[0]), bucket.give(vectors, forms[1])
    count = backend.peaks_(out, given, bucket.table, scalar(highest))
    assert count.shape == () and count.dtype == torch.float64
    assert same_bits(bucket.read(given), [v.to(bucket.dtype) for v in vectors]), "the vectors were written to"
    bucket.assert_guards()
    return [*bucket.read(out), count]


def check(backend, bucket, forms=FORMS["runs"]):
    """The values are exact in their dtype, and so are a maximum, its sign and a count: no rounding anywhere."""
    vectors = bucket.values()
    expected = max((float(v.abs().max()) for v in vectors if v.numel()), default=0.0)
    highest = backend.largest(bucket.give(vectors, forms[1]), bucket.table)
    assert highest.shape == () and highest.dtype == torch.float64 and highest.item() == expected
    *out, count = peaks(backend, bucket, vectors, expected, forms)
    for x, v in zip(out, vectors, strict=True):
        assert torch.equal(x.double(), torch.where(v.abs() == expected, v.sign(), 0.0))
    assert count.item() == sum(int((v.abs() == expected).sum()) for v in vectors)
    return [highest, count, *out]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_peaks_on_every_layout(backend, layout, dtype):
    check(backend, Bucket(LAYOUTS[layout], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forms", FORMS)
def test_peaks_in_every_argument_form(backend, forms, dtype):
    check(backend, Bucket(LAYOUTS["several"], dtype), FORMS[forms])


@pytest.mark.parametrize("forms", FORMS)
def test_one_run_that_does_not_start_at_zero(backend, forms):
    check(backend, Bucket([Run((33,))], torch.float32, first_start=48), FORMS[forms])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_is_found_wherever_it_is_and_whatever_its_sign(backend, dtype):
    bucket = Bucket(LAYOUTS["several"], dtype)
    for i, (run, at) in enumerate([(0, 0), (0, 14), (2, 16), (7, 0), (7, 1), (7, 65535), (7, 65536), (8, 0), (9, 719)]):
        vectors = bucket.values()
        vectors[run][at] = 100.0 * (-1) ** i
        assert backend.largest(bucket.give(vectors, "list"), bucket.table).item() == 100.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_of_the_same_size_are_all_peaks(backend, dtype):
    bucket = Bucket(LAYOUTS["several"], dtype)
    vectors = bucket.values()
    for run, at, sign in ((0, 3, 1), (2, 16, -1), (7, 65536, 1), (7, 12345, -1), (8, 0, -1)):
        vectors[run][at] = 100.0 * sign
    *out, count = peaks(backend, bucket, vectors, 100.0)
    assert count.item() == 5
    assert [(i, int(at), float(x[at])) for i, x in enumerate(out) for at in x.nonzero()[:, 0]] == [
        (0, 3, 1.0), (2, 16, -1.0), (7, 12345, -1.0), (7, 65536, 1.0), (8, 0, -1.0),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run, at", [(0, 0), (0, 14), (7, 0), (7, 40000), (7, 65536), (8, 0), (9, 719)])
def test_a_nan_anywhere_is_the_largest_and_an_infinity_else(backend, run, at, dtype):
    """A NaN sticks, before and after larger numbers; a gradient that is not finite must show."""
    bucket = Bucket(LAYOUTS["several"], dtype)
    vectors = bucket.values()
    vectors[run][at] = -torch.inf
    assert backend.largest(bucket.give(vectors, "list"), bucket.table).item() == torch.inf
    vectors[run][at] = torch.nan
    vectors[2][5], vectors[9][0 if at else 1] = torch.inf, torch.inf
    assert backend.largest(bucket.give(vectors, "list"), bucket.table).isnan()
    *out, count = peaks(backend, bucket, vectors, torch.nan)
    assert count.item() == 0 and all(bool((x == 0).all()) for x in out)


def test_of_zeros_the_largest_is_zero_and_none_points_anywhere(backend):
    """Each is as large as the largest, and its sign is zero: the perturbation vanishes, as for the other norms."""
    bucket = Bucket(LAYOUTS["several"], torch.float32)
    zeros = [torch.zeros(r.numel, dtype=torch.float64) * (-1) ** i for i, r in enumerate(bucket.runs)]
    highest = backend.largest(bucket.give(zeros, "list"), bucket.table)
    assert highest.item() == 0.0 and not highest.signbit()
    *out, count = peaks(backend, bucket, zeros, 0.0)
    assert all(bool((x == 0).all()) for x in out) and count.item() == bucket.table[:, 1].sum()


def test_largest_keeps_what_float32_does_not_hold(backend):
    """Subnormal numbers, and neighbours in float64."""
    table = torch.tensor([[0, 3, -1, 0, 0]])
    v = torch.tensor([1.0, -(1 + 2.0**-52), 1.0], dtype=torch.float64)
    out = torch.empty_like(v)
    assert backend.largest([v], table).item() == 1 + 2.0**-52
    assert backend.peaks_([out], [v], table, scalar(1 + 2.0**-52)).item() == 1 and out.tolist() == [0.0, -1.0, 0.0]
    tiny = torch.tensor([2.0**-149, 0.0, -(2.0**-148)])
    out = torch.empty_like(tiny)
    assert backend.largest([tiny], table).item() == 2.0**-148
    assert backend.peaks_([out], [tiny], table, scalar(2.0**-148)).item() == 1 and out.tolist() == [0.0, 0.0, -1.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peaks_bit_for_bit_as_plain_torch_does(backend, dtype):
    for highest in (0.0, 1.0, torch.nan, torch.inf):
        vectors = Bucket(LAYOUTS["several"], dtype).values()
        vectors[7][5:8] = torch.tensor([torch.inf, -torch.inf, 1.0])
        ours, theirs = (peaks(b, Bucket(LAYOUTS["several"], dtype), vectors, highest) for b in (backend, plain()))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))  # a zero may have either sign


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peaks_are_the_same_bits_for_every_thread_count_and_form(backend, dtype, threads):
    results = []
    for count in (2, 1) if backend.name != "reference" else (1,):
        threads(count)
        for forms in FORMS.values():
            results.append(check(backend, Bucket(LAYOUTS["several"], dtype), forms))
    assert all(same_bits(results[0], other) for other in results[1:])
