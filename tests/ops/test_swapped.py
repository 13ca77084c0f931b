"""perturb_ without vectors: they stand in `saved`, and the weights take their place there."""

import itertools

import pytest
import torch
from test_perturb import RHO, Call

from support.backends import Backend
from support.guard_bands import DTYPES, LAYOUTS, Bucket, Run, same_bits

pytestmark = [pytest.mark.ops, pytest.mark.pairwise]


def swapped(bucket, q=2.0, form="list", **options):
    return Call(bucket, q, (form, form), swapped=True, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vectors_in_saved_on_every_layout(backend, layout, dtype):
    call = swapped(Bucket(LAYOUTS[layout], dtype, "all"))
    call.perturb(backend)
    call.check()
    backend.restore_(call.params, call.saved, call.dirty, call.bucket.table)
    assert same_bits(call.theta(), call.original()) and call.dirty.item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["list", "flat"])
@pytest.mark.parametrize("q", [1.0, 1.5, 2.0, 3.0])
def test_vectors_in_saved_give_the_bits_of_vectors_beside_it(backend, q, form, dtype):
    """The same elements through the same formula: where they stood makes no difference, for powers either."""
    results = []
    for swap in (False, True):
        call = Call(Bucket(LAYOUTS["several"], dtype, "all"), q, (form, form), swapped=swap)
        call.perturb(backend)
        results.append([*call.theta(), *call.bucket.read([call.saved])])
    assert same_bits(*results)


@pytest.mark.parametrize("form", ["list", "flat"])
def test_one_run_that_does_not_start_at_zero(backend, form):
    call = swapped(Bucket([Run((33,), (3, 11))], torch.float32, "filter", first_start=48), form=form)
    call.perturb(backend)
    call.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("total", [0.0, torch.nan])
def test_a_zero_or_non_finite_total_leaves_the_weights_and_saves_them(backend, total, dtype):
    bucket = Bucket(LAYOUTS["several"], dtype, "all")
    bad = [torch.full((r.numel,), 0.0 if total == 0 else torch.nan, dtype=torch.float64) for r in bucket.runs]
    call = swapped(bucket, vectors=bad)
    call.perturb(backend, total)
    assert same_bits(call.theta(), call.original())
    assert same_bits(bucket.read([call.saved]), call.original()) and call.dirty.item() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors_in_saved_are_the_same_bits_for_every_thread_count_and_form(backend, dtype, threads):
    results, total = [], swapped(Bucket(LAYOUTS["several"], dtype, "all"), 1.5).total
    for count, form in itertools.product((2, 1) if backend.name != "reference" else (1,), ("list", "flat")):
        threads(count)
        call = swapped(Bucket(LAYOUTS["several"], dtype, "all"), 1.5, form)
        call.perturb(backend, total, RHO)
        results.append(call.theta())
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vectors_in_buffers_too_large_for_the_caches(dtype, threads):
    """Above 8 MiB what is not read back may be written around the caches; here it has been read before."""
    threads(2)
    size = (9 << 20) // torch.finfo(dtype).bits * 8
    call = swapped(Bucket([Run((size + 3,), (1, size + 3), offset=1), Run((70001,), (1, 70001), offset=5)], dtype))
    call.perturb(Backend("cpu"))
    call.check()
