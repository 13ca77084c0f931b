"""Saving, copying, growing, scheduling: one optimizer, not two, and the same bits ever after."""

import copy
import functools
import io
import pickle

import pytest
import torch

import lets_kernels as lk
from support import family
from support.conv_net import Task
from support.core_methods import BASES
from support.family import FAMILY, ONE_EACH
from support.given_gradients import Toy, snapshot, weights
from support.guard_bands import same_bits
from support.inside import shares
from support.moving_radii import auto, following

METHODS = {
    "sam": lambda: (lk.SAM, 0.1, {}),
    "sam-scheduled": lambda: (lk.SAM, lk.ScheduledRadius.cosine(0.3, 0.05, 8), {}),
    "asam": lambda: (lk.ASAM, 0.5, {"filterwise": True}),
    "lets-sam": lambda: (lk.LETSSAM, lk.LearnedRadius(0.1, lr=0.05), {}),
    "lets-sam-sgd": lambda: (
        lk.LETSSAM,
        lk.LearnedRadius(0.1, curvature="secant", optimizer=torch.optim.SGD, lr=1.0, momentum=0.9),
        {},
    ),
    "lets-asam": lambda: (lk.LETSASAM, lk.LearnedRadius(0.3, direction="algorithm1", lr=0.05), {}),
    "lets-asam-reuse": lambda: (lk.LETSASAM, lk.LearnedRadius(0.3, lr=0.05, reuse_train_gradient=True), {}),
    "lets-sam-reuse-every-5": lambda: (
        lk.LETSSAM,
        lk.LearnedRadius(0.1, curvature="secant", lr=0.05, reuse_train_gradient=True, interval=5),
        {},
    ),
    "auto": lambda: (lk.SAM, auto(), {}),
    "auto-asam-per-group": lambda: (lk.ASAM, auto(per_group=True), {"groups": True}),
    "auto-gsam": lambda: (lk.GSAM, auto(), {}),
    "next": lambda: (lk.SAM, following(), {}),
    "next-diagonal-per-group": lambda: (lk.ASAM, following(0.3, "diagonal", per_group=True), {"groups": True}),
    "warmup": lambda: (lk.SAM, 0.1, {"rho_warmup": 8}),
    "lets-asam-per-group": lambda: (lk.LETSASAM, lk.LearnedRadius(0.3, lr=0.05, per_group=True), {"groups": True}),
}


#: Of the family every method, and those that keep more than others of their class.
MORE = [*ONE_EACH, "sparse-dynamic", "looksam-per-tensor"]
CASES = [(method, base) for method in METHODS for base in ("momentum", "adamw", "rmsprop")]
CASES += [(method, "adamw" if FAMILY[method].base else "momentum") for method in MORE]


def build(method, task, base, backend):
    if method in FAMILY:
        params = list(task.net.parameters())
        params = [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}]
        return family.build(method, params, base, backend=backend)
    cls, rho, options = METHODS[method]()
    params = list(task.net.parameters())
    if options.pop("groups", False):
        params = [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}]
    optimizer, _, base_options, _ = BASES[base]
    return cls(params, optimizer, rho, **options, backend=backend, **base_options)


def go_on(opt, task, batches):
    if opt.radius.learns:
        task.run(opt, batches, learned=True)
    else:
        family.run(opt, task, batches)


def continued(method, base, backend, transfer):
    """Ten steps, with `transfer` between the fifth and the sixth making the net and the optimizer that go on."""
    if method in FAMILY and backend == "reference":
        pytest.skip("what is saved does not depend on the backend")
    task = Task(torch.float32)
    opt = build(method, task, base, backend)
    go_on(opt, task, task.batches[:5])
    task, opt = transfer(task, opt)
    assert shares(opt)
    assert [p for g in opt.param_groups for p in g["params"]] == list(task.net.parameters())
    go_on(opt, task, task.batches[5:])
    own = opt.state_dict()["lets_kernels"]
    counts = [torch.as_tensor(own[name]) for name in ("step", "gradients", "skipped")]
    return [*snapshot(opt), *family.held(opt).values(), *counts]


