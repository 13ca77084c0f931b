"""grad_norm and filter_norms against the float64 oracle, over backends, dtypes and layouts."""

import pytest
import torch

from support import oracle
from support.guard_bands import DTYPES, LAYOUTS, U64, Bucket, Run, arithmetic, assert_within, guarded, same_bits

pytestmark = [pytest.mark.ops, pytest.mark.own, pytest.mark.pairwise]
XI = 0.01
SCALES = ("plain", "element", "filter")


def scalar(x):
    return guarded(torch.tensor(x, dtype=torch.float64))


def norm_bound(bucket, q):
    """Relative, every term being non-negative.  The power, good to 4 u itself, multiplies the roundings of T v by q.
    The sum is in float64: (numel - 1) roundings at worst."""
    return (bucket.roundings * q + 4) * arithmetic(bucket.dtype) + bucket.total * U64


def check_norm(backend, bucket, q, form, scaled):
    vectors, thetas = bucket.values(), bucket.values()
    norms = bucket.norms()
    total = backend.grad_norm(
        bucket.give(vectors, form),
        bucket.give(thetas, form) if scaled else [],
        bucket.table,
        norms if bucket.filter_count else None,
        XI,
        q,
    )
    expected = oracle.grad_norm(vectors, thetas, bucket.table, norms.double(), XI, q)
    assert total.shape == () and total.dtype == torch.float64
    bound = norm_bound(bucket, q) * expected
    assert abs(total.item() - expected) <= bound, f"{total.item()!r} is not {expected!r} to {bound:.3g}"
    bucket.assert_guards()
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grad_norm_of_every_layout(backend, layout, scale, dtype):
    check_norm(backend, Bucket(LAYOUTS[layout], dtype, scale), 2.0, "list", scaled=scale != "plain")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["list", "flat"])
@pytest.mark.parametrize("q", [1.0, 1.5, 2.0, 3.0])
def test_grad_norm_of_every_q_in_both_argument_forms(backend, q, form, dtype):
    check_norm(backend, Bucket(LAYOUTS["several"], dtype, "mixed"), q, form, scaled=True)


@pytest.mark.parametrize("form", ["list", "flat"])
def test_one_run_that_does_not_start_at_zero(backend, form):
    bucket = Bucket([Run((33,), (3, 11))], torch.float32, "filter", first_start=48)
    check_norm(backend, bucket, 2.0, form, scaled=True)


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_non_finite_element_anywhere_makes_the_norm_non_finite(backend, bad, q):
    """The norm is the first pass's finiteness check (design.md section 3): no element may hide."""
    bucket = Bucket(LAYOUTS["several"], torch.float32)
    for run, at in ((0, 14), (7, 0), (7, 65536), (9, 100)):
        vectors = bucket.values()
        vectors[run][at] = bad
        total = backend.grad_norm(bucket.give(vectors, "list"), [], bucket.table, None, 0.0, q)
        assert not torch.isfinite(total)


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
def test_the_norm_of_zero_is_zero(backend, q):
    bucket = Bucket(LAYOUTS["several"], torch.float32, "element")
    vectors = [torch.zeros(r.numel) for r in bucket.runs]
    total = backend.grad_norm(
        bucket.give(vectors, "list"), bucket.give(bucket.values(), "list"), bucket.table, None, XI, q
    )
    assert total.item() == 0.0


def test_sums_accumulate_in_float64(backend):
    """2^24 + 1 ones and one 1e4: a float32 sum would stop growing at 2^24 and lose the small terms beside the large."""
    bucket = Bucket([Run(((1 << 24) + 1,))], torch.bfloat16)
    ones = torch.ones(bucket.runs[0].numel, dtype=torch.bfloat16)
    ones[5] = 256.0
    assert backend.grad_norm([ones], [], bucket.table, None, 0.0, 2.0).item() == 2.0**24 + 65536


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["list", "flat"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_filter_norms_of_every_layout(backend, layout, form, dtype):
    bucket = Bucket(LAYOUTS[layout], dtype, "filter")
    thetas = bucket.values()
    out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    guard = 8
    out = torch.full((guard + bucket.filter_count + guard,), torch.nan, dtype=out_dtype)
    params = bucket.give(thetas, form)
    backend.filter_norms(params, bucket.table, out[guard : guard + bucket.filter_count])
    assert same_bits(bucket.read(params), [t.to(dtype) for t in thetas]), "a weight was written to"
    expected = torch.full((bucket.filter_count,), torch.nan, dtype=torch.float64)
    expected = oracle.filter_norms(thetas, bucket.table, expected)
    assert bool(out[:guard].isnan().all()) and bool(out[-guard:].isnan().all())
    # a square rounds once, the float64 sum at most numel times, the root and its storage once each: all relative
    bound = (4 * arithmetic(dtype) + bucket.total * U64) * expected
    assert_within([out[guard:-guard]], [expected], [bound])
    bucket.assert_guards()


def test_filter_norms_leave_the_rows_of_others_alone(backend):
    """Two buckets may share one buffer of norms: here the second's rows stand behind the first five."""
    bucket = Bucket(LAYOUTS["several"], torch.float32, "mixed")
    bucket.table[:, 4] += 5
    thetas = bucket.values()
    before = torch.full((bucket.filter_count + 10,), -5.0)
    out = before.clone()
    backend.filter_norms(bucket.give(thetas, "list"), bucket.table, out)
    assert same_bits(out[:5], before[:5]) and same_bits(out[-5:], before[-5:])
    expected = oracle.filter_norms(thetas, bucket.table, before.double())
    assert_within([out], [expected], [(4 * arithmetic(torch.float32) + bucket.total * U64) * expected.abs()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_are_the_same_bits_for_every_thread_count_and_form(backend, dtype, threads):
    """The reference adds up as torch does, whose sums depend on the number of threads: there, only repetition holds."""
    bucket = Bucket(LAYOUTS["several"], dtype, "mixed")
    vectors, thetas, norms = bucket.values(), bucket.values(), bucket.norms()
    results = []
    for count in (2, 1, 2) if backend.name == "cpu" else (2, 2):
        threads(count)
        for form in ("list", "flat"):
            out = torch.zeros_like(norms)
            backend.filter_norms(bucket.give(thetas, form), bucket.table, out)
            arguments = bucket.give(vectors, form), bucket.give(thetas, form)
            results.append([out, backend.grad_norm(*arguments, bucket.table, norms, XI, 1.5)])
    assert all(same_bits(results[0], other) for other in results[1:])


def test_all_finite_tells_on_the_device_and_counts(backend):
    skipped = guarded(torch.zeros((), dtype=torch.int64))
    assert backend.all_finite_([scalar(1.0), scalar(-1e300)], skipped).item() == 1.0 and skipped.item() == 0
    for bad in (torch.nan, torch.inf, -torch.inf):
        for values in ([scalar(bad), scalar(1.0)], [scalar(1.0), scalar(bad)], [scalar(bad)]):
            before = skipped.item()
            assert backend.all_finite_(values, skipped).item() == 0.0
            assert skipped.item() == before + 1
