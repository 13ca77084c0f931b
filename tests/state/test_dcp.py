"""torch.distributed.checkpoint keeps "state" and "param_groups" only: radius, its optimizer, counters come through."""

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import lets_kernels as lk
from support import family
from support.conv_net import Task
from support.core_methods import BASES
from support.family import FAMILY, ONE_EACH
from support.given_gradients import snapshot, weights
from support.guard_bands import same_bits
from support.inside import progress, shares
from support.moving_radii import auto


def secant(rho, **options):
    return lk.LearnedRadius(rho, curvature="secant", lr=0.05, **options)


METHODS = {
    "sam": lambda rho: (lk.SAM, rho, {}),
    "asam": lambda rho: (lk.ASAM, rho, {"filterwise": True}),
    "lets-sam": lambda rho: (lk.LETSSAM, secant(rho), {}),
    "lets-asam-per-group": lambda rho: (lk.LETSASAM, secant(rho, per_group=True), {"groups": True}),
    "auto": lambda rho: (lk.SAM, auto(rho), {}),
    "auto-per-group": lambda rho: (lk.ASAM, auto(rho, per_group=True), {"groups": True}),
    "nu-by-sgd": lambda rho: (lk.LETSSAM, secant(rho, optimizer=torch.optim.SGD, momentum=0.9), {}),
    "nu-by-rmsprop": lambda rho: (lk.LETSSAM, secant(rho, optimizer=torch.optim.RMSprop), {}),
    "nu-by-amsgrad": lambda rho: (lk.LETSSAM, secant(rho, optimizer=torch.optim.AdamW, amsgrad=True), {}),
}


def build(method, base, net, rho=0.1):
    if method in FAMILY:
        return family.build(method, net, base, rho=rho)
    cls, radius, options = METHODS[method](rho)
    optimizer, _, base_options, _ = BASES[base]
    params = list(net.parameters())
    if options.pop("groups", False):
        params = [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}]
    return cls(params, optimizer, radius, **options, model=net, **base_options)


def ran(method, base, steps=4):
    task = Task(torch.float32, steps=2 * steps)
    opt = build(method, base, task.net)
    go_on(task, opt, task.batches[:steps])
    return task, opt


def go_on(task, opt, batches):
    if opt.radius.learns:
        task.run(opt, batches, learned=True)
    else:
        family.run(opt, task, batches)


def counters(opt):
    return progress(opt).step, int(opt.metrics()["skipped_steps"])


def fresh(method, base, task):
    """Another net and another radius, to be overwritten."""
    task = Task(torch.float32, steps=len(task.batches), net=Task(torch.float32, seed=9).net)
    return task, build(method, base, task.net, rho=0.7)


def through_dcp(tmp_path, task, opt, method, base, options, save=dcp.save):
    state = {
        "model": get_model_state_dict(task.net),
        "optim": get_optimizer_state_dict(task.net, opt, options=options),
    }
    written = save(state, checkpoint_id=tmp_path)
    if save is not dcp.save:
        written.result()
    task, opt = fresh(method, base, task)
    state = {
        "model": get_model_state_dict(task.net),
        "optim": get_optimizer_state_dict(task.net, opt, options=options),
    }
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(task.net, state["model"])
    set_optimizer_state_dict(task.net, opt, state["optim"], options=options)
    return task, opt


