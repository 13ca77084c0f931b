"""Numbers and radii that differ by run, in Triton's interpreter; test_triton.py runs these in their own process."""

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves

import lets_kernels as lk
from lets_kernels.ops import triton as ops
from lets_kernels.ops.declared import OPS
from lets_kernels.ops.triton import launch
from support.given_gradients import Toy, snapshot
from support.guard_bands import DTYPES, same_bits
from support.op_arguments import RUNS, arguments

#: Bounds of the numbers of runs. Some runs have a rate, a decay or a radius of 0.
BOUNDS = {
    "xi": (0.01, 1.0), "rho": (0.0, 2.0), "lr": (0.0, 0.3), "momentum": (0.5, 0.95), "weight_decay": (0.0, 0.2),
    "beta1": (0.1, 0.95), "beta2": (0.5, 0.99), "eps": (1e-8, 0.1), "damping": (0.01, 1.0),
}  # fmt: skip
BY_RUN = {op.name: [a.name for a in op.arguments if a.kind in ("PerRun", "Radii")] for op in OPS}
BY_RUN = {name: numbers for name, numbers in BY_RUN.items() if numbers}
KINDS = {op.name: {a.name: a.kind for a in op.arguments} for op in OPS}
CASES = [(op, which) for op, numbers in BY_RUN.items() for which in (numbers, *([n] for n in numbers if numbers[1:]))]


def own(name, count=None):
    """A number for each run."""
    count = len(RUNS) if count is None else count
    return torch.linspace(*BOUNDS[name], count, dtype=torch.float64)


def by_run(op, dtype, which, scale="all"):
    """An op's arguments by name; the numbers that ``which`` names differ by run."""
    given = dict(zip(KINDS[op], arguments(op, dtype, scale=scale), strict=True))
    return given | {name: own(name) if name == "rho" else own(name).tolist() for name in which}


def of_run(op, given, i):
    """The arguments for run i alone, with its numbers; memory is shared, apart from the flag that the call would clear.

    Tensors of all runs stay as they are: flat buffers, for one.
    """

    def alone(name, x):
        if name == "table":
            return x[i : i + 1].clone()
        if name == "dirty":
            return x.clone()
        if KINDS[op][name] in ("Tensors", "MaybeTensors", "Steps") and len(x) == len(RUNS):
            return [x[i]]
        if KINDS[op][name] == "PerRun":
            return x[i] if isinstance(x, list) else x
        return x[i] if KINDS[op][name] == "Radii" and x.numel() > 1 else x

    return [alone(name, x) for name, x in given.items()]


def tensors(given):
    return [t for t in tree_leaves(given) if torch.is_tensor(t)]


@pytest.mark.parametrize(
    "op, which, dtype",
    [(op, which, DTYPES[i % 4]) for i, (op, which) in enumerate(CASES)],
    ids=[f"{op}-{'-'.join(which)}" for op, which in CASES],
)
def test_the_result_is_that_of_one_call_a_run(op, which, dtype):
    given = by_run(op, dtype, which)
    expected = copy.deepcopy(given)
    totals = [getattr(ops, op)(*of_run(op, expected, i)) for i in range(len(RUNS))]
    total = getattr(ops, op)(*given.values())
    if "dirty" in given:
        expected["dirty"].fill_(op == "perturb_")
    assert same_bits(tensors(given), tensors(expected))
    if total is not None:  # a sum in double, of the same terms in another order
        torch.testing.assert_close(total, sum(totals), rtol=1e-14, atol=0)


@pytest.mark.parametrize("op", BY_RUN)
def test_a_list_of_one_number_is_that_number(op):
    given = by_run(op, torch.float32, [])
    expected = copy.deepcopy(given)
    total = getattr(ops, op)(*expected.values())
    for name in BY_RUN[op]:
        given[name] = given[name].reshape(1) if name == "rho" else [given[name]]
    found = getattr(ops, op)(*given.values())
    assert same_bits(tensors((given, found)), tensors((expected | {"rho": given.get("rho")}, total)))


@pytest.mark.parametrize("op", ["perturb_", "restore_adamw_"])
def test_in_a_graph_they_are_the_same(op):
    torch.compiler.reset()
    given = by_run(op, torch.float32, BY_RUN[op])
    expected = copy.deepcopy(given)
    found = torch.compile(getattr(ops, op), fullgraph=True, backend="eager")(*given.values())
    assert same_bits(tensors((given, found)), tensors((expected, getattr(ops, op)(*expected.values()))))


def test_opcheck():
    given = by_run("restore_sgd_", torch.float64, BY_RUN["restore_sgd_"])
    torch.library.opcheck(torch.ops.lets_kernels_triton.restore_sgd_.default, (*given.values(),))


# ---- what is refused


def refused(op, given, message):
    before = copy.deepcopy(given)
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(*given.values())
    assert same_bits(tensors(given), tensors(before)), "something was written"


@pytest.mark.parametrize("op, name", [(op, name) for op, names in BY_RUN.items() for name in names if name != "rho"])
def test_other_counts_of_numbers_are_refused(op, name):
    for count in (0, 2, len(RUNS) - 1, len(RUNS) + 1):
        given = by_run(op, torch.float32, []) | {name: own(name, count).tolist()}
        message = f"^{name} must be one number, or one for each row of the run table, not {count}$"
        refused(op, given, message)