def through_a_file(method, base, backend):
    def transfer(task, opt):
        file = io.BytesIO()
        torch.save({"net": task.net.state_dict(), "optimizer": opt.state_dict()}, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        task = Task(torch.float32, net=Task(torch.float32, seed=9).net)
        opt = build(method, task, base, backend)
        task.net.load_state_dict(state["net"])
        opt.load_state_dict(state["optimizer"])
        return task, opt

    return transfer


def by_deepcopy(task, opt):
    """Copies go on; the originals, stepping in between, must not reach into them."""
    net, copied = copy.deepcopy((task.net, opt))
    go_on(opt, task, task.batches[:1])
    return Task(torch.float32, net=net), copied


def by_pickle(task, opt):
    net, copied = pickle.loads(pickle.dumps((task.net, opt)))
    return Task(torch.float32, net=net), copied


@functools.cache
def uninterrupted(method, base, backend):
    """For the three tests below, which compare with it."""
    return continued(method, base, backend, lambda task, opt: (task, opt))


@pytest.mark.parametrize("method, base", CASES)
def test_five_steps_a_file_and_five_steps_are_ten_steps(backend, method, base):
    whole = uninterrupted(method, base, backend.name)
    resumed = continued(method, base, backend.name, through_a_file(method, base, backend.name))
    assert same_bits(whole, resumed)


@pytest.mark.parametrize("transfer", [by_deepcopy, by_pickle])
@pytest.mark.parametrize("method, base", CASES)
def test_a_copy_goes_on_as_the_original_would(backend, method, base, transfer):
    whole = uninterrupted(method, base, backend.name)
    assert same_bits(whole, continued(method, base, backend.name, transfer))


def test_going_back_to_a_saved_state_starts_from_no_old_gradient(backend):
    """The gradients in place are of weights that are no more; the steps from here are those from there, to the bit."""
    task = Task(torch.float32, steps=4)
    opt = lk.SAM(task.net.parameters(), torch.optim.SGD, rho=0.3, backend=backend.name, lr=0.1, momentum=0.9)
    task.run(opt, task.batches[:2])
    saved = copy.deepcopy((task.net.state_dict(), opt.state_dict()))
    ends = []
    for _ in range(2):
        task.run(opt, task.batches[2:])
        ends.append(snapshot(opt))
        task.net.load_state_dict(saved[0])
        opt.load_state_dict(copy.deepcopy(saved[1]))
    assert same_bits(*ends)


def test_the_state_of_the_bare_base_optimizer_can_be_loaded(backend):
    """A run that began without SAM: its momentum and its groups are taken over, the radius stays what it was."""
    toy, plain = Toy(), Toy()
    inner = torch.optim.SGD(plain.params, lr=0.05, momentum=0.9)
    plain.set_grads(plain.grads(0))
    inner.step()
    opt = lk.SAM(toy.params, torch.optim.SGD, rho=0.3, backend=backend.name, lr=0.1, momentum=0.9)
    opt.load_state_dict(inner.state_dict())
    assert opt.param_groups[0]["lr"] == 0.05 and opt.rho.item() == pytest.approx(0.3)
    for p, q in zip(toy.params, plain.params, strict=True):
        assert same_bits(opt.state[p]["momentum_buffer"], inner.state[q]["momentum_buffer"])
    toy.steps(opt, 1)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ["old_p", "e_w"])
