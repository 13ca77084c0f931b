"""What does a whole step cost outside forward and backward? SAM, ASAM and LETS on five models' parameters, float32.

Three times. *Device*: events around each half, work queued up before, so that the host does not show. *Elapsed*: from
an idle device to the last kernel, what a step that nothing hides costs. *Host*: until the calls return. Halves are
timed apart, as a backward lies between them. A contender whose weights differ from those of the reference backend
after any half of two steps is not timed. Peak memory is what a step allocates above parameters, gradients and the base
optimizer's state, in units of the parameters. Contenders run one after another, each beside a copy; torch.compile,
which takes a minute a set, last, and with SAM and SGD alone. A GPU takes about a thousand launches ahead: with eager
code of more launches than that, the host shows in the device's time.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.contenders import BASES, METHODS, Compiled, Foreach, Ours, PerTensor, give, passes
from benchmarks.gpu.shapes import MODELS, shrunk
from benchmarks.gpu.timing import Contender, Device, copy_of, measure, ratio, summary
from benchmarks.gpu.worker import Work, in_words, main
from lets_kernels.bench.compare import error
from lets_kernels.bench.shapes import Shape, numel

ROUNDS, DRY_ROUNDS, WARM_UP = 21, 2, 3
COPIED = 2**30  # bytes that the copy beside each contender moves: many times the L2
TOLERANCE = 1e-5  # of the weights' rms in a tensor: the norm is a float32 sum in eager code
RHO_GRAD_TOLERANCE = 1e-4  # a float32 sum of products that partly cancel
DRY_STEPS = [("SAM", "SGD"), ("ASAM filter-wise", "AdamW"), ("LETS secant", "SGD")]
UNCOMPILED = 0.65  # of the time; torch.compile may have what is left
# Parameter-sized buffers moved: norm 1 (2 where T is read from the weights), perturb 4, restore and step 5 or 7, radius
# 6, which are g, ĝ and one more for each of two sums; and 1 for check_finite.
FLOOR = {"SAM": 5, "ASAM": 6, "ASAM filter-wise": 7, "LETS secant": 11, "LETS diagonal": 11}
BASE_FLOOR = {"SGD": 5, "AdamW": 7}
Make = Callable[[list[Tensor]], Any]


def floor(method: str, base: str, check: bool) -> int:
    return FLOOR[method] + BASE_FLOOR[base] + check


def makers(work: Work, method: str, base: str) -> dict[str, Make]:
    """The contenders by name; ours are called "ours …"."""

    def ours(**options: Any) -> Make:
        return lambda params: Ours(params, method, base, **options)

    found: dict[str, Make] = {}
    for backend in work.backends:
        found[f"ours {backend}"] = ours(backend=backend)
        found[f"ours {backend} flatten"] = ours(backend=backend, flatten=True)
    if method == "SAM":
        found[f"ours {work.backends[0]} no check"] = ours(backend=work.backends[0], check_finite=False)
    found["per tensor"] = lambda params: PerTensor(params, method, base)
    found["foreach"] = lambda params: Foreach(params, method, base)
    found["foreach swapped"] = lambda params: Foreach(params, method, base, swap=True)
    if method in ("SAM", "ASAM"):
        found["foreach waiting"] = lambda params: Foreach(params, method, base, waits=True)
        found["foreach swapped waiting"] = lambda params: Foreach(params, method, base, waits=True, swap=True)
    return found


def halves(contender: Any, grads: list[list[Tensor]]) -> list[tuple[Callable[[], None], Callable[[], None]]]:
    """The parts of a step: what must be there before (not timed), and what is timed."""
    parts = [
        (functools.partial(give, contender.params, grads[0]), contender.first_step),
        (functools.partial(give, contender.params, grads[1]), contender.second_step),
    ]
    if len(grads) == 4:
        parts.append((lambda: None, lambda: contender.radius_step(grads[2], grads[3])))
    return parts


def check(contender: Any, grads: list[list[Tensor]], expected: list[list[Tensor]]) -> float:
    """The largest error after each half of two steps; the first contender, the reference, fills `expected`."""
    worst, fill, at = 0.0, not expected, 0
    for _ in range(2):
        for prepare, run in halves(contender, grads)[:2]:
            prepare()
            run()
            if fill:
                expected.append([p.detach().clone() for p in contender.params])
            else:
                worst = max(worst, error(contender.params, expected[at]))
            at += 1
        if len(grads) == 4:
            halves(contender, grads)[2][1]()
    return worst


def time_step(device: Device, contender: Any, grads: list[list[Tensor]], rounds: int) -> dict[str, Any]:
    """Device, elapsed and host time of a step, summed over its parts round by round.

    `copied_meanwhile`: the bytes that a copy, timed in the same rounds, moves in the step's time on the device.
    """
    parts = halves(contender, grads)
    host, elapsed = [], []
    for number in range(WARM_UP + rounds):
        spent = waited = 0.0
        for prepare, run in parts:
            prepare()
            device.synchronize()
            start = device.mark()
            before = time.perf_counter()
            run()
            spent += time.perf_counter() - before
            end = device.mark()
            device.synchronize()
            waited += device.between(start, end)
        if number >= WARM_UP:
            host.append(spent)
            elapsed.append(waited)
    pair = {f"part {i}": Contender(lambda _, run=run: run(), lambda _, p=p: p()) for i, (p, run) in enumerate(parts)}
    moved = COPIED if device.cuda else 2**10
    seconds = measure(device, {**pair, "copy": copy_of(device, moved)}, rounds)
    copied = seconds.pop("copy")
    whole = [sum(values) for values in zip(*seconds.values(), strict=True)]
    return {
        "device": summary(whole, "ms"),
        "elapsed": summary(elapsed, "ms"),
        "host": summary(host, "us"),
        "copy_GB/s": round(moved / summary(copied, "us")["median_us"] * 1e-3, 1),
        "copied_meanwhile": moved * ratio(whole, copied),
    }


def memory(device: Device, contender: Any, grads: list[list[Tensor]], before: int) -> float | None:
    """Bytes at the peak of a step above what was there before, the parameters and the base optimizer's state."""
    if not device.cuda:
        return None
    device.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for prepare, run in halves(contender, grads):
        prepare()
        run()
    device.synchronize()
    state = [t for own in contender.state().values() for t in own.values() if isinstance(t, Tensor) and t.is_cuda]
    own = sum(t.numel() * t.element_size() for t in [*contender.params, *state])
    return torch.cuda.max_memory_allocated() - before - own


