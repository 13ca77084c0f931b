"""Sums over whole parameters, however a mesh of ranks shares them out: four ranks, and layouts at 512."""

import functools

import pytest
import torch
from torch import nn

from support.ddp_training import by_parts
from support.mesh_draws import drawn, noise
from support.sharded_training import FAMILY, Net, assert_close, batch, build, joined, shard, train, whole
from support.spawned_ranks import Calls, outcomes, result, spawn

WORLD = 4
# As in test_fsdp.py: other orders of the same float64 sums, amplified by a few steps.
BOUND = 1e-10


def mesh_of(*sizes):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=("outer", "middle", "inner")[-len(sizes) :])


class GatheredConv2d(nn.Conv2d):
    """A convolution whose weight is a DTensor with filters cut over ranks; it runs on the whole of it."""

    def forward(self, x):
        weight = self.weight
        return self._conv_forward(x, weight.full_tensor() if hasattr(weight, "full_tensor") else weight, self.bias)


def tensor_parallel(net, mesh):
    """The last layers by columns and by rows, the first one's filters by input channels; the second stays plain."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parallelize_module(net, mesh, {"head": ColwiseParallel(), "out": RowwiseParallel()}, src_data_rank=None)
    net.stem.__class__ = GatheredConv2d
    stem = distribute_tensor(net.stem.weight.detach(), mesh, [Shard(1)], src_data_rank=None)
    net.stem.weight = nn.Parameter(stem)
    return net


def tensor_parallel_and_sharded(net):
    mesh = mesh_of(2, 2)
    tensor_parallel(net, mesh["inner"])
    return shard(net, mesh=mesh["middle"])


def mixed(net):
    """Some layers cut along one dimension of the mesh and the others along the other, none along both."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = mesh_of(2, 2)
    plan = {"head": ColwiseParallel(), "out": RowwiseParallel()}
    parallelize_module(net, mesh["inner"], plan, src_data_rank=None)
    for layer in (net.stem, net.up):
        fully_shard(layer, mesh=mesh["middle"])
    return net


#: name: (what shares a net out, the ranks that see the batches of their own)
LAYOUTS = {
    "ddp": (nn.parallel.DistributedDataParallel, (0, 1, 2, 3)),
    "fsdp": (shard, (0, 1, 2, 3)),
    "fsdp-to-two": (functools.partial(shard, reshard_after_forward=2), (0, 1, 2, 3)),
    "hsdp": (lambda net: shard(net, mesh=mesh_of(2, 2)), (0, 1, 2, 3)),
    "tp": (lambda net: tensor_parallel(net, mesh_of(4)), (0, 0, 0, 0)),
    "tp-fsdp": (tensor_parallel_and_sharded, (0, 0, 1, 1)),
    "half": (lambda net: shard(net, mesh=mesh_of(2, 2)["inner"]), (0, 1, 0, 1)),
}
METHODS = ("secant", "diagonal", "algorithm1")
# Of every step: Σ|Tg|^q, the second gradient's, and what the radius learns from (a sum, two losses, ν). Algorithm 1's
# direction has a norm of its own. Filters that ranks share take one more, before, for each group that shares them.
# The other methods, where it matters how a part of a net is shared out.
SPREAD = ("fsdp", "hsdp", "tp", "tp-fsdp")
OTHERS = ("looksam-per-tensor", "aesam", "gsam", "friendly", "fisher-sam", "sparse-interval", "esam-tensor", "p-1")
PAIRS = [
    *(("tp-fsdp", method) for method in OTHERS),
    *(("tp", method) for method in ("looksam-per-tensor", "esam-tensor", "p-1")),
    *(("hsdp", method) for method in ("friendly", "sparse-interval")),
]
#: Those that draw for single elements: one of each kind, the masks where parts differ the most.
COPIES = [
    *((layout, method) for layout in (*SPREAD[1:], "mixed") for method in ("rsam", "random-sam", "esam", "bsam")),
    *((layout, "sparse-dynamic") for layout in ("tp-fsdp", "mixed")),
]
RUNS = [*((layout, method) for layout in LAYOUTS for method in METHODS), *PAIRS]
SUMS = {"secant": [1, 1, 4], "diagonal": [1, 1, 4], "algorithm1": [1, 1, 1, 4]}
FILTERS = {"fsdp": [3], "fsdp-to-two": [3], "hsdp": [3], "tp": [5], "half": [3], "tp-fsdp": [3, 3]}


def steps_on(rank, layout, method):
    share, ranks = LAYOUTS[layout]
    net = Net()
    model = share(net)
    opt = build(net, model, method)
    with Calls() as calls:
        train(opt, model, lambda step: batch(ranks[rank], step), steps=3, evaluate=True)
    return whole(opt), calls.sizes


class Sequence(nn.Sequential):
    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            super().__init__(nn.LayerNorm(6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6))
            for layer in (self[0], self[4]):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
        self.double()


def tokens(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2)]


