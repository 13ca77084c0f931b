"""Steps over devices that are not here: fake CUDA tensors have a device and no values.

What mixes two devices raises, and so does whatever would have to read a value on the host. The ops are stand-ins that
compute nothing and only look where their arguments lie, as the real ones do. (torch's own optimizers do not run on such
tensors where torch was built without CUDA: tests/step/test_sync.py has them on the meta device.)
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves

import lets_kernels as lk
from lets_kernels.space import buckets as layout
from support.core_methods import BASES
from support.given_gradients import SHAPES
from support.op_arguments import WRITES


class Ops:
    """An op: all of its tensors but the table on one device; a scalar is returned there."""

    def __init__(self):
        self.ran = []

    def pack(self, tensors, anchor, addresses=None):
        return tensors

    def __getattr__(self, name):
        def run(*args):
            self.ran.append(name)
            tensors = [t for t in tree_leaves(args) if torch.is_tensor(t) and not (t.ndim == 2 and t.shape[1] == 5)]
            assert len({t.device for t in tensors}) == 1, f"{name}: {[str(t.device) for t in tensors]}"
            if name in ("grad_norm", "rho_grad_diagonal", "rho_grad_secant", "all_finite_"):
                return torch.empty((), dtype=torch.float64, device=tensors[0].device)
            return None

        assert name in WRITES
        return run


@pytest.fixture
def ops(monkeypatch):
    """The stand-in for every backend; tables stay real, as they are read on the host."""
    ops, table, unscaled = Ops(), layout.Bucket.table, layout.Bucket.unscaled_table

    def real(function):
        def run(*args, **kwargs):
            with unset_fake_temporarily():
                return function(*args, **kwargs)

        return run

    class Torch:
        def __getattr__(self, name):
            return real(torch.tensor) if name == "tensor" else getattr(torch, name)

    monkeypatch.setattr(layout, "torch", Torch())
    monkeypatch.setattr(layout.Bucket, "table", real(table))
    monkeypatch.setattr(layout.Bucket, "unscaled_table", real(unscaled))
    monkeypatch.setattr(layout.ops, "choose", lambda requested, device: ("reference", ops))
    return ops


class Fakes:
    """Parameters of five shapes, on these devices in turn."""

    def __init__(self, places):
        shapes = [s for s in SHAPES if s != (3, 4, 2, 2)]  # five columns would pass for a table
        self.params = [torch.nn.Parameter(torch.empty(s, device=places[i % 2])) for i, s in enumerate(shapes)]
        self.loss = torch.empty((), device=places[1])  # of the last layer

    def backward(self):
        for p in self.params:
            p.grad = torch.empty_like(p)
        return self.loss

    def step(self, opt):
        self.backward()
        opt.first_step(zero_grad=True, loss=self.loss)
        self.backward()
        opt.second_step()
        if opt.radius.learns:
            opt.radius_step(self.backward, self.backward)


PLACES = {"one": ("cuda:0", "cuda:0"), "two": ("cuda:0", "cuda:1"), "swapped": ("cuda:1", "cuda:0")}
RADII = {
    "constant": lambda: 0.1,
    "scheduled": lambda: lk.ScheduledRadius.cosine(0.1, 0.2, 9),
    "diagonal": lambda: lk.LearnedRadius(0.1),
    "algorithm1": lambda: lk.LearnedRadius(0.1, direction="algorithm1"),
    "secant": lambda: lk.LearnedRadius(0.1, curvature="secant"),
    "reuse": lambda: lk.LearnedRadius(0.1, reuse_train_gradient=True),
    "validation-loss": lambda: lk.LearnedRadius(0.1, metric="validation_loss"),
    "sgd": lambda: lk.LearnedRadius(0.1, optimizer=torch.optim.SGD),
    "per-group": lambda: lk.LearnedRadius(0.1, per_group=True),
}


@pytest.mark.parametrize("base", ["momentum", "adamw"])
@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("places", PLACES)
def test_steps_mix_no_devices_and_read_nothing(ops, places, radius, base):
    cls, _, options, op = BASES[base]
    with FakeTensorMode():
        fakes = Fakes(PLACES[places])
        opt = lk.ASAM(fakes.params, cls, RADII[radius](), **options)
        for _ in range(3):
            fakes.step(opt)
        metrics = opt.metrics()
        home = torch.device(PLACES[places][0])
        for name in ("grad_norm", "perturbed_grad_norm", "skipped_steps", *(["rho_grad"] if opt.radius.learns else [])):
            assert metrics[name].device == home, name
        assert opt.fused and {"perturb_", op, "all_finite_"} <= set(ops.ran)
        if opt.radius.learns:
            (nu,) = opt.radius.nu
            assert nu.device == home == opt.rho.device
            state = opt.radius.optimizer.state[nu]
            assert radius == "sgd" or state["step"].device == state["exp_avg"].device == home


def test_a_group_has_its_own_radius_on_the_device(ops):
    with FakeTensorMode():
        fakes = Fakes(PLACES["two"])
        groups = [{"params": fakes.params[:2]}, {"params": fakes.params[2:], "rho": 0.2}]
        opt = lk.SAM(groups, torch.optim.SGD, lr=0.1)
        opt.param_groups[0]["rho"] = torch.empty((), device="cuda:0")
        for _ in range(3):
            fakes.step(opt)
        assert opt.rho.device == torch.device("cuda:0") and opt.rho.shape == (2,) and opt.rho.dtype == torch.float64


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.NAdam])
def test_the_radius_is_learned_by_an_optimizer_that_a_graph_can_hold(optimizer):
    with FakeTensorMode():
        opt = lk.SAM(Fakes(PLACES["one"]).params, torch.optim.SGD, lk.LearnedRadius(optimizer=optimizer), lr=0.1)
        assert [group["capturable"] for group in opt.radius.optimizer.param_groups] == [True]


def test_the_guard_itself_raises():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.zeros((), device="cuda:0").item()
    with FakeTensorMode(), pytest.raises(RuntimeError):
        torch.zeros(2, device="cuda:0") + torch.zeros(2, device="cuda:1")
