"""restore_lion_ against the float64 oracle, and which optimizers named Lion it stands for."""

import pytest
import torch
from test_step import FORMS, Step, scalar

import lets_kernels as lk
from support import oracle_vectors as oracle
from support.backends import plain
from support.guard_bands import DTYPES, LAYOUTS, Bucket, arithmetic, assert_within, same_bits, storage

LR, BETAS, DECAY = 0.1, (0.9, 0.99), 0.05


def lion(step, backend, gate=1.0, lr=LR, betas=BETAS, weight_decay=DECAY):
    state = step.params, step.grads, step.buffers[0], step.saved, step.dirty, step.bucket.table
    backend.restore_lion_(*state, scalar(gate), lr, *betas, weight_decay)
    return step


def check(step, lr=LR, betas=BETAS, weight_decay=DECAY):
    """The mixture and the average: coefficients, products and a sum, 3 u of what is added up. The weights: a decay, its
    product, a sum, lr and its product, 5 u of the step, and 1 u of the weight. Where the mixture is below its own bound
    its sign is not determined, and a step either way is as right; that is one element in a thousand at most, in 16 bits
    too, whose arithmetic is float32."""
    b, u = step.bucket, arithmetic(step.bucket.dtype)
    undecided = count = 0
    for after, after_m, x, g, m in zip(
        b.read(step.params), b.read(step.buffers[0]), step.thetas, step.vectors, step.states[0], strict=True
    ):
        mixed, average, expected = oracle.lion(x, g, m, lr, *betas, weight_decay)
        added = [3.01 * u * (beta * m.abs() + (1 - beta) * g.abs()) for beta in betas]
        assert_within([after_m], [average], [added[1] + storage(b.dtype, average)])
        open_sign = (mixed.abs() <= added[0]) & (added[0] > 0)
        bound = lr * (5 * u * (1 + weight_decay * x.abs()) + 2 * open_sign) + u * expected.abs()
        assert_within([after], [expected], [bound + storage(b.dtype, expected)])
        undecided, count = undecided + int(open_sign.sum()), count + x.numel()
    assert undecided <= 1 + count / 1000
    step.check_untouched_inputs()


@pytest.mark.ops
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lion_on_every_layout(backend, layout, dtype):
    check(lion(Step(Bucket(LAYOUTS[layout], dtype)), backend))


@pytest.mark.ops
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize(
    "lr, betas, weight_decay", [(0.1, BETAS, 0.0), (0.01, (0.0, 0.5), 0.5), (0.1, (0.95, 0.9), 0.05)]
)
def test_lion_of_every_kind(backend, lr, betas, weight_decay, forms, dtype):
    options = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
    check(lion(Step(Bucket(LAYOUTS["several"], dtype), FORMS[forms]), backend, **options), **options)


@pytest.mark.ops
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lion_starts_from_the_weights_where_nothing_is_perturbed(backend, dtype):
    check(lion(Step(Bucket(LAYOUTS["several"], dtype), dirty=0), backend))


@pytest.mark.ops
@pytest.mark.parametrize("dirty", [0, 1])
def test_a_closed_gate_restores_and_leaves_the_average(backend, dirty):
    step = lion(Step(Bucket(LAYOUTS["several"], torch.float32), dirty=dirty), backend, gate=0.0)
    assert same_bits(step.bucket.read(step.params), step.original(step.thetas))
    assert same_bits(step.bucket.read(step.buffers[0]), step.original(step.states[0]))
    step.check_untouched_inputs()


@pytest.mark.ops
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_bit_for_bit_as_plain_torch_does(backend, lr, dtype):
    """With lr = 0 not a bit of a weight changes."""
    steps = [lion(Step(Bucket(LAYOUTS["several"], dtype)), ops, lr=lr) for ops in (backend, plain())]
    written = [[*s.bucket.read(s.params), *s.bucket.read(s.buffers[0])] for s in steps]
    assert same_bits(*written)
    if lr == 0:
        assert same_bits(steps[0].bucket.read(steps[0].params), steps[0].original(steps[0].thetas))


# ---- the optimizers


class Lion(torch.optim.Optimizer):
    """As the paper prints it, and as packages have it."""

    mix = staticmethod(lambda m, g, beta: beta * m + (1 - beta) * g)

    def __init__(self, params, lr=1e-4, betas=BETAS, weight_decay=0.0, **more):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, **more})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                m = state["exp_avg"]
                self.move(p, self.mix(m, p.grad, beta1).sign(), group)
                m.copy_(beta2 * m + (1 - beta2) * p.grad)

    def move(self, p, update, group):
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)


def other(name="Lion", **methods):
    return type(name, (Lion,), methods)


def coupled(self, p, update, group):
    p.sub_(group["lr"] * (update + group["weight_decay"] * p.sign()))


def counting(self, p, update, group):
    Lion.move(self, p, update, group)
    self.state[p]["step"] = 1


def train(base, backend="auto", steps=3, **options):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(40, 3))
    opt = lk.SAM([p], base, lr=0.01, rho=0.05, weight_decay=0.1, backend=backend, **options)
    x = torch.randn(3, 40)

    def closure():
        opt.zero_grad()
        loss = (x @ p).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        opt.step(closure)
    return opt, p


@pytest.mark.parametrize("options", [{}, {"betas": (0.95, 0.98)}, {"maximize": False, "foreach": None}])
def test_lion_is_fused_and_steps_as_itself(backend, options):
    """Against the same optimizer under a name that nobody knows; the decay is in another order: 4 u a step."""
    opt, p = train(other(), backend.name, **options)
    assert opt.fused and not opt.fused_reason
    own, q = train(other("Tiger"), backend.name, **options)
    assert not own.fused and "Tiger has no fused step" in own.fused_reason
    torch.testing.assert_close(p, q, rtol=0, atol=12 * 2.0**-24 * float(q.detach().abs().max()))
    torch.testing.assert_close(opt.state[p]["exp_avg"], own.state[q]["exp_avg"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "base, options, reason",
    [
        (Lion, {"cautious": True}, "cautious=True"),
        (other(move=coupled), {}, "does not step as Chen et al"),
        (other(mix=staticmethod(lambda m, g, beta: (1 - beta) * m + beta * g)), {}, "does not step as Chen et al"),
        (other(move=counting), {}, "does not step as Chen et al"),
        (other(__init__=lambda self, params, lr, weight_decay: Lion.__init__(self, params, lr)), {}, "not be tried"),
    ],
)
def test_what_is_only_named_so_steps_by_itself_and_the_reason_is_given(base, options, reason):
    opt, p = train(base, **options)
    assert not opt.fused and reason in opt.fused_reason
    assert bool(p.isfinite().all())


def test_a_step_that_was_put_around_it_is_its_own():
    opt, _ = train(other(), steps=0)
    step = opt.base_optimizer.step
    opt.base_optimizer.step = lambda closure=None: step(closure)
    p = opt.param_groups[0]["params"][0]
    p.grad = torch.ones_like(p)
    opt.first_step()
    opt.second_step()
    assert not opt.fused and opt.fused_reason == "the base optimizer's step was replaced"
