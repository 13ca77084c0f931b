"""Parameters sharded by fully_shard: two ranks, and one process on the joined batch, take the same steps."""

import functools

import pytest
import torch
from torch.func import functional_call

from lets_kernels.around.network import Network
from support import sharded_cases
from support.ddp_training import by_parts
from support.sharded_training import (
    EVERYWHERE,
    SHARDINGS,
    Net,
    assert_close,
    batch,
    build,
    distance,
    freeze,
    joined,
    train,
    whole,
)
from support.spawned_ranks import outcomes, result, spawn

WORLD = 2
# Sums over ranks have another order than those of one process: some ulp of float64 a step, which the steps amplify,
# and AdamW most of all, where it divides a small average by the root of another.
BOUND = 1e-10

RESHARDING = ("default", "always", "kept", "set-to-keep", "kept-after-backward")
#: Where a rank holds on to weights that have moved if nobody calls reshard().
HOLDING = ("default", "kept", "set-to-keep", "kept-after-backward")
METHODS = {
    **{name: {"method": name} for name in ("sam", "asam", "filterwise", "secant", "diagonal", "algorithm1", "reuse")},
    **{name: {"method": name} for name in EVERYWHERE},
    "adamw": {"method": "filterwise", "base": "adamw"},
    "rmsprop": {"method": "filterwise", "base": "rmsprop"},
    "base-step-adamw": {"method": "base-step-sam", "base": "adamw"},
    "base-step-rmsprop": {"method": "base-step-sam", "base": "rmsprop"},
    "reference": {"method": "diagonal", "backend": "reference"},
}
LONG = {"steps": 20, "evaluate": True}
#: name: (sharding, options of the optimizer, of the training)
RUNS = {
    **{f"closure {s}": (s, {"method": "filterwise"}, LONG) for s in RESHARDING},
    **{
        f"{shape} {s}": (s, {}, {"evaluate": True, "shape": shape})
        for s in RESHARDING
        for shape in ("steps", "context")
    },
    **{f"method {m}": ("default", options, {}) for m, options in METHODS.items()},
    **{f"placed {s}": (s, {"method": "diagonal"}, {}) for s in ("second-dimension", "offloaded", "frozen")},
}


def sharded_run(rank, name):
    sharding, options, how = RUNS[name]
    net = Net()
    SHARDINGS[sharding](net)
    opt = build(net, **options)
    train(opt, net, lambda step: batch(rank, step), **how)
    return whole(opt), opt.backend, opt.fused, opt.fused_reason


def without_resharding(rank, name):
    moves, Network.weights_move = Network.weights_move, lambda self: None
    try:
        return sharded_run(rank, name)
    finally:
        Network.weights_move = moves


def in_float32(rank):
    net = Net(torch.float32)
    SHARDINGS["default"](net)
    opt = build(net, method="filterwise")
    train(opt, net, lambda step: batch(rank, step, torch.float32), **LONG)
    return whole(opt)


def mixed_precision(rank):
    net = Net(torch.float32)
    SHARDINGS["mixed-precision"](net)
    opt = build(net, method="filterwise")
    train(opt, net, lambda step: batch(rank, step, torch.float32))
    dtypes = {p.to_local().dtype for group in opt.param_groups for p in group["params"]}
    return whole(opt), dtypes


def cases(rank):
    found = {name: functools.partial(sharded_run, rank, name) for name in RUNS}
    for name in (f"closure {s}" for s in HOLDING):
        found[f"control {name}"] = functools.partial(without_resharding, rank, name)
    for case in (in_float32, mixed_precision, *sharded_cases.CASES):
        found[case.__name__] = functools.partial(case, rank)
    return outcomes(found)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return spawn(cases, WORLD, tmp_path_factory.mktemp("fsdp"))


@functools.cache
def alone(name):
    sharding, options, how = RUNS[name]
    net = Net()
    if sharding == "frozen":
        freeze(net)
    opt = by_parts(build(net, **options), WORLD)
    train(opt, net, lambda step: joined(step, WORLD), **{**how, "evaluate": False})
    return whole(opt)


@pytest.mark.parametrize("name", RUNS)
def test_ranks_step_as_one_process_does(ranks, name):
    """Weights, the base optimizer's state, radius and metrics, whole; on each rank the same to the bit."""
    first, backend, fused, reason = result(ranks[0], name)
    assert_close(first, alone(name), BOUND)
    second, *_ = result(ranks[1], name)
    assert_close(second, first, 0.0)
    options = RUNS[name][1]
    assert backend == options.get("backend", backend) and backend in ("cpu", "reference")
    assert fused == (options.get("base") != "rmsprop") and bool(reason) != fused


@pytest.mark.parametrize("name", [f"closure {s}" for s in HOLDING])
def test_without_resharding_the_check_fails(ranks, name):
    """The control: passes at weights that have moved since, hundreds of times the bound away, and without an error."""
    found, *_ = result(ranks[0], f"control {name}")
    assert distance(found, alone(name)) > 1e-3


def test_float32_stays_within_one_millionth(ranks):
    net = Net(torch.float32)
    opt = build(net, method="filterwise")
    train(opt, net, lambda step: joined(step, WORLD, torch.float32), steps=20)
    assert_close(result(ranks[0], "in_float32"), whole(opt), 1e-6)


