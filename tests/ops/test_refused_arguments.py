"""Arguments of a wrong dtype, size, count or layout: every compiled op refuses each of them, and writes nothing."""

import pytest
import torch

from lets_kernels.ops import native
from support import emulated, refusals
from support.guard_bands import guarded, same_bits
from support.op_arguments import WRITES, arguments, overload

KERNELS = {"cpu": native, "emulated": emulated}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("op, name, wrong", refusals.cases())
def test_a_wrong_argument_is_refused_before_anything_is_written(kernels, op, name, wrong):
    refusals.check(KERNELS[kernels], op, name, wrong)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("share", [0.0, -0.5, 1.0001, float("nan"), float("inf")])
def test_a_share_that_is_no_probability_is_refused(kernels, share):
    """With a mask nobody asks for the share."""
    out, v, table = guarded(torch.zeros(16)), guarded(torch.ones(16)), torch.tensor([[0, 16, -1, 0, 0]])
    random, mask = torch.tensor([1, 2]), torch.ones(16, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="share"):
        KERNELS[kernels].masked_([out], [v], None, table, random, 0, share)
    assert same_bits(out, torch.zeros(16))
    KERNELS[kernels].masked_([out], [v], mask, table, random, 0, share)
    assert same_bits(out, v)


@pytest.mark.parametrize("kernels", KERNELS)
def test_filter_lengths_below_those_with_a_meaning_are_refused(kernels):
    v, table = guarded(torch.ones(16)), torch.tensor([[0, 16, -3, 0, 0]])
    with pytest.raises(RuntimeError, match="row 0 is not valid"):
        KERNELS[kernels].grad_norm([v], [], table, None, 0.0, 2.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("op", sorted(set(WRITES) - {"all_finite_"}))
def test_tensors_on_another_device_are_refused(op):
    """One argument at a time is left on the CPU, where the others are on the GPU: but for the table, which must be."""
    if reason := native.load_cuda():
        pytest.skip(reason)

    def there(x):
        return [there(t) for t in x] if isinstance(x, list) else x.cuda() if torch.is_tensor(x) else x

    names = [a.name for a in overload(op)._schema.arguments]
    for i, name in enumerate(names):
        given = list(arguments(op, torch.float32))
        if name == "table" or not (isinstance(given[i], list) or torch.is_tensor(given[i])):
            continue
        moved = [x if k == i or names[k] == "table" else there(x) for k, x in enumerate(given)]
        if all(x is g or not torch.is_tensor(x) for x, g in zip(moved, given, strict=True)) and not any(
            isinstance(x, list) and k != i for k, x in enumerate(moved)
        ):
            continue  # nothing of it is on the GPU
        with pytest.raises((RuntimeError, NotImplementedError), match=r"\w"):
            overload(op)(*moved)
