"""The layout of 512 ranks, one after the other in this process: every element counts once, wherever it lies."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lets_kernels as lk
from lets_kernels.space.shards import groups_of
from support.inside import space, work
from support.lengths import at_length

WORLD = 512
#: Of ranks that are all asked, one after the other: how many share the rows, and the columns.
ROWS, COLUMNS = at_length(64, 16), 8


class Wide(nn.Module):
    """Some parameters with fewer rows than there are ranks, some with more, some that no number of ranks divides."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 1030, 1)
        self.few = nn.Conv2d(2, 3, 2)
        self.up = nn.ConvTranspose2d(70, 5, 2)
        self.wide = nn.Linear(6, 1040)
        self.back = nn.Linear(1040, 6)
        self.gain = nn.Parameter(torch.ones(7))
        for p in self.parameters():  # each element says which it is
            p.data = torch.arange(p.numel(), dtype=torch.float32).reshape(p.shape)


def mesh_of(*sizes):
    """A mesh whose dimensions are called after the rank: torch keeps what it knows of a mesh by the names of those."""
    from torch.distributed.device_mesh import init_device_mesh

    names = tuple(f"{place} seen from {dist.get_rank()}" for place in range(len(sizes)))
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    return [mesh, *(mesh[name] for name in names)]


def fsdp(net):
    from torch.distributed.fsdp import fully_shard

    fully_shard(net, mesh=mesh_of(WORLD)[0])


def hsdp(net):
    from torch.distributed.fsdp import fully_shard

    fully_shard(net, mesh=mesh_of(8, 64)[0])


def tp_fsdp(net):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    _, data, tensor = mesh_of(ROWS, COLUMNS)
    parallelize_module(net, tensor, {"wide": ColwiseParallel(), "back": RowwiseParallel()}, src_data_rank=None)
    conv = distribute_tensor(net.conv.weight.detach(), tensor, [Shard(1)], src_data_rank=None)
    net.conv.weight = nn.Parameter(conv)
    fully_shard(net, mesh=data)


@contextmanager
def as_rank(rank, world=WORLD):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_rank(rank, share, world=WORLD):
    """What the optimizer of one rank finds, by parameter: its elements, parts, filters, and how many share those."""
    with as_rank(rank, world):
        net, found = Wide(), {}
        share(net)
        opt = lk.ASAM(net.parameters(), torch.optim.SGD, lr=0.1, filterwise=True, model=net)
        names = {id(p): name for name, p in net.named_parameters()}
        for b in space(opt).buckets:
            for i, (p, memory) in enumerate(zip(b.params, b.memory, strict=True)):
                place = b._filters_of.get(i, slice(0, 0))
                sharing = [dist.get_world_size(g) for g, places in b._split_filters.items() if place in places]
                found[names[id(p)]] = memory.flatten().long(), b.parts, place.stop - place.start, sharing
        assert work(opt).setting.replicas.groups == [None]  # one collective over all ranks
        return found


@pytest.mark.parametrize("share, parts", [(fsdp, 512), (hsdp, 64)])
@pytest.mark.parametrize("rank", [0, 1, 63, 64, 346, 347, 511])
def test_a_rank_holds_its_rows(share, parts, rank):
    """Of n rows in k parts the j-th has those from j·⌈n/k⌉ on; every element counts once for each part."""
    found = on_rank(rank, share)
    filters = {"conv.weight": 0, "few.weight": 0, "up.weight": 1}
    for name, p in Wide().named_parameters():
        rows = -(-len(p) // parts)
        mine = p[rows * (rank % parts) :][:rows]
        elements, counted, count, sharing = found[name]
        assert torch.equal(elements, mine.detach().flatten().long())
        assert counted == parts
        assert count == (mine.shape[filters[name]] if name in filters else 0)
        assert sharing == ([parts] if name == "up.weight" else [])


def test_in_two_dimensions_every_element_counts_once():
    """64 × 8 ranks, sharded and tensor-parallel (16 × 8 but at length): over all each element's share comes to one."""
    world = ROWS * COLUMNS
    whole = {name: p.numel() for name, p in Wide().named_parameters()}
    times = {name: torch.zeros(numel, dtype=torch.int64) for name, numel in whole.items()}
    filters = dict.fromkeys(whole, 0)
    for rank in range(world):
        for name, (elements, counted, count, sharing) in on_rank(rank, tp_fsdp, world).items():
            times[name] += counted * torch.bincount(elements, minlength=whole[name])
            filters[name] += count
            assert sharing == ({"conv.weight": [COLUMNS], "up.weight": [ROWS]}.get(name, []) if count else [])
    for name, each in times.items():
        assert torch.equal(each, torch.full_like(each, world)), name
    # Every rank that holds a part of a filter has a row for it, and those of few, which are whole, 8 copies.
    expected = {"conv.weight": 1030 * COLUMNS, "few.weight": 3 * COLUMNS, "up.weight": 5 * world}
    assert {name: n for name, n in filters.items() if n} == expected


def spread_over(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(torch.ones(512), mesh, [Shard(0)] * mesh.ndim, src_data_rank=None)


def test_a_mesh_over_some_of_the_ranks_takes_one_collective_a_dimension():
    from torch.distributed.device_mesh import init_device_mesh

    with as_rank(37):
        mesh = init_device_mesh("cpu", (2, 8, 32), mesh_dim_names=("models", "data", "tensor"))
        params = [spread_over(mesh["data", "tensor"]), spread_over(mesh["tensor"]), torch.ones(3)]
        assert [dist.get_world_size(group) for group in groups_of(params)] == [8, 32]
        assert groups_of([torch.ones(3)]) is None
        with pytest.raises(ValueError, match="process_group="):
            groups_of([spread_over(mesh["data"]), spread_over(mesh["tensor"])])
