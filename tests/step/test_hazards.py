"""What users do around a step that must not be taken for something else: freezing, clipping, old gradients, groups."""

import copy

import pytest
import torch

import lets_kernels as lk
from support.inside import space

SGD = torch.optim.SGD
START = torch.tensor(0.1, dtype=torch.float64).log().exp()


class Problem:
    """Two layers and a quadratic loss, in float64; counts the calls of its closure."""

    def __init__(self):
        torch.manual_seed(2)
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3)).double()
        self.x, self.v = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
        self.calls = 0

    def backward(self, x=None):
        loss = (self.net(self.x if x is None else x) - 1).square().mean()
        loss.backward()
        return loss

    def closure(self, opt, x=None):
        def run():
            self.calls += 1
            opt.zero_grad()
            return self.backward(x)

        return run

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.net.parameters()])


def test_gradients_from_before_the_optimizer_are_not_its_first_pass():
    problem = Problem()
    base = SGD(problem.net.parameters(), lr=0.1)
    problem.backward()
    base.step()
    opt = lk.SAM(problem.net.parameters(), base)
    opt.step(problem.closure(opt))
    assert problem.calls == 2


def test_a_caller_who_begins_is_understood_when_only_some_parameters_have_new_gradients():
    """A frozen layer with a stale gradient, a gradient set to None by hand: neither hides a new one, nor fakes it."""
    problem = Problem()
    opt = lk.SAM(problem.net.parameters(), SGD, lr=0.1)

    def second():
        problem.calls += 1
        return problem.backward()

    problem.backward()
    opt.step(second)
    assert problem.calls == 1
    for p in problem.net[0].parameters():
        p.requires_grad_(False)
    for p in problem.net[2].parameters():
        p.grad = None
    problem.backward()
    opt.step(second)
    assert problem.calls == 2
    problem.net[2].weight.grad = None  # the bias keeps what the last step has used
    opt.step(second)
    assert problem.calls == 4


def pending(radius_options, disturb):
    """The radius after two steps with the hypergradient of the first finished in the second."""
    problem = Problem()
    radius = lk.LearnedRadius(0.1, optimizer=SGD, lr=10.0, reuse_train_gradient=True, **radius_options)
    opt = lk.SAM(problem.net.parameters(), SGD, radius, lr=0.1)
    val = problem.closure(opt, problem.v)
    for _ in range(2):
        opt.zero_grad()
        opt.first_step(zero_grad=True, loss=problem.backward())
        problem.backward()
        opt.second_step()
        opt.radius_step(None, val)
        disturb(opt, problem)
    return opt, problem


@pytest.mark.parametrize("curvature", ["diagonal", "secant"])
def test_what_users_do_to_gradients_after_a_step_does_not_reach_a_waiting_hypergradient(curvature):
    options = {"curvature": curvature}
    untouched, _ = pending(options, lambda opt, problem: None)
    zeroed, _ = pending(options, lambda opt, problem: opt.zero_grad(set_to_none=False))
    clipped, _ = pending(options, lambda opt, problem: torch.nn.utils.clip_grad_norm_(problem.net.parameters(), 1e-3))
    assert abs(untouched.rho - START) > 1e-6
    assert untouched.rho == zeroed.rho == clipped.rho


def test_freezing_between_steps_drops_the_waiting_hypergradient_and_goes_on():
    opt, problem = pending({}, lambda opt, problem: problem.net[0].requires_grad_(False))
    assert opt.rho == START
    assert torch.isfinite(problem.weights()).all()
    state = copy.deepcopy(opt.state_dict())
    problem.net[0].requires_grad_(True)
    opt.load_state_dict(state)
    opt.zero_grad()
    opt.first_step(zero_grad=True, loss=problem.backward())
    assert opt.rho == START
    opt.restore()


def test_freezing_between_a_step_and_its_radius_step_is_fine():
    problem = Problem()
    opt = lk.LETSSAM(problem.net.parameters(), SGD, 0.1, lr=0.1)
    problem.backward()
    opt.first_step(zero_grad=True)
    problem.backward()
    opt.second_step()
    problem.net[0].requires_grad_(False)
    opt.radius_step(problem.closure(opt), problem.closure(opt, problem.v))
    assert abs(opt.rho - START) > 1e-6


@pytest.mark.parametrize("per_group, rho", [(False, 0.2), (True, 0.0)])
def test_a_group_that_a_learned_radius_refuses_is_not_added(per_group, rho):
    problem = Problem()
    radius = lk.LearnedRadius(0.1, per_group=per_group)
    opt = lk.SAM(problem.net.parameters(), SGD, radius, lr=0.1)
    extra = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="rho"):
        opt.add_param_group({"params": [extra], "rho": rho})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [extra]})
    opt.step(problem.closure(opt), problem.closure(opt, problem.v))
    assert len(opt.param_groups) == 2


