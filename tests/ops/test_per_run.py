"""Numbers that differ by run: parameters of several param groups are one call of an op."""

import pytest
import torch

from lets_kernels.ops.declared import OPS
from support.guard_bands import DTYPES, same_bits
from support.op_arguments import RUNS, arguments

pytestmark = [pytest.mark.ops, pytest.mark.own, pytest.mark.pairwise]
WITH_NUMBERS = [op for op in OPS if any(a.kind in ("PerRun", "Radii") for a in op.arguments)]
LISTS = ("Tensors", "MaybeTensors", "Steps")
BY_RUN = pytest.mark.parametrize("op", WITH_NUMBERS, ids=lambda op: op.name)


def spread(op, given, every=1, only=None):
    """The arguments with numbers that differ, from one run to the next or every so many runs: down, since a beta is
    less than 1. All numbers, or the only one of a name.
    """
    found = list(given)
    for place, (argument, value) in enumerate(zip(op.arguments, given, strict=True)):
        if only not in (None, argument.name):
            continue
        factors = [1 - 0.25 * (i // every) / len(RUNS) for i in range(len(RUNS))]
        if argument.kind == "PerRun":
            found[place] = [value * factor for factor in factors]
        if argument.kind == "Radii":
            found[place] = value * torch.tensor(factors, dtype=torch.float64)
    return found


def of_run(op, given, i):
    """The arguments of a call for one run alone, as far as they are not written; the flags are its own."""
    found = list(given)
    for place, (argument, value) in enumerate(zip(op.arguments, given, strict=True)):
        if argument.kind == "Table":
            found[place] = value[[i]]
        elif argument.kind in LISTS and len(value):
            found[place] = [value[i]]
        elif argument.kind == "PerRun":
            found[place] = value[i] if isinstance(value, list) else value
        elif argument.kind == "Radii":
            found[place] = value[i].clone() if value.dim() else value
        elif argument.name == "dirty":
            found[place] = value.clone()
    return found


def written(op, given):
    """What a call has written, but for its flag."""
    found = [x for a, x in zip(op.arguments, given, strict=True) if a.written and a.name != "dirty"]
    return [t for x in found for t in (x if isinstance(x, list) else [x])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("every", [1, 3], ids=["each-its-own", "in-threes"])
@BY_RUN
def test_every_run_goes_by_its_own_numbers(backend, op, every, dtype):
    """As if it were called alone. What is added up is added up in another order: float64 sums of a few terms."""
    together = spread(op, arguments(op.name, dtype), every)
    one_by_one = spread(op, arguments(op.name, dtype), every)
    sums = [getattr(backend, op.name)(*of_run(op, one_by_one, i)) for i in range(len(RUNS))]
    returned = getattr(backend, op.name)(*together)
    assert same_bits(written(op, together), written(op, one_by_one))
    assert all(bool(t.isfinite().all()) for t in written(op, together))
    if op.shape is not None:
        torch.testing.assert_close(returned, torch.stack(sums).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "op, name",
    [(op, a.name) for op in WITH_NUMBERS for a in op.arguments if a.kind in ("PerRun", "Radii")],
    ids=lambda x: getattr(x, "name", x),
)
def test_one_of_the_numbers_may_differ_where_the_others_do_not(backend, op, name):
    together, one_by_one = (spread(op, arguments(op.name, torch.float64), 3, name) for _ in range(2))
    sums = [getattr(backend, op.name)(*of_run(op, one_by_one, i)) for i in range(len(RUNS))]
    returned = getattr(backend, op.name)(*together)
    assert same_bits(written(op, together), written(op, one_by_one))
    if op.shape is not None:
        torch.testing.assert_close(returned, torch.stack(sums).sum(), rtol=1e-12, atol=0)


@BY_RUN
def test_one_number_and_as_many_of_it_as_runs_are_the_same(backend, op):
    given, several = arguments(op.name, torch.float32), list(arguments(op.name, torch.float32))
    for place, argument in enumerate(op.arguments):
        if argument.kind == "PerRun":
            several[place] = [several[place]] * len(RUNS)
        if argument.kind == "Radii":
            several[place] = several[place].expand(len(RUNS)).contiguous()
    results = [getattr(backend, op.name)(*each) for each in (given, several)]
    assert op.shape is None or same_bits(results[:1], results[1:])
    assert same_bits(written(op, given), written(op, several))


@BY_RUN
def test_as_many_numbers_as_there_are_no_runs_are_refused(backend, op):
    for place, argument in enumerate(op.arguments):
        if argument.kind not in ("PerRun", "Radii"):
            continue
        given = list(arguments(op.name, torch.float32))
        given[place] = [0.1] * 2 if argument.kind == "PerRun" else torch.ones(2, dtype=torch.float64)
        with pytest.raises(RuntimeError, match=r"row|run"):
            getattr(backend, op.name)(*given)
