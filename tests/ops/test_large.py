"""More than 2^31 elements, for real: flat buffers that the system need not back with memory until they are touched."""

import mmap
import platform

import pytest
import torch

from support.backends import Backend
from support.guard_bands import guarded, same_bits

PAST = 2**31
pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="MAP_NORESERVE as Linux has it")
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def sparse(numel, dtype):
    """Zeros that take no memory before they are written. A refusal is an error: the promise could not be tested."""
    size = numel * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    return torch.frombuffer(memory, dtype=dtype)


def scalar(x):
    return guarded(torch.tensor(x, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["reference", "cpu", "emulated"])
def test_runs_that_start_past_2_31_elements(name, dtype):
    """Every op, on runs of which two lie where 32 bits do not reach: the bits of the same runs in small buffers."""
    backend = Backend(name)
    numels, starts = (1000, 37, 70_000), (0, PAST - 48, PAST + 4096)

    def results(ops, starts, make):
        kinds = ((-1, 0), (0, 0), (7, 10))  # T = 1; |theta| + xi; of ten filters
        table = torch.tensor([(s, n, *kind, 0) for s, n, kind in zip(starts, numels, kinds, strict=True)])
        size = starts[-1] + numels[-1]
        generator = torch.Generator().manual_seed(5)

        def buffer():
            flat = make(size, dtype=dtype)
            for start, numel in zip(starts, numels, strict=True):
                flat[start : start + numel] = torch.randn(numel, generator=generator)
            return flat

        theta, g, m, v, saved = (buffer() for _ in range(5))
        for start, numel in zip(starts, numels, strict=True):
            v[start : start + numel].abs_()
        norms = torch.zeros(10)
        dirty, gate = guarded(torch.tensor(0)), scalar(1.0)
        ops.filter_norms([theta], table, norms)
        scaling = norms, 0.01, 2.0
        sums = [
            ops.grad_norm([g], [theta], table, *scaling),
            ops.rho_grad_diagonal([g], [m], [v], [g], [theta], table, *scaling),
            ops.rho_grad_secant([g], [m], [v], [theta], table),
        ]
        written = []

        def look():
            for flat in (theta, m, v, saved):
                written.extend(flat[s : s + n].clone() for s, n in zip(starts, numels, strict=True))

        ops.perturb_([theta], [g], saved, dirty, table, *scaling, scalar(3.0), scalar(0.5))
        look()
        ops.restore_([theta], saved, dirty, table)
        look()
        ops.restore_sgd_([theta], [g], [m], saved, dirty, table, gate, 0.1, 0.9, 0.01, False, False)
        look()
        steps = [guarded(torch.zeros(())) for _ in numels]
        adam = 0.1, 0.9, 0.999, 1e-8, 0.01, True, False
        ops.restore_adamw_([theta], [g], [m], [v], steps, saved, dirty, table, gate, *adam)
        look()
        return sums, norms, written

    far = results(backend, starts, sparse)
    near = results(backend, (0, 1008, 1056), torch.zeros)
    for a, b in ((far[0], near[0]), ([far[1]], [near[1]]), (far[2], near[2])):
        assert same_bits(a, b)
    assert all(bool(x.isfinite().all()) for x in far[2]) and not same_bits(far[2][0], far[2][-12])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["reference", "cpu", "emulated"])
def test_vectors_and_masks_past_2_31_elements(name, dtype):
    """The ops on vectors, whose random numbers belong to the positions: the bits of tensors of their own that the same
    table describes. Masks have one form only."""
    ops, spans = Backend(name), [(0, 1000), (PAST - 48, PAST - 11), (PAST + 4096, PAST + 74_096)]
    table = torch.tensor([(start, end - start, -1, 0, 0) for start, end in spans])

    def inside(argument):
        return [t.clone() for t in argument] if len(argument) > 1 else [argument[0][a:b].clone() for a, b in spans]

    def results(form):
        generator = torch.Generator().manual_seed(6)

        def make():
            values = [torch.randn(b - a, generator=generator).to(dtype) for a, b in spans]
            if form == "list":
                return values
            flat = sparse(spans[-1][1], dtype)
            for (a, b), value in zip(spans, values, strict=True):
                flat[a:b] = value
            return [flat]

        x, y, out, s = (make() for _ in range(4))
        for i, (a, b) in enumerate(spans):
            (s[i] if form == "list" else s[0][a:b]).abs_().add_(0.1)
        mask = sparse(spans[-1][1], torch.uint8)
        random, updates = guarded(torch.tensor([1, 2])), guarded(torch.tensor(1))
        coefficients, gate = guarded(torch.tensor([0.5, -0.25], dtype=torch.float64)), scalar(1.0)
        threshold = guarded(torch.tensor(0x3F000000 << 32))
        found = [ops.dots(x, y, table), ops.largest(x, table)]
        ops.combine_(out, x, y, table, coefficients, gate)
        found += [*inside(out), ops.average_(y, x, out, updates, table, gate, 0.9, 1.0, -0.5), *inside(out)]
        ops.posterior_ascent_(out, s, y, table, gate, 0.9, 0.1)
        found += [*inside(out), ops.noise_(out, x, s, table, None, random, 5, 0.5, 0.1), *inside(out)]
        ops.select_(mask, x, table, threshold, random, 5, -1, 1)
        found += [*inside([mask]), ops.count_above(x, mask, table, threshold, random, 5, 1)]
        for given in (mask, None):
            found += [ops.masked_(out, x, given, table, random, 5, 0.5), *inside(out)]
        found += [ops.peaks_(out, x, table, found[1]), *inside(out), *inside(y), *inside(s)]
        saved = sparse(spans[-1][1], dtype)  # flat in either form
        for a, b in spans:
            saved[a:b] = torch.randn(b - a, generator=generator)
        return [*found, ops.displacement_dots(x, y, saved, table)]

    flat, lists = results("flat"), results("list")
    assert same_bits(flat, lists)
    assert all(bool(x.isfinite().all()) for x in flat) and 1000 < sum(int(m.sum()) for m in flat[11:14]) < 71_000


def test_one_run_of_more_than_2_31_elements(threads):
    """What only reads, over 4 GiB of zeros with a few numbers among them: none is missed, none is counted twice."""
    threads(2)
    backend = Backend("cpu")
    numel = PAST + 2**17 + 4
    x = sparse(numel, torch.bfloat16)
    where = [0, 65_535, 65_536, PAST - 1, PAST, PAST + 1, numel - 1]
    for power, i in enumerate(where):
        x[i] = 2.0**power
    squares = sum(4.0**power for power in range(len(where)))
    table = torch.tensor([[0, numel, -1, 0, 0]])
    assert backend.grad_norm([x], [], table, None, 0.0, 2.0).item() == squares
    # Two filters, the second of which begins in the middle, at 2^30 + 65,538 elements.
    table = torch.tensor([[0, numel, numel // 2, 2, 0]])
    norms = torch.full((4,), torch.nan)
    backend.filter_norms([x], table, norms[1:3])
    first = sum(4.0**power for power in range(3))
    expected = torch.tensor([torch.nan, first**0.5, (squares - first) ** 0.5, torch.nan])
    torch.testing.assert_close(norms, expected, rtol=2**-23, atol=0, equal_nan=True)
