"""``--full``: how a step grows with the number of elements, and with the number of tensors that they are in."""

import torch

from lets_kernels.bench.clock import Budget
from lets_kernels.bench.compare import Comparison, Say, compare
from lets_kernels.bench.contenders import CONTENDERS, DEFAULT, LOOP, SGD, Contender
from lets_kernels.bench.shapes import Shape

TENSORS, ELEMENTS = 161, 25_600_000
SIZES = (16_000, 160_000, 1_600_000, 6_400_000, ELEMENTS)
COUNTS = (1, 4, 16, 64, 256, 1024)
RACING = (DEFAULT, LOOP, "foreach", "foreach, swapped")


def even(elements: int, tensors: int) -> list[Shape]:
    """So many tensors of one length, with about as many elements in all."""
    return [(max(1, elements // tensors),)] * tensors


def growth(
    dtype: torch.dtype, budget: Budget, sizes: list[Comparison], counts: list[Comparison], say: Say = lambda text: None
) -> None:
    """SGD's step over ``SIZES`` elements in 161 tensors, and over 25.6 M elements in ``COUNTS`` tensors."""
    racing: list[Contender] = [c for c in CONTENDERS if c.name in RACING]
    plan = [(sizes, even(n, TENSORS)) for n in SIZES] + [(counts, even(ELEMENTS, count)) for count in COUNTS]
    for done, (into, shapes) in enumerate(plan):
        what = f"growth, {len(shapes)} tensors, {sum(s[0] for s in shapes) / 1e6:.3g} M elements: "
        compare(
            racing,
            SGD,
            shapes,
            dtype,
            budget,
            into,
            share=0.9 / (len(plan) - done),
            most=30,
            say=lambda text, what=what: say(what + text),  # type: ignore[misc]
        )
