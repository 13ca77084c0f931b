"""Packed lists (ops.native.pack): the same bits as lists, and an error where they were packed for something else."""

import itertools
import weakref

import pytest
import torch
from torch.utils._pytree import tree_leaves

from lets_kernels.ops import native
from support import emulated
from support.guard_bands import DTYPES, LAYOUTS, Bucket, same_bits
from support.op_arguments import WRITES, arguments, ran

KERNELS = {"cpu": native, "emulated": emulated}
ANCHOR = torch.zeros((), dtype=torch.int64)


@pytest.mark.parametrize("op", WRITES)
@pytest.mark.parametrize("kernels", KERNELS)
def test_packed_lists_give_the_bits_of_lists(kernels, op):
    for whole, dtype in itertools.product((True, False), DTYPES):
        expected = ran(KERNELS[kernels], op, arguments(op, dtype, whole))
        given = arguments(op, dtype, whole)
        packed = [native.pack(x, ANCHOR) if isinstance(x, list) else x for x in given]
        if whole and op != "all_finite_":  # which takes a few numbers
            assert any(isinstance(x, native.Packed) for x in packed)
        returned = getattr(KERNELS[kernels], op)(*packed)
        assert same_bits([t for t in tree_leaves((returned, given)) if torch.is_tensor(t)], expected)


@pytest.mark.parametrize("kernels", KERNELS)
def test_packed_for_something_else(kernels):
    ops = KERNELS[kernels]
    bucket = Bucket(LAYOUTS["several"], torch.float32)
    g = bucket.give(bucket.values(), "list")
    packed = native.pack(g, ANCHOR)

    def norm(vectors, table=bucket.table):
        return ops.grad_norm(vectors, [], table, None, 0.0, 2.0)

    with pytest.raises(RuntimeError, match="packed for another run table"):
        norm(packed, bucket.table[:-1].contiguous())
    words = packed[0].clone()
    words[2] = 9
    with pytest.raises(RuntimeError, match="packed with an unknown dtype"):
        norm([words, ANCHOR])
    other = native.pack([x.double() for x in g], ANCHOR)
    with pytest.raises(RuntimeError, match="perturbed has another dtype than the rest"):
        ops.rho_grad_secant(g, g, other, g, bucket.table)
    with pytest.raises(RuntimeError, match="packed for another run table, or another device"):
        ops.rho_grad_secant(g, g, [packed[0][:-1], ANCHOR], g, bucket.table)


@pytest.mark.parametrize("kernels", KERNELS)
def test_only_what_was_packed_is_taken_for_packed(kernels):
    """Every other list of two int64 tensors is one of tensors with a dtype that no op takes."""
    ops = KERNELS[kernels]
    table = torch.tensor([[0, 1, -1, 0, 0], [1, 1, -1, 0, 0]])
    packed = native.pack([torch.ones(1)] * 4, ANCHOR)[0]
    for wrong in (0, 1):
        words = packed[:5].clone()
        words[wrong] += 1
        with pytest.raises(RuntimeError, match="must be float32"):
            ops.grad_norm([words, ANCHOR], [], table, None, 0.0, 2.0)
    for shape in ([words[:2], ANCHOR], [packed[::2], ANCHOR], [packed[None], ANCHOR]):
        with pytest.raises(RuntimeError, match="must be float32"):
            ops.grad_norm(shape, [], table, None, 0.0, 2.0)


def test_short_lists_stay_lists():
    assert native.pack([ANCHOR], ANCHOR) == [ANCHOR]
    assert native.pack([], ANCHOR) == []


def test_a_packed_list_keeps_its_tensors_alive():
    """Zeros in the place of a gradient belong to nobody else: their memory must live until the op has run."""
    tensors = [torch.zeros(3) for _ in range(4)]
    references = [weakref.ref(t) for t in tensors]
    packed = native.pack(tensors, ANCHOR)
    del tensors
    assert None not in [reference() for reference in references]
    del packed
    assert [reference() for reference in references] == [None] * 4