def zeroed_in_place(rank):
    """The gradients of a step, DTensors all of them, are zeroed in their memory before the radius learns from them."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    found = []
    for set_to_none in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 6, bias=False)).double()
        parallelize_module(net, mesh_of(4), {"0": ColwiseParallel(), "2": RowwiseParallel()})
        opt = build(net, method="secant")

        def closure(which=0):
            opt.zero_grad()
            x, y = tokens(which)
            loss = (net(x) - y).square().mean()
            loss.backward()
            return loss

        closure()
        opt.first_step(zero_grad=True)
        closure()
        opt.second_step()
        opt.zero_grad(set_to_none)
        opt.radius_step(closure, lambda: closure(1))
        found.append(whole(opt))
    return found


def sequence_parallel(rank, base):
    """Each rank normalises a token of its own: the gradients of those layers are partial sums."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    net = Sequence()
    plan = {
        "0": SequenceParallel(sequence_dim=0, use_local_output=False),
        "1": ColwiseParallel(input_layouts=Shard(0)),
        "3": RowwiseParallel(output_layouts=Shard(0), use_local_output=False),
        "4": SequenceParallel(sequence_dim=0),
    }
    parallelize_module(net, mesh_of(4), plan)
    opt = build(net, method="asam", base=base)

    def passes(x):
        y = net(x[rank : rank + 1])
        return y.full_tensor()

    train(opt, passes, tokens, steps=3)
    kinds = {str(p.placements) for p in net.parameters()}
    return whole(opt), kinds


def cases(rank):
    found = {" ".join(pair): functools.partial(steps_on, rank, *pair) for pair in RUNS}
    for layout, method in COPIES:
        share, own = LAYOUTS.get(layout, (mixed, (0, 0, 0, 0)))
        found[f"{layout} {method}"] = functools.partial(drawn(share, layout == "mixed"), rank, own, method)
    for layout in SPREAD:
        found[f"noise {layout}"] = functools.partial(noise, LAYOUTS[layout][0])
    found["zeroed"] = functools.partial(zeroed_in_place, rank)
    for base in ("momentum", "rmsprop"):
        found[f"sequence {base}"] = functools.partial(sequence_parallel, rank, base)
    return outcomes(found)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return spawn(cases, WORLD, tmp_path_factory.mktemp("mesh"))


@functools.cache
def alone(batches, method):
    net = Net()
    opt = by_parts(build(net, method=method), batches)
    train(opt, net, lambda step: joined(step, batches), steps=3)
    return whole(opt)


@pytest.mark.parametrize(("layout", "method"), RUNS)
def test_a_mesh_steps_as_one_process_does(ranks, layout, method):
    """Global gradient norm, ∂F/∂ρ, radius, weights and state; on every rank, to the bit the same."""
    expected = alone(max(LAYOUTS[layout][1]) + 1, method)
    found = [result(each, f"{layout} {method}")[0] for each in ranks]
    if method not in (*FAMILY, "p-1"):
        assert {"grad_norm", "rho_grad"} <= expected.keys()
        assert float(expected["rho_grad"]) != 0
    for each in found:
        assert_close(each, expected, BOUND)
        assert_close(each, found[0], 0.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pass_takes_one_small_collective(ranks, layout, method):
    """And one for each group of ranks that holds filters together, of as many numbers as filters."""
    filters = FILTERS.get(layout, []) if method != "secant" else []
    for each in ranks:
        sizes = result(each, f"{layout} {method}")[1]
        once = sizes[: len(sizes) // 3]
        assert sizes == once * 3
        assert len(once) == len(filters) + len(SUMS[method])
        assert once[len(filters) :] == SUMS[method] and all(n <= f for n, f in zip(once, filters, strict=False))


def test_gradients_zeroed_after_the_step_are_not_what_the_radius_sees(ranks):
    for each in ranks:
        kept, zeroed = result(each, "zeroed")
        assert_close(zeroed, kept, 0.0)


@pytest.mark.parametrize("base", ["momentum", "rmsprop"])
def test_partial_gradients_are_summed_before_they_are_used(ranks, base):
    net = Sequence()
    opt = build(net, method="asam", base=base)
    train(opt, net, tokens, steps=3)
    for each in ranks:
        found, kinds = result(each, f"sequence {base}")
        assert_close(found, whole(opt), BOUND)
        assert len(kinds) == 3


@pytest.mark.parametrize(("layout", "method"), COPIES)
def test_ranks_that_hold_the_same_draw_the_same(ranks, layout, method):
    """Copies of a part, and of what is not cut at all, stay the same to the bit; masks keep their share to one."""
    first, *others = [result(each, f"{layout} {method}") for each in ranks]
    for each in others:
        assert_close(each, first, 0.0)
    assert all(torch.isfinite(value).all() for value in first.values())
    if method == "sparse-dynamic":
        masks = torch.cat([value.flatten() for name, value in first.items() if name.startswith("mask")])
        assert masks.unique().tolist() == [0, 1] and masks.sum() == round(0.5 * len(masks))


@pytest.mark.parametrize("layout", SPREAD)
def test_no_part_of_a_tensor_repeats_the_noise_of_another(ranks, layout):
    """Numbers of 24 bits among a thousand: two that agree to 1e-12 have come from the same place of the stream."""
    for each in ranks:
        found, scales = result(each, f"noise {layout}")
        apart = found.sort().values.diff()
        assert apart.min() > 1e-12
        # Σ n² of d normal numbers is d, give or take some times the root of 2d.
        assert abs(found.square().sum() * len(found) / 0.3**2 - len(found)) < 4 * (2 * len(found)) ** 0.5
        assert torch.equal(found, result(ranks[0], f"noise {layout}")[0])
        for name, p in Net().named_parameters():
            if p.dim() == 1:  # the whole vector's norm, though ranks hold parts of it; its root, as printed
                torch.testing.assert_close(scales[name], p.detach().norm()[None].sqrt(), rtol=1e-12, atol=0)