def assert_goes_on_alike(whole, resumed, steps=4):
    """Everything a step reads is the same, and so are the bits after some more steps."""
    for task, opt in (whole, resumed):
        assert shares(opt)
        assert [group["lets_kernels"] for group in opt.param_groups] == [None] * len(opt.param_groups)
        go_on(task, opt, task.batches[steps:])
    assert same_bits(snapshot(whole[1]), snapshot(resumed[1]))
    family.assert_same(*(family.held(opt) for _, opt in (whole, resumed)))
    assert counters(whole[1]) == counters(resumed[1]) == (2 * steps, 0)


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
CASES = [(method, base) for method in METHODS for base in ("momentum", "adamw")]
MEMBERS = [(method, "adamw" if FAMILY[method].base else "momentum") for method in [*ONE_EACH, "sparse-dynamic"]]


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("method, base", [*CASES, ("sam", "sgd"), ("lets-sam", "sgd"), *MEMBERS])
def test_a_checkpoint_resumes_to_the_bit(tmp_path, method, base, flat):
    """A flat state is read by the names in ``opt.state[p]``, so what parts keep has to be found there."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    task, opt = ran(method, base)
    resumed = through_dcp(tmp_path, task, opt, method, base, options)
    assert same_bits(opt.rho, resumed[1].rho)
    assert_goes_on_alike((task, opt), resumed)


def test_an_asynchronous_save_holds_what_was_there_when_it_was_asked_for(tmp_path):
    """Copied before the call returns: steps taken while it is written do not reach into it."""
    task, opt = ran("lets-sam", "adamw")

    def save(state, checkpoint_id):
        written = dcp.async_save(state, checkpoint_id=checkpoint_id)
        copied, stepping = copy.deepcopy((task.net, opt))
        Task(torch.float32, steps=8, net=copied).run(stepping, task.batches[4:], learned=True)
        return written

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        resumed = through_dcp(tmp_path / "saved", task, opt, "lets-sam", "adamw", StateDictOptions(), save)
    finally:
        torch.distributed.destroy_process_group()
    assert_goes_on_alike((task, opt), resumed)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("method", ["sam", "lets-asam-per-group", "nu-by-rmsprop", *ONE_EACH])
def test_a_full_state_goes_through_a_file_that_holds_no_code(method, flat):
    """What rank 0 writes with torch.save, read with weights_only=True."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=flat)
    # Of any optimizer, torch takes a full state that is flat for one that is not full.
    taken = StateDictOptions(full_state_dict=not flat, flatten_optimizer_state_dict=flat)
    task, opt = ran(method, "momentum")
    file = io.BytesIO()
    torch.save((get_model_state_dict(task.net), get_optimizer_state_dict(task.net, opt, options=options)), file)
    file.seek(0)
    model, optim = torch.load(file, weights_only=True)
    other, resumed = fresh(method, "momentum", task)
    set_model_state_dict(other.net, model)
    set_optimizer_state_dict(other.net, resumed, optim, options=taken)
    assert_goes_on_alike((task, opt), (other, resumed))


@pytest.mark.parametrize("base", ["sgd", "momentum", "adamw", "rmsprop"])
@pytest.mark.parametrize("method", ["sam", "lets-sam", "nu-by-rmsprop", "nu-by-amsgrad"])
def test_the_call_that_makes_state_moves_nothing(method, base):
    """step(closure=None) with zero gradients and lr = 0, on an optimizer without state; asked twice."""
    task = Task(torch.float32, steps=2)
    opt = build(method, base, task.net)
    before, rho = weights(task), opt.rho
    nu = [n.detach().clone() for n in getattr(opt.radius, "nu", [])]
    for _ in range(2):
        saved = get_optimizer_state_dict(task.net, opt)
    assert same_bits(before, weights(task)) and same_bits(rho, opt.rho)
    assert same_bits(nu, [n.detach() for n in getattr(opt.radius, "nu", [])])
    assert all(p.grad is None for p in task.net.parameters())
    assert counters(opt) == (0, 0)
    carried = saved["param_groups"][0]["lets_kernels"]
    averages = {path: value for path, value in carried.items() if "optimizer.state" in path and "step" not in path}
    assert bool(averages) == (method != "sam") and not any(map(bool, averages.values()))
    assert bool(saved["state"]) == (base != "sgd")
    if base == "sgd" and method in ("sam", "lets-sam"):  # nothing there is that this could have changed
        untouched = Task(torch.float32, steps=2)
        other = build(method, base, untouched.net)
        for each, optimizer in ((task, opt), (untouched, other)):
            each.run(optimizer, learned=optimizer.radius.learns)
        assert same_bits(snapshot(opt), snapshot(other))


@pytest.mark.parametrize("nu", ["lets-sam", "nu-by-sgd"])
def test_the_state_of_the_optimizer_of_nu_is_there_from_the_beginning_and_changes_nothing(backend, nu):
    """As if it were made at the first step: zeros, no step counted."""
    ends = []
    for late in (False, True):
        task = Task(torch.float32, steps=3)
        cls, radius, _ = METHODS[nu](0.1)
        opt = cls(task.net.parameters(), torch.optim.SGD, radius, backend=backend.name, lr=0.1)
        state = radius.optimizer.state
        assert all(not bool(t.any()) for t in state[radius.nu[0]].values())
        assert set(state[radius.nu[0]]) == (
            {"momentum_buffer"} if nu == "nu-by-sgd" else {"step", "exp_avg", "exp_avg_sq"}
        )
        if late:
            state.clear()
        task.run(opt, learned=True)
        ends.append(snapshot(opt))
    assert same_bits(*ends)


