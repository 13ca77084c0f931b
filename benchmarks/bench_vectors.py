"""The ops of the other methods, measured as in bench_ops.py: products, combinations, averages, masks, noise."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_ops import Contender, Work, both_copies, flat, measure, name_of, native
from benchmarks.common import SHAPES
from lets_kernels.bench.clock import CLOCK
from lets_kernels.bench.shapes import normal
from lets_kernels.ops import reference

pytestmark = pytest.mark.benchmark(timer=CLOCK)
DECAY, SHARE, STD = 0.9, 0.5, 0.01
copies = pytest.fixture(scope="module")(both_copies)


def others(w: Work) -> list[Tensor]:
    """A second vector, of which the first is a part."""
    return [0.3 * g + y for g, y in zip(w.g, normal(SHAPES, 0.01, 7, w.dtype), strict=True)]


def draws() -> Tensor:
    return torch.tensor([3, 5])


def product(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.dot(a.flatten(), b.flatten()) for a, b in zip(xs, ys, strict=True)]).sum()


def products(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
    """The three inner products of two vectors, tensor by tensor."""
    return [product(xs, xs), product(xs, ys), product(ys, ys)]


def foreach_products(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
    squares = [torch.stack(torch._foreach_norm(x)).square().sum() for x in (xs, ys)]
    return [squares[0], torch.stack([t.sum() for t in torch._foreach_mul(xs, ys)]).sum(), squares[1]]


def dots(w: Work) -> dict[str, Contender]:
    y = others(w)

    def ours(module: Any) -> Contender:
        return Contender(lambda: module.dots(w.g, y, w.table), lambda: list(module.dots(w.g, y, w.table).unbind()))

    def loop() -> list[Tensor]:
        return products(w.g, y)

    def foreach() -> list[Tensor]:
        return foreach_products(w.g, y)

    rows = {"reference": ours(reference), "ours": ours(native)}
    return {**rows, "loop": Contender(loop, loop), "foreach": Contender(foreach, foreach)}


def displacement_dots(w: Work) -> dict[str, Contender]:
    """The next gradient with what a step along it has moved, up to the sign."""
    old = w.own().old
    saved = flat(old, w)

    def ours(module: Any) -> Contender:
        def run() -> Tensor:
            return module.displacement_dots(w.g, w.params, saved, w.table)

        return Contender(run, lambda: list(run().unbind()))

    def loop() -> list[Tensor]:
        return products(w.g, [p - o for p, o in zip(w.params, old, strict=True)])

    def foreach() -> list[Tensor]:
        return foreach_products(w.g, torch._foreach_sub(w.params, old))

    rows = {"reference": ours(reference), "ours": ours(native)}
    return {**rows, "loop": Contender(loop, loop), "foreach": Contender(foreach, foreach)}


def combine_(w: Work) -> dict[str, Contender]:
    y, a, b = others(w), 0.5, 0.25  # halves and quarters: repeated, the vector settles near y/2

    def ours(module: Any) -> Contender:
        x, coefficients = [g.clone() for g in w.g], torch.tensor([a, b], dtype=torch.float64)
        return Contender(lambda: module.combine_(x, x, y, w.table, coefficients, w.gate), lambda: x)

    own, each = [g.clone() for g in w.g], [g.clone() for g in w.g]

    def loop() -> None:
        for x, other in zip(own, y, strict=True):
            x.mul_(a).add_(other, alpha=b)

    def foreach() -> None:
        torch._foreach_mul_(each, a)
        torch._foreach_add_(each, y, alpha=b)

    rows = {"reference": ours(reference), "ours": ours(native)}
    return {**rows, "loop": Contender(loop, lambda: own), "foreach": Contender(foreach, lambda: each)}


def average_(w: Work) -> dict[str, Contender]:
    """Friendly SAM's: d = g - m before m moves, and the norm of d."""

    def ours(module: Any) -> Contender:
        m, out, updates = others(w), torch.zeros(w.bucket.size, dtype=w.dtype), torch.ones((), dtype=torch.int64)
        numbers = (DECAY, 1 + (1 - DECAY) / DECAY, -1 / DECAY)

        def run() -> None:
            module.average_(m, w.g, [out], updates, w.table, w.gate, *numbers)

        return Contender(run, lambda: [*m, out])

    own, each = others(w), others(w)
    d, apart = [torch.empty_like(g) for g in w.g], [torch.empty_like(g) for g in w.g]

    def loop() -> Tensor:
        for m, g, to in zip(own, w.g, d, strict=True):
            torch.sub(g, m, out=to)
            m.mul_(DECAY).add_(g, alpha=1 - DECAY)
        return torch.stack([to.norm() for to in d]).norm()

    def foreach() -> Tensor:
        torch._foreach_copy_(apart, w.g)
        torch._foreach_sub_(apart, each)
        torch._foreach_lerp_(each, w.g, 1 - DECAY)
        return torch.stack(torch._foreach_norm(apart)).norm()

    return {
        "reference": ours(reference),
        "ours": ours(native),
        "loop": Contender(loop, lambda: [*own, flat(d, w)]),
        "foreach": Contender(foreach, lambda: [*each, flat(apart, w)]),
    }