def test_a_group_added_to_the_base_optimizer_gets_what_it_lacks():
    problem = Problem()
    opt = lk.SAM(problem.net.parameters(), SGD, lr=0.1)
    extra = torch.ones(3, dtype=torch.float64, requires_grad=True)
    opt.base_optimizer.add_param_group({"params": [extra]})
    extra.grad = torch.ones_like(extra)
    problem.backward()
    opt.first_step()
    opt.second_step()
    assert opt.param_groups[1]["rho"] == 0.05
    torch.testing.assert_close(extra.detach(), torch.full_like(extra, 0.9))


def test_the_step_is_not_taken_inside_the_context():
    problem = Problem()
    opt = lk.SAM(problem.net.parameters(), SGD, lr=0.1)
    before = problem.weights()
    problem.backward()
    with pytest.raises(RuntimeError, match="leave the context first"), opt.perturbed():
        opt.step()
    assert torch.equal(problem.weights(), before)
    with opt.perturbed():
        opt.restore()
    assert torch.equal(problem.weights(), before)


def test_a_bad_second_gradient_leaves_the_unperturbed_weights():
    table = torch.nn.Embedding(4, 2)
    opt = lk.SAM(table.parameters(), SGD, lr=0.1)
    before = table.weight.detach().clone()
    table(torch.tensor([1])).sum().backward()
    opt.first_step(zero_grad=True)
    table.sparse = True
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse=False"):
        opt.second_step()
    assert torch.equal(table.weight, before)


def test_steps_with_lr_zero_do_not_age_the_state():
    problem = Problem()
    opt = lk.SAM(problem.net.parameters(), torch.optim.Adam, lr=0.1)
    opt.step(problem.closure(opt))
    count = opt.state[problem.net[0].weight]["step"].clone()
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    assert torch.equal(opt.state[problem.net[0].weight]["step"], count)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_another_dtype_than_their_parameters_are_cast(backend, dtype):
    """torch lets a parameter ask for wider gradients (grad_dtype); the step is that of the cast ones."""
    results = []
    for wide in (True, False):
        p = torch.linspace(-1, 1, 33).to(dtype).requires_grad_()
        p.grad_dtype = torch.float32 if wide else dtype
        opt = lk.SAM([p], SGD, lr=0.1, momentum=0.9, backend=backend.name)
        for _ in range(3):
            for step in (opt.first_step, opt.second_step):
                g = torch.linspace(0, 1, 33).to(dtype)
                p.grad = g.float() if wide else g
                step()
        results.append(p.detach().clone())
    assert torch.equal(*results)


def test_a_changing_set_of_gradients_does_not_pile_up_tables():
    params = [torch.ones(2, requires_grad=True) for _ in range(10)]
    groups = [{"params": params[:5]}, {"params": params[5:], "rho": 0.1}]
    opt = lk.SAM(groups, SGD, lr=0.1, momentum=0.9)
    for subset in range(1, 400):
        for i, p in enumerate(params):
            p.grad = torch.ones(2) if subset >> i & 1 else None
        opt.first_step()
        opt.second_step()
    (bucket,) = space(opt).buckets
    assert 1 < len(bucket._tables) < 100 and 1 < len(bucket._chosen) < 100 and len(bucket.found_state) < 100


@pytest.mark.parametrize(
    "build, error, way_out",
    [
        (lambda p: lk.SAM(p, SGD, lr=0.1, maximize=True), ValueError, "minimise the negative"),
        (lambda p: lk.SAM(p, torch.optim.LBFGS), TypeError, "step\\(\\) needs none"),
        (lambda p: lk.LearnedRadius(optimizer=torch.optim.LBFGS), TypeError, "step\\(\\) needs none"),
        (lambda p: lk.SAM([{"params": []}], SGD, lr=0.1), ValueError, "no parameters"),
        (lambda p: lk.SAM(p, SGD, True, lr=0.1), TypeError, "rho must be a number"),
        (
            lambda p: lk.SAM([{"params": p, "rho": 0.7}], SGD, lk.ScheduledRadius.linear(0.1, 0.2, 3), lr=0.1),
            ValueError,
            "the same for all groups",
        ),
    ],
    ids=["maximize", "lbfgs", "lbfgs-for-nu", "empty-group", "rho-true", "scheduled-and-own"],
)
def test_what_cannot_work_is_refused_at_once(build, error, way_out):
    p = [torch.ones(2, requires_grad=True)]
    with pytest.raises(error, match=way_out):
        build(p)
    assert torch.equal(p[0], torch.ones(2))


def test_a_radius_whose_first_optimizer_failed_starts_afresh_in_the_next():
    radius = lk.LearnedRadius(0.1, per_group=True, lr=-1.0)
    p = [torch.ones(2, requires_grad=True)]
    with pytest.raises(ValueError, match="learning rate"):
        lk.SAM(p, SGD, radius, lr=0.1)
    with pytest.raises(ValueError, match="learning rate"):  # the same error again, not a half-made radius
        lk.SAM(p, SGD, radius, lr=0.1)
    assert radius.nu == []