@pytest.mark.parametrize("metric", ["squared_gap", "gap"])
def test_the_step_that_waits_is_dropped_and_nothing_else(tmp_path, metric):
    """Under reuse_train_gradient; as a run goes on whose waiting step is forgotten."""

    def make(net, rho):
        radius = secant(rho, reuse_train_gradient=True, metric=metric)
        return lk.LETSSAM(net.parameters(), torch.optim.SGD, radius, lr=0.1, momentum=0.9)

    task = Task(torch.float32, steps=6)
    opt = make(task.net, 0.1)
    task.run(opt, task.batches[:3], learned=True)
    assert opt.radius.waits
    saved = {"model": get_model_state_dict(task.net), "optim": get_optimizer_state_dict(task.net, opt)}
    assert not any("pending" in path for path in saved["optim"]["param_groups"][0]["lets_kernels"])
    dcp.save(saved, checkpoint_id=tmp_path)
    other = Task(torch.float32, steps=6, net=Task(torch.float32, seed=9).net)
    resumed = make(other.net, 0.7)
    other.run(resumed, other.batches[:1], learned=True)  # has one of its own, which goes with other weights
    assert resumed.radius.waits
    state = {"model": get_model_state_dict(other.net), "optim": get_optimizer_state_dict(other.net, resumed)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(other.net, state["model"])
    set_optimizer_state_dict(other.net, resumed, state["optim"])
    assert not resumed.radius.waits and same_bits(resumed.rho, opt.rho)
    opt.radius._pending = None
    rho = resumed.rho
    for each, optimizer in ((task, opt), (other, resumed)):
        each.run(optimizer, each.batches[3:4], learned=True)
    assert same_bits(resumed.rho, rho)
    for each, optimizer in ((task, opt), (other, resumed)):
        each.run(optimizer, each.batches[4:], learned=True)
    assert same_bits(snapshot(opt), snapshot(resumed))
    assert not same_bits(resumed.rho, rho)


def test_the_entry_beside_the_groups_wins_over_the_numbers_in_them():
    task, opt = ran("lets-sam", "momentum")
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0]["lets_kernels"]["radius.nu.0"] = torch.tensor(5.0)
    _, other = fresh("lets-sam", "momentum", task)
    other.load_state_dict(state)
    assert same_bits(other.rho, opt.rho)


def test_the_bare_base_optimizer_takes_such_a_state_and_steps_by_it():
    task, opt = ran("lets-sam", "adamw")
    state = copy.deepcopy(opt.state_dict())
    ends = []
    for given in (state, copy.deepcopy(opt.base_optimizer.state_dict())):
        net = copy.deepcopy(task.net)
        bare = torch.optim.AdamW(net.parameters(), lr=0.5)
        bare.load_state_dict(given)
        Task(torch.float32, net=net).closure(task.batches[3][0])()
        bare.step()
        ends.append(weights(net))
    assert same_bits(*ends)


def test_numbers_of_another_radius_are_refused_and_nothing_is_loaded():
    """Two radii into one, one into two, a learned one into a fixed one: named, and all as before."""
    states = {}
    for method in ("sam", "lets-sam", "lets-asam-per-group"):
        task, opt = ran(method, "momentum", steps=1)
        states[method] = get_optimizer_state_dict(task.net, opt)
    for saved, taker, named in (
        ("lets-asam-per-group", "lets-sam", "has .*radius.nu.1"),
        ("lets-sam", "lets-asam-per-group", "lacks .*radius.nu.1"),
        ("lets-sam", "sam", "has .*radius.nu.0"),
        ("sam", "lets-sam", "lacks .*radius.nu.0"),
    ):
        task, opt = ran(taker, "momentum", steps=1)
        before = [t.clone() for t in snapshot(opt)]
        carried = states[saved]["param_groups"][0]["lets_kernels"]
        state = {k: v for k, v in copy.deepcopy(opt.state_dict()).items() if k != "lets_kernels"}
        state["param_groups"][0] |= {"lets_kernels": carried, "lr": 7.0}
        with pytest.raises(ValueError, match=named):
            opt.load_state_dict(state)
        assert same_bits(before, snapshot(opt)) and opt.param_groups[0]["lr"] != 7.0
