"""T = 1/sqrt(1 + xi v^2), where a row length is -2: the diagonal Fisher information as the scale of the perturbation
(Kim et al., 2022), in the three ops that know T, against the float64 oracle."""

import pytest
import torch
from test_norm import check_norm
from test_perturb import Call
from test_rho import check_diagonal

from support import oracle
from support.backends import plain
from support.guard_bands import DTYPES, LAYOUTS, U64, Bucket, guarded, same_bits

pytestmark = [pytest.mark.ops, pytest.mark.pairwise]
QS = [1.0, 1.5, 2.0, 3.0]


def scalar(x):
    return guarded(torch.tensor(x, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fisher_on_every_layout(backend, layout, dtype):
    """The norm and the gradient in the radius, which need no weights for it, and the perturbation."""
    bucket = Bucket(LAYOUTS[layout], dtype, "fisher")
    check_norm(backend, bucket, 2.0, "list", scaled=False)
    check_diagonal(backend, bucket)
    call = Call(bucket)
    call.perturb(backend)
    call.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["list", "flat"])
@pytest.mark.parametrize("q", QS)
def test_fisher_beside_the_other_scales_at_every_q(backend, q, form, dtype):
    """Filters, Fisher, |theta| + xi and T = 1, each in some rows of one table."""
    bucket = Bucket(LAYOUTS["several"], dtype, "all")
    check_norm(backend, bucket, q, form, scaled=True)
    check_diagonal(backend, bucket, q, form)
    call = Call(bucket, q, (form, form))
    call.perturb(backend)
    call.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", ["fisher", "all"])
@pytest.mark.parametrize("q", [1.0, 2.0])
def test_fisher_perturbs_bit_for_bit_as_plain_torch_does(backend, q, scale, dtype):
    results = []
    for one in (backend, plain()):
        call = Call(Bucket(LAYOUTS["several"], dtype, scale), q)
        call.perturb(one, total=call.total)
        results.append(call.theta())
    assert same_bits(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fisher_is_the_same_bits_for_every_thread_count_and_form(backend, dtype, threads):
    results, total = [], Call(Bucket(LAYOUTS["several"], dtype, "all"), 1.5).total
    for count in (2, 1) if backend.name != "reference" else (1,):
        threads(count)
        for form in ("list", "flat"):
            norm = check_norm(backend, Bucket(LAYOUTS["several"], dtype, "all"), 1.5, form, scaled=True)
            share = check_diagonal(backend, Bucket(LAYOUTS["several"], dtype, "all"), 1.5, form)
            call = Call(Bucket(LAYOUTS["several"], dtype, "all"), 1.5, (form, form))
            call.perturb(backend, total)
            results.append([norm, share, *call.theta()])
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_non_finite_element_shows_in_the_norm_under_fisher(backend, bad):
    """T vanishes where v is infinite, and T v is not zero for that."""
    bucket = Bucket(LAYOUTS["several"], torch.float32, "fisher")
    for run, at in ((0, 14), (7, 65536)):
        vectors = bucket.values()
        vectors[run][at] = bad
        assert not torch.isfinite(backend.grad_norm(bucket.give(vectors, "list"), [], bucket.table, None, 0.1, 2.0))


def test_xi_of_zero_is_sam(backend):
    results = []
    for scale in ("fisher", "plain"):
        bucket = Bucket(LAYOUTS["several"], torch.float32, scale)
        v, theta, saved = (
            bucket.give(bucket.values(), "list"),
            bucket.give(bucket.values(), "list"),
            bucket.give(None, "flat"),
        )
        norm = backend.grad_norm(v, [], bucket.table, None, 0.0, 2.0)
        dirty = guarded(torch.tensor(0))
        backend.perturb_(theta, v, saved[0], dirty, bucket.table, None, 0.0, 2.0, norm, scalar(0.5))
        results.append([norm, *bucket.read(theta)])
    assert same_bits(*results)


def test_far_from_zero_every_element_moves_alike(backend):
    """T v tends to sign(v)/sqrt(xi): what tells T from its square, T^2 v = v/(1 + xi v^2), which would vanish."""
    v = [torch.tensor([1e8, -1e9, 1e10], dtype=torch.float64)]
    table = torch.tensor([[0, 3, -2, 0, 0]])
    total = backend.grad_norm(v, [], table, None, 4.0, 2.0).item()
    # T v is 1/2 less 1/2 (1 + xi v^2)^-1: 1e-17; seven roundings and two of the sum
    assert total == pytest.approx(0.75, rel=20 * U64)
    assert total == pytest.approx(oracle.grad_norm(v, v, table, None, 4.0, 2.0), rel=20 * U64)
