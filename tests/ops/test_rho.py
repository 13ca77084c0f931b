"""rho_grad_diagonal and rho_grad_secant against the float64 oracle."""

import pytest
import torch

from support import oracle
from support.guard_bands import DTYPES, LAYOUTS, U64, Bucket, Run, arithmetic, same_bits

pytestmark = [pytest.mark.ops, pytest.mark.pairwise]
XI = 0.01
SCALES = ("plain", "element", "filter")


def close(actual, terms, roundings, dtype, numel):
    """A sum of signed terms, each within `roundings` u of itself (differences of inputs round once, the inputs being
    exact), added up in float64: |error| <= (roundings u + numel u64) sum |terms|."""
    expected = float(sum(t.sum() for t in terms))
    bound = (roundings * arithmetic(dtype) + numel * U64) * float(sum(t.abs().sum() for t in terms))
    assert actual.shape == () and actual.dtype == torch.float64
    assert abs(actual.item() - expected) <= bound, f"{actual.item()!r} is not {expected!r} to {bound:.3g}"


def check_diagonal(backend, bucket, q=2.0, form="list", with_train=True):
    val, train, perturbed, vectors, thetas = (bucket.values() for _ in range(5))
    norms = bucket.norms()
    actual = backend.rho_grad_diagonal(
        bucket.give(val, form),
        bucket.give(train, form) if with_train else [],
        bucket.give(perturbed, form),
        bucket.give(vectors, form),
        bucket.give(thetas, form) if bucket.scale not in ("plain", "fisher") else [],
        bucket.table,
        norms if bucket.filter_count else None,
        XI,
        q,
    )
    train = train if with_train else [torch.zeros_like(t) for t in train]
    terms = oracle.rho_grad_diagonal(val, train, perturbed, vectors, thetas, bucket.table, norms.double(), XI, q)
    # T v, its power (q - 1 times the error before, plus 4 u), T times it; square, difference, two products
    close(actual, terms, bucket.roundings * q + 12, bucket.dtype, bucket.total)
    bucket.assert_guards()
    return actual


def check_secant(backend, bucket, forms=("list",) * 4, with_train=True):
    val, train, perturbed, first = values = [bucket.values() for _ in range(4)]
    arguments = [bucket.give(v, form) for v, form in zip(values, forms, strict=True)]
    if not with_train:
        arguments[1], train = [], [torch.zeros_like(t) for t in train]
    actual = backend.rho_grad_secant(*arguments, bucket.table)
    # two differences and a product
    close(actual, oracle.rho_grad_secant(val, train, perturbed, first), 3, bucket.dtype, bucket.total)
    bucket.assert_guards()
    return actual


@pytest.mark.own
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_diagonal_on_every_layout(backend, layout, scale, dtype):
    check_diagonal(backend, Bucket(LAYOUTS[layout], dtype, scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_train", [True, False])
@pytest.mark.parametrize("form", ["list", "flat"])
@pytest.mark.parametrize("q", [1.0, 1.5, 2.0, 3.0])
def test_diagonal_of_every_q_and_argument_form(backend, q, form, with_train, dtype):
    check_diagonal(backend, Bucket(LAYOUTS["several"], dtype, "mixed"), q, form, with_train)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_secant_on_every_layout(backend, layout, dtype):
    check_secant(backend, Bucket(LAYOUTS[layout], dtype))


@pytest.mark.own
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_train", [True, False])
@pytest.mark.parametrize("forms", [("list",) * 4, ("flat",) * 4, ("list", "list", "list", "flat")])
def test_secant_of_every_argument_form(backend, forms, with_train, dtype):
    check_secant(backend, Bucket(LAYOUTS["several"], dtype), forms, with_train)


@pytest.mark.parametrize("form", ["list", "flat"])
def test_one_run_that_does_not_start_at_zero(backend, form):
    check_diagonal(backend, Bucket([Run((33,), (3, 11))], torch.float32, "filter", first_start=48), form=form)
    check_secant(backend, Bucket([Run((33,))], torch.float32, first_start=48), (form,) * 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rho_gradients_are_the_same_bits_for_every_thread_count_and_form(backend, dtype, threads):
    """The reference adds up as torch does, whose sums depend on the number of threads: there, only repetition holds."""
    results = []
    for count in (2, 1, 2) if backend.name == "cpu" else (2, 2):
        threads(count)
        for form in ("list", "flat"):
            diagonal = check_diagonal(backend, Bucket(LAYOUTS["several"], dtype, "mixed"), 1.5, form)
            secant = check_secant(backend, Bucket(LAYOUTS["several"], dtype), (form,) * 4)
            results.append([diagonal, secant])
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.own
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("where", range(4))
def test_a_non_finite_gradient_shows_in_the_result(backend, where, bad):
    """So that the radius can be gated on the one scalar: no multiplication by zero, no comparison may swallow it."""
    bucket = Bucket(LAYOUTS["several"], torch.float32)
    values = [bucket.positive(0.5, 1.0) for _ in range(4)]
    values[where][7][65536] = bad
    arguments = [bucket.give(v, "list") for v in values]
    assert not torch.isfinite(backend.rho_grad_secant(*arguments, bucket.table))
    assert not torch.isfinite(backend.rho_grad_diagonal(*arguments, [], bucket.table, None, 0.0, 2.0))
