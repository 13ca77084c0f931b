"""restore_sgd_ and restore_adamw_ against the float64 oracle: the restore fused into the base optimizer's step."""

import itertools

import pytest
import torch

from support.backends import Backend
from support.guard_bands import DTYPES, LAYOUTS, Bucket, Run, arithmetic, assert_within, guarded, same_bits, storage

pytestmark = [pytest.mark.ops, pytest.mark.own, pytest.mark.pairwise]
FORMS = {"runs": ("list",) * 3, "flat-state": ("list", "list", "flat"), "flat": ("flat",) * 3}


def scalar(x):
    return guarded(torch.tensor(x, dtype=torch.float64))


class Step:
    """The arguments of a fused step: weights that are perturbed (anything), the saved ones, a gradient and state."""

    def __init__(self, bucket, forms=FORMS["runs"], states=1, dirty=1):
        self.bucket = bucket
        self.thetas, self.vectors = bucket.values(), bucket.values()
        # m of either sign; v >= 0.01: where v vanishes so does Adam's denominator, and no relative bound holds
        self.states = [bucket.values(0.5), bucket.positive(0.01, 1.0)][:states]
        self.params = bucket.give(bucket.values() if dirty else self.thetas, forms[0])
        self.grads = bucket.give(self.vectors, forms[1])
        self.buffers = [bucket.give(s, forms[2]) for s in self.states]
        (self.saved,) = bucket.give(self.thetas if dirty else None, "flat")
        self.dirty = guarded(torch.tensor(dirty))
        self.steps = [guarded(torch.tensor(float(3 + i % 2))) for i in range(len(bucket.runs))]

    def sgd(self, backend, gate=1.0, lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=False, maximize=False):
        momenta = self.buffers[0] if self.buffers else []
        state = self.params, self.grads, momenta, self.saved, self.dirty, self.bucket.table
        backend.restore_sgd_(*state, scalar(gate), lr, momentum, weight_decay, nesterov, maximize)

    def adamw(self, backend, gate=1.0, lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.05, **kinds):
        state = self.params, self.grads, *self.buffers, self.steps, self.saved, self.dirty, self.bucket.table
        numbers = scalar(gate), lr, beta1, beta2, eps, weight_decay
        backend.restore_adamw_(*state, *numbers, kinds.get("decoupled", True), kinds.get("maximize", False))

    def original(self, values):
        return [x.to(self.bucket.dtype) for x in values]

    def check_untouched_inputs(self):
        b = self.bucket
        assert same_bits(b.read(self.grads), self.original(self.vectors)), "the gradient was written to"
        assert self.dirty.item() == 0
        b.assert_guards()


def check_sgd(step, lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=False, maximize=False):
    """torch.optim.SGD's pseudo-code.  Bound: the products and sums are at most eight roundings of quantities no larger
    than G = |g| + wd |theta| (+ momentum |m|) together, so 8 u G for the buffer and lr 12 u G for the step; then the
    subtraction and the storage.  A half-precision momentum may be rounded to storage before or after it is used."""
    b, u = step.bucket, arithmetic(step.bucket.dtype)
    theta, m = b.read(step.params), b.read(step.buffers[0]) if step.buffers else itertools.repeat(None)
    old = step.states[0] if step.states else itertools.repeat(None)
    for after, after_m, x, g, m0 in zip(theta, m, step.thetas, step.vectors, old, strict=False):
        d = (-g if maximize else g) + weight_decay * x
        size = g.abs() + weight_decay * x.abs()
        rounding = torch.zeros_like(x)
        if m0 is not None:
            buffer = momentum * m0 + d
            size = size + momentum * m0.abs()
            rounding = storage(b.dtype, buffer)
            assert_within([after_m], [buffer], [8 * u * size + rounding])
            d = d + momentum * buffer if nesterov else buffer
            size = size + momentum * size if nesterov else size
        expected = x - lr * d
        bound = lr * (12 * u * size + rounding) + u * expected.abs() + storage(b.dtype, expected)
        assert_within([after], [expected], [bound])
    step.check_untouched_inputs()


