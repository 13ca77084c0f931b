"""average_ and posterior_ascent_ against the float64 oracle: what a perturbation is made of beside one gradient."""

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
FORMS = {"runs": ("list",) * 3, "flat-out": ("list", "list", "flat"), "flat": ("flat",) * 3}
DECAY, A, B = 0.9, 1.0, -0.4


def scalar(x):
    return guarded(torch.tensor(x, dtype=torch.float64))


class Average:
    """average_'s arguments on random values; `out` full of NaN, or none at all."""

    def __init__(self, bucket, forms=FORMS["runs"], updates=3, out=True, vectors=None):
        self.bucket, self.begins = bucket, updates == 0
        self.before = bucket.values(0.5)
        self.vectors = bucket.values() if vectors is None else vectors
        self.averages = bucket.give(self.before, forms[0])
        self.given = bucket.give(self.vectors, forms[1])
        self.out = bucket.give(None, forms[2]) if out else []
        self.updates = guarded(torch.tensor(updates))

    def run(self, backend, gate=1.0, decay=DECAY, a=A, b=B):
        lists = self.averages, self.given, self.out
        self.total = backend.average_(*lists, self.updates, self.bucket.table, scalar(gate), decay, a, b)
        assert self.total.shape == () and self.total.dtype == torch.float64
        self.bucket.assert_guards()
        return self

    def written(self):
        return [*self.bucket.read(self.averages), *(self.bucket.read(self.out) if self.out else []), self.updates]

    def original(self, values):
        return [x.to(self.bucket.dtype) for x in values]

    def check_total(self, stored):
        """Of v as it is stored: only the sum rounds."""
        exact = float(sum(v.double().square().sum() for v in stored))
        assert abs(self.total.item() - exact) <= (self.bucket.total + 1) * U64 * exact

    def check(self, decay=DECAY, a=A, b=B, moved=True, updates=4):
        """3 u of what is added up (a coefficient, a product, the sum), and the storage; v is of m as it is stored."""
        bucket, u = self.bucket, 3.01 * arithmetic(self.bucket.dtype)
        averages = bucket.read(self.averages)
        if not moved:
            assert same_bits(averages, self.original(self.before))
        elif self.begins:
            assert same_bits(averages, self.original(self.vectors))
        else:
            pairs = zip(self.before, self.vectors, strict=True)
            expected, size = zip(*(oracle.combined(decay, m, 1 - decay, x) for m, x in pairs), strict=True)
            bounds = [u * s + storage(bucket.dtype, e) for s, e in zip(size, expected, strict=True)]
            assert_within(averages, expected, bounds)
        if self.out:
            v = bucket.read(self.out)
            if self.begins:
                assert same_bits(v, self.original(self.vectors))
            else:
                pairs = zip(self.vectors, averages, strict=True)
                expected, size = zip(*(oracle.combined(a, x, b, m.double()) for x, m in pairs), strict=True)
                bounds = [u * s + storage(bucket.dtype, e) for s, e in zip(size, expected, strict=True)]
                assert_within(v, expected, bounds)
            self.check_total(v)
        assert same_bits(bucket.read(self.given), self.original(self.vectors)), "the vectors were written to"
        assert self.updates.item() == updates


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_average_on_every_layout(backend, layout, dtype):
    Average(Bucket(LAYOUTS[layout], dtype)).run(backend).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("a, b", [(1.0, -0.4), (0.0, 1.0), (0.3, 2.0)])
