"""The flattened parameter space on random shapes, memory orders, dtypes and gradients: what the ops rely on."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import lets_kernels
from lets_kernels.ops.memory import is_dense
from lets_kernels.parts.direction import Adaptive, Gradient
from lets_kernels.space.buckets import PADDING
from lets_kernels.space.layout import ParameterSpace
from support.guard_bands import DTYPES, same_bits

# The same examples every time, so that a red test stays red.
random_layouts = hypothesis.settings(max_examples=80, deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def tensors(draw, dtypes=DTYPES):
    """A tensor of any shape up to 4-d, its dimensions in any order in memory, with holes or without."""
    shape = draw(st.lists(st.integers(0, 6), max_size=4))
    order = draw(st.permutations(range(len(shape))))
    hole = draw(st.sampled_from([1, 1, 1, 2, 3]))
    dtype = draw(st.sampled_from(dtypes))
    return strided(shape, order, hole, dtype, draw(SEEDS))


def strided(shape, order, hole, dtype, seed):
    strides, step = [0] * len(shape), hole
    for dimension in reversed(order):
        strides[dimension] = step
        step *= max(1, shape[dimension])
    values = torch.randn(step + 1, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.as_strided(shape, strides)


@st.composite
def spaces(draw):
    """A parameter space over one or two groups of random tensors, and its parameters."""
    groups, names = [], itertools.count()
    for _ in range(draw(st.integers(1, 2))):
        params = draw(st.lists(tensors(), min_size=1, max_size=8))
        for p in params:
            p.requires_grad_(draw(st.sampled_from([True, True, True, False])))
        labels = [f"{next(names)}.{draw(st.sampled_from(['weight', 'bias']))}" for _ in params]
        adaptive = draw(st.booleans())
        groups.append({"params": params, "param_names": labels, "adaptive": adaptive, "xi": 0.01})
    direction = draw(st.sampled_from([Gradient(), Adaptive(), Adaptive(filterwise=True)]))
    flatten = draw(st.booleans())
    before = [p.detach().clone() for g in groups for p in g["params"]]
    strides = [p.stride() for g in groups for p in g["params"]]
    backend = draw(st.sampled_from(["reference", "cpu"]))
    space = ParameterSpace(groups, {}, direction.geometry, backend, flatten, direction.filter_dim)
    return space, groups, before, strides


def gradients(draw, params):
    """A gradient for some of the parameters, dense or not, in a memory order of its own or in the parameter's."""
    for p in params:
        kind = draw(st.sampled_from(["none", "same", "same", "other"]))
        if kind == "same":
            p.grad = torch.randn_like(p)
        elif kind == "other":
            order, hole = draw(st.permutations(range(p.dim()))), draw(st.sampled_from([1, 2]))
            p.grad = strided(p.shape, order, hole, p.dtype, draw(SEEDS))


@random_layouts
@hypothesis.given(spaces())
def test_runs_are_aligned_and_apart_and_cover_what_is_trained(made):
    space, groups, before, strides = made
    params = [p for g in groups for p in g["params"]]
    trained = [p for p in params if p.requires_grad]
    found = [p for b in space.buckets for p in b.params]
    assert sorted(map(id, found)) == sorted(map(id, trained)), "a parameter is missing, or there twice"
    for b in space.buckets:
        table = b.table(tuple(range(len(b.params)))).tolist()
        end, row = 0, 0
        rows = zip(b.params, b.group_of, b.places, table, strict=True)
        for p, group, place, (start, numel, length, count, first) in rows:
            assert groups[group]["params"][place] is p and p.dtype == b.dtype and numel == p.numel()
            assert start % PADDING == 0 and end <= start < end + PADDING, "a gap, or an overlap with the run before"
            end = start + numel
            if length > 0:
                assert first == row and numel % (length * count) == 0 and count in (1, *p.shape)
                row += count
        assert b.size % PADDING == 0 and end <= b.size < end + PADDING and b.saved.numel() == b.size
        assert row == b.filters == (0 if b.filter_norms is None else b.filter_norms.numel())
        if b.flat is not None:
            assert [p.data_ptr() for p in b.params if p.numel()] == [
                b.flat.data_ptr() + start * b.flat.element_size() for start, numel, *_ in table if numel
            ]
    assert same_bits([p.detach() for p in params], before), "a value changed"
    assert [p.stride() for p in params] == strides, "a stride changed"
    assert space.is_current(groups)


@random_layouts
@hypothesis.given(spaces(), st.data())
def test_runs_pair_weights_and_gradients_element_by_element(made, data):
    """In memory order, whatever the strides were; and what is written to the runs comes home."""
    space, *_ = made
    for b in space.buckets:
        gradients(data.draw, b.params)
        runs = b.gather()
        assert list(runs.indices) == [i for i, p in enumerate(b.params) if p.grad is not None]
        for i, weights, grad in zip(runs.indices, runs.params, runs.grads, strict=True):
            p = b.params[i]
            assert is_dense(weights) and is_dense(grad) and (weights.stride() == grad.stride() or not p.numel())
            assert same_bits(weights.detach(), p.detach()) and same_bits(grad, p.grad)
        with torch.no_grad():
            for weights in runs.params:
                weights.add_(1)
        expected = [w.detach().clone() for w in runs.params]
        runs.write_back()
        assert same_bits([b.params[i].detach() for i in runs.indices], expected)


@random_layouts
@hypothesis.given(
    st.lists(tensors(), min_size=1, max_size=6),
    st.sampled_from(["reference", "cpu"]),
    st.booleans(),
    st.sampled_from([Gradient(), Adaptive(), Adaptive(filterwise=True)]),
    st.data(),
)
def test_perturbed_and_restored_to_the_bit(params, backend, flatten, direction, data):
    """Through every table and list that random parameters lead to: a perturbation of length rho, then the old bits."""
    for p in params:
        p.requires_grad_()
    gradients(data.draw, params)
    before = [p.detach().clone() for p in params]
    adaptive = isinstance(direction, Adaptive)
    options = {"adaptive": True} if adaptive else {}
    opt = lets_kernels.SAM(
        params, torch.optim.SGD, rho=0.5, lr=0.0, direction=direction, backend=backend, flatten=flatten, **options
    )
    total = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params if p.grad is not None))
    with opt.perturbed():
        moved = [(p.detach().double() - q.double()).square().sum() for p, q in zip(params, before, strict=True)]
        if total > 0 and not adaptive and all(p.dtype.itemsize >= 4 for p in params):
            # Each of at most 6 * 6^4 elements of size 5 or less rounds by 2^-22 at most.
            length = math.sqrt(sum(map(float, moved)))
            assert length == pytest.approx(0.5, abs=math.sqrt(6**5) * 2**-22)
    assert same_bits([p.detach() for p in params], before)
