"""Packed lists (ops.native.pack): the same bits as lists, and an error where they were packed for something else."""

import weakref

import pytest
import torch

from lets_kernels.ops import native
from support import emulated
from support.guard_bands import DTYPES, LAYOUTS, Bucket, guarded, same_bits

KERNELS = {"cpu": native, "emulated": emulated}
ANCHOR = torch.zeros((), dtype=torch.int64)


def scalar(x):
    return guarded(torch.tensor(x, dtype=torch.float64))


def a_step(ops, dtype, packed):
    """Every op once, on lists or packed lists of the same values; all that it wrote or returned."""
    bucket = Bucket(LAYOUTS["several"], dtype, "mixed")
    theta, g, m, v, h = (bucket.give(bucket.values(), "list") for _ in range(5))
    v = [x.abs_() for x in v]
    steps = [guarded(torch.zeros(())) for _ in bucket.runs]
    saved, dirty, norms = bucket.give(None, "flat")[0], guarded(torch.zeros((), dtype=torch.int64)), bucket.norms()
    table, gate = bucket.table, scalar(1.0)
    form = (lambda x: native.pack(x, ANCHOR)) if packed else (lambda x: x)
    assert not packed or [t.dtype for t in form(theta)] == [torch.int64] * 2
    ops.filter_norms(form(theta), table, norms)
    scaling = (norms, 0.01, 2.0)
    returned = [
        ops.grad_norm(form(g), form(theta), table, *scaling),
        ops.rho_grad_diagonal(form(g), form(m), form(h), form(v), form(theta), table, *scaling),
        ops.rho_grad_secant(form(g), [], form(h), form(m), table),
    ]
    ops.perturb_(form(theta), form(g), saved, dirty, table, *scaling, returned[0], scalar(0.5))
    ops.restore_(form(theta), saved, dirty, table)
    ops.perturb_(form(theta), form(g), saved, dirty, table, *scaling, returned[0], scalar(0.5))
    ops.restore_sgd_(form(theta), form(g), form(m), saved, dirty, table, gate, 0.1, 0.9, 0.01, True, False)
    adam = (0.1, 0.9, 0.999, 1e-8, 0.01, True, False)
    ops.restore_adamw_(form(theta), form(g), form(m), form(v), form(steps), saved, dirty, table, gate, *adam)
    vectors_of(ops, form, bucket, gate, norms, returned, saved, (theta, g, m, v, h))
    fresh = form(h), form(g), form(m), form(v), saved, dirty, table, gate
    ops.restore_bsam_(*fresh, 0.1, 0.9, 0.01)
    bucket.assert_guards()
    return [*returned, norms, dirty, *steps, *(x for one in (theta, m, v, h) for x in bucket.read(one))]


def vectors_of(ops, form, bucket, gate, norms, returned, saved, lists):
    """The ops on vectors; sums go to `returned`, the rest is written to h, of which a mask tells more."""
    theta, g, m, v, h = lists
    table, random, updates = bucket.table, guarded(torch.tensor([9, 8])), guarded(torch.tensor(1))
    mask, threshold = guarded(torch.zeros(bucket.total, dtype=torch.uint8)), guarded(torch.tensor(0x3F000000 << 32))
    coefficients = guarded(torch.tensor([0.3, -0.7], dtype=torch.float64))
    returned.append(ops.dots(form(g), form(m), table))
    returned.append(ops.displacement_dots(form(g), form(theta), saved, table))
    ops.combine_(form(h), form(g), form(m), table, coefficients, gate)
    returned.append(ops.average_(form(m), form(g), form(h), updates, table, gate, 0.9, 1.0, -0.5))
    ops.posterior_ascent_(form(h), form([x.add_(0.1) for x in v]), form(g), table, gate, 0.9, 0.1)
    returned.append(ops.noise_(form(h), form(g), [], table, norms, random, 1, 1.0, 0.1))
    returned.append(ops.noise_(form(h), [], form(v), table, None, random, 1, 1.0, 0.1))
    returned.append(ops.count_above(form(h), mask, table, threshold, random, 2, 0))
    ops.select_(mask, form(h), table, threshold, random, 2, 0, 1)
    returned.append(ops.masked_(form(theta), form(h), mask, table, random, 0, 0.5))
    returned += [mask, ops.largest(form(h), table)]
    returned.append(ops.peaks_(form(g), form(h), table, returned[-1]))
    returned += bucket.read(g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernels", KERNELS)
def test_packed_lists_give_the_bits_of_lists(kernels, dtype):
    ops = KERNELS[kernels]
    assert same_bits(a_step(ops, dtype, packed=True), a_step(ops, dtype, packed=False))


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