def compete(
    work: Work, kept: dict[str, Any], shapes: Sequence[Shape], grads: list[list[Tensor]], contestants: dict[str, Make]
) -> None:
    """Validate contenders on one parameter set against the reference, and time them, one after another."""
    device = work.device
    start = [device.normal(s, 0.02) for s in shapes]
    params_bytes = 4 * numel(list(shapes))
    expected: list[list[Tensor]] = []
    rho_grad: float | None = None
    reference: Make = lambda params: Ours(params, kept["method"], kept["base"], backend="reference")  # noqa: E731
    for name, make in {"reference": reference, **contestants}.items():
        case = f"{kept['method']} {kept['base']} {kept['set']}: {name}"
        if work.remaining() <= 0:
            work.leave_out(case, "no time was left")
            continue
        try:
            found = one(work, case, make, start, grads, expected, rho_grad)
        except torch.cuda.OutOfMemoryError:
            if name == "reference":
                raise
            work.leave_out(case, "out of memory")
            found = None
        except Exception as failure:
            if name == "reference":
                raise
            work.fail(case, in_words(failure))
            found = None
        work.release()
        if name == "reference":
            assert found is not None
            rho_grad = found["rho_grad"]
        elif found is not None:
            row = {**kept, "contender": name, **found}
            if name.startswith("ours"):
                row |= {"backend": name.split()[1], "check_finite": "no check" not in name}
                row["bytes"] = params_bytes * floor(kept["method"], kept["base"], row["check_finite"])
                row["share_of_copy"] = round(row["bytes"] / row["copied_meanwhile"], 4)
            if row["peak"] is not None:
                row["peak_over_params"] = round(row["peak"] / params_bytes, 4)
            work.row(**row)


def one(
    work: Work,
    case: str,
    make: Make,
    start: Sequence[Tensor],
    grads: list[list[Tensor]],
    expected: list[list[Tensor]],
    rho_grad: float | None,
) -> dict[str, Any] | None:
    """Build, validate and time one contender; None if it is wrong. The reference (`rho_grad` None) is not timed."""
    device, learns = work.device, len(grads) == 4
    before = torch.cuda.memory_allocated() if device.cuda else 0
    contender = make([p.clone().requires_grad_() for p in start])
    worst = check(contender, grads, expected)
    found = float(contender.rho_grad()) if learns else 1.0
    if rho_grad is None:
        return {"rho_grad": found}
    if isinstance(contender, Ours) and not contender.optimizer.fused:
        raise RuntimeError(f"not fused: {contender.optimizer.fused_reason}")
    off = abs(found / rho_grad - 1)
    if not (worst <= TOLERANCE and off <= RHO_GRAD_TOLERANCE):
        work.fail(case, f"weights wrong by {worst:.1e}, the radius's gradient by {off:.1e}: not timed")
        return None
    peak = memory(device, contender, grads, before)
    times = time_step(device, contender, grads, DRY_ROUNDS if work.dry else ROUNDS)
    return {"error": worst, "peak": peak, **times}


def run(work: Work) -> None:
    sets = {"ResNet-50": shrunk(MODELS["ResNet-50"])} if work.dry else MODELS
    order = [("ResNet-50", method, base) for base in BASES for method in METHODS]
    rest = [label for label in sets if label != "ResNet-50"]
    order += [(label, "SAM", base) for base in BASES for label in rest]
    order += [(label, method, "SGD") for method in METHODS if method != "SAM" for label in rest]
    if work.dry:
        order = [step for step in order if step[1:] in DRY_STEPS]
    compiled = [f"torch.compile SAM SGD {label}" for label in ("ResNet-50", *rest)]
    work.write(plan=[f"{method} {base} {label}" for label, method, base in order] + compiled)
    reserve = (1 - UNCOMPILED) * work.remaining()

    def compare(label: str, method: str, base: str, contestants: dict[str, Make]) -> None:
        grads = passes(work.device, sets[label], METHODS[method][1] is not None)
        kept = {"set": label, "tensors": len(sets[label]), "elements": numel(sets[label])}
        compete(work, {**kept, "method": method, "base": base}, sets[label], grads, contestants)

    for label, method, base in order:
        if work.remaining() > reserve:
            case = functools.partial(compare, label, method, base, makers(work, method, base))
            work.case(f"{method} {base} {label}", case)
    for label, case_name in zip(("ResNet-50", *rest), compiled, strict=True):
        work.case(case_name, functools.partial(compare, label, "SAM", "SGD", {"torch.compile": Compiled}))


if __name__ == "__main__":
    main(run, __doc__)
