"""The CUDA kernels' bookkeeping, run by the emulator: many launches for one call, many chunks a block, races.

The op tests run them on every layout as well (the target "emulated" in backends.py).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lets_kernels.ops import native
from lets_kernels.ops.declared import OPS
from support import emulated
from support.guard_bands import DTYPES, Run, same_bits
from support.lengths import at_length
from support.op_arguments import RUNS, arguments, ran

TESTS = Path(__file__).resolve().parents[1]
ON_RUNS = {op.name: op for op in OPS if any(a.kind == "Table" for a in op.arguments)}
BY_RUN = {name: op for name, op in ON_RUNS.items() if any(a.kind in ("PerRun", "Radii") for a in op.arguments)}


def given(op, rows):
    """Arguments of an op on so many small runs, each with a filter of its own."""
    return arguments(op, torch.float32, runs=[Run((1 + i % 5,)) for i in range(rows)], scale="filter")


def counted(op, given):
    """What the emulated op leaves, and how many launches it takes."""
    begin = emulated.launches()
    found = ran(emulated, op, given)
    return found, emulated.launches() - begin


def assert_as_compiled(op, found, expected):
    """Bit for bit what the compiled CPU kernel leaves; a sum but for its order, of terms of both signs in double."""
    if ON_RUNS[op].shape is not None:
        assert torch.allclose(found[0], expected[0], rtol=1e-12, atol=0)
        found, expected = found[1:], expected[1:]
    assert same_bits(found, expected)


@pytest.mark.parametrize("op", ON_RUNS)
def test_rows_beyond_one_launch_go_into_the_next(op):
    """More rows than a short launch takes, as many as a long one takes, and one more."""
    few, many = emulated.rows_of_a_launch(op)
    assert 1 < few < 300 < many
    one = counted(op, given(op, 1))[1]
    for rows, launches in ((few + 1, 1), (many, 1), (many + 1, 2)):
        found, took = counted(op, given(op, rows))
        assert took - one == (launches - 1) * (2 if op == "restore_adamw_" else 1)  # the counts have a launch as well
        assert_as_compiled(op, found, ran(native, op, given(op, rows)))


def with_numbers(op, given, count):
    """The arguments with `count` numbers for each of those that may differ by run, no two alike."""
    factors = [1 - i / (2 * count) for i in range(count)]
    several = {"PerRun": lambda x: [x * f for f in factors], "Radii": lambda x: x * torch.tensor(factors).double()}
    return tuple(several.get(a.kind, lambda x: x)(x) for a, x in zip(BY_RUN[op].arguments, given, strict=True))


def alone(op, given, run):
    """Copies of the arguments for one run, with its own numbers as those for all."""
    table = next(x for a, x in zip(BY_RUN[op].arguments, given, strict=True) if a.kind == "Table")
    start, numel, *filters = table[run].tolist()

    def own(kind, x):
        if kind in ("Tensors", "MaybeTensors", "Steps"):
            return [x[run].clone()] if x else []
        if kind == "Flat":
            return x[start : start + numel].clone()
        if kind == "Table":
            return torch.tensor([[0, numel, *filters]])
        if kind in ("PerRun", "Radii"):
            return x[run]
        return x.clone() if torch.is_tensor(x) else x

    return tuple(own(a.kind, x) for a, x in zip(BY_RUN[op].arguments, given, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", BY_RUN)
def test_the_numbers_of_a_run_are_those_of_a_call_on_it_alone(op, dtype):
    runs = [run for run in RUNS if run.numel > 0]
    kinds, declared = ("plain", "all"), BY_RUN[op]
    for together in (with_numbers(op, arguments(op, dtype, runs=runs, scale=s), len(runs)) for s in kinds):
        singles = [alone(op, together, run) for run in range(len(runs))]
        if declared.shape is None:
            ran(emulated, op, together)
            for run, single in enumerate(singles):
                ran(emulated, op, single)
                for a, x, y in zip(declared.arguments, alone(op, together, run), single, strict=True):
                    assert not (torch.is_tensor(x) or isinstance(x, list)) or same_bits(x, y), (run, a.name)
            continue
        # Of a sum one run at a time has vectors that are not zero: the rest adds nothing.
        at = [a.name for a in declared.arguments].index("vectors")
        for run, single in enumerate(singles):
            others = [x if i == run else torch.zeros_like(x) for i, x in enumerate(together[at])]
            (total, *_), (own, *_) = (
                ran(emulated, op, given) for given in ((*together[:at], others, *together[at + 1 :]), single)
            )
            assert own.item() != 0 and same_bits(total, own), run


@pytest.mark.parametrize("op", BY_RUN)
def test_numbers_of_465_runs_take_no_more_launches_than_one_for_all(op):
    """As many as a ResNet-152 has parameters: more than one launch takes, and each run finds its own number."""
    rows = 465
    _, launches = counted(op, given(op, rows))
    found, took = counted(op, with_numbers(op, given(op, rows), rows))
    assert took == launches
    assert_as_compiled(op, found, ran(native, op, with_numbers(op, given(op, rows), rows)))


def test_more_chunks_than_blocks_of_a_sum():
    """1,024 blocks take 8,192 elements at a time: from 8.4 M elements on, some take a second chunk."""
    numel = 1024 * 8192 + 3 * 8192 + 5
    x = torch.ones(numel)
    x[-1] = 3.0
    table = torch.tensor([[0, numel, -1, 0, 0]])
    assert emulated.grad_norm([x], [], table, None, 0.0, 2.0).item() == numel - 1 + 9
    assert emulated.dots([x], [x], table).tolist() == [numel - 1 + 9] * 3
    assert emulated.displacement_dots([x], [x], torch.zeros(numel), table).tolist() == [numel - 1 + 9] * 3
    assert emulated.largest([x], table).item() == 3


def test_the_order_of_blocks_and_threads_changes_no_bit():
    """The emulator shuffles both; another seed gives the same bits, so nothing depends on who comes first."""
    program = (
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "import hashlib, torch\n"
        "from support import emulated\n"
        "from support.guard_bands import LAYOUTS, Bucket\n"
        "digest = hashlib.sha256()\n"
        "for scale in ('plain', 'element', 'filter'):\n"
        "    b = Bucket(LAYOUTS['several'], torch.bfloat16, scale)\n"
        "    theta, g = b.give(b.values(), 'list'), b.give(b.values(), 'list')\n"
        "    norms = b.norms()\n"
        "    emulated.filter_norms(theta, b.table, norms)\n"
        "    total = emulated.grad_norm(g, theta, b.table, norms, 0.01, 2.0)\n"
        "    saved, dirty = b.give(None, 'flat')[0], torch.zeros((), dtype=torch.int64)\n"
        "    rho = torch.tensor(0.5, dtype=torch.float64)\n"
        "    emulated.perturb_(theta, g, saved, dirty, b.table, norms, 0.01, 2.0, total, rho)\n"
        "    r = emulated.rho_grad_diagonal(g, [], theta, g, theta, b.table, norms, 0.01, 2.0)\n"
        "    out, updates, random = b.give(None, 'list'), torch.tensor(0), torch.tensor([1, 2])\n"
        "    mask, gate = torch.ones(b.total, dtype=torch.uint8), torch.ones((), dtype=torch.float64)\n"
        "    top = emulated.largest(g, b.table)\n"
        "    more = [top, emulated.dots(theta, g, b.table), emulated.peaks_(out, g, b.table, top)]\n"
        "    more += [emulated.displacement_dots(g, theta, saved, b.table)]\n"
        "    more += [emulated.average_(theta, g, out, updates, b.table, gate, .9, .5, .5), updates, *b.read(out)]\n"
        "    more += [emulated.noise_(out, g, [], b.table, norms, random, 0, 1., .1), *b.read(out)]\n"
        "    more += [emulated.masked_(out, g, None, b.table, random, 1, .5)]\n"
        "    emulated.select_(mask, g, b.table, torch.tensor(2**60), random, 2, 1, 0)\n"
        "    more += [mask, emulated.count_above([], mask, b.table, torch.tensor(2**62), random, 3, 1)]\n"
        "    for t in (norms, total, r, saved, *theta, *out, *more):\n"
        "        digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())\n"
        "print(digest.hexdigest())\n"
    )

    def digest(seed):
        environment = {**os.environ, "LETS_EMULATOR_SEED": str(seed), "OMP_NUM_THREADS": "1"}
        result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert len({digest(seed) for seed in at_length(range(5), range(2))}) == 1
