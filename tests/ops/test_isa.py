"""The compiled kernels on every instruction set that this machine supports, and around the caches."""

import pytest
import torch
from test_average import Ascent, Average
from test_bsam_step import bsam, step_of, written
from test_combine import combine
from test_mask import Masked
from test_noise import Noise
from test_peaks import peaks
from test_perturb import Call
from test_step import Step, check_adamw, check_sgd

from lets_kernels.ops.declared import FISHER
from support.backends import Backend, plain
from support.guard_bands import DTYPES, LAYOUTS, Bucket, Run, forget_guards, same_bits


@pytest.fixture
def isas():
    """The supported instruction sets, and `_C`, whose choice is put back."""
    from lets_kernels import _C

    before = _C.cpu_isa()
    yield _C.supported_cpu_isas(), _C
    _C.use_cpu_isa(before)


def every_op(bucket):
    """The outputs of every op on one bucket, as a flat list of tensors."""
    cpu, results = Backend("cpu"), []
    for q in (1.0, 1.5, 2.0, 3.0):
        call = Call(bucket, q)
        call.perturb(cpu)
        results += [*call.theta(), cpu.grad_norm(call.grads, call.params, bucket.table, call.norms, 0.01, q)]
        values = [bucket.give(bucket.values(), "list") for _ in range(5)]
        results.append(cpu.rho_grad_diagonal(*values, bucket.table, call.norms, 0.01, q))
    results.append(cpu.rho_grad_secant(*values[:4], bucket.table))
    out = torch.zeros_like(call.norms)
    cpu.filter_norms(call.params, bucket.table, out)
    for states, kind in ((1, "sgd"), (2, "adamw")):
        step = Step(bucket, states=states)
        getattr(step, kind)(cpu)
        results += bucket.read(step.params) + [x for buffer in step.buffers for x in bucket.read(buffer)]
    results += vector_ops(cpu, bucket)
    bucket.assert_guards()
    return [*results, out]


def vector_ops(cpu, bucket):
    """The outputs of the ops that make and compare vectors; of rows of the Fisher information too."""
    table, norms = bucket.table, bucket.norms()
    fisher = table.clone()
    fisher[:, 2] = FISHER
    random, gate = torch.tensor([2**62 + 3, 2**33 + 5]), torch.tensor(1.0, dtype=torch.float64)
    x, y, m = (bucket.give(bucket.values(), "list") for _ in range(3))
    s = bucket.give(bucket.positive(0.1, 1.0), "list")
    out, (saved,) = bucket.give(None, "list"), bucket.give(bucket.values(), "flat")
    mask, threshold = torch.zeros(bucket.total, dtype=torch.uint8), torch.tensor(0x3F000000 << 32)
    dirty, updates = torch.tensor(0), torch.tensor(0)
    results = [cpu.dots(x, y, table), cpu.largest(x, table), cpu.grad_norm(x, [], fisher, None, 0.3, 2.0)]
    results.append(cpu.displacement_dots(x, y, saved, table))
    written = []

    def made(returned=None):
        results.extend([] if returned is None else [returned])
        written.extend(bucket.read(out))

    for vectors, precisions in (([], []), (x, []), (x, s)):
        made(cpu.noise_(out, vectors, precisions, table, norms, random, 3, 0.9, 0.1))
    cpu.select_(mask, x, table, threshold, random, 4, 0, 1)
    results += [cpu.count_above(v, mask, table, threshold, random, 5, 1) for v in (x, [])]
    for own in (None, mask):
        made(cpu.masked_(out, x, own, table, random, 6, 0.4))
    for _ in range(2):
        made(cpu.average_(m, x, out, updates, table, gate, 0.9, 1.2, -0.3))
    made(cpu.combine_(out, x, y, table, torch.tensor([0.3, -1.7], dtype=torch.float64), gate))
    made(cpu.posterior_ascent_(out, s, x, table, gate, 0.9, 0.1))
    made(cpu.peaks_(out, x, table, results[1]))
    cpu.perturb_(y, [], saved, dirty, fisher, None, 0.3, 2.0, results[2], gate)
    written += bucket.read(y) + bucket.read([saved])
    cpu.restore_lion_(y, x, m, saved, dirty, table, gate, 0.1, 0.9, 0.99, 0.01)
    written += bucket.read(y) + bucket.read(m)
    cpu.restore_bsam_(y, x, m, s, saved, dirty, table, gate, 0.1, 0.9, 0.01)
    return [*results, *written, mask, *(v for one in (y, m, s) for v in bucket.read(one))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_gives_the_same_bits(isas, dtype):
    names, extension = isas
    assert names and extension.cpu_isa() in names
    results = []
    for name in names:
        extension.use_cpu_isa(name)
        assert extension.cpu_isa() == name
        results.append(every_op(Bucket(LAYOUTS["several"], dtype, "all")))
    assert all(same_bits(results[0], other) for other in results[1:])


def test_an_unknown_instruction_set_is_an_error_that_names_the_choices(isas):
    names, extension = isas
    with pytest.raises(ValueError, match=names[0]):
        extension.use_cpu_isa("z80")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_buckets_too_large_for_the_caches(dtype, threads):
    """On two threads. Above 8 MiB kernels may write around the caches, in wider pieces: odd sizes, and addresses off
    every boundary."""
    threads(2)
    size = (9 << 20) // torch.finfo(dtype).bits * 8
    bucket = Bucket([Run((size + 3,), (1, size + 3), offset=1), Run((70001,), (1, 70001), offset=5)], dtype)
    cpu = Backend("cpu")
    call = Call(bucket)
    call.perturb(cpu)
    call.check()
    cpu.restore_(call.params, call.saved, call.dirty, bucket.table)
    assert same_bits(call.theta(), call.original())
    bucket.assert_guards()
    for kind, states, check in (("sgd", 1, check_sgd), ("adamw", 2, check_adamw)):
        step = Step(bucket, states=states)
        getattr(step, kind)(cpu)
        check(step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vectors_too_large_for_the_caches(dtype, threads):
    """As above, against the reference, which is done with millions of elements sooner than the oracle."""
    size = (9 << 20) // torch.finfo(dtype).bits * 8
    results = []
    for ops, count in ((Backend("cpu"), 2), (plain(), 1)):
        threads(count)
        bucket = Bucket([Run((size + 3,), offset=1), Run((70001,), offset=5)], dtype)
        found = []
        for part in (
            lambda: written(bsam(step_of(bucket), ops)),
            lambda: Average(bucket).run(ops).written(),
            lambda: Ascent(bucket).run(ops).written(),
            lambda: combine(ops, bucket)[-1],
            lambda: Noise(bucket).run(ops).read(),
            lambda: Masked(bucket).masked(ops, 0.5)[:-1],
            lambda: Masked(bucket).masked(ops)[:-1],
            lambda: peaks(ops, bucket, bucket.values(), 1.5),
        ):
            found += part()
            forget_guards()  # they have been looked at; a look at all of them after each op takes long
        results.append(found)
    assert same_bits(*results)
