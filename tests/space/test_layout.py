"""The flattened parameter space: geometry of filters, runs, flattening, and noticing that parameters have changed."""

import pytest
import torch
from torch import nn

import lets_kernels
from lets_kernels.ops.memory import is_dense
from lets_kernels.parts.direction import Adaptive
from lets_kernels.space.layout import ParameterSpace


def space(params, direction=None, flatten=False, **group):
    direction = direction or Adaptive(filterwise=True)
    groups = [{"params": list(params), "adaptive": True, "xi": 0.01, **group}]
    return ParameterSpace(groups, {}, direction.geometry, "reference", flatten, direction.filter_dim), groups


@pytest.mark.parametrize(
    "tensor, dense",
    [
        (torch.empty(3, 4), True),
        (torch.empty(3, 4).t(), True),
        (torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.empty(3, 1, 4).as_strided((3, 1, 4), (4, 99, 1)), True),
        (torch.empty(()), True),
        (torch.empty(0, 3), True),
        (torch.empty(3, 8)[:, ::2], False),
        (torch.empty(3, 8)[:, :4], False),
        (torch.empty(1).expand(4), False),
        (torch.empty(10).as_strided((3, 3), (2, 1)), False),
    ],
)
def test_dense_means_one_stretch_without_holes_or_overlaps(tensor, dense):
    assert is_dense(tensor) is dense


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "layer, dim",
    [
        (nn.Conv1d(3, 5, 3), 0),
        (nn.Conv2d(3, 5, 3), 0),
        (nn.Conv2d(4, 4, 3, groups=4), 0),
        (nn.Conv2d(3, 1, 1), 0),
        (nn.ConvTranspose2d(3, 5, 2), 1),
        (nn.ConvTranspose2d(1, 5, 2), 1),
        (nn.ConvTranspose2d(3, 1, 2), 1),
    ],
)
def test_filters_are_what_the_table_says(layer, dim, channels_last):
    """The row of each element, found through the table, is its index along the filter dimension."""
    weight = layer.weight
    if channels_last and weight.dim() == 4:
        weight.data = weight.data.to(memory_format=torch.channels_last)
    direction = Adaptive(filterwise=True)
    direction.bind(layer)
    length, count = direction.geometry(weight, None, {"adaptive": True})
    index = torch.arange(weight.shape[dim]).view([-1 if d == dim else 1 for d in range(weight.dim())])
    along = torch.empty_like(weight, dtype=torch.int64, requires_grad=False).copy_(index.expand(weight.shape))
    in_memory = along.as_strided((weight.numel(),), (1,))
    assert count == weight.shape[dim]
    assert torch.equal(torch.arange(weight.numel()) // length % count, in_memory)


def test_biases_are_told_by_name_where_there_are_names_and_else_by_dimension():
    direction = Adaptive(scale_bias=False)
    group = {"adaptive": True}
    vector, matrix = torch.empty(3), torch.empty(3, 3)
    assert direction.geometry(vector, None, group) == (-1, 0)
    assert direction.geometry(matrix, None, group) == (0, 0)
    assert direction.geometry(vector, "norm.weight", group) == (0, 0)
    assert direction.geometry(matrix, "position", group) == (-1, 0)


def test_starts_are_padded_and_do_not_overlap():
    s, _ = space([torch.zeros(n, requires_grad=True) for n in (1, 16, 17, 0, 5)])
    (bucket,) = s.buckets
    table = bucket.table((0, 1, 2, 3, 4))
    assert table[:, 0].tolist() == [0, 16, 32, 64, 64]
    assert bucket.size == 80


def test_a_bucket_for_each_group_and_dtype_and_none_for_what_is_frozen():
    a, b = torch.zeros(3, requires_grad=True), torch.zeros(4, dtype=torch.float64, requires_grad=True)
    c, frozen = torch.zeros(2, 2, requires_grad=True), torch.zeros(5)
    s, _ = space([a, b, c, frozen])
    assert [(bucket.dtype, len(bucket.params)) for bucket in s.buckets] == [(torch.float32, 2), (torch.float64, 1)]


def retype(p):
    p.data = p.data.double()


def restride(p):
    p.data = p.data.to(memory_format=torch.channels_last)


def freeze(p):
    p.requires_grad_(False)


@pytest.mark.parametrize("change", [retype, restride, freeze])
def test_a_changed_parameter_is_noticed(change):
    p, q = torch.zeros(2, 3, 4, 4, requires_grad=True), torch.zeros(3, requires_grad=True)
    s, groups = space([p, q])
    assert s.is_current(groups)
    change(p)
    assert not s.is_current(groups)


def test_a_swapped_parameter_is_noticed():
    s, groups = space([torch.zeros(3, requires_grad=True)])
    groups[0]["params"] = [torch.zeros(3, requires_grad=True)]
    assert not s.is_current(groups)


def test_flattened_parameters_keep_values_strides_and_training():
    """After flattening, all parameters lie in one buffer; a parameter re-pointed elsewhere is taken back into one."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 2))
    net[0].to(memory_format=torch.channels_last)
    before = [(p.detach().clone(), p.stride()) for p in net.parameters()]
    opt = lets_kernels.SAM(net.parameters(), torch.optim.SGD, lr=0.0, momentum=0.9, flatten=True)
    x = torch.randn(4, 2, 6, 6)

    def closure():
        opt.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    for moved in (False, True):
        if moved:
            net[3].weight.data = net[3].weight.data.clone()
        opt.step(closure)
        storages = {p.untyped_storage().data_ptr() for p in net.parameters()}
        assert len(storages) == 1, "the parameters are not in one buffer"
    for p, (value, stride) in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert p.stride() == stride


def test_parameters_with_holes_and_gradients_of_other_strides_give_the_same_step(backend):
    """What does not lie dense in memory is copied in and out; the result is that of a dense twin.

    The twin's step is fused, the other's is SGD's own, with fused multiply-adds: a few ulp a step.
    """
    torch.manual_seed(1)
    holes = torch.randn(6, 10)[:, ::2].requires_grad_()
    twin = holes.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    target = torch.randn(6, 5)
    for p in (holes, twin):
        opt = lets_kernels.SAM([p], torch.optim.SGD, adaptive=True, rho=0.5, lr=0.1, momentum=0.9, backend=backend.name)
        for _ in range(3):

            def closure(p=p, opt=opt):
                opt.zero_grad()
                loss = (p.exp() * target).sum()
                loss.backward()
                p.grad = p.grad.t().contiguous().t()
                return loss

            opt.step(closure)
    assert not is_dense(holes)
    torch.testing.assert_close(holes, twin, rtol=3 * 4 * torch.finfo(torch.float32).eps, atol=1e-7)
