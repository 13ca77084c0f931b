"""Damaged states of base optimizers and radii: refused in words before anything is loaded."""

import copy
import math

import pytest
import torch

import lets_kernels as lk
from support.conv_net import Task
from support.given_gradients import snapshot
from support.guard_bands import same_bits

BASES = {
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "adamax": (torch.optim.Adamax, {"lr": 0.1}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}),
    "radam": (torch.optim.RAdam, {"lr": 0.01}),
    "asgd": (torch.optim.ASGD, {"lr": 0.1}),
    "rprop": (torch.optim.Rprop, {"lr": 0.1}),
}


def trained(base, make=lk.SAM, steps=2, **options):
    task = Task(torch.float32, steps=4)
    cls, own = BASES[base]
    opt = make(task.net.parameters(), cls, **{**own, **options})
    for batch, val in task.batches[:steps]:
        opt.step(task.closure(batch), *([task.closure(val)] if opt.radius.learns else []))
    return task, opt


def refused(opt, task, state, match):
    """Nothing is loaded, and the next steps are those of an optimizer to which nothing happened."""
    before = copy.deepcopy([g["lr"] for g in opt.param_groups]), snapshot(opt)
    state["param_groups"][0]["lr"] = 0.5
    with pytest.raises(ValueError, match=match):
        opt.load_state_dict(state)
    assert [g["lr"] for g in opt.param_groups] == before[0]
    assert same_bits(snapshot(opt), before[1])
    task.run(opt, task.batches[2:3], learned=opt.radius.learns)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_an_entry_of_a_parameter_that_lacks_something_is_refused(base, fresh):
    """Also by an optimizer that has no state yet to compare with."""
    _, saved = trained(base)
    names = sorted(saved.state_dict()["state"][0])
    assert names
    for name in names:
        task, opt = trained(base, steps=0 if fresh else 2)
        state = copy.deepcopy(saved.state_dict())
        del state["state"][1][name]
        if len(state["state"][1]) == 0:  # of SGD, which then begins anew
            continue
        refused(opt, task, state, f"lacks {name}")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("value", [math.nan, -1.0, torch.tensor(-1.0), torch.ones(2), "many", 1j])
def test_a_step_count_that_is_none_is_refused(base, value):
    task, opt = trained(base)
    state = copy.deepcopy(opt.state_dict())
    if "step" not in state["state"][0]:
        assert base == "momentum"
        return
    state["state"][0]["step"] = value
    refused(opt, task, state, "not a number that it could have come to")


@pytest.mark.parametrize("base", BASES)
def test_groups_without_their_numbers_or_with_others_are_refused(base):
    for name, value, match in (
        ("lr", None, "lacks lr"),
        ("lr", math.nan, "which is not finite"),
        ("weight_decay", math.inf, "which is not finite"),
        ("weight_decay", 1j, "has another kind"),
        ("maximize", torch.zeros(3), "has 3 elements for maximize"),
        ("adaptive", torch.zeros(2), "has 2 elements for adaptive"),
    ):
        task, opt = trained(base)
        state = copy.deepcopy(opt.state_dict())
        group = state["param_groups"][0]
        if name not in group:  # Rprop has no weight decay
            assert base == "rprop"
            continue
        if value is None:
            del group[name]
        else:
            group[name] = value
        before = snapshot(opt)
        with pytest.raises(ValueError, match=match):
            opt.load_state_dict(state)
        assert same_bits(snapshot(opt), before)
        task.run(opt, task.batches[2:3])


@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_tensors_that_only_have_the_shape_are_refused(kind):
    for base in ("momentum", "adam", "rmsprop"):
        task, opt = trained(base)
        state = copy.deepcopy(opt.state_dict())
        name = next(n for n, t in state["state"][0].items() if t.dim())
        t = state["state"][0][name]
        state["state"][0][name] = t.to("meta") if kind == "meta" else t.to_sparse()
        refused(opt, task, state, "no tensor of the parameter's shape")