def test_radii_that_do_not_suit_are_refused():
    rho = own("rho")
    for bad in (rho[1:], torch.cat([rho, rho]), rho.float(), rho.repeat_interleave(2)[::2], rho[:0], rho.to("meta")):
        given = by_run("perturb_", torch.float32, []) | {"rho": bad}
        before = copy.deepcopy(given)
        with pytest.raises(RuntimeError, match=r"^rho must be a float64 tensor with one element, or one for each row"):
            ops.perturb_(*given.values())
        assert same_bits(tensors(given)[:-1], tensors(before)[:-1])


def test_momenta_go_with_the_momentum_of_every_run():
    some = [0.9] * len(RUNS)
    some[3] = 0.0
    given = by_run("restore_sgd_", torch.float32, []) | {"nesterov": False}
    refused("restore_sgd_", given | {"momentum": some}, "momenta go with a momentum that is not zero")
    refused("restore_sgd_", given | {"momentum": [0.0] * len(RUNS)}, "momenta go with")
    some = [0.0] * len(RUNS)
    some[3] = 0.9
    refused("restore_sgd_", given | {"momenta": [], "momentum": some}, "momenta go with")
    ops.restore_sgd_(*(given | {"momenta": [], "momentum": [0.0] * len(RUNS)}).values())
    assert given["dirty"] == 0


# ---- the table of numbers, and what is launched


@pytest.fixture
def uploads(monkeypatch):
    """The tables that are made, in order; nothing is remembered from the tests before."""
    made = []
    original = launch.Resident.__init__

    def init(self, rows, device):
        original(self, rows, device)
        made.append(rows)

    monkeypatch.setattr(launch, "_plans", {})
    monkeypatch.setattr(launch, "_captured", {})
    monkeypatch.setattr(launch.Resident, "__init__", init)
    return made


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are launched, in order."""
    made = []
    original = launch.Call.launch

    def counted(self, kernel, *arguments, **more):
        made.append(kernel.__name__)
        return original(self, kernel, *arguments, **more)

    monkeypatch.setattr(launch.Call, "launch", counted)
    return made


def test_only_numbers_that_differ_and_change_are_uploaded(uploads):
    given = by_run("restore_sgd_", torch.float32, ["weight_decay"])
    decays = given["weight_decay"]
    others = [x / 2 for x in decays]
    for lr, decay, fresh in (
        (0.1, decays, None),  # the table of the runs, of the chunks, and of each list beside
        (0.2, decays, 0),
        (0.3, others, 1),
        (0.1, 0.5, 0),
        (0.1, decays, 0),  # nothing is forgotten
        (others, 0.1, 1),  # the same numbers, under another name
    ):
        uploads.clear()
        ops.restore_sgd_(*(given | {"lr": lr, "weight_decay": decay}).values())
        assert len(uploads) == fresh if fresh is not None else len(uploads) > 1
    assert uploads[0].shape == (len(RUNS), 8) and uploads[0].view(torch.float64)[:, 0].tolist() == others


def test_the_tables_of_numbers_are_bounded(monkeypatch, uploads):
    monkeypatch.setattr(launch, "NUMBERS", 3)
    given = by_run("grad_norm", torch.float32, ["xi"])
    for i in range(8):
        ops.grad_norm(*(given | {"xi": [x * (i + 1) for x in given["xi"]]}).values())
    (plan,) = launch._plans.values()
    assert len(plan.numbers) == 3 and len(uploads) >= 8


def test_under_capture_known_numbers_are_kept_for_good_and_new_ones_refused(monkeypatch, uploads):
    given = by_run("grad_norm", torch.float32, ["xi"])
    before = ops.grad_norm(*given.values())
    monkeypatch.setattr(launch, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="warm-up"):
        ops.grad_norm(*(given | {"xi": [2 * x for x in given["xi"]]}).values())
    assert same_bits(ops.grad_norm(*given.values()), before)
    (plan,) = launch._plans.values()
    (numbers,) = plan.numbers.values()
    assert launch._captured[id(numbers)] is numbers
    ops.grad_norm(*(given | {"xi": 0.5}).values())  # an argument of the kernel: there is nothing to upload


@pytest.mark.parametrize("op", BY_RUN)
def test_no_more_kernels_are_launched(op, launches):
    getattr(ops, op)(*by_run(op, torch.float32, []).values())
    expected = launches.copy()
    launches.clear()
    getattr(ops, op)(*by_run(op, torch.float32, BY_RUN[op]).values())
    assert launches == expected and launches


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_steps_over_groups_are_those_of_the_reference(base, launches):
    """Elementwise the same operations in the same order; the norm is summed in another one, which float64 forgives."""
    ends, counts = [], []
    for backend, count in (("triton", 1), ("triton", 3), ("reference", 3)):
        toy = Toy(torch.float64)
        more = {"momentum": 0.9} if base is torch.optim.SGD else {}
        groups = [
            {"params": toy.params[i::count], "lr": 0.1 / (i + 1), "weight_decay": 0.1 * i, "rho": 0.5 * (i + 1)}
            for i in range(count)
        ]
        opt = lk.ASAM(groups, base, backend=backend, lr=0.1, **more)
        launches.clear()
        toy.steps(opt, 3)
        ends.append(snapshot(opt))
        counts.append(len(launches))
    assert counts[0] == counts[1] > 0 == counts[2]
    for ours, theirs in zip(*ends[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