def masked_(w: Work) -> dict[str, Contender]:
    generator = torch.Generator().manual_seed(9)
    masks = [torch.rand(s, generator=generator) < SHARE for s in SHAPES]
    mask = torch.zeros(w.bucket.size, dtype=torch.uint8)
    for (start, numel, *_), own in zip(w.table.tolist(), masks, strict=True):
        mask[start : start + numel] = own.flatten()

    def ours(module: Any) -> Contender:
        out = torch.zeros(w.bucket.size, dtype=w.dtype)
        return Contender(lambda: module.masked_([out], w.g, mask, w.table, draws(), 1, 1.0), lambda: [out])

    own, each = [torch.empty_like(g) for g in w.g], [torch.empty_like(g) for g in w.g]

    def loop() -> Tensor:
        for to, g, m in zip(own, w.g, masks, strict=True):
            torch.mul(g, m, out=to)
        return torch.stack([g.norm() for g in w.g]).norm()

    def foreach() -> Tensor:
        torch._foreach_copy_(each, w.g)
        torch._foreach_mul_(each, masks)
        return torch.stack(torch._foreach_norm(w.g)).norm()

    return {
        "reference": ours(reference),
        "ours": ours(native),
        "loop": Contender(loop, lambda: [flat(own, w)]),
        "foreach": Contender(foreach, lambda: [flat(each, w)]),
    }


def noise_(w: Work) -> dict[str, Contender]:
    """R-SAM's: g and noise. Against torch's own generator, whose numbers are others: its results are not compared."""

    def ours(module: Any) -> Contender:
        out = torch.zeros(w.bucket.size, dtype=w.dtype)
        arguments = ([out], w.g, [], w.table, None, draws(), 0, 1.0, STD)
        return Contender(lambda: module.noise_(*arguments), lambda: [out])

    own = [torch.empty_like(g) for g in w.g]
    same = ours(reference)

    def loop() -> Tensor:
        for to, g in zip(own, w.g, strict=True):
            to.normal_(0, STD).add_(g)
        return torch.stack([to.norm() for to in own]).norm()

    def result() -> list[Tensor]:
        same.run()
        return list(same.result())

    return {"reference": ours(reference), "ours": ours(native), "loop": Contender(loop, result)}


OPS: list[Callable[[Work], dict[str, Contender]]] = [dots, displacement_dots, combine_, average_, masked_, noise_]
CASES = [(op, dtype) for op in OPS for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("op, dtype", CASES, ids=name_of)
def test_op(op, dtype, benchmark, copies, rounds, report):
    measure(op, "plain", dtype, benchmark, copies, rounds, report, ("vectors", "The ops of the other methods"))
