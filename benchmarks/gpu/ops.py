"""How close is each op to the speed of a copy on the device? Single tensors of 1 M to 1 B elements, and models.

GB/s counts the bytes that the op cannot avoid moving (`benchmarks.common.FLOORS`); the share is that of a copy which
moves as many bytes, timed in the same rounds. Buffers rotate, so that from 25 M elements on no round finds its own in
the cache; of smaller ones the cache may hold a part, of the copy's as of the op's (`buffer_sets` says how many there
are). Where the tensors are tiny the launches are what counts: the time of as many empty kernels stands beside. A
backend whose result differs from float64 is not timed.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import FLOORS
from benchmarks.gpu import calls
from benchmarks.gpu.shapes import OP_SETS, SMALL, shrunk
from benchmarks.gpu.timing import Contender, Device, copy_of, measure, ratio, summary
from benchmarks.gpu.worker import Work, in_words, main
from lets_kernels import ops
from lets_kernels.bench.compare import error
from lets_kernels.bench.shapes import Shape, numel

DTYPES = (torch.float32, torch.bfloat16)
ROUNDS, REFERENCE_ROUNDS, DRY_ROUNDS = 21, 3, 2
DRY_SETS = ("25 M", "ResNet-50", SMALL)
VECTOR_SETS = DRY_SETS  # what not every method needs is timed on fewer
MOST_SETS, MOST_FOR_REFERENCE = 8, 30_000_000  # of seven lists: what the backends remember the addresses of
CHECKED: list[Shape] = [(16, 7, 3, 3), (16,), (257, 33), (), (3, 4096, 1), (70_001,)]
DRY_CHECKED = 4  # of them
# Against float64, relative to the element or the tensor's rms. Storage: half an ulp of the dtype (2^-24, 2^-8 relative)
# with a few roundings of the float32 arithmetic on top. Scalars: a float32 sum over a few hundred terms a lane before
# it is widened (2^-24 each), of terms whose absolute values add up to at most some ten times the sum.
STORAGE = {torch.float32: 2.0**-20, torch.bfloat16: 1.01 * 2.0**-8}
SCALAR = 1e-4
# The average is rounded to storage before half of it goes into the vector, of whose rms its elements are six times.
ROUNDINGS = {"average_": 1 + 3}
# The average is rounded, and so is the vector whose squares are summed: in bfloat16 that moves the sum over some 90,000
# elements by 4e-5 (median), by 1e-4 in one of 150 draws.
SUMS_OF_ROUNDED = {("average_", torch.bfloat16): 1e-4}
SCALARS_ALONE = ("filter_norms", "all_finite_")  # what they write is no vector


def name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def sets_for(device: Device, elements: int, dtype: torch.dtype) -> int:
    """As many sets that the op which moves least (1N) moves four times the L2 before a set comes up again; 8 at most.

    One where a single pass is larger than that many times over, and where all sets together are next to nothing.
    """
    once = elements * dtype.itemsize
    if once >= 16 * device.l2 or 16 * MOST_SETS * once <= device.l2:
        return 1
    return min(MOST_SETS, max(2, -(-4 * device.l2 // once)))


def checked(work: Work, backend: str, op: str, direction: str, dtype: torch.dtype) -> tuple[float, float]:
    """The op's largest error against the same formula in float64, on small tensors of every kind, and the limit of it.

    Where an op writes tensors and returns a sum, it is that which comes nearer to its limit.
    """
    tensors = calls.Tensors(CHECKED[:DRY_CHECKED] if work.dry else CHECKED, dtype, work.device)
    twin = tensors.double(direction)
    expected = calls.call(op, direction, ops.reference, twin)()
    returned = calls.call(op, direction, ops.load(backend)[0], tensors)()
    work.device.synchronize()
    pairs = [(calls.results(op, tensors, None), calls.results(op, twin, None))]
    if isinstance(returned, Tensor):
        pairs.append(([returned], [expected]))
    errors = [error([x.cpu() for x in found], right) for found, right in pairs]
    limits = [SCALAR if op in SCALARS_ALONE else ROUNDINGS.get(op, 1) * STORAGE[dtype]]
    limits.append(SCALAR + SUMS_OF_ROUNDED.get((op, dtype), 0.0))
    return max(zip(errors, limits, strict=False), key=lambda pair: pair[0] / pair[1])


def check_all(work: Work) -> dict[tuple[str, str, str, str], bool]:
    """Which backend is right at which op, direction and dtype; a wrong one is a failed case.

    Raises:
        SystemExit: the device does not recover from what an op did.
    """
    right = {}
    for backend in work.backends:
        for op, direction in (*calls.CASES, *calls.VECTOR_CASES):
            for dtype in DTYPES:
                name = f"check {op} {direction} {name_of(dtype)} {backend}"
                try:
                    worst, limit = checked(work, backend, op, direction, dtype)
                    reason = "" if worst <= limit else f"wrong by {worst:.1e}, more than {limit:.1e}: not timed"
                except Exception as failure:
                    worst, reason = float("inf"), in_words(failure)
                right[backend, op, direction, name_of(dtype)] = not reason
                if reason:
                    work.fail(name, reason)
                    work.end_if_lost()
                else:
                    work.row(check=op, direction=direction, dtype=name_of(dtype), backend=backend, error=worst)
    return right


def launches(device: Device, run: Any) -> int | None:
    """Kernels, copies and fills that one call puts on the device; None where the profiler does not see the device."""
    if not device.cuda:
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    device.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            run()
            device.synchronize()
    except (RuntimeError, AssertionError):  # no access to the device's counters, or a torch without them
        return None
    return sum(event.device_type == DeviceType.CUDA for event in found.events()) or None


def time_op(
    work: Work, label: str, op: str, direction: str, dtype: torch.dtype, sets: Sequence[calls.Tensors], fit: list[str]
) -> None:
    device, rounds = work.device, DRY_ROUNDS if work.dry else ROUNDS
    for t in sets:
        calls.touch(op, direction, t)
    table = calls.table_of(sets[0].space(direction), direction)
    elements = numel(sets[0].shapes)
    moved = FLOORS[op].bytes(table, dtype.itemsize) if op in FLOORS else 0
    contenders: dict[str, Contender] = {}
    copy = copy_of(device, moved, len(sets)) if moved else None
    before = (lambda i: sets[i].dirty.fill_(1)) if op.startswith("restore") else None
    for backend in fit:
        module = ops.load(backend)[0]
        runs = [calls.call(op, direction, module, t) for t in sets]
        contenders[backend] = Contender(functools.partial(_call, runs), before)
        if copy:
            contenders[f"copy after {backend}"] = copy
    seconds = measure(device, contenders, rounds, len(sets))
    kept: dict[str, Any] = {"set": label, "op": op, "direction": direction, "dtype": name_of(dtype)}
    if (op, direction) in calls.VECTOR_CASES and dtype != torch.float32:
        kept["summary"] = False  # which has no line to spare
    kept |= {"elements": elements, "tensors": len(sets[0].shapes), "bytes": moved, "buffer_sets": len(sets)}
    for backend in fit:
        row = {**kept, "backend": backend, **summary(seconds[backend])}
        if moved:
            copied = seconds[f"copy after {backend}"]
            row["GB/s"] = round(moved / row["median_us"] * 1e-3, 1)
            row["copy_us"] = summary(copied)["median_us"]
            row["share_of_copy"] = float(f"{ratio(copied, seconds[backend]):.4g}")
        if label == SMALL:
            row |= against_launches(device, contenders[backend], rounds)
        work.row(**row)
    if dtype == torch.float32 and elements <= MOST_FOR_REFERENCE and device.cuda and label in ("25 M", "ResNet-50"):
        plain = calls.call(op, direction, ops.reference, sets[0])
        alone = measure(device, {"reference": Contender(lambda _: plain(), before)}, REFERENCE_ROUNDS)
        row = {**kept, "backend": "reference", **summary(alone["reference"])}
        work.row(**row, **({"GB/s": round(moved / row["median_us"] * 1e-3, 1)} if moved else {}))


def _call(runs: list[Any], index: int) -> Any:
    return runs[index]()


def against_launches(device: Device, contender: Contender, rounds: int) -> dict[str, Any]:
    """The time of as many empty kernels as the op launches, and how many times as long the op takes."""
    count = launches(device, lambda: contender.run(0))
    if count is None and device.cuda:
        return {"launches": None, "note": "the profiler does not see the device"}

    def chain(_: int) -> None:
        for _ in range(count or 1):
            device.empty_kernel()

    pair = measure(device, {"op": contender, "chain": Contender(chain)}, rounds)
    found = {"launches": count, "empty_chain_us": summary(pair["chain"])["median_us"]}
    return {**found, "times_empty_chain": round(ratio(pair["op"], pair["chain"]), 3)}


def sanity(work: Work, label: str, dtype: torch.dtype, t: calls.Tensors) -> None:
    """At the full size: the norm against torch's, and the weights after a restore against what was saved."""
    for backend in work.backends:
        module = ops.load(backend)[0]
        found = calls.call("grad_norm", "plain", module, t)()
        expected = sum(float(torch.linalg.vector_norm(g, dtype=torch.float32)) ** 2 for g in t.g)
        t.dirty.fill_(1)
        calls.call("restore_", "plain", module, t)()
        rows = zip(t.params, calls.table_of(t.space("plain")).tolist(), strict=True)
        same = all(_equal(p, t.saved[start : start + n]) for p, (start, n, *_) in rows)
        off = abs(float(found) / expected - 1)
        if off > 1e-3 or not same:  # torch's norm is a float32 sum over up to 10^9 elements
            work.fail(f"{label} {name_of(dtype)} {backend}", f"norm off by {off:.1e}, restored exactly: {same}")