def test_the_state_of_the_sam_in_common_use_is_loaded_without_the_weights_that_it_keeps(name, momentum):
    """It leaves the weights before the perturbation, or the perturbation, with every parameter for ever."""
    toy, theirs = Toy(), Toy()
    inner = torch.optim.SGD([{"params": theirs.params, "rho": 0.05, "adaptive": False}], lr=0.1, momentum=momentum)
    theirs.set_grads(theirs.grads(0))
    inner.step()
    bare = copy.deepcopy(inner.state_dict())
    for p in theirs.params:
        inner.state[p][name] = p.detach().clone()
    saved = inner.state_dict()
    opt = lk.SAM(toy.params, torch.optim.SGD, rho=0.3, lr=0.1, momentum=momentum)
    opt.load_state_dict(saved)
    assert opt.rho.item() == pytest.approx(0.3)
    assert opt.state_dict()["state"].keys() == bare["state"].keys()
    for own, before in zip(opt.state_dict()["state"].values(), bare["state"].values(), strict=True):
        assert own.keys() == before.keys() and all(same_bits(own[k], before[k]) for k in before)
    assert all(name in entry for entry in saved["state"].values())  # the caller's dict is as it was
    toy.steps(opt, 1)
    assert opt.fused


@pytest.mark.parametrize("base", [True, False], ids=["of-the-bare-base", "of-ours"])
def test_a_base_optimizer_may_keep_something_of_that_name(base):
    toy = Toy()
    opt = lk.SAM(toy.params, torch.optim.SGD, lr=0.1, momentum=0.9)
    toy.steps(opt, 1)
    for p in toy.params:
        opt.state[p]["old_p"] = p.detach().clone()
    saved = opt.state_dict()
    if base:
        plain = torch.optim.SGD(toy.params, lr=0.1, momentum=0.9)
        saved = {"state": saved["state"], "param_groups": plain.state_dict()["param_groups"]}
    opt.load_state_dict(saved)
    assert all("old_p" in opt.state[p] for p in toy.params)


def test_the_saved_state_is_a_torch_state_dict_with_one_more_key(backend):
    """What tools expect ("state", "param_groups") is there and is the base optimizer's own."""
    toy = Toy()
    opt = lk.LETSSAM(toy.params, torch.optim.AdamW, backend=backend.name, lr=0.1)
    toy.steps(opt, 1)
    saved, base = opt.state_dict(), opt.base_optimizer.state_dict()
    assert saved["state"].keys() == base["state"].keys() and len(saved.keys() - base.keys()) == 1
    assert saved["param_groups"][0]["params"] == base["param_groups"][0]["params"]


@pytest.mark.parametrize("name", MORE)
def test_a_state_in_the_middle_of_a_first_pass_or_after_it_is_that_of_before(name):
    """Saved after a first pass, and after a step that was given up: who resumes takes the step anew. What has counted a
    gradient that was given up has it in the saved state as well."""
    ends = []
    for resumes in (False, True):
        task = Task(torch.float32, steps=4)
        opt = build(name, task, "momentum", "auto")
        go_on(opt, task, task.batches[:2])
        with opt.first_pass():
            task.closure(task.batches[2][0])()
        opt.first_step()
        opt.restore()
        with opt.first_pass():
            task.closure(task.batches[2][0])()
        if resumes:
            state, net = copy.deepcopy(opt.state_dict()), Task(torch.float32, net=copy.deepcopy(task.net)).net
            task = Task(torch.float32, steps=4, net=net)
            opt = build(name, task, "momentum", "auto")
            opt.load_state_dict(state)
        opt.zero_grad()
        go_on(opt, task, task.batches[2:])
        ends.append(family.held(opt))
    family.assert_same(*ends)


