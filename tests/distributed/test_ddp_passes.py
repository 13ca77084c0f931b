"""DistributedDataParallel: whatever its settings and however the passes are called, it is the same step."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.functional import cross_entropy

from support.ddp_training import KINDS, SHAPES, SYNC, VALIDATION, batch, build, net, replica, train
from support.given_gradients import snapshot
from support.guard_bands import same_bits

# ---- call shapes and gradients that lie in buckets -----------------------------------------------------------------


class Single(nn.Module):
    """One parameter, and so one bucket that it fills."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.5, 96).reshape(3, 32))

    def forward(self, x):
        return torch.tanh(x.flatten(1)) @ self.weight.t()


#: Methods that keep gradients, or make others of them where they lie; and those that move the weights for a first pass.
KEEPING = (
    "looksam",
    "looksam-per-tensor",
    "aelooksam",
    "gsam",
    "rgsam",
    "norm-penalty",
    "wsam",
    "friendly",
    "vasso",
    "bsam",
)
NETS = {"layers": net, "single": Single}


def shaped(rank, name, sync, views):
    """The end of three steps, by kind and call shape."""
    ends = {}
    for kind in [*KINDS, *(KEEPING if sync else ())]:
        if kind == "reuse" and not sync:
            continue
        for shape, take in SHAPES.items():
            model = replica(layers=NETS[name](), gradient_as_bucket_view=views)
            opt = build(model, kind, sync)
            train(opt, model, lambda step: batch(rank, step), 3, take=take)
            ends[kind, shape] = snapshot(opt)
    return ends


@pytest.mark.parametrize("sync", SYNC.values(), ids=SYNC)
@pytest.mark.parametrize("name", NETS)
def test_call_shapes_and_bucket_views_make_no_difference(ranks, name, sync):
    """To the bit: a gradient that is held is a copy, where the next pass writes into the same memory."""
    plain, other = ranks.run(shaped, name, sync, False)
    views, _ = ranks.run(shaped, name, sync, True)
    for kind, shape in plain:
        assert same_bits(plain[kind, shape], other[kind, shape]), (kind, shape, "ranks")
        assert same_bits(plain[kind, shape], plain[kind, "closure"]), (kind, shape)
        assert same_bits(views[kind, shape], plain[kind, shape]), (kind, shape, "views")


# ---- accumulation --------------------------------------------------------------------------------------------------


def accumulating(model, batches):
    """One backward a micro-batch, of which only the last is synchronised."""

    def run():
        model.zero_grad()
        losses = []
        for index, (x, y) in enumerate(batches):
            waits = index < len(batches) - 1 and isinstance(model, nn.parallel.DistributedDataParallel)
            with model.no_sync() if waits else nullcontext():
                loss = cross_entropy(model(x), y) / len(batches)
                loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    return run


def halves(ranks, step):
    return [batch(rank, step + 500 * half, torch.float64) for rank in ranks for half in (0, 1)]


def accumulated(rank, kind, sync, views):
    model = replica(torch.float64, gradient_as_bucket_view=views)
    opt = build(model, kind, sync)
    for step in range(3):
        closures = [accumulating(model, halves([rank], s)) for s in (step, step + VALIDATION)]
        opt.step(*closures[: 1 + opt.radius.learns])
    return snapshot(opt)


@pytest.mark.parametrize("views", [False, True], ids=["own-gradients", "bucket-views"])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_without_synchronisation_is_the_step_of_one_process(ranks, kind, views):
    """In float64 to rounding: `no_sync` around all micro-batches but the last, in every pass."""
    found, other = ranks.run(accumulated, kind, True, views)
    assert same_bits(found, other)
    alone = net(torch.float64)
    opt = build(alone, kind)
    for step in range(3):
        closures = [accumulating(alone, halves([0, 1], s)) for s in (step, step + VALIDATION)]
        opt.step(*closures[: 1 + opt.radius.learns])
    torch.testing.assert_close(found, snapshot(opt), rtol=1e-10, atol=1e-13)