def _equal(p: Tensor, saved: Tensor) -> bool:
    return torch.equal(p.flatten(), saved)


def time_set(work: Work, label: str, shapes: list[Shape], dtype: torch.dtype, right: dict[Any, bool]) -> None:
    work.release()
    count = sets_for(work.device, numel(shapes), dtype)
    # So many lists a set, and a copy that moves as much as the op that moves most: seven.
    need = numel(shapes) * dtype.itemsize * count * ((10 if label in VECTOR_SETS else 8) + 7)
    if need > 0.9 * work.device.free_bytes():
        for op, direction in _cases(label, shapes):
            work.leave_out(_name(label, dtype, op, direction), f"needs {need / 2**30:.0f} GiB")
        return
    sets = [calls.Tensors(shapes, dtype, work.device) for _ in range(count)]
    work.case(f"results at {label} {name_of(dtype)}", functools.partial(sanity, work, label, dtype, sets[0]))
    for op, direction in _cases(label, shapes):
        fit = [b for b in work.backends if right[b, op, direction, name_of(dtype)]]
        if fit:
            run = functools.partial(time_op, work, label, op, direction, dtype, sets, fit)
            work.case(_name(label, dtype, op, direction), run)


def _cases(label: str, shapes: list[Shape]) -> list[tuple[str, str]]:
    """Filter-wise only where something has filters."""
    cases = [*calls.CASES, *(calls.VECTOR_CASES if label in VECTOR_SETS else [])]
    return [case for case in cases if case[1] != "filter" or any(len(s) > 2 for s in shapes)]


def _name(label: str, dtype: torch.dtype, op: str, direction: str) -> str:
    return f"{op} {direction} {name_of(dtype)} at {label}"


@torch.no_grad()
def run(work: Work) -> None:
    sets = {label: shrunk(OP_SETS[label]) for label in DRY_SETS} if work.dry else OP_SETS
    work.write(plan=[_name(label, d, *case) for label, s in sets.items() for d in DTYPES for case in _cases(label, s)])
    right = check_all(work)
    for label, shapes in sets.items():
        for dtype in DTYPES:
            if work.remaining() > 0:
                time_set(work, label, shapes, dtype, right)


if __name__ == "__main__":
    main(run, __doc__)
