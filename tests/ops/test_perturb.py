"""perturb_ and restore_ against the float64 oracle, over backends, dtypes, layouts and norms."""

import pytest
import torch

from support import oracle
from support.backends import Backend
from support.guard_bands import DTYPES, LAYOUTS, Bucket, Run, arithmetic, assert_within, guarded, same_bits, storage

XI, RHO = 0.01, 0.7
SCALES = ("plain", "element", "filter")
FORMS = {"runs": ("list", "list"), "flat-grads": ("list", "flat"), "flat": ("flat", "flat")}


pytestmark = [pytest.mark.ops, pytest.mark.own, pytest.mark.pairwise]


def scalar(x):
    return guarded(torch.tensor(x, dtype=torch.float64))


def flag(x=0):
    return guarded(torch.tensor(x, dtype=torch.int64))


class Call:
    """perturb_'s arguments on random values; forms: those of params and vectors.  `saved` is full of NaN or, where
    swapped, has the vectors."""

    def __init__(self, bucket, q=2.0, forms=FORMS["runs"], thetas=None, vectors=None, swapped=False):
        self.bucket, self.q = bucket, q
        self.thetas = bucket.values() if thetas is None else thetas
        self.vectors = bucket.values() if vectors is None else vectors
        norms = bucket.norms()
        self.norms = norms if bucket.filter_count else None
        self.total = oracle.grad_norm(self.vectors, self.thetas, bucket.table, norms.double(), XI, q)
        self.params = bucket.give(self.thetas, forms[0])
        self.grads = [] if swapped else bucket.give(self.vectors, forms[1])
        (self.saved,) = bucket.give(self.vectors if swapped else None, "flat")
        self.dirty = flag()

    def perturb(self, backend, total=None, rho=RHO):
        total = scalar(self.total if total is None else total)
        arguments = self.bucket.table, self.norms, XI, self.q, total, scalar(rho)
        backend.perturb_(self.params, self.grads, self.saved, self.dirty, *arguments)

    def theta(self):
        return self.bucket.read(self.params)

    def original(self):
        return [t.to(self.bucket.dtype) for t in self.thetas]

    def check(self):
        b, norms = self.bucket, None if self.norms is None else self.norms.double()
        eps = oracle.perturbation(self.vectors, self.thetas, b.table, norms, XI, self.q, self.total, RHO)
        expected = [t + e for t, e in zip(self.thetas, eps, strict=True)]
        # eps: T v, its power (times q - 1, plus 4 u for pow), T times it, rho / norm, the product: where T v has three
        # roundings, (3 q + 8) u of |eps|.  The sum rounds once more, its storage once in the parameter's dtype.
        u = arithmetic(b.dtype)
        bound = [
            (b.roundings * self.q + 8) * u * e.abs() + u * x.abs() + storage(b.dtype, x)
            for e, x in zip(eps, expected, strict=True)
        ]
        assert_within(self.theta(), expected, bound)
        assert same_bits(b.read([self.saved]), self.original()), "saved is not the weights, bit for bit"
        if self.grads:
            assert same_bits(b.read(self.grads), [v.to(b.dtype) for v in self.vectors]), "the gradient was written to"
        assert self.dirty.item() == 1
        b.assert_guards()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_perturb_and_restore_on_every_layout(backend, layout, scale, dtype):
    call = Call(Bucket(LAYOUTS[layout], dtype, scale))
    call.perturb(backend)
    call.check()
    backend.restore_(call.params, call.saved, call.dirty, call.bucket.table)
    assert same_bits(call.theta(), call.original()) and call.dirty.item() == 0
    call.bucket.assert_guards()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("q", [1.0, 1.5, 2.0, 3.0])
def test_perturb_of_every_q_in_every_argument_form(backend, q, forms, dtype):
    call = Call(Bucket(LAYOUTS["several"], dtype, "mixed"), q, FORMS[forms])
    call.perturb(backend)
    call.check()
    backend.restore_(call.params, call.saved, call.dirty, call.bucket.table)
    assert same_bits(call.theta(), call.original())


@pytest.mark.parametrize("forms", FORMS)
def test_one_run_that_does_not_start_at_zero(backend, forms):
    call = Call(Bucket([Run((33,), (3, 11))], torch.float32, "filter", first_start=48), forms=FORMS[forms])
    call.perturb(backend)
    call.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("total", [0.0, torch.inf, torch.nan, -torch.inf])
def test_a_zero_or_non_finite_total_leaves_the_weights(backend, total, q, dtype):
    """Zero gives eps = 0, never NaN, and a non-finite gradient reaches no weight: bitwise, and `saved` is good."""
    bucket = Bucket(LAYOUTS["several"], dtype, "mixed")
    vectors = [torch.full((r.numel,), 0.0 if total == 0 else torch.nan, dtype=torch.float64) for r in bucket.runs]
    call = Call(bucket, q, thetas=[t.clone() for t in bucket.values()], vectors=vectors)
    call.perturb(backend, total)
    assert same_bits(call.theta(), call.original())
    assert same_bits(bucket.read([call.saved]), call.original())
    backend.restore_(call.params, call.saved, call.dirty, bucket.table)
    assert same_bits(call.theta(), call.original()) and call.dirty.item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rho", [0.0, 1e-3, 10.0])
