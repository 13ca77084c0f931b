"""The Triton backend's tables and indices in Triton's interpreter; test_triton.py runs them in their own process."""

import itertools

import pytest
import torch
import triton.language as tl

import lets_kernels as lk
from lets_kernels.ops import triton as ops
from lets_kernels.ops.triton import device, launch, norm
from support.given_gradients import Toy
from support.guard_bands import LAYOUTS, Bucket
from support.op_arguments import scalar


@pytest.fixture
def uploads(monkeypatch):
    """The tables that are made, in order."""
    made = []
    original = launch.Resident.__init__

    def init(self, rows, device):
        original(self, rows, device)
        made.append(rows)

    monkeypatch.setattr(launch.Resident, "__init__", init)
    return made


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Nothing is remembered from the tests before."""
    monkeypatch.setattr(launch, "_plans", {})
    monkeypatch.setattr(launch, "_captured", {})


# ---- the tables


def norm_of(bucket, argument):
    return ops.grad_norm(argument, [], bucket.table, None, 0.0, 2.0).item()


def squares(values):
    return float(sum((v**2).sum() for v in values))


def test_a_steady_state_uploads_nothing(uploads):
    toy = Toy()
    opt = lk.ASAM(toy.params, torch.optim.AdamW, backend="triton", filterwise=True)
    for p in toy.params:
        p.grad = torch.randn_like(p)
    for i in range(3):
        opt.first_step()
        opt.second_step()
        assert uploads if i == 0 else not uploads
        uploads.clear()


def test_tensors_that_move_are_followed_at_once():
    bucket = Bucket(LAYOUTS["several"], torch.float64)
    first, second = bucket.values(), bucket.values()
    argument = bucket.give(first, "list")
    assert norm_of(bucket, argument) == pytest.approx(squares(first), rel=1e-14)
    for tensor, moved in zip(argument, bucket.give(second, "list"), strict=True):
        tensor.data = moved
    assert norm_of(bucket, argument) == pytest.approx(squares(second), rel=1e-14)


def test_a_packed_list_is_what_it_was_made_of():
    """Under two run tables, in ops that want dense runs and in one that wants step counts."""
    bucket = Bucket(LAYOUTS["several"], torch.float32)
    values, dirty = bucket.values(), torch.tensor(0)
    other = bucket.table.clone()
    other[:, 0] += 16
    argument = ops.pack(bucket.give(values, "list"), dirty)
    assert argument.addresses == tuple(t.data_ptr() for t in argument)
    for table in (bucket.table, other, bucket.table):
        assert ops.grad_norm(argument, [], table, None, 0.0, 2.0).item() == pytest.approx(squares(values), rel=1e-13)
    steps = [torch.tensor(float(i)) for i in range(len(bucket.runs))]
    states = [ops.pack(bucket.give(bucket.positive(0.1, 1.0), "list"), dirty) for _ in range(3)]
    saved, options = torch.zeros(bucket.total), (scalar(1.0), 0.1, 0.9, 0.99, 1e-8, 0.0, True, False)
    ops.restore_adamw_(argument, *states, ops.pack(steps, dirty), saved, dirty, bucket.table, *options)
    assert [s.item() for s in steps] == [i + 1.0 for i in range(len(bucket.runs))]


def test_memory_that_is_used_again_for_other_tensors_is_read_as_these():
    """The same addresses as float32 and float64, as runs of other lengths, as one flat buffer: each its own entry."""
    memory = torch.randn(96, dtype=torch.float64)
    table = torch.tensor([[0, 32, -1, 0, 0], [32, 64, -1, 0, 0]])
    for _ in range(2):
        for view, lengths in ((memory, (32, 64)), (memory.view(torch.float32), (64, 128)), (memory, (48, 48))):
            table[:, 1] = torch.tensor(lengths)
            table[1, 0] = lengths[0]
            parts = list(view.split(lengths))
            expected = squares([view.double()])
            assert ops.grad_norm(parts, [], table, None, 0.0, 2.0).item() == pytest.approx(expected, rel=1e-13)
            assert ops.grad_norm([view], [], table, None, 0.0, 2.0).item() == pytest.approx(expected, rel=1e-13)


def test_a_flat_buffer_and_a_tensor_at_one_address_are_two_entries():
    """Where the table has one row that does not start at zero, their elements stand 48 apart."""
    memory, table = torch.arange(96.0), torch.tensor([[48, 33, -1, 0, 0]])
    for _ in range(2):
        for argument, run in ((memory, memory[48:81]), (memory[:33], memory[:33]), (memory[:81], memory[48:81])):
            assert ops.grad_norm([argument], [], table, None, 0.0, 2.0).item() == squares([run.double()])


@pytest.mark.parametrize("kind", ["strides", "shape", "dtype"])
def test_what_another_tensor_at_the_address_was_is_not_taken_for_this_one(kind):
    """Memory that was freed comes back as a tensor of another kind; here a view begins where its base does."""
    memory, table = torch.arange(16.0), torch.tensor([[0, 8, -1, 0, 0], [8, 8, -1, 0, 0]])
    dense = {"strides": memory[:8], "shape": memory[:8].view(2, 4).t(), "dtype": memory[:8]}[kind]
    holes = {
        "strides": lambda: memory[::2],
        "shape": lambda: memory.as_strided((2, 4), dense.stride()),
        "dtype": lambda: memory[:4].view(torch.float16),
    }[kind]()
    assert dense.data_ptr() == holes.data_ptr() and dense.numel() == holes.numel()
    other = torch.ones(8)
    found = ops.grad_norm([other, dense], [], table, None, 0.0, 2.0).item()
    assert found == pytest.approx(squares([other.double(), dense.double()]), rel=1e-6)  # a float32 sum of 16 terms
    with pytest.raises(RuntimeError, match="float16" if kind == "dtype" else "holes or overlaps"):
        ops.grad_norm([other, holes], [], table, None, 0.0, 2.0)


def test_the_caches_are_bounded(monkeypatch):
    monkeypatch.setattr(launch, "PLANS", 3)
    monkeypatch.setattr(launch, "LISTS", 4)
    memory = torch.ones(64)
    for start, numel in itertools.product(range(0, 40, 4), (5, 6, 7, 8)):
        table = torch.tensor([[0, numel, -1, 0, 0]])
        assert ops.grad_norm([memory[start : start + numel]], [], table, None, 0.0, 2.0).item() == numel
    assert len(launch._plans) == 3 and all(len(plan.lists) <= 4 for plan in launch._plans.values())


def test_the_oldest_entry_is_forgotten_and_made_again(uploads, monkeypatch):
    monkeypatch.setattr(launch, "LISTS", 2)
    table = torch.tensor([[0, 4, -1, 0, 0]])
    a, b, c = (torch.ones(4) for _ in range(3))
    for argument, fresh in ((a, 3), (b, 1), (a, 0), (c, 1), (b, 0), (a, 1)):  # the plan itself has two tables
        uploads.clear()
        assert ops.grad_norm([argument], [], table, None, 0.0, 2.0).item() == 4.0
        assert len(uploads) == fresh


def test_under_capture_known_tables_are_kept_for_good_and_new_ones_refused(monkeypatch):
    bucket = Bucket(LAYOUTS["several"], torch.float32)
    known, new = bucket.give(bucket.values(), "list"), bucket.give(bucket.values(), "list")
    before = norm_of(bucket, known)
    assert not launch._captured
    monkeypatch.setattr(launch, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="warm-up"):
        norm_of(bucket, new)
    assert norm_of(bucket, known) == before
    plan = next(iter(launch._plans.values()))
    used = {id(r) for r in (plan.runs, plan.chunks, *(r for r, _ in plan.lists.values()))}
    assert set(launch._captured) == used and len(used) == 3


def test_the_default_device_does_not_matter():
    """Tables are made on the CPU, whatever tensors without a device are made on (here: without storage)."""
    bucket = Bucket(LAYOUTS["several"], torch.float32, "mixed")
    arguments = bucket.give(bucket.values(), "list"), bucket.give(bucket.values(), "list"), bucket.table
    norms, out = bucket.norms(), bucket.norms()
    steps, saved, dirty = [torch.tensor(0.0) for _ in bucket.runs], torch.zeros(bucket.total), torch.tensor(0)
    states, gate = [bucket.give(bucket.positive(0.1, 1.0), "list") for _ in range(2)], scalar(1.0)
    with torch.device("meta"):
        ops.filter_norms(arguments[0], bucket.table, out)
        total = ops.grad_norm(*arguments, norms, 0.01, 2.0) + ops.largest(arguments[0], bucket.table)
        total += ops.dots(*arguments[:2], bucket.table)[0]
        total += ops.displacement_dots(*arguments[:2], saved, bucket.table)[0]
        options = gate, 0.1, 0.9, 0.99, 1e-8, 0.0, True, False
        ops.restore_adamw_(*arguments[:2], *states, steps, saved, dirty, bucket.table, *options)
    assert total.device.type == "cpu" and total > 0 and all(s == 1 for s in steps)


# ---- indices


def test_offsets_beyond_32_bits():
    """A flat buffer of 2^31 elements, of which only the pages at its end are ever touched."""
    start = 1 << 31
    buffer = torch.empty(start + 64, dtype=torch.float16)
    buffer[start:] = torch.arange(64)
    table = torch.tensor([[start, 50, -1, 0, 0]])
    assert ops.grad_norm([buffer], [], table, None, 0.0, 2.0).item() == sum(i * i for i in range(50))
    mask, draw = torch.empty(start + 64, dtype=torch.uint8), (torch.tensor([1, 2]), 3)
    mask[start:] = 0
    above = torch.tensor(torch.tensor(39.5).view(torch.int32).item() << 32)
    assert ops.count_above([buffer], mask, table, above, *draw, 0).item() == 10
    ops.select_(mask, [buffer], table, above, *draw, 0, 1)
    assert mask[start:].tolist() == [0] * 40 + [1] * 10 + [0] * 14
    out = torch.empty(50, dtype=torch.float16)
    ops.masked_([out], [buffer], mask, table, *draw, 0.0)
    assert out.tolist() == [0] * 40 + list(range(40, 50))


@pytest.mark.parametrize("offset", [0, 1, 8])
def test_a_mask_may_lie_anywhere(offset):
    """Unaligned masks and starts are read byte by byte, and nothing beside a run is written."""
    memory, draw = torch.full((96,), 9, dtype=torch.uint8), (torch.tensor([1, 2]), 3)
    mask, table = memory[offset:], torch.tensor([[4, 33, -1, 0, 0], [40, 17, -1, 0, 0]])
    below = torch.tensor(-1)
    assert ops.count_above([], mask, table, below, *draw, 9).item() == 50
    ops.select_(mask, [], table, below, *draw, 9, 200)
    assert mask[:60].tolist() == [9] * 4 + [200] * 33 + [9] * 3 + [200] * 17 + [9] * 3
    assert memory.eq(9).sum() == 96 - 50 and ops.count_above([], mask, table, below, *draw, 200).item() == 50


def test_more_chunks_than_are_added_at_a_time(monkeypatch):
    """Three sums of many slots each, and the largest of many, wherever it lies."""
    monkeypatch.setattr(launch, "SLOTS", 4)
    x, y = (torch.randn(10 * launch.CHUNK + 3, dtype=torch.float64) for _ in range(2))
    table = torch.tensor([[0, len(x), -1, 0, 0]])
    exact = torch.stack([x @ x, x @ y, y @ y])
    torch.testing.assert_close(ops.dots([x], [y], table), exact, rtol=1e-12, atol=1e-12)
    moved = ops.displacement_dots([x], [2 * y], y, table)
    torch.testing.assert_close(moved, exact, rtol=1e-12, atol=1e-12)
    for at in (0, 5 * launch.CHUNK, len(x) - 1):
        x[at] = -(100.0 + at)
        assert ops.largest([x], table).item() == 100.0 + at
        assert ops.peaks_([y], [x], table, scalar(100.0 + at)).item() == 1.0 and y[at] == -1.0


def test_chunks_and_filters_beyond_32_bits():
    """A run of ten filters, 2.7e9 elements: its chunks, and the sum over the border of the last two filters."""
    length, count = (1 << 28) + 12, 2
    numel, border = 10 * length, 9 * length
    table = torch.tensor([[0, numel, length, count, 0]])
    plan = launch.Plan(table, torch.device("cpu"))
    run, begin, left = plan.chunks.table[-1].tolist()
    assert (run, begin + left) == (0, numel) and begin > 1 << 31
    assert bool((plan.chunks.table[1:, 1] == plan.chunks.table[:-1, 1] + plan.chunks.table[:-1, 2]).all())
    buffer = torch.empty(numel, dtype=torch.float16)  # only the pages around the border are ever touched
    begin = border - border % 4096
    around = 2 * (border - begin)
    buffer[begin : begin + around] = 1.0
    slots, norms = torch.zeros(1, dtype=torch.float64), torch.tensor([3.0, 5.0])
    chunks, addresses = torch.tensor([[0, begin, around]]), torch.tensor([buffer.data_ptr()])
    norm.norm_kernel[(1,)](
        slots, chunks, table, addresses, addresses, norms, table, 0, 0.0, 2.0, POWER=2, SCALED=2,
        DTYPE=tl.float16, C=tl.float32, ALIGNED=True, BLOCK=2048, STAGES=11,
    )  # fmt: skip
    assert slots.item() == around // 2 * (9 + 25)


@device.kernel
def filters_kernel(out, runs, begin, at, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), device.filters_of(device.scaling_at(runs, 0, begin), at, BLOCK))


@pytest.mark.parametrize("begin", [0, 4096, (1 << 30) - 20, (1 << 31) + 4096, (1 << 40) - 30, 3 * (1 << 40) + 7])
@pytest.mark.parametrize(
    "length, count",
    [(1, 1), (3, 7), (4099, 2), (1 << 30, 3), ((1 << 30) - 9, 2), ((1 << 40) + 1, 5), (1, 1 << 40), (3, (1 << 33) + 1)],
)
def test_filters_of_elements_far_away(length, count, begin):
    """The kernels count in 32 bits from where a chunk begins; Python's integers know no such border."""
    table = torch.tensor([[0, 0, length, count, 0]])
    for at in (0, 64):
        out = torch.zeros(64, dtype=torch.int64)
        filters_kernel[(1,)](out, table, torch.tensor(begin).item(), at, BLOCK=64)
        assert out.tolist() == [(begin + at + i) // length % count for i in range(64)]