def test_mixed_precision_leaves_the_weights_in_float32(ranks):
    """The passes are those of a bfloat16 copy of the weights, one for each rank; weights and sums are float32."""
    net = Net(torch.float32)

    def passes(x):
        copies = [{n: p.bfloat16() for n, p in net.named_parameters()} for _ in range(WORLD)]
        return torch.cat([functional_call(net, c, h.bfloat16()) for c, h in zip(copies, x.chunk(WORLD), strict=True)])

    opt = build(net, method="filterwise")
    train(opt, passes, lambda step: joined(step, WORLD, torch.float32))
    exact = Net(torch.float32)
    other = build(exact, method="filterwise")
    train(other, exact, lambda step: joined(step, WORLD, torch.float32))
    found, dtypes = result(ranks[0], "mixed_precision")
    assert dtypes == {torch.float32}
    # The same casts, and sums of two numbers: equal but for a last bit of float32, which could round one weight of a
    # later pass to the next bfloat16, 2^-8 of itself away; the gradients and learning rate here make 1e-5 of that.
    assert distance(found, whole(opt)) < 1e-5
    assert distance(found, whole(other)) > 1e-4


@pytest.mark.parametrize("pass_", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize(
    ("method", "base"), [("sam", "adamw"), ("sam", "rmsprop"), *((m, "momentum") for m in sharded_cases.KEEPING)]
)
def test_infinity_on_one_rank_skips_the_step_on_all(ranks, method, base, pass_):
    """What a finite first gradient has moved stays: averages, AE-SAM's moments, bSAM's precision, a mask."""
    counted = ("average", "schedule", "precision", "mask") if pass_ else ()
    for rank in range(WORLD):
        before, after = result(ranks[rank], "not_finite")[method, base, pass_]
        assert after.pop("skipped_steps") == before.pop("skipped_steps") + 1
        same = [k for k in before if not k.endswith("grad_norm") and not k.startswith((*counted, "gradients"))]
        assert_close({k: after[k] for k in same}, {k: before[k] for k in same}, 0.0)


@pytest.mark.parametrize("method", ["filterwise", *sharded_cases.KEEPING[:-1]])
def test_weights_come_back_to_the_bit(ranks, method):
    for rank in range(WORLD):
        before, places, between, after = result(ranks[rank], "restored")[method]
        assert len(places) == 1 + (method in ("rsam", "bsam"))
        assert all(distance(place, before) > 1e-3 for place in places)
        assert_close(between, before, 0.0)
        assert_close(after, before, 0.0)


@pytest.mark.parametrize("method", ["reuse", *sharded_cases.KEEPING])
def test_a_loaded_state_goes_on_to_the_bit(ranks, method):
    """With a step that waits to be learned from, through torch.save."""
    for rank in range(WORLD):
        uninterrupted, resumed = result(ranks[rank], "round_trip")[method]
        assert_close(resumed, uninterrupted, 0.0)


def test_a_mask_by_samples_is_that_of_one_process(ranks):
    """Each gradient is the mean over one sample a rank, on ranks and in one process."""
    net = Net()
    opt = build(net, method="sparse")
    steps = iter(range(100, 104))

    def closure():
        opt.zero_grad()
        x, y = joined(next(steps), WORLD)
        (net(x) - y).square().mean().backward()

    opt.update_mask(closure, samples=4)
    train(opt, net, lambda step: joined(step, WORLD), steps=1)
    for each in ranks:
        assert_close(result(each, "mask_of_samples"), whole(opt), BOUND)


@pytest.mark.parametrize("how", ["reset", "no-reset-in-torch"])
@pytest.mark.parametrize("sharding", ["default", "kept", "kept-after-backward"])
def test_a_pass_that_fails_leaves_no_perturbed_copy(ranks, sharding, how):
    """An exception amid the forward of the second pass; the next forward is at the weights from before the step."""
    for rank in range(WORLD):
        before, after, weights, expected = result(ranks[rank], "cut_short")[sharding, how]
        assert torch.equal(before, after)
        assert_close(weights, expected, 0.0)


def test_gradients_added_in_place_are_new(ranks):
    """FSDP adds to the local part of a gradient; the closure is then called for the second pass alone."""
    for rank in range(WORLD):
        calls, weights, expected = result(ranks[rank], "added_in_place")
        assert calls == 3
        assert_close(weights, expected, 0.0)


@pytest.mark.parametrize(
    "what, error, way_out",
    [
        ("unsynchronised", "ValueError", "with a sharded model"),
        ("flattened", "ValueError", "leave it out"),
        ("first version", "TypeError", "fully_shard"),
        ("no model", "ValueError", "need model="),
        ("partial sum", "TypeError", "redistribute"),
        ("no first pass", "RuntimeError", "call step(closure)"),
    ],
)
def test_what_is_not_supported_raises_before_a_weight_is_touched(ranks, what, error, way_out):
    for rank in range(WORLD):
        kind, message, untouched = result(ranks[rank], "refused")[what]
        assert (kind, untouched) == (error, True) and way_out in message