def test_restore_gives_the_bits_back_at_any_radius(backend, rho, dtype):
    """Subtraction would not: (theta + eps) - eps moves elements in every dtype.  NaN, inf and -0 come back too."""
    bucket = Bucket(LAYOUTS["several"], dtype)
    thetas = bucket.values()
    thetas[7][:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    call = Call(bucket, thetas=thetas)
    call.total = oracle.grad_norm(call.vectors, call.vectors, bucket.table, None, XI, 2.0)
    call.perturb(backend, rho=rho)
    if rho == 10.0:
        assert not same_bits(call.theta()[7], call.original()[7])
    backend.restore_(call.params, call.saved, call.dirty, bucket.table)
    assert same_bits(call.theta(), call.original())


def test_restore_of_what_is_not_perturbed_is_nothing(backend):
    """`saved` is stale whenever `dirty` is 0: restoring then must not write it over the weights."""
    call = Call(Bucket(LAYOUTS["several"], torch.float32))
    backend.restore_(call.params, call.saved, call.dirty, call.bucket.table)
    assert same_bits(call.theta(), call.original()) and call.dirty.item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", ["plain", "mixed"])
def test_perturb_is_the_same_bits_for_every_thread_count_and_form(backend, scale, dtype, threads):
    results = []
    total = Call(Bucket(LAYOUTS["several"], dtype, scale), 1.5).total  # the oracle's own sum depends on the threads
    for count in (2, 1, 2):
        threads(count)
        for forms in FORMS.values():
            call = Call(Bucket(LAYOUTS["several"], dtype, scale), 1.5, forms)
            call.perturb(backend, total)
            results.append(call.theta())
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", ["plain", "element", "filter"])
@pytest.mark.parametrize("q", [1.0, 2.0])
def test_both_backends_perturb_to_the_same_bits(q, scale, dtype):
    """Given the same scalars nothing in the arithmetic is open (for q 1.5 and 3, pow is: libraries round it apart)."""
    results = []
    for name in ("reference", "cpu"):
        call = Call(Bucket(LAYOUTS["several"], dtype, scale), q)
        call.perturb(Backend(name))
        results.append(call.theta())
    assert same_bits(*results)


@pytest.mark.parametrize("p, size", [(1.05, 1e-3), (1.1, 1e-6), (1.2, 1e-9), (1.5, 1e-20), (2.0, 1e-30), (2.0, 1e-41)])
def test_small_gradients_under_high_powers_give_a_perturbation_of_length_rho_or_none(backend, p, size):
    """|g|^(q-1) underflows in float32 where p is near 1; a perturbation has p-norm rho, or is zero where rho over the
    norm overflows, and is never NaN."""
    q = p / (p - 1)
    theta = torch.ones(8)
    v = torch.linspace(-1, 1, 8) * size
    table = torch.tensor([[0, 8, -1, 0, 0]])
    total = backend.grad_norm([v], [], table, None, 0.0, q)
    saved = torch.full((16,), torch.nan)
    rho = torch.tensor(0.1, dtype=torch.float64)
    backend.perturb_([theta], [v], saved, torch.zeros((), dtype=torch.int64), table, None, 0.0, q, total, rho)
    length = (theta.double() - 1).abs().pow(p).sum().pow(1 / p).item()
    # Each element is rounded at 1: 8 halves of an ulp of 1, against 0.1; the power costs (q + 8) u.
    assert length == pytest.approx(0.0 if size < 1e-40 else 0.1, rel=80 * 2**-24 + (q + 8) * 2**-24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_two_bytes_is_read_and_rounded_to_even(backend, dtype):
    """θ + g, a sum that float32 holds, where g is half the spacing at θ: between two values, of which torch's own
    conversion takes the even one. Rounding up, or reading subnormal values as others, is off for some of them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    theta = every[every.isfinite() & (every.float().abs() < torch.finfo(dtype).max / 2)]
    wide = theta.float()
    spacing = torch.ldexp(torch.ones_like(wide), torch.frexp(wide).exponent - 1) * torch.finfo(dtype).eps
    g = (spacing / 2).to(dtype)
    expected = (wide + g.float()).to(dtype)
    assert int((g.float() * 2 == spacing).sum()) > 50000
    table = torch.tensor([[0, theta.numel(), -1, 0, 0]])
    params, saved = theta.clone(), torch.full((-(-theta.numel() // 16) * 16,), torch.nan, dtype=dtype)
    backend.perturb_([params], [g], saved, flag(), table, None, 0.0, 2.0, scalar(1.0), scalar(1.0))
    assert same_bits(params, torch.where(g == 0, theta, expected))
