"""dots, displacement_dots and combine_ against the float64 oracle."""

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
A, B = 0.3, -1.7


def scalar(x):
    return guarded(torch.tensor(x, dtype=torch.float64))


def check_dots(backend, bucket, forms=("list", "list")):
    x, y = bucket.values(), bucket.values()
    found = backend.dots(bucket.give(x, forms[0]), bucket.give(y, forms[1]), bucket.table)
    assert found.shape == (3,) and found.dtype == torch.float64
    for actual, (a, b) in zip(found.tolist(), ((x, x), (x, y), (y, y)), strict=True):
        terms = [u * v for u, v in zip(a, b, strict=True)]
        # a product of two float32 numbers is exact in float64; of float64 numbers it rounds once, as each sum does
        bound = (bucket.total + 1) * U64 * float(sum(t.abs().sum() for t in terms))
        assert abs(actual - float(sum(t.sum() for t in terms))) <= bound
    bucket.assert_guards()
    return found


def displaced(backend, bucket, values, forms=("list", "list")):
    """displacement_dots of gradients, weights and saved weights, which are always flat; it writes to none of them."""
    given = [bucket.give(v, form) for v, form in zip(values, (*forms, "flat"), strict=True)]
    found = backend.displacement_dots(*given[:2], *given[2], bucket.table)
    assert found.shape == (3,) and found.dtype == torch.float64
    bucket.assert_guards()
    for v, argument in zip(values, given, strict=True):
        assert same_bits(bucket.read(argument), [x.to(bucket.dtype) for x in v])
    return found


def check_displacement(backend, bucket, forms=("list", "list")):
    values = bucket.values(), bucket.values(), bucket.values()
    found = displaced(backend, bucket, values, forms)
    terms = zip(*(oracle.displacement_terms(*each) for each in zip(*values, strict=True)), strict=True)
    for differences, (actual, products) in enumerate(zip(found.tolist(), terms, strict=True)):
        # as of dots; and each difference in a product rounds once in the arithmetic type, and once in the oracle
        bound = (bucket.total + 1 + differences) * U64 + 1.01 * differences * arithmetic(bucket.dtype)
        size = float(sum(t.abs().sum() for t in products))
        assert abs(actual - float(sum(t.sum() for t in products))) <= bound * size
    return found


def combine(backend, bucket, forms=FORMS["runs"], a=A, b=B, gate=1.0, alias=None, x=None, y=None):
    """combine_ on random values; alias: which of x and y is the output as well.  x, y, the old output and the new."""
    x, y, old = (bucket.values() if v is None else v for v in (x, y, None))
    given = [bucket.give(v, form) for v, form in zip((old, x, y), forms, strict=True)]
    if alias:
        given[0] = given[" xy".index(alias)]
        old = {"x": x, "y": y}[alias]
    coefficients = guarded(torch.tensor([a, b], dtype=torch.float64))
    backend.combine_(*given, bucket.table, coefficients, scalar(gate))
    bucket.assert_guards()
    for values, argument, name in ((x, given[1], "x"), (y, given[2], "y")):
        if name != alias:
            assert same_bits(bucket.read(argument), [v.to(bucket.dtype) for v in values]), f"{name} was written to"
    return x, y, old, bucket.read(given[0])


