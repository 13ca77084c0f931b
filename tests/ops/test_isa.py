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

from lets_kernels.ops import native
from lets_kernels.ops.declared import OPS
from support.backends import Backend, plain
from support.guard_bands import DTYPES, LAYOUTS, Bucket, Run, assert_guards, forget_guards, same_bits
from support.op_arguments import arguments, ran


@pytest.fixture
def isas():
    """The supported instruction sets, and `_C`, whose choice is put back."""
    from lets_kernels import _C

    before = _C.cpu_isa()
    yield _C.supported_cpu_isas(), _C
    _C.use_cpu_isa(before)


def every_op(dtype):
    """What every declared op returns and leaves, with all its arguments and without those that may be left out."""
    found = []
    for op in OPS:
        for whole, scale in ((True, "all"), (False, "plain")):
            for q in (1.0, 1.5, 2.0, 3.0) if "q" in (a.name for a in op.arguments) else (2.0,):
                given = arguments(op.name, dtype, whole, LAYOUTS["several"], scale, q)
                found += ran(native, op.name, given)
    assert_guards()
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_gives_the_same_bits(isas, dtype):
    names, extension = isas
    assert names and extension.cpu_isa() in names
    results = []
    for name in names:
        extension.use_cpu_isa(name)
        assert extension.cpu_isa() == name
        results.append(every_op(dtype))
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
