"""Does a step captured in a CUDA graph replay to the same bits as eager, how fast, and is it the same every time?

ResNet-50's parameters, float32, static gradients of both passes (and for LETS of the two at the new weights).
"""

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.contenders import Ours, passes
from benchmarks.gpu.end_to_end import WARM_UP, capture
from benchmarks.gpu.shapes import MODELS, shrunk
from benchmarks.gpu.steps import halves
from benchmarks.gpu.timing import Contender, measure, ratio, summary
from benchmarks.gpu.worker import Work, in_words, main

CASES = [
    ("SAM", "SGD"),
    ("SAM", "AdamW"),
    ("ASAM filter-wise", "SGD"),
    ("LETS secant", "SGD"),
    ("LETS diagonal", "SGD"),
]
DRY_CASES = [("SAM", "AdamW"), ("LETS secant", "SGD")]
REPLAYS, REPEATS, ROUNDS, DRY_ROUNDS = 5, 10, 21, 2


def whole_step(contender: Ours, grads: list[list[Tensor]]) -> None:
    for prepare, run in halves(contender, grads):
        prepare()
        run()


def outcome(contender: Ours) -> list[Tensor]:
    """Weights, the base optimizer's state and the radius, all of float32 or float64."""
    state = [t for own in contender.state().values() for t in own.values() if isinstance(t, Tensor)]
    return [t.detach().clone() for t in [*contender.params, *state, contender.optimizer.rho]]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(_bits(x), _bits(y)) for x, y in zip(a, b, strict=True))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({4: torch.int32, 8: torch.int64}[x.element_size()])


def examine(work: Work, method: str, base: str, options: dict[str, Any]) -> None:
    shapes = shrunk(MODELS["ResNet-50"]) if work.dry else MODELS["ResNet-50"]
    grads = passes(work.device, shapes, method.startswith("LETS"))
    start = [work.device.normal(s, 0.02) for s in shapes]

    def fresh() -> Ours:
        return Ours([p.clone().requires_grad_() for p in start], method, base, **options)

    def after(steps: int) -> list[Tensor]:
        contender = fresh()
        for _ in range(steps):
            whole_step(contender, grads)
        return outcome(contender)

    expected = after(WARM_UP + REPLAYS)
    once = after(WARM_UP)
    repeats = [same(once, after(WARM_UP)) for _ in range(1 if work.dry else REPEATS - 1)]
    row: dict[str, Any] = {"method": method, "base": base, "options": options, "backend": options["backend"]}
    row |= {"deterministic": all(repeats), "runs": 1 + len(repeats)}
    captured = fresh()
    step = functools.partial(whole_step, captured, grads)
    try:
        replay = capture(work, step)
    except Exception as refused:
        work.row(**row)
        raise RuntimeError(f"cannot be captured: {in_words(refused)}") from refused
    for _ in range(REPLAYS + (WARM_UP - 1 if work.dry else 0)):
        replay()
    row["replay_equals_eager"] = same(outcome(captured), expected)
    for promise in ("deterministic", "replay_equals_eager"):
        if not row[promise]:
            work.fail(f"{method} {base} {' '.join(map(str, options.values()))}", f"{promise}: not so")
    eager = fresh()
    pair = {"eager": Contender(lambda _: whole_step(eager, grads)), "replay": Contender(lambda _: replay())}
    seconds = measure(work.device, pair, DRY_ROUNDS if work.dry else ROUNDS)
    row |= {"eager": summary(seconds["eager"], "ms"), "replay": summary(seconds["replay"], "ms")}
    work.row(**row, replay_over_eager=round(ratio(seconds["replay"], seconds["eager"]), 4))


def run(work: Work) -> None:
    kinds = [{"backend": b, **more} for b in work.backends for more in ({}, {"flatten": True})]
    chosen = DRY_CASES if work.dry else CASES
    cases = [(f"{m} {b} {' '.join(map(str, o.values()))}", m, b, o) for m, b in chosen for o in kinds]
    work.write(plan=[name for name, *_ in cases])
    for name, method, base, options in cases:
        work.case(name, functools.partial(examine, work, method, base, options))


if __name__ == "__main__":
    main(run, __doc__)