def check_adamw(step, lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.05, decoupled=True, maximize=False):
    """torch.optim.Adam's / AdamW's pseudo-code.  First-order propagation of every rounding: e_g of the gradient, e_m
    and e_v of the moments (8 u of what is added up, plus their storage), then of the quotient, then of the weight."""
    b, u = step.bucket, arithmetic(step.bucket.dtype)
    after = zip(b.read(step.params), *(b.read(x) for x in step.buffers), strict=True)
    before = zip(step.thetas, step.vectors, *step.states, strict=True)
    for i, ((x1, m1, v1), (x, g, m0, v0)) in enumerate(zip(after, before, strict=True)):
        t = 4 + i % 2
        assert step.steps[i].item() == t and step.steps[i].dtype == torch.float32
        g = -g if maximize else g
        decay = 0.0 if decoupled else weight_decay
        d, size = g + decay * x, g.abs() + decay * x.abs()
        e_g = 2 * u * size
        m, v = beta1 * m0 + (1 - beta1) * d, beta2 * v0 + (1 - beta2) * d**2
        e_m = 8 * u * (m0.abs() + size) + e_g + storage(b.dtype, m)
        e_v = 8 * u * (v0 + size**2) + 2 * size * e_g + storage(b.dtype, v)
        assert_within([m1], [m], [e_m])
        assert_within([v1], [v], [e_v])
        c1, c2 = 1 - beta1**t, (1 - beta2**t) ** 0.5
        root = v.sqrt() / c2 + eps
        quotient = m / c1 / root
        e_root = e_v / (2 * (v - e_v).clamp_min(1e-3).sqrt()) / c2
        e_quotient = e_m / c1 / (root - e_root) + quotient.abs() * (e_root / (root - e_root) + 8 * u)
        shrunk = x * (1 - lr * weight_decay) if decoupled else x
        expected = shrunk - lr * quotient
        bound = lr * e_quotient + 4 * u * (x.abs() + expected.abs()) + storage(b.dtype, expected)
        assert_within([x1], [expected], [bound])
    step.check_untouched_inputs()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sgd_on_every_layout(backend, layout, dtype):
    step = Step(Bucket(LAYOUTS[layout], dtype))
    step.sgd(backend)
    check_sgd(step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adamw_on_every_layout(backend, layout, dtype):
    step = Step(Bucket(LAYOUTS[layout], dtype), states=2)
    step.adamw(backend)
    check_adamw(step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_sgd_of_every_kind(backend, momentum, nesterov, weight_decay, maximize, forms, dtype):
    options = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "maximize": maximize}
    step = Step(Bucket(LAYOUTS["several"], dtype), FORMS[forms], states=1 if momentum else 0)
    step.sgd(backend, **options)
    check_sgd(step, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_adamw_of_every_kind(backend, decoupled, weight_decay, maximize, forms, dtype):
    options = {"decoupled": decoupled, "weight_decay": weight_decay, "maximize": maximize, "eps": 1e-3}
    step = Step(Bucket(LAYOUTS["several"], dtype), FORMS[forms], states=2)
    step.adamw(backend, **options)
    check_adamw(step, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eps_is_added_after_the_bias_correction(backend, dtype):
    """eps / sqrt(1 - beta2^t) would be ten times as much at t = 1; only an eps of the size of sqrt(v) tells."""
    step = Step(Bucket(LAYOUTS["several"], dtype), states=2)
    step.adamw(backend, eps=0.5)
    check_adamw(step, eps=0.5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_one_run_that_does_not_start_at_zero(backend, kind, form):
    step = Step(Bucket([Run((33,))], torch.float32, first_start=48), FORMS[form], states=1 if kind == "sgd" else 2)
    getattr(step, kind)(backend)
    (check_sgd if kind == "sgd" else check_adamw)(step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_step_starts_from_the_weights_where_nothing_is_perturbed(backend, kind, dtype):
    """`saved` means something only while `dirty` is set (here: NaN); the weights may have been written to since."""
    step = Step(Bucket(LAYOUTS["several"], dtype), states=1 if kind == "sgd" else 2, dirty=0)
    getattr(step, kind)(backend)
    (check_sgd if kind == "sgd" else check_adamw)(step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dirty", [0, 1])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_closed_gate_restores_and_touches_no_state(backend, kind, dirty, dtype):
    """A skipped step: the gradient is NaN and its gate 0; weights come back, moments and counters stay, bit for bit."""
    step = Step(Bucket(LAYOUTS["several"], dtype), states=1 if kind == "sgd" else 2, dirty=dirty)
    step.vectors = [torch.full_like(v, torch.nan) for v in step.vectors]
    step.grads = step.bucket.give(step.vectors, "list")
    getattr(step, kind)(backend, gate=0.0)
    assert same_bits(step.bucket.read(step.params), step.original(step.thetas))
    for buffer, state in zip(step.buffers, step.states, strict=True):
        assert same_bits(step.bucket.read(buffer), step.original(state))
    assert [s.item() for s in step.steps] == [3.0 + i % 2 for i in range(len(step.steps))]
    step.check_untouched_inputs()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_step_of_size_zero_leaves_the_weights_bitwise(backend, kind, dtype):
    """-0 as well, which -0 - 0 * step would make +0 where the step is negative; the moments go on all the same."""
    step = Step(Bucket(LAYOUTS["several"], dtype), states=1 if kind == "sgd" else 2)
    getattr(step, kind)(backend, lr=0.0)
    assert same_bits(step.bucket.read(step.params), step.original(step.thetas))
    assert not same_bits(step.bucket.read(step.buffers[0]), step.original(step.states[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_steps_are_the_same_bits_for_every_thread_count_and_form(backend, kind, dtype, threads):
    results = []
    for count, forms in itertools.product((2, 1), FORMS.values()):
        threads(count)
        step = Step(Bucket(LAYOUTS["several"], dtype), forms, states=1 if kind == "sgd" else 2)
        getattr(step, kind)(backend)
        results.append([step.bucket.read(x) for x in (step.params, *step.buffers)])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_both_backends_step_to_the_same_bits(kind, dtype):
    """SGD and Adam's moments are IEEE sums and products, which leave no room.  Adam's weights differ by one rounding of
    the update: torch.sqrt on the CPU (MKL's) is good to one ulp, the kernels' is the correctly rounded one."""
    results = []
    for name in ("reference", "cpu"):
        step = Step(Bucket(LAYOUTS["several"], dtype), states=1 if kind == "sgd" else 2)
        getattr(step, kind)(Backend(name), lr=0.01)
        results.append([step.bucket.read(x) for x in (step.params, *step.buffers)])
    (theta, *state), (theta_cpu, *state_cpu) = results
    assert all(same_bits(a, b) for a, b in zip(state, state_cpu, strict=True))
    if kind == "sgd":
        assert same_bits(theta, theta_cpu)
    u = arithmetic(dtype)
    moved = [(a.double() - b).abs() for a, b in zip(theta, step.thetas, strict=True)]
    bound = [
        4 * u * m + 2 * (u * t.double().abs() + storage(dtype, t.double())) for m, t in zip(moved, theta, strict=True)
    ]
    assert_within(theta_cpu, [t.double() for t in theta], bound)


def test_second_moments_and_counters_start_at_zero(backend):
    """Adam's first step from empty state: m / (1 - beta1) over sqrt(v / (1 - beta2)) is the sign of the gradient."""
    bucket = Bucket([Run((100,))], torch.float64)
    step = Step(bucket, states=2)
    step.buffers = [bucket.give([torch.zeros(100)], "list") for _ in range(2)]
    step.steps = [torch.tensor(0.0)]
    step.adamw(backend, eps=0.0 + 1e-300, weight_decay=0.0, lr=0.5)
    moved = bucket.read(step.params)[0] - step.thetas[0]
    expected = -0.5 * step.vectors[0].sign()
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-14)
    assert step.steps[0].item() == 1.0