def test_one_tensor_for_two_parameters_is_refused():
    """The step of one would be a step of the other."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = lk.SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9)

    def closure():
        opt.zero_grad()
        sum(p.square().sum() for p in params).backward()

    opt.step(closure)
    state = copy.deepcopy(opt.state_dict())
    state["state"][1]["momentum_buffer"] = state["state"][0]["momentum_buffer"]
    before = snapshot(opt)
    with pytest.raises(ValueError, match="is the tensor of another entry too"):
        opt.load_state_dict(state)
    assert same_bits(snapshot(opt), before)


@pytest.mark.parametrize("kind", ["meta", "sparse"])
@pytest.mark.parametrize("make", [lk.VaSSO, lk.FriendlySAM, lk.LookSAM, lk.SparseSAM])
def test_what_parts_keep_is_refused_where_it_only_has_the_shape(make, kind):
    task, opt = trained("momentum", make)
    state = copy.deepcopy(opt.state_dict())
    name = next(n for n in state["state"][0] if n.startswith("lets_kernels."))
    t = state["state"][0][name]
    state["state"][0][name] = t.to("meta") if kind == "meta" else t.to_sparse()
    refused(opt, task, state, "no tensor of the parameter's shape")


@pytest.mark.parametrize(
    "damage",
    [
        lambda o: o["state"][0].update(exp_avg=0.0),
        lambda o: o["state"][0].update(step=torch.tensor(-1.0)),
        lambda o: o["param_groups"][0].update(betas=torch.tensor(math.inf)),
        lambda o: o["param_groups"][0].update(lr=torch.tensor(1j)),
        lambda o: o["param_groups"][0].update(eps=1j),
        lambda o: o["param_groups"][0].update(lr=math.nan),
        lambda o: o["param_groups"][0].update(amsgrad=True),
    ],
)
def test_the_optimizer_of_the_radius_is_tried_out_on_what_it_would_load(damage):
    task, opt = trained("momentum", lk.LETSSAM)
    state = copy.deepcopy(opt.state_dict())
    damage(state["lets_kernels"]["radius"]["optimizer"])
    refused(opt, task, state, "the radius's optimizer")


def test_a_seed_beyond_64_bits_is_refused():
    for make, options in ((lk.VaSSO, {}), (lk.RandomSAM, {"seed": 1})):
        task, opt = trained("momentum", make, **options)
        state = copy.deepcopy(opt.state_dict())
        state["lets_kernels"]["random"]["seed"] = 2**70
        refused(opt, task, state, "not a count")


@pytest.mark.parametrize("name", ["state", "param_groups", "params"])
def test_a_state_of_another_layout_is_refused_in_words(name):
    for value in (None, 3, "x", torch.ones(2)):
        task, opt = trained("adam")
        state = copy.deepcopy(opt.state_dict())
        if name == "params":
            state["param_groups"][0]["params"] = value
        else:
            state[name] = value
        with pytest.raises(ValueError, match="nothing of it was loaded"):
            opt.load_state_dict(state)
        task.run(opt, task.batches[2:3])
    task, opt = trained("adam")
    state = opt.state_dict()
    (state["param_groups"][0] if name == "params" else state).pop(name)
    with pytest.raises(ValueError, match=r"lacks|has no list of params"):
        opt.load_state_dict(state)


def test_a_waiting_step_with_another_kind_of_place_is_refused():
    radius = lk.LearnedRadius(0.05, curvature="secant", validation="next")
    task, opt = trained("momentum", rho=radius)
    for name, value in (("group", torch.tensor(0)), ("places", [0, torch.tensor(1)]), ("places", 3)):
        state = copy.deepcopy(opt.state_dict())
        state["lets_kernels"]["radius"]["pending"]["trial"]["ascents"][0][name] = value
        refused(opt, task, state, "an ascent")


def test_a_base_optimizer_that_never_called_torchs_constructor_can_be_loaded():
    class Bare(torch.optim.Optimizer):
        def __init__(self, params, lr):
            self.param_groups = [{"params": list(params), "lr": lr}]
            self.state, self.defaults = {}, {"lr": lr}

        def zero_grad(self, set_to_none=True):
            for p in self.param_groups[0]["params"]:
                p.grad = None

        def step(self, closure=None):
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.sub_(self.param_groups[0]["lr"] * p.grad)

        def state_dict(self):
            groups = [{"lr": g["lr"], "rho": g["rho"], "params": [0, 1]} for g in self.param_groups]
            return {"state": {}, "param_groups": groups}

        def load_state_dict(self, state):
            self.param_groups[0]["lr"] = state["param_groups"][0]["lr"]

    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = lk.SAM(params, Bare(params, lr=0.1), rho=0.1)
    saved = opt.state_dict()
    saved["param_groups"][0]["lr"] = 0.25
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 0.25


def test_a_base_optimizer_whose_saving_fails_is_refused_when_built():
    class Broken(torch.optim.SGD):
        def state_dict(self):
            raise KeyError("fast")

    with pytest.raises(TypeError, match=r"Broken.state_dict\(\) fails.*fast"):
        lk.SAM([torch.nn.Parameter(torch.ones(3))], Broken, lr=0.1)


# ---- what is no damage


class Counting(torch.optim.Optimizer):
    """Keeps something in an attribute, as some do, and divides by the gradient's norm."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.calls += 1
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p -= group["lr"] * p.grad / p.grad.norm()


@pytest.mark.parametrize("inner", [Counting, lambda ps, **k: torch.optim.Adam(ps, eps=0.0, **k), torch.optim.RMSprop])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_radius_of_any_optimizer_goes_on_from_its_own_state(inner, steps):
    _, opt = trained("momentum", rho=lk.LearnedRadius(0.05, optimizer=inner), steps=steps)
    state = copy.deepcopy(opt.state_dict())
    _, again = trained("momentum", rho=lk.LearnedRadius(0.05, optimizer=inner), steps=0)
    torch.optim.lr_scheduler.LambdaLR(again.radius.optimizer, lambda _: 1.0)  # which puts something into the groups
    again.load_state_dict(state)
    assert same_bits(again.rho, opt.rho)


def test_options_of_a_group_may_be_what_the_optimizer_takes():
    a, b = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    groups = [{"params": [a]}, {"params": [b], "eps": (None, 1e-3)}]
    opt = lk.SAM(groups, torch.optim.Adafactor, lr=0.1, eps=(1e-30, 1e-3))
    opt.param_groups[0]["layer_scale"] = torch.ones(3)  # the user's own

    def closure():
        opt.zero_grad()
        (a.square().sum() + b.square().sum()).backward()

    opt.step(closure)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    before = a.detach().clone()
    opt.step(closure)
    assert not same_bits(a.detach(), before)


def test_others_may_share_a_tensor_between_parameters():
    class Sharing(torch.optim.SGD):
        def step(self, closure=None):
            history = self.state[self.param_groups[0]["params"][0]].get("history", torch.zeros(3))
            for p in self.param_groups[0]["params"]:
                self.state[p]["history"] = history
            return super().step(closure)

    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = lk.SAM(params, Sharing, lr=0.1)

    def closure():
        opt.zero_grad()
        sum(p.square().sum() for p in params).backward()

    opt.step(closure)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert opt.state[params[0]]["history"].shape == (3,)