def check_combine(backend, bucket, forms=FORMS["runs"], a=A, b=B, alias=None):
    x, y, _, out = combine(backend, bucket, forms, a, b, alias=alias)
    expected, bounds = [], []
    for u, v in zip(x, y, strict=True):
        e, size = oracle.combined(a, u, b, v)
        expected.append(e)
        # each coefficient, each product and the sum: 3 u of what is added up, then the storage
        bounds.append(3.01 * arithmetic(bucket.dtype) * size + storage(bucket.dtype, e))
    assert_within(out, expected, bounds)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dots_and_combine_on_every_layout(backend, layout, dtype):
    bucket = Bucket(LAYOUTS[layout], dtype)
    check_dots(backend, bucket)
    check_combine(backend, bucket)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_displacement_dots_on_every_layout(backend, layout, dtype):
    check_displacement(backend, Bucket(LAYOUTS[layout], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("alias", [None, "x", "y"])
def test_combine_into_a_third_the_first_or_the_second(backend, alias, forms, dtype):
    check_combine(backend, Bucket(LAYOUTS["several"], dtype), FORMS[forms], alias=alias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alias", [None, "x", "y"])
def test_combine_bit_for_bit_as_plain_torch_does(backend, alias, dtype):
    """Also with coefficients that float32 cannot hold, and with much more of one vector than of the other."""
    for a, b in ((A, B), (1 / 3, 1.0), (0.0, -1.0), (1e-3, 1e3)):
        ours, theirs = (
            combine(one, Bucket(LAYOUTS["several"], dtype), a=a, b=b, alias=alias)[-1] for one in (backend, plain())
        )
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alias", [None, "x", "y"])
def test_a_closed_gate_leaves_the_output(backend, alias, dtype):
    """Bit for bit, also where the inputs are not finite."""
    bucket = Bucket(LAYOUTS["several"], dtype)
    x, y = bucket.values(), bucket.values()
    for values in (x, y):
        values[7][5:8] = torch.tensor([torch.nan, torch.inf, -0.0])
    *_, old, out = combine(backend, bucket, gate=0.0, alias=alias, x=x, y=y)
    assert same_bits(out, [o.to(dtype) for o in old])


@pytest.mark.parametrize("forms", FORMS)
def test_one_run_that_does_not_start_at_zero(backend, forms):
    bucket = Bucket([Run((33,))], torch.float32, first_start=48)
    check_combine(backend, bucket, FORMS[forms])
    check_dots(backend, bucket, FORMS[forms][:2])
    check_displacement(backend, bucket, FORMS[forms][:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forms", [*itertools.product(("list", "flat"), repeat=2)], ids="-".join)
def test_dots_of_every_argument_form(backend, forms, dtype):
    check_dots(backend, Bucket(LAYOUTS["several"], dtype), forms)
    check_displacement(backend, Bucket(LAYOUTS["several"], dtype), forms)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_non_finite_element_shows_in_its_dots(backend, bad):
    """In those of its own vector and in the mixed one, so that one look tells; the other vector's stays."""
    bucket = Bucket(LAYOUTS["several"], torch.float32)
    for run, at in ((0, 14), (7, 65536), (9, 100)):
        x, y = bucket.positive(0.5, 1.0), bucket.positive(0.5, 1.0)
        x[run][at] = bad
        first, mixed, second = backend.dots(bucket.give(x, "list"), bucket.give(y, "list"), bucket.table)
        assert not first.isfinite() and not mixed.isfinite() and second.isfinite()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("which", ["g", "theta", "saved"])
def test_a_non_finite_element_shows_in_its_displacement_dots(backend, which, bad):
    """Of the gradient, of the weights or of the saved weights; the sum without it stays."""
    bucket = Bucket(LAYOUTS["several"], torch.float32)
    for run, at in ((0, 14), (7, 65536), (9, 100)):
        values = [bucket.positive(0.5, 1.0) for _ in range(3)]
        values[["g", "theta", "saved"].index(which)][run][at] = bad
        given = [bucket.give(v, form) for v, form in zip(values, ("list", "list", "flat"), strict=True)]
        first, mixed, second = backend.displacement_dots(*given[:2], *given[2], bucket.table)
        assert first.isfinite() == (which != "g") and not mixed.isfinite() and second.isfinite() == (which == "g")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_displacements_are_taken_in_the_arithmetic_type(backend, dtype):
    """1 - u/2 rounds to 1 in float32 and float64 themselves; float32 has room for that of bfloat16 and float16."""
    count, small = 70_000, torch.finfo(dtype).eps / 4
    g, theta, saved = (torch.full((count,), x, dtype=dtype) for x in (2.0, 1.0, small))
    table = torch.tensor([[0, count, -1, 0, 0]])
    found = backend.displacement_dots([g], [theta], saved, table)
    delta = 1.0 if dtype in (torch.float32, torch.float64) else 1.0 - small
    assert found.tolist() == [4.0 * count, 2.0 * count * delta, count * delta * delta]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_displacement_dots_are_the_dots_of_the_difference_to_the_same_bits(backend, dtype):
    bucket = Bucket(LAYOUTS["several"], dtype)
    g, theta, saved = bucket.values(), bucket.values(), bucket.values()
    delta = [(a.to(dtype) - b.to(dtype)).double() for a, b in zip(theta, saved, strict=True)]
    expected = backend.dots(bucket.give(g, "list"), bucket.give(delta, "list"), bucket.table)
    assert same_bits(displaced(backend, bucket, (g, theta, saved)), expected)


def test_no_step_displaces_nothing(backend):
    bucket = Bucket(LAYOUTS["several"], torch.bfloat16)
    g, theta = bucket.values(), bucket.values()
    first, mixed, second = displaced(backend, bucket, (g, theta, theta)).tolist()
    assert first > 0 and mixed == second == 0


def test_displacement_dots_accumulate_in_float64(backend):
    """2^24 and many ones: a float32 sum of them would stay where it is."""
    count = 70_000
    g, theta = torch.ones(count, dtype=torch.bfloat16), torch.ones(count, dtype=torch.bfloat16)
    g[5], theta[5] = -4096.0, 4096.0
    table = torch.tensor([[0, count, -1, 0, 0]])
    found = backend.displacement_dots([g], [theta], torch.zeros_like(theta), table).tolist()
    assert found == [2.0**24 + count - 1, count - 1 - 2.0**24, 2.0**24 + count - 1]


def test_dots_accumulate_in_float64(backend):
    """2^24 + 1 ones: a float32 sum would stop growing at 2^24.  x y is 256 at one place, and x is negative there."""
    x = torch.ones((1 << 24) + 1, dtype=torch.bfloat16)
    y = x.clone()
    x[5], y[5] = -16.0, 16.0
    table = torch.tensor([[0, x.numel(), -1, 0, 0]])
    assert backend.dots([x], [y], table).tolist() == [2.0**24 + 256, 2.0**24 - 256, 2.0**24 + 256]


def test_dots_of_large_and_small_float32_numbers_neither_overflow_nor_vanish(backend):
    x, y = torch.full((3,), 1e30), torch.full((3,), 1e-30)
    table = torch.tensor([[0, 3, -1, 0, 0]])
    big, small = float(x[0]) ** 2, float(y[0]) ** 2
    found = backend.dots([x], [y], table).tolist()
    assert found == pytest.approx([3 * big, 3 * float(x[0]) * float(y[0]), 3 * small], rel=4 * U64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dots_and_combinations_are_the_same_bits_for_every_thread_count_and_form(backend, dtype, threads):
    results = []
    for count in (2, 1) if backend.name != "reference" else (1,):
        threads(count)
        for forms in (FORMS["runs"], FORMS["flat"]):
            dots = check_dots(backend, Bucket(LAYOUTS["several"], dtype), forms[:2])
            moved = check_displacement(backend, Bucket(LAYOUTS["several"], dtype), forms[:2])
            results.append([dots, moved, *combine(backend, Bucket(LAYOUTS["several"], dtype), forms)[-1]])
    assert all(same_bits(results[0], other) for other in results[1:])
