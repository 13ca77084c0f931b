"""The registered operators: torch.library.opcheck, mutation annotations, fakes, and the schema list itself."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import lets_kernels as lk
from lets_kernels.ops import native, reference
from support import emulated
from support.backends import Backend
from support.guard_bands import DTYPES, same_bits
from support.op_arguments import SHAPES, WRITES, arguments, overload, registered


def test_the_extension_is_there_and_registers_exactly_these_ops():
    assert lk.backends()["cpu"].startswith("available")
    assert registered("lets_kernels") == set(WRITES) == set(native.OPS)


@pytest.mark.parametrize("op", WRITES)
def test_every_op_is_in_both_backends_and_has_a_fake(op):
    assert callable(getattr(reference, op)) and callable(getattr(native, op))
    given = arguments(op, torch.float32)
    with FakeTensorMode() as mode:
        result = overload(op)(*tree_map_only(torch.Tensor, mode.from_tensor, given))
    if op in SHAPES:
        assert result.shape == SHAPES[op] and result.dtype == torch.float64
    else:
        assert result is None


@pytest.mark.parametrize("op", WRITES)
def test_the_schema_says_what_is_written(op):
    written = {a.name for a in overload(op)._schema.arguments if a.is_write}
    assert written == WRITES[op]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("op, dtype", [(op, DTYPES[i % 4]) for i, op in enumerate(WRITES)])
def test_opcheck(op, dtype, whole):
    """With and without what may be left out. No schema and no fake asks for a dtype, so each op has one of the four."""
    torch.library.opcheck(overload(op), arguments(op, dtype, whole))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("op", WRITES)
def test_the_cuda_kernels_write_what_their_schema_says(op, whole):
    """Through the emulator, whose library registers every op of the CUDA library, with the same schema list; fakes
    belong to the ops on the CPU and on GPUs alike, and have been checked above."""
    emulated.load()
    assert registered("lets_kernels_emulated") == set(WRITES)
    there = getattr(torch.ops.lets_kernels_emulated, op).default
    assert str(there._schema).replace("lets_kernels_emulated::", "lets_kernels::") == str(overload(op)._schema)
    torch.library.opcheck(there, arguments(op, torch.float32, whole), test_utils="test_schema")


@pytest.mark.parametrize("op", WRITES)
def test_each_op_writes_what_its_schema_says_and_nothing_else(backend, op):
    """Versions count writes; values prove them. For the reference too, which has no schema to be checked against."""
    given = arguments(op, torch.float32)
    names = [a.name for a in overload(op)._schema.arguments]
    before = [[t.clone() for t in x] if isinstance(x, list) else x.clone() if torch.is_tensor(x) else x for x in given]
    getattr(backend, op)(*given)
    changed = set()
    for name, old, new in zip(names, before, given, strict=True):
        pairs = zip(old, new, strict=True) if isinstance(old, list) else [(old, new)] if torch.is_tensor(old) else []
        if any(not same_bits(a, b) for a, b in pairs):
            changed.add(name)
    assert changed <= WRITES[op]
    assert changed >= WRITES[op] - {"dirty"}  # perturb_ leaves a 1 at 1


@pytest.mark.parametrize("op", sorted(set(WRITES) - {"all_finite_"}))
def test_a_table_that_does_not_fit_is_refused_before_anything_is_written(op):
    """The compiled ops check what they are given: never a read or a write outside of a tensor."""
    names = [a.name for a in overload(op)._schema.arguments]
    where = names.index("table")

    def wrong(change):
        given = list(arguments(op, torch.float32))
        given[where] = change(given[where].clone())
        lists = [x for x in given if isinstance(x, list)]
        before = [[t.clone() for t in x] for x in lists]
        with pytest.raises(RuntimeError, match=r"\w"):
            overload(op)(*given)
        assert all(torch.equal(a, b) for x, y in zip(before, lists, strict=True) for a, b in zip(x, y, strict=True))

    def longer(table):
        table[0, 1] += 1
        return table

    wrong(longer)
    wrong(lambda table: table[:-1].contiguous())
    wrong(lambda table: table.to(torch.int32))
    wrong(lambda table: table[:, :4].contiguous())


def test_filters_that_do_not_divide_their_run_are_refused():
    """16 elements in filters of 9: the last one would reach past the end of the tensor."""
    table = torch.tensor([[0, 16, 9, 2, 0]])
    weights, out = torch.ones(16), torch.zeros(2)
    with pytest.raises(RuntimeError, match="row"):
        native.filter_norms([weights], table, out)


def test_lists_of_mixed_dtypes_and_tensors_with_holes_are_refused():
    table = torch.tensor([[0, 4, -1, 0, 0], [16, 4, -1, 0, 0]])
    good = [torch.ones(4), torch.ones(4)]
    for bad in ([torch.ones(4), torch.ones(4).double()], [torch.ones(4), torch.ones(8)[::2]]):
        with pytest.raises(RuntimeError, match=r"vectors\[1\]"):
            native.grad_norm(bad, [], table, None, 0.0, 2.0)
    assert Backend("cpu").grad_norm(good, [], table, None, 0.0, 2.0).item() == 8.0
