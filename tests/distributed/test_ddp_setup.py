"""DistributedDataParallel: what is refused before a weight moves, what ranks agree on, and copies."""

import copy
import pickle
import re

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from lets_kernels import LearnedRadius, Schedule
from support.ddp_training import batch, by_two_steps, closure, net, optimizer, replica, train
from support.family import FAMILY, ONE_PASS
from support.given_gradients import snapshot, weights
from support.guard_bands import same_bits

# ---- refused before a weight moves ---------------------------------------------------------------------------------


def own_forward(rank, setting):
    """The message of what a step raises; None if it raises nothing. The weights stay where they were."""
    model = replica(static_graph=setting == "static_graph")
    sync = setting in ("same_rng", "two forwards")
    opt = optimizer(model, sync_perturbation=sync, same_rng=setting == "same_rng")
    x, y = batch(rank, 0)
    before = weights(model)
    try:
        if setting == "static_graph":
            opt.step(closure(model, (x, y)))
        elif setting == "static_graph, two steps":
            by_two_steps(opt, closure(model, (x, y)))
        elif setting in ("no first_pass", "same_rng"):
            closure(model, (x, y))()
            opt.first_step(zero_grad=True)
        elif setting == "forward before":
            loss = cross_entropy(model(x), y)
            with opt.first_pass():
                loss.backward()
        elif setting == "evaluation inside":
            loss = cross_entropy(model(x), y)
            with opt.first_pass():
                with torch.no_grad():
                    model(x)
                loss.backward()
        elif setting == "two forwards":
            first, second = (cross_entropy(model(x), y) for _ in range(2))
            first.backward()
            opt.first_step(zero_grad=True)
            second.backward()
    except RuntimeError as error:
        message = str(error)
    else:
        message = None
    opt.restore()
    same = same_bits(before, weights(model))
    if setting != "static_graph":  # and the optimizer is as good as new
        take = by_two_steps
        train(opt, model, lambda step: batch(rank, step), 2, take=take)
    return message, same, snapshot(opt)


@pytest.mark.parametrize(
    ("setting", "way_out"),
    [
        ("static_graph", "static_graph=False, or sync_perturbation=True"),
        ("no first_pass", "with opt.first_pass():"),
        ("same_rng", "with opt.first_pass():"),
        ("forward before", "both forward and backward of the first pass belong inside"),
        ("evaluation inside", "both forward and backward of the first pass belong inside"),
        ("two forwards", "modified by an inplace operation"),
    ],
)
def test_passes_that_would_go_wrong_in_silence_raise_and_move_nothing(ranks, setting, way_out):
    (message, same, end), (other_message, other_same, other_end) = ranks.run(own_forward, setting)
    assert same
    assert other_same
    assert way_out in message
    assert way_out in other_message
    assert same_bits(end, other_end)


class Sometimes(Schedule):
    def perturbs(self, step):
        return step % 2 == 1


def refused(rank, setting):
    """The same for settings; with the radius after a step where there is nothing wrong."""
    model = replica()
    radius = LearnedRadius(0.05 * (1 + rank), reuse_train_gradient=setting == "reuse")
    before = weights(model)
    options = {
        "reuse": {"sync_perturbation": False},
        "alone with ranks of its own": {"sync_perturbation": False, "process_group": "alone"},
        "no model": {"model": None},
        "the module inside": {"model": model.module},
        "alone": {"model": None, "process_group": "alone"},
        "group": {"model": None, "process_group": dist.group.WORLD},
        "FSDP": {"sync_perturbation": False},
        "a schedule that skips steps": {"sync_perturbation": False, "schedule": Sometimes()},
    }[setting]
    if setting == "FSDP":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        options["model"] = model = fully_shard(net(), mesh=init_device_mesh("cpu", (2,)))
        before = [p.to_local() for p in weights(model)]
    try:
        opt = optimizer(model, "lets-sam", "momentum", rho=radius, **options)
        train(opt, model, lambda step: batch(rank, step), 1)
    except ValueError as error:
        now = [p.to_local() if setting == "FSDP" else p for p in weights(model)]
        return str(error), same_bits(before, now), None
    return None, None, opt.rho


