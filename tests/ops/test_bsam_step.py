"""restore_bsam_ against the float64 oracle: the restore fused into the step of Variational SAM."""

import itertools

import pytest
import torch
from test_step import FORMS, Step, scalar

from support import oracle_vectors as oracle
from support.backends import plain
from support.guard_bands import DTYPES, LAYOUTS, Bucket, Run, arithmetic, assert_within, same_bits, storage

pytestmark = [pytest.mark.ops, pytest.mark.pairwise]
LR, BETA1, DECAY = 0.1, 0.9, 0.05


def step_of(bucket, forms=FORMS["runs"], dirty=1):
    """test_step.py's arguments: the second state, at least 0.01, is the precision."""
    return Step(bucket, forms, states=2, dirty=dirty)


def bsam(step, backend, gate=1.0, lr=LR, beta1=BETA1, weight_decay=DECAY):
    state = step.params, step.grads, *step.buffers, step.saved, step.dirty, step.bucket.table
    backend.restore_bsam_(*state, scalar(gate), lr, beta1, weight_decay)
    precisions = step.bucket.read(step.buffers[1])
    assert same_bits(precisions, step.original(step.states[1])), "the precision was written to"
    return step


def written(step):
    return [*step.bucket.read(step.params), *step.bucket.read(step.buffers[0])]


def check(step, lr=LR, beta1=BETA1, weight_decay=DECAY):
    """6 u of what the average adds up (decay and its product, the sum, the coefficient, its product, the sum), which lr
    over s multiplies; quotient, lr, product and difference: 4 u of the step and 1 u of the weight."""
    b, u = step.bucket, arithmetic(step.bucket.dtype)
    for after, after_m, x, g, m, s in zip(
        b.read(step.params), b.read(step.buffers[0]), step.thetas, step.vectors, *step.states, strict=True
    ):
        average, expected = oracle.bsam(x, g, m, s, lr, beta1, weight_decay)
        error = 6.01 * u * (beta1 * m.abs() + (1 - beta1) * (g.abs() + weight_decay * x.abs()))
        assert_within([after_m], [average], [error + storage(b.dtype, average)])
        bound = lr * (error + 4 * u * average.abs()) / s + u * expected.abs() + storage(b.dtype, expected)
        assert_within([after], [expected], [bound])
    step.check_untouched_inputs()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bsam_on_every_layout(backend, layout, dtype):
    check(bsam(step_of(Bucket(LAYOUTS[layout], dtype)), backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("lr, beta1, weight_decay", [(0.1, 0.9, 0.0), (0.01, 0.0, 0.5), (0.1, 0.9, 0.05)])
def test_bsam_of_every_kind(backend, lr, beta1, weight_decay, forms, dtype):
    options = {"lr": lr, "beta1": beta1, "weight_decay": weight_decay}
    check(bsam(step_of(Bucket(LAYOUTS["several"], dtype), FORMS[forms]), backend, **options), **options)


@pytest.mark.parametrize("form", FORMS)
def test_one_run_that_does_not_start_at_zero(backend, form):
    check(bsam(step_of(Bucket([Run((33,))], torch.float32, first_start=48), FORMS[form]), backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bsam_starts_from_the_weights_where_nothing_is_perturbed(backend, dtype):
    check(bsam(step_of(Bucket(LAYOUTS["several"], dtype), dirty=0), backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dirty", [0, 1])
def test_a_closed_gate_restores_and_touches_no_state(backend, dirty, dtype):
    step = step_of(Bucket(LAYOUTS["several"], dtype), dirty=dirty)
    step.vectors = [torch.full_like(v, torch.nan) for v in step.vectors]
    step.grads = step.bucket.give(step.vectors, "list")
    bsam(step, backend, gate=0.0)
    assert same_bits(written(step), step.original([*step.thetas, *step.states[0]]))
    step.check_untouched_inputs()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_of_size_zero_leaves_the_weights_bitwise(backend, dtype):
    step = bsam(step_of(Bucket(LAYOUTS["several"], dtype)), backend, lr=0.0)
    assert same_bits(step.bucket.read(step.params), step.original(step.thetas))
    assert not same_bits(step.bucket.read(step.buffers[0]), step.original(step.states[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_bsam_bit_for_bit_as_plain_torch_does(backend, gate, dtype):
    for options in ({}, {"lr": 1 / 3, "beta1": 0.99, "weight_decay": 1e-3}, {"lr": 0.0}, {"weight_decay": 0.0}):
        ours, theirs = (
            written(bsam(step_of(Bucket(LAYOUTS["several"], dtype)), one, gate, **options))
            for one in (backend, plain())
        )
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bsam_is_the_same_bits_for_every_thread_count_and_form(backend, dtype, threads):
    results = []
    for count, forms in itertools.product((2, 1) if backend.name != "reference" else (1,), FORMS.values()):
        threads(count)
        results.append(written(bsam(step_of(Bucket(LAYOUTS["several"], dtype), forms), backend)))
    assert all(same_bits(results[0], other) for other in results[1:])