@pytest.mark.parametrize("backend_of_resume", ["reference", "cpu"])
def test_a_state_does_not_depend_on_the_backend_that_saved_it(backend, backend_of_resume):
    toy = Toy(torch.float64)
    opt = lk.SAM(toy.params, torch.optim.AdamW, rho=0.3, backend=backend.name, lr=0.01)
    toy.steps(opt, 2)
    other = Toy(torch.float64)
    resumed = lk.SAM(other.params, torch.optim.AdamW, rho=0.9, backend=backend_of_resume, lr=0.5)
    with torch.no_grad():
        [p.copy_(q) for p, q in zip(other.params, toy.params, strict=True)]
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))  # torch.optim shares tensors that it is given
    toy.steps(opt, 2, start=2)
    other.steps(resumed, 2, start=2)
    for a, b in zip(snapshot(opt), snapshot(resumed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)  # Adam's root rounds apart


@pytest.mark.parametrize("base", ["momentum", "adamw", "rmsprop", *ONE_EACH])
def test_a_group_added_later_is_as_good_as_one_given_at_first(backend, base):
    """Over each base optimizer, and each method of the family over one."""
    name, base = (base, "momentum") if base in FAMILY else ("sam", base)
    cls, _, options, _ = BASES[base]
    if name == "bsam":
        options = {}
    ends = []
    for later in (False, True):
        toy = Toy()
        groups = [{"params": toy.params[:3]}, {"params": toy.params[3:], "rho": 0.9, "lr": 0.02}]
        given = groups[:1] if later else groups
        if name in FAMILY:
            opt = family.build(name, given, rho=0.3, backend=backend.name)
        else:
            opt = lk.SAM(given, cls, rho=0.3, adaptive=True, backend=backend.name, **options)
        if later:
            opt.add_param_group(groups[1])
        assert opt.param_groups is opt.base_optimizer.param_groups and len(opt.param_groups) == 2
        assert opt.rho.tolist() == pytest.approx([0.3, 0.9])
        toy.steps(opt, 3 if name != "sparse" or backend.name == "cpu" else 1)
        ends.append([*snapshot(opt), *family.held(opt).values()])
    assert same_bits(*ends)


@pytest.mark.parametrize("name", MORE)
def test_a_group_added_between_steps_of_any_method(name):
    """As if the first steps had been taken by an optimizer of the first group, whose state the whole one then loads."""
    toy = Toy()
    opt = family.build(name, toy.params[:3])
    toy.steps(opt, 2)
    before = weights(toy)
    opt.add_param_group({"params": toy.params[3:], "rho": 0.6})
    toy.steps(opt, 3, start=2)
    assert not any(same_bits(a, b) for a, b in zip(weights(toy), before, strict=True) if a.numel())
    found = family.held(opt)
    assert all(bool(v.double().isfinite().all()) for v in found.values())
    kept = {k.split(".", 1)[1] for k in found if k.split(".", 1)[1].startswith("lets_kernels.")}
    assert all(f"{i}.{k}" in found for k in kept for i in range(len(toy.params)))
    saved, other = copy.deepcopy(opt.state_dict()), Toy()
    resumed = family.build(name, [{"params": other.params[:3]}, {"params": other.params[3:]}])
    with torch.no_grad():
        [p.copy_(q) for p, q in zip(other.params, toy.params, strict=True)]
    resumed.load_state_dict(saved)
    toy.steps(opt, 2, start=5)
    other.steps(resumed, 2, start=5)
    family.assert_same(family.held(opt), family.held(resumed))


def test_a_group_added_between_steps_joins_the_norm(backend):
    toy = Toy(torch.float64)
    opt = lk.SAM(toy.params[:3], torch.optim.SGD, rho=0.3, backend=backend.name, lr=0.1)
    toy.steps(opt, 1)
    opt.add_param_group({"params": toy.params[3:], "rho": 0.6})
    before, grads = weights(toy), toy.grads(20)
    toy.set_grads(grads)
    total = sum(float((g**2).sum()) for g in grads) ** 0.5
    with opt.perturbed():
        for i, (p, x, g) in enumerate(zip(toy.params, before, grads, strict=True)):
            expected = x + (0.3 if i < 3 else 0.6) * g / total
            torch.testing.assert_close(p.detach(), expected, rtol=1e-14, atol=1e-15)
    assert same_bits(weights(toy), before)


def test_a_learned_radius_a_group_grows_with_the_groups(backend):
    task = Task(torch.float32, steps=3)
    params = list(task.net.parameters())
    radius = lk.LearnedRadius(0.1, per_group=True, lr=0.05)
    opt = lk.LETSSAM(params[:2], torch.optim.SGD, radius, backend=backend.name, lr=0.1)
    task.run(opt, task.batches[:1], learned=True)
    opt.add_param_group({"params": params[2:], "rho": 0.4})
    before = opt.rho.clone()
    assert before.shape == (2,) and before[1].item() == pytest.approx(0.4)
    task.run(opt, task.batches[1:], learned=True)
    assert bool((opt.rho != before).all()) and len(opt.radius.optimizer.param_groups) == 2


@pytest.mark.parametrize("change", ["data", "frozen", "channels_last", "double"])
@pytest.mark.parametrize("name", MORE)
def test_a_changed_parameter_is_noticed_by_any_method(name, change):
    """As one goes on who loads the state into a new optimizer on the changed net; or what is kept for the parameter
    lies otherwise now, and the step is refused, with the weights as they were."""
    ends, refused = [], None
    for fresh in (False, True):
        task = Task(torch.float32, steps=4)
        net, make = task.net, {"rho": 0.3, "flatten": True}
        opt = family.build(name, net, family.plainest(name), **make)
        family.run(opt, task, task.batches[:2])
        opt.zero_grad()
        saved = copy.deepcopy(opt.state_dict())
        if change == "data":
            for p in net.parameters():
                p.data = p.detach() * 0.5
        elif change == "frozen":
            net[0].weight.requires_grad_(False)
        elif change == "channels_last":
            net.to(memory_format=torch.channels_last)
        else:
            net.double()
            task.batches = [[(x.double(), y) for x, y in pair] for pair in task.batches]
        if fresh:
            opt = family.build(name, net, family.plainest(name), **make)
            opt.load_state_dict(saved)
        before = weights(task)
        try:
            family.run(opt, task, task.batches[2:])
            ends.append(weights(task))
        except ValueError as error:
            refused = None if fresh else f"{error}"
            assert same_bits(weights(task), before)
            assert any((*opt.direction.held, *opt.descent.held, name == "bsam"))
    if refused is None and change == "double" and family.plainest(name) != "sgd":
        # The base optimizer's own momentum stays in float32: four steps of 0.1 times 2^-24 of buffers below 8.
        assert all((a - b).abs().max() < 4 * 0.1 * 8 * 2**-24 for a, b in zip(*ends, strict=True))
    elif refused is None:
        assert same_bits(*ends)
    else:  # and loading it does help
        assert "another memory layout" in refused and "load" in refused and change in ("channels_last", "double")
        assert len(ends) == 1


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("change", ["data", "assign", "channels_last", "double", "frozen"])
def test_a_parameter_that_is_repointed_restrided_or_retyped_is_noticed(backend, change, flatten):
    """As a fresh optimizer on the changed net would go on (SGD without momentum has nothing else to remember)."""
    ends = []
    for fresh in (False, True):
        task = Task(torch.float32, steps=4)
        make = {"rho": 0.3, "backend": backend.name, "flatten": flatten, "filterwise": True, "lr": 0.1}
        opt = lk.ASAM(task.net.parameters(), torch.optim.SGD, **make)
        task.run(opt, task.batches[:2])
        opt.zero_grad()
        net = task.net
        if change == "data":
            for p in net.parameters():
                p.data = p.detach() * 0.5
        elif change == "assign":
            net.load_state_dict({k: v.clone() * 0.5 for k, v in net.state_dict().items()}, assign=True)
            opt.param_groups[0]["params"] = list(net.parameters())
        elif change == "channels_last":
            net.to(memory_format=torch.channels_last)
        elif change == "double":
            net.double()
            task.batches = [[(x.double(), y) for x, y in pair] for pair in task.batches]
        else:
            net[0].weight.requires_grad_(False)
        if fresh:
            opt = lk.ASAM(net.parameters(), torch.optim.SGD, **make)
        task.run(opt, task.batches[2:])
        ends.append(weights(task))
    assert same_bits(*ends)