def test_average_in_every_argument_form(backend, a, b, forms, dtype):
    Average(Bucket(LAYOUTS["several"], dtype), FORMS[forms]).run(backend, 1.0, 0.99, a, b).check(0.99, a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forms", FORMS)
def test_the_first_vector_is_the_average(backend, forms, dtype):
    """Where nothing has been averaged, to the bit: what the buffers held (here also NaN) does not matter."""
    average = Average(Bucket(LAYOUTS["several"], dtype), FORMS[forms], updates=0)
    for run in average.averages:
        run.masked_fill_(run == 0, torch.nan)
    average.run(backend).check(updates=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out", [True, False])
def test_a_closed_gate_leaves_the_average(backend, out, dtype):
    """v is made of the average as it was; of a vector that is not finite v is no number either, nor is its total."""
    average = Average(Bucket(LAYOUTS["several"], dtype), out=out).run(backend, gate=0.0)
    average.check(moved=False, updates=3)
    bucket = Bucket(LAYOUTS["several"], dtype)
    vectors = [torch.full((r.numel,), torch.nan, dtype=torch.float64) for r in bucket.runs]
    average = Average(bucket, out=out, vectors=vectors).run(backend, gate=0.0)
    assert same_bits(bucket.read(average.averages), average.original(average.before))
    assert average.updates.item() == 3 and average.total.isnan()
    assert all(bool(v.isnan().all()) for v in (bucket.read(average.out) if out else []))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_closed_gate_at_the_first_vector_begins_nothing(backend, dtype):
    average = Average(Bucket(LAYOUTS["several"], dtype), updates=0).run(backend, gate=0.0)
    average.check(moved=False, updates=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("updates", [0, 3])
def test_without_an_output_the_total_is_of_what_would_stand_there(backend, updates, forms, dtype):
    """Rounded to the storage type: in bfloat16 that differs from the sum before the rounding by far more than 2^-53."""
    whole, alone = (
        Average(Bucket(LAYOUTS["several"], dtype), FORMS[forms], updates, out).run(backend) for out in (True, False)
    )
    alone.check(updates=updates + 1)
    alone.check_total(whole.bucket.read(whole.out))
    assert same_bits(alone.bucket.read(alone.averages), whole.bucket.read(whole.averages))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("updates, gate", [(0, 1.0), (3, 1.0), (3, 0.0)])
def test_average_bit_for_bit_as_plain_torch_does(backend, updates, gate, dtype):
    for decay, a, b in ((DECAY, A, B), (1 / 3, -0.1, 1e3)):
        results = [
            Average(Bucket(LAYOUTS["several"], dtype), updates=updates).run(one, gate, decay, a, b).written()
            for one in (backend, plain())
        ]
        assert same_bits(*results)


def test_averages_follow_a_constant_and_one_minus_the_decay_is_not_rounded_away(backend):
    """decay = 1 - 2^-20: beside it (1 - decay) x is small; of a constant the average is the constant, to the bit."""
    bucket = Bucket([Run((100,))], torch.float32)
    average = Average(bucket, vectors=[torch.ones(100, dtype=torch.float64)])
    average.averages[0].fill_(1.0)
    average.run(backend, decay=1 - 2.0**-20, a=1.0, b=-1.0)
    assert bool((bucket.read(average.averages)[0] == 1).all()) and average.total.item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_averages_are_the_same_bits_for_every_thread_count_and_form(backend, dtype, threads):
    results = []
    for count, forms in itertools.product((2, 1) if backend.name != "reference" else (1,), FORMS.values()):
        threads(count)
        average = Average(Bucket(LAYOUTS["several"], dtype), forms).run(backend)
        results.append([*average.written(), average.total])
    assert all(same_bits(results[0], other) for other in results[1:])


# ---- the ascent of Variational SAM

BETA2, DAMPING = 0.95, 0.1


class Ascent:
    """posterior_ascent_'s arguments: precisions of at least the damping's size, as they are in use."""

    def __init__(self, bucket, forms=FORMS["runs"], gradients=None):
        self.bucket = bucket
        self.s = bucket.positive(0.1, 2.0)
        self.g = bucket.values() if gradients is None else gradients
        self.out = bucket.give(None, forms[2])
        self.precisions = bucket.give(self.s, forms[0])
        self.grads = bucket.give(self.g, forms[1])

    def run(self, backend, gate=1.0, beta2=BETA2, damping=DAMPING):
        lists = self.out, self.precisions, self.grads
        backend.posterior_ascent_(*lists, self.bucket.table, scalar(gate), beta2, damping)
        self.bucket.assert_guards()
        return self

    def written(self):
        return [*self.bucket.read(self.out), *self.bucket.read(self.precisions)]

    def original(self, values):
        return [x.to(self.bucket.dtype) for x in values]

    def check(self, beta2=BETA2, damping=DAMPING, moved=True):
        """A quotient rounds once.  No two terms of the precision differ in sign: the longest chain of roundings (root,
        product, damping's own, sum, coefficient, product, sum) is relative."""
        bucket, u = self.bucket, arithmetic(self.bucket.dtype)
        steps = [oracle.ascent(s, g, beta2, damping) for s, g in zip(self.s, self.g, strict=True)]
        expected, after = ([one[i] for one in steps] for i in (0, 1))
        assert_within(bucket.read(self.out), expected, [u * e.abs() + storage(bucket.dtype, e) for e in expected])
        if moved:
            bounds = [7.01 * u * s + storage(bucket.dtype, s) for s in after]
            assert_within(bucket.read(self.precisions), after, bounds)
        else:
            assert same_bits(bucket.read(self.precisions), self.original(self.s))
        assert same_bits(bucket.read(self.grads), self.original(self.g)), "the gradient was written to"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ascent_on_every_layout(backend, layout, dtype):
    Ascent(Bucket(LAYOUTS[layout], dtype)).run(backend).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("beta2, damping", [(0.95, 0.1), (0.0, 0.0), (1.0, 0.5)])
def test_ascent_in_every_argument_form(backend, beta2, damping, forms, dtype):
    Ascent(Bucket(LAYOUTS["several"], dtype), FORMS[forms]).run(backend, 1.0, beta2, damping).check(beta2, damping)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_closed_gate_leaves_the_precisions(backend, dtype):
    Ascent(Bucket(LAYOUTS["several"], dtype)).run(backend, gate=0.0).check(moved=False)
    bucket = Bucket(LAYOUTS["several"], dtype)
    bad = [torch.full((r.numel,), torch.nan, dtype=torch.float64) for r in bucket.runs]
    ascent = Ascent(bucket, gradients=bad).run(backend, gate=0.0)
    assert same_bits(bucket.read(ascent.precisions), ascent.original(ascent.s))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_ascent_bit_for_bit_as_plain_torch_does(backend, gate, dtype):
    for beta2, damping in ((BETA2, DAMPING), (1 / 3, 1e-3)):
        results = [
            Ascent(Bucket(LAYOUTS["several"], dtype)).run(one, gate, beta2, damping).written()
            for one in (backend, plain())
        ]
        assert same_bits(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ascent_is_the_same_bits_for_every_thread_count_and_form(backend, dtype, threads):
    results = []
    for count, forms in itertools.product((2, 1) if backend.name != "reference" else (1,), FORMS.values()):
        threads(count)
        results.append(Ascent(Bucket(LAYOUTS["several"], dtype), forms).run(backend).written())
    assert all(same_bits(results[0], other) for other in results[1:])


def test_one_run_that_does_not_start_at_zero(backend):
    for forms in FORMS.values():
        Average(Bucket([Run((33,))], torch.float32, first_start=48), forms).run(backend).check()
        Ascent(Bucket([Run((33,))], torch.float32, first_start=48), forms).run(backend).check()