@pytest.mark.parametrize(
    ("setting", "way_out"),
    [
        ("reuse", "leave one of the two out"),
        ("alone with ranks of its own", "leave 'alone' out"),
        ("no model", "process_group='alone' if each rank"),
        ("the module inside", "model=, the DistributedDataParallel module"),
        ("FSDP", "a list of closures"),
        ("a schedule that skips steps", "perturb at every step"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(ranks, setting, way_out):
    for message, same, _ in ranks.run(refused, setting):
        assert way_out in message
        assert same


def test_without_a_model_ranks_agree_on_a_radius_by_a_group_or_each_has_its_own(ranks):
    (_, _, first), (_, _, second) = ranks.run(refused, "alone")
    assert second > 1.5 * first
    (_, _, first), (_, _, second) = ranks.run(refused, "group")
    assert torch.equal(first, second)


def test_a_perturbation_a_rank_needs_ranks():
    layers = net()
    with pytest.raises(ValueError, match="list of closures, one a micro-batch"):
        optimizer(layers, sync_perturbation=False)


#: What stands against perturbing each rank along its own first gradient; the others may.
NOT_ALONE = {
    "rst": "perturb at every step",
    "late-sam": "perturb at every step",
    "looksam": "perturb at every step",
    "aesam": "perturb at every step",
    "aelooksam": "perturb at every step",
    "gsam": "combine each rank's own first gradient",
    "rgsam": "combine each rank's own first gradient",
    "stable-sam": "combine each rank's own first gradient",
    "wsam": "combine each rank's own first gradient",
    "wsam-coupled": "combine each rank's own first gradient",
    "norm-penalty": "combine each rank's own first gradient",
    **dict.fromkeys(ONE_PASS, "is about the first of two passes"),
    "friendly": "keep an average, a sum or a mask",
    "vasso": "keep an average, a sum or a mask",
    "sparse": "keep an average, a sum or a mask",
    "bsam": "keep an average, a sum or a mask",
    "lightsam": "keep an average, a sum or a mask",
}


def family_alone(rank):
    found = {}
    for method in FAMILY:
        try:
            optimizer(replica(), method, sync_perturbation=False)
            found[method] = None
        except ValueError as error:
            found[method] = str(error)
    return found


def test_methods_that_cannot_go_along_each_ranks_own_gradient_say_so(ranks):
    """Those that could were tried over many steps in test_ddp.py."""
    for found in ranks.run(family_alone):
        for method, message in found.items():
            wanted = [text for name, text in NOT_ALONE.items() if method == name or method.startswith(f"{name}-")]
            assert (message is None) is not wanted, method
            assert not wanted or wanted[0] in message, method


def frozen(rank):
    layers = net().requires_grad_(False)
    opt = optimizer(layers, model=None, process_group=dist.group.WORLD)
    opt.first_step()
    opt.second_step()
    return same_bits(weights(layers), weights(net()))


def test_a_group_of_ranks_that_have_nothing_to_train_takes_its_steps(ranks):
    assert ranks.run(frozen) == [True, True]


# ---- the first rank's radius ---------------------------------------------------------------------------------------


def disagreeing(rank, kind):
    model = replica()
    radius = LearnedRadius((0.05, 0.2)[rank], lr=0.01, curvature=kind)
    opt = optimizer(model, "lets-sam", "momentum", rho=radius)
    train(opt, model, lambda step: batch(rank, step), 1)
    first = opt.rho
    train(opt, model, lambda step: batch(rank, step), 3, start=1)
    return first, snapshot(opt)


@pytest.mark.parametrize("kind", ["secant", "diagonal"])
def test_ranks_that_begin_with_different_radii_go_on_with_the_first_ones(ranks, kind):
    """From the first learning step on; it moves log ρ by at most the learning rate of Adam."""
    (rho, end), (other, other_end) = ranks.run(disagreeing, kind)
    assert torch.equal(rho, other)
    assert abs(rho.log() - torch.tensor(0.05).log()) <= 0.0101
    assert same_bits(end, other_end)


# ---- copies --------------------------------------------------------------------------------------------------------


def copied(rank, how):
    model = replica()
    opt = optimizer(model, "lets-sam", "adam")
    train(opt, model, lambda step: batch(rank, step), 2)
    other = how(opt)
    assert other.model is not model
    assert [id(p) for p in other.model.parameters()] == [id(p) for p in other.param_groups[0]["params"]]
    for each in (opt, other):
        train(each, each.model, lambda step: batch(rank, step), 2, start=2)
    return snapshot(opt), snapshot(other)


def through_pickle(opt):
    return pickle.loads(pickle.dumps(opt))


@pytest.mark.parametrize("how", [copy.deepcopy, through_pickle])
def test_a_copy_has_a_module_of_its_own_and_trains_on_as_the_original_would(ranks, how):
    results = [state for pair in ranks.run(copied, how) for state in pair]
    assert all(same_bits(state, results[0]) for state in results)


def not_copied(rank, how, where):
    group = dist.new_group([0, 1])
    model = replica(process_group=group) if where == "module" else replica()
    opt = optimizer(model, "lets-sam", process_group=group if where == "optimizer" else None)
    train(opt, model, lambda step: batch(rank, step), 1)
    try:
        how(opt)
    except (RuntimeError, TypeError) as error:
        return str(error)
    return None


def test_a_group_of_ones_own_cannot_be_pickled_and_says_so(ranks):
    for message in ranks.run(not_copied, through_pickle, "optimizer"):
        assert "state_dict()" in message
    for message in ranks.run(not_copied, through_pickle, "module"):
        assert re.search("default process group", message)
