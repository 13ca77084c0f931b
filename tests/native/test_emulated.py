"""The CUDA kernels' bookkeeping, run by the emulator: many launches for one call, many chunks a block, races.

The op tests run them on every layout as well (the target "emulated" in backends.py).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lets_kernels.ops import native, reference
from support import emulated, oracle
from support.guard_bands import U64, Bucket, Run, guarded, same_bits

TESTS = Path(__file__).resolve().parents[1]
FEW, MANY = 8, 352  # rows that one launch takes: kFew and kMany of csrc/cuda/batch.h


def scalar(x):
    return guarded(torch.tensor(x, dtype=torch.float64))


@pytest.mark.parametrize("rows", [FEW, FEW + 1, MANY, MANY + 1, 2 * MANY + FEW + 1])
def test_rows_beyond_one_launch_go_into_the_next(rows):
    """Every op on so many small runs, bit for bit as the compiled CPU kernels (sums: to their rounding)."""
    bucket = Bucket([Run((1 + i % 5,)) for i in range(rows)], torch.float32)
    theta, g, m, v = (bucket.values() for _ in range(4))
    v = [x.abs() for x in v]

    def run(ops):
        dirty, gate = guarded(torch.zeros((), dtype=torch.int64)), scalar(1.0)
        saved, *_ = bucket.give(None, "flat")
        params, grads = bucket.give(theta, "list"), bucket.give(g, "list")
        momenta, squares = bucket.give(m, "list"), bucket.give(v, "list")
        steps = [guarded(torch.tensor(float(i % 3))) for i in range(rows)]
        total = ops.grad_norm(grads, [], bucket.table, None, 0.0, 2.0)
        rho_grad = ops.rho_grad_secant(grads, momenta, squares, params, bucket.table)
        ops.perturb_(params, grads, saved, dirty, bucket.table, None, 0.0, 2.0, scalar(2.0), scalar(0.5))
        perturbed = bucket.read(params)
        ops.restore_sgd_(params, grads, momenta, saved, dirty, bucket.table, gate, 0.1, 0.9, 0.01, False, False)
        options = (0.1, 0.9, 0.999, 1e-8, 0.01, True, False)
        ops.restore_adamw_(params, grads, momenta, squares, steps, saved, dirty, bucket.table, gate, *options)
        return total, rho_grad, [*perturbed, *bucket.read(params), *bucket.read(momenta), *bucket.read(squares), *steps]

    total, rho_grad, tensors = run(emulated)
    total_cpu, rho_grad_cpu, tensors_cpu = run(native)
    assert same_bits(tensors, tensors_cpu)
    exact = oracle.grad_norm(g, theta, bucket.table, None, 0.0, 2.0)
    assert abs(total.item() - exact) <= bucket.total * U64 * exact
    assert total_cpu.item() == pytest.approx(total.item(), rel=bucket.total * U64)
    assert rho_grad_cpu.item() == pytest.approx(rho_grad.item(), rel=1e-12)  # terms of both signs: a few u of their sum
    bucket.assert_guards()


@pytest.mark.parametrize("rows", [FEW + 1, MANY + 1])
def test_rows_of_vectors_beyond_one_launch_go_into_the_next(rows):
    """The same for ops on vectors, against the reference; the sums are of whole numbers, so that no order matters."""
    bucket = Bucket([Run((1 + i % 5,)) for i in range(rows)], torch.float32)
    values = [[x.round() for x in bucket.values(spread=3.0)] for _ in range(3)]
    precisions = bucket.positive(0.1, 3.0)

    def run(ops):
        x, y, m = (bucket.give(v, "list") for v in values)
        s, a, b, c = (bucket.give(v, "list") for v in (precisions, None, None, None))
        gate, updates, dirty = scalar(1.0), guarded(torch.tensor(0)), guarded(torch.tensor(0))
        saved, threshold = bucket.give(None, "flat")[0], guarded(torch.tensor(0x3F800000 << 32))
        random, mask = guarded(torch.tensor([5, 6])), torch.ones(bucket.total, dtype=torch.uint8)
        coefficients = guarded(torch.tensor([0.5, -2.0], dtype=torch.float64))
        sums = [ops.dots(x, y, bucket.table), ops.largest(x, bucket.table)]
        sums.append(ops.displacement_dots(m, y, *bucket.give(values[0], "flat"), bucket.table))
        sums.append(ops.peaks_(a, x, bucket.table, sums[1]))
        sums.append(ops.average_(m, x, b, updates, bucket.table, gate, 0.9, 0.5, 0.5))
        ops.combine_(c, x, y, bucket.table, coefficients, gate)
        written = bucket.read(a) + bucket.read(b) + bucket.read(c)
        sums.append(ops.masked_(b, x, None, bucket.table, random, 1, 0.5))
        sums.append(ops.count_above(x, mask, bucket.table, threshold, random, 1, 1))
        ops.select_(mask, x, bucket.table, threshold, random, 1, 1, 0)
        ops.noise_(c, y, s, bucket.table, None, random, 2, 0.5, 0.1)
        ops.posterior_ascent_(a, s, x, bucket.table, gate, 0.9, 0.1)
        ops.restore_bsam_(x, y, m, s, saved, dirty, bucket.table, gate, 0.1, 0.9, 0.01)
        written += [t for list in (a, b, c, m, s, x) for t in bucket.read(list)]
        return [*sums, *written, mask, updates]

    assert same_bits(run(emulated), run(reference))
    bucket.assert_guards()


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

    assert digest(0) == digest(1) == digest(2)
