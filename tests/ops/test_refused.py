"""Tables and lists that make no sense: the compiled ops refuse them before they read or write through them.

The fuzzer (tests/sanitize/fuzz.cpp) looks for more of the kind.
"""

import pytest
import torch

from lets_kernels.ops import native
from support import emulated
from support.guard_bands import guarded, same_bits

pytestmark = pytest.mark.parametrize("kernels", ["cpu", "emulated"])
FAR = 2**63 - 16

TABLES = {
    "start-plus-numel-overflows": ([[FAR, 32, -1, 0, 0]], "row 0 is not valid"),
    "numel-beyond-memory": ([[0, 8, -1, 0, 0], [16, 2**62, -1, 0, 0]], "row 1 is not valid"),
    "first-filter-overflows": ([[0, 8, 4, 2, FAR]], "filters of row 0"),
    "filters-of-an-empty-run-overflow": ([[0, 0, 2**62, 4, 0]], "filters of row 0"),
    "sum-of-many-rows-overflows": ([[0, 2**56, -1, 0, 0]] * 200, "more elements"),
    "beyond-the-buffer": ([[0, 8, -1, 0, 0], [2**40, 8, -1, 0, 0]], "number of elements"),
}


@pytest.fixture
def ops(kernels):
    return {"cpu": native, "emulated": emulated}[kernels]


@pytest.mark.parametrize("case", TABLES)
def test_a_table_that_leads_out_of_the_buffers_is_refused(ops, case):
    rows, match = TABLES[case]
    table = torch.tensor(rows, dtype=torch.int64)
    theta, saved, norms = (guarded(torch.ones(64)) for _ in range(3))
    dirty = guarded(torch.ones((), dtype=torch.int64))
    with pytest.raises(RuntimeError, match=match):
        ops.grad_norm([theta], [], table, norms, 0.0, 2.0)
    with pytest.raises(RuntimeError, match=match):
        ops.restore_([theta], saved, dirty, table)
    if rows[0][2] > 0:
        with pytest.raises(RuntimeError, match=match):
            ops.filter_norms([theta], table, norms)
    assert same_bits([theta, saved, norms], [torch.ones(64)] * 3) and dirty.item() == 1


def test_a_list_that_an_op_needs_may_not_be_empty(ops):
    table = torch.tensor([[0, 8, -1, 0, 0]])
    theta, saved, number = guarded(torch.ones(8)), guarded(torch.ones(16)), torch.ones((), dtype=torch.float64)
    dirty = guarded(torch.ones((), dtype=torch.int64))
    calls = {
        "vectors": lambda: ops.grad_norm([], [theta], table, None, 0.0, 2.0),
        "grads": lambda: ops.restore_sgd_([theta], [], [], saved, dirty, table, number, 0.1, 0.0, 0.0, False, False),
        "perturbed": lambda: ops.rho_grad_secant([theta], [], [], [theta], table),
        "params": lambda: ops.restore_([], saved, dirty, table),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{name} is empty; pass one tensor for each row"):
            call()
    assert same_bits(theta, torch.ones(8)) and dirty.item() == 1


@pytest.mark.parametrize("momentum", [0.9, [0.9, 0.0], 0.0, [0.0, 0.9]], ids=str)
def test_momenta_go_with_a_momentum_in_every_run(ops, momentum):
    table = torch.tensor([[0, 8, -1, 0, 0], [16, 8, -1, 0, 0]])
    theta, g, m = ([guarded(torch.full((8,), x)) for _ in range(2)] for x in (1.0, 2.0, 3.0))
    saved, dirty = guarded(torch.ones(24)), guarded(torch.ones((), dtype=torch.int64))
    given, gate = [] if momentum in (0.9, [0.0, 0.9]) else m, torch.ones((), dtype=torch.float64)
    with pytest.raises(RuntimeError, match="momenta go with a momentum that is not zero"):
        ops.restore_sgd_(theta, g, given, saved, dirty, table, gate, 0.1, momentum, 0.0, False, False)
    assert same_bits(theta + m, [torch.ones(8)] * 2 + [torch.full((8,), 3.0)] * 2) and dirty.item() == 1


def test_packed_step_counts_of_no_runs(ops):
    """A packed list is a list, also where there is nothing in it."""
    table, number = torch.empty(0, 5, dtype=torch.int64), torch.ones((), dtype=torch.float64)
    flag = torch.zeros((), dtype=torch.int64)
    packed = [native.pack([torch.zeros(())] * 4, flag)[0][:3], flag]
    adam = 0.1, 0.9, 0.999, 1e-8, 0.0, True, False
    ops.restore_adamw_([], [], [], [], packed, torch.empty(0), flag, table, number, *adam)