def test_accumulation_on_ranks_that_are_perturbed_one_by_one(ranks):
    found, other = ranks.run(accumulated, "sam", False, True)
    assert same_bits(found, other)
    alone = net(torch.float64)
    opt = build(alone, "sam")
    for step in range(3):
        opt.step([accumulating(alone, halves([rank], step)) for rank in (0, 1)])
    torch.testing.assert_close(found, snapshot(opt), rtol=1e-10, atol=1e-13)


# ---- settings of DistributedDataParallel ---------------------------------------------------------------------------


def set_up(rank, kind, sync, setting):
    """The end of four steps with a communication hook, or an option."""
    options = {setting: True} if setting in ("static_graph", "find_unused_parameters") else {}
    model = replica(**options)
    if setting == "compress":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    opt = build(model, kind, sync)
    train(opt, model, lambda step: batch(rank, step), 4)
    return snapshot(opt)


@pytest.mark.parametrize("kind", ["sam", "secant"])
def test_settings_of_the_module(ranks, kind):
    """A static graph and the search for unused parameters change no bit; a compressing hook rounds, alike on all."""
    plain, _ = ranks.run(set_up, kind, True, None)
    for setting in ("static_graph", "find_unused_parameters"):
        for found in ranks.run(set_up, kind, True, setting):
            assert same_bits(found, plain), setting
    for sync in (True, False):
        found, other = ranks.run(set_up, kind, sync, "compress")
        assert same_bits(found, other)
        assert not same_bits(found, plain)
        if sync:  # gradients below 1 with 11 bits, four steps; 0.1 / (1 - 0.9) is how far each carries; twice for ĝ's ε
            torch.testing.assert_close(found[1:], plain[1:], rtol=0, atol=8 * 2**-11)


def normalised(rank, kind, sync):
    """Statistics of a batch norm that sees the inputs themselves, so that they depend on no weight."""
    model = replica(layers=nn.Sequential(nn.BatchNorm2d(2), net()))
    opt = build(model, kind, sync)
    train(opt, model, lambda step: batch(rank, step), 4)
    found = model.module[0]
    return snapshot(opt), found.running_mean, found.running_var, int(found.num_batches_tracked)


@pytest.mark.parametrize("sync", SYNC.values(), ids=SYNC)
@pytest.mark.parametrize("kind", ["sam", "secant"])
def test_running_statistics_count_a_step_once_where_buffers_are_broadcast(ranks, kind, sync):
    """Those of the first rank, which DistributedDataParallel hands out, are of its first passes and no others."""
    (state, mean, var, count), (other, *_, other_count) = ranks.run(normalised, kind, sync)
    assert same_bits(state, other)
    assert (count, other_count) == (4, 4)
    expected = nn.BatchNorm2d(2)
    for step in range(4):
        expected(batch(0, step)[0])
    torch.testing.assert_close(mean, expected.running_mean)
    torch.testing.assert_close(var, expected.running_var)


def counted(rank, kind, sync):
    """How many collectives each of three steps starts from Python; DistributedDataParallel's own are not among them."""
    model = replica()
    opt = build(model, kind, sync)
    calls, original = [], dist.all_reduce
    dist.all_reduce = lambda *args, **options: calls.append(args) or original(*args, **options)
    try:
        train(opt, model, lambda step: batch(rank, step), 3)
    finally:
        dist.all_reduce = original
    return len(calls) / 3, max(args[0].numel() for args in calls)


@pytest.mark.parametrize(
    ("kind", "sync", "count"),
    [
        *[("sam", True, 2), ("sam", False, 1), ("secant", True, 3), ("diagonal", False, 2), ("algorithm1", True, 4)],
        *((kind, True, 2) for kind in ("looksam", "aelooksam", "gsam", "norm-penalty", "fisher-sam")),
        *((kind, True, 3) for kind in ("friendly", "vasso", "stable-sam")),
    ],
)
def test_a_pass_costs_one_collective_of_a_few_numbers(ranks, kind, sync, count):
    """The first norm, the second's, and what the radius learns from (Algorithm 1 as printed needs a norm there too).
    A moving average takes in what is finite on all ranks, and its own norm is known after that. Stable SAM asks for ‖g‖
    beside the norm of the direction, which may be another one."""
    for calls, numbers in ranks.run(counted, kind, sync):
        assert calls == count
        assert numbers <= 4
