"""The Triton backend's operators, steps and refusals in its interpreter; run by test_triton.py, in another process."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import lets_kernels as lk
from lets_kernels.ops import triton as ops
from support import refusals
from support.given_gradients import Toy, snapshot
from support.guard_bands import DTYPES, same_bits
from support.lengths import at_length
from support.op_arguments import RUNS, SHAPES, WRITES, arguments, overload, registered

#: Of opcheck's parts those of every run, and for a second call of each operator: what is written, and the shapes.
ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
CHECKS, AGAIN = at_length((ALL, ALL), (ALL[:3], (ALL[0], ALL[2])))


def operator(op):
    return getattr(torch.ops.lets_kernels_triton, op).default


def tensors(*values):
    return [t for t in tree_leaves(values) if torch.is_tensor(t)]


# ---- the operators


def test_every_registered_operator_is_one_of_these():
    assert registered("lets_kernels_triton") == set(WRITES)


@pytest.mark.parametrize("op", WRITES)
def test_schemas_are_those_of_the_compiled_ops(op):
    assert str(operator(op)._schema).replace("lets_kernels_triton::", "lets_kernels::") == str(overload(op)._schema)


@pytest.mark.parametrize("op, dtype", [(op, DTYPES[i % 4]) for i, op in enumerate(WRITES)])
def test_opcheck(op, dtype):
    torch.library.opcheck(operator(op), arguments(op, dtype), test_utils=CHECKS)


@pytest.mark.parametrize("op", WRITES)
def test_opcheck_without_what_may_be_left_out(op):
    torch.library.opcheck(operator(op), arguments(op, torch.float32, whole=False), test_utils=AGAIN)


@pytest.mark.parametrize("op", WRITES)
def test_fakes(op):
    given = arguments(op, torch.float32)
    with FakeTensorMode() as mode:
        result = operator(op)(*tree_map_only(torch.Tensor, mode.from_tensor, given))
    if op in SHAPES:
        assert result.shape == SHAPES[op] and result.dtype == torch.float64
    else:
        assert result is None


@pytest.mark.parametrize("op", WRITES)
def test_in_a_graph_an_op_is_its_operator_and_gives_the_same_bits(op):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    given = arguments(op, torch.float32)
    expected = copy.deepcopy(given)
    result = torch.compile(getattr(ops, op), fullgraph=True, backend=keep)(*given)
    assert [n.target for n in graphs[0].graph.nodes if n.op == "call_function"] == [operator(op)]
    assert same_bits(tensors(result, given), tensors(getattr(ops, op)(*expected), expected))


# ---- whole steps


@pytest.mark.parametrize(
    "method, options",
    [
        (lk.SAM, {"rho": 0.5, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
        (lk.ASAM, {"rho": 0.5, "filterwise": True, "lr": 0.1, "flatten": True}),
    ],
)
def test_sgd_steps_are_those_of_the_reference(method, options):
    """Elementwise the same operations in the same order; the norm is summed in another one, which float64 forgives."""
    ends = []
    for backend in ("triton", "reference"):
        toy = Toy(torch.float64)
        opt = method(toy.params, torch.optim.SGD, backend=backend, **options)
        assert opt.backend == backend
        toy.steps(opt, 3)
        ends.append(snapshot(opt))
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_non_finite_gradient_skips_the_whole_step(value):
    toy = Toy()
    opt = lk.SAM(toy.params, torch.optim.AdamW, backend="triton", lr=0.1)
    toy.steps(opt, 1)
    before = snapshot(opt)
    bad = toy.grads(50)
    bad[3].view(-1)[17] = value
    toy.two_steps(opt, bad, toy.grads(51))
    toy.two_steps(opt, toy.grads(52), bad)
    assert same_bits(snapshot(opt), before) and opt.metrics()["skipped_steps"].item() == 2


# ---- what is refused


@pytest.mark.parametrize("op", sorted(set(WRITES) - {"all_finite_"}))
def test_a_table_that_does_not_fit_is_refused_before_anything_is_written(op):
    where = [a.name for a in operator(op)._schema.arguments].index("table")
    longer = torch.zeros(len(RUNS), 5, dtype=torch.int64)
    longer[2, 1] = 1  # where T = 1: no filter to divide
    for change in (lambda t: t + longer, lambda t: t[:-1].contiguous(), lambda t: t.int(), lambda t: t[:, :4].clone()):
        given = list(arguments(op, torch.float32))
        given[where] = change(given[where])
        before = copy.deepcopy(given)
        with pytest.raises(RuntimeError, match=r"\w"):
            getattr(ops, op)(*given)
        assert same_bits(tensors(given), tensors(before))


@pytest.mark.parametrize("op, name, wrong", refusals.cases())
def test_a_wrong_argument_is_refused_before_anything_is_written(op, name, wrong):
    refusals.check(ops, op, name, wrong)


def test_shares_positions_and_filter_lengths_that_mean_nothing_are_refused():
    v, out, draw = torch.ones(16), torch.zeros(16), (torch.tensor([1, 2]), 0)
    table = torch.tensor([[0, 16, -1, 0, 0]])
    for share in (0.0, -0.5, 1.0001, float("nan"), float("inf")):
        with pytest.raises(RuntimeError, match="share"):
            ops.masked_([out], [v], None, table, *draw, share)
    between = torch.tensor([[2, 16, -1, 0, 0]])  # its first two elements would share a draw with nobody
    with pytest.raises(RuntimeError, match="four"):
        ops.noise_([out], [], [], between, None, *draw, 0.0, 1.0)
    with pytest.raises(RuntimeError, match="row 0"):
        ops.grad_norm([v], [], torch.tensor([[0, 16, -3, 0, 0]]), None, 0.0, 2.0)
    assert not out.any()


def test_lists_of_mixed_dtypes_tensors_with_holes_and_filters_that_do_not_divide_are_refused():
    table = torch.tensor([[0, 4, -1, 0, 0], [16, 4, -1, 0, 0]])
    for bad in ([torch.ones(4), torch.ones(4).double()], [torch.ones(4), torch.ones(8)[::2]]):
        with pytest.raises(RuntimeError, match=r"vectors\[1\]"):
            ops.grad_norm(bad, [], table, None, 0.0, 2.0)
    with pytest.raises(RuntimeError, match="row"):
        ops.filter_norms([torch.ones(16)], torch.tensor([[0, 16, 9, 2, 0]]), torch.zeros(2))
    with pytest.raises(RuntimeError, match="at least 1"):
        ops.grad_norm([torch.ones(4)], [], table[:1], None, 0.0, 0.5)
    with pytest.raises(RuntimeError, match="interpreter"):
        ops.grad_norm([torch.ones(4, device="meta")], [], table[:1], None, 0.0, 2.0)


def test_filter_norms_that_do_not_suit_are_refused():
    table, weights = torch.tensor([[0, 16, 4, 4, 3]]), torch.ones(16)
    for bad in (torch.ones(6), torch.ones(7).double(), torch.ones(14)[::2]):
        with pytest.raises(RuntimeError, match="filter"):
            ops.grad_norm([weights], [], table, bad, 0.0, 2.0)
        with pytest.raises(RuntimeError, match="filter"):
            ops.filter_norms([weights], table, bad)
    with pytest.raises(RuntimeError, match="filter_norms must be given"):
        ops.grad_norm([weights], [], table, None, 0.0, 2.0)
    with pytest.raises(RuntimeError, match="params must be given"):
        ops.grad_norm([weights], [], torch.tensor([[0, 16, 0, 0, 0]]), None, 0.0, 2.0)
