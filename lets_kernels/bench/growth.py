"""``--full``: how a step grows with elements, with the tensors that they are in, and with the param groups of these."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lets_kernels.bench.clock import Budget
from lets_kernels.bench.compare import Comparison, Result, Say, compare
from lets_kernels.bench.contenders import CONTENDERS, DEFAULT, LOOP, SGD, Base, Contender
from lets_kernels.bench.memory import free_bytes
from lets_kernels.bench.shapes import Shape

TENSORS, ELEMENTS = 161, 25_600_000
SIZES = (10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8, 3 * 10**8, 10**9)
COUNTS = (10, 30, 100, 300, 1000, 3000, 10_000)
GROUPS, GROUPED = (1, 10, 28, 161, 500), 500
EACH = 1000  # elements of each of these tensors
RACING = (DEFAULT, "foreach, swapped", LOOP, "foreach")  # the last ones are the first to be left out
NO_ROOM = "left out: it did not fit into the free memory"
USABLE = 0.9  # of the memory that is free; others use it too


@dataclass
class Growth:
    """The comparisons with SAM + SGD, each list from small to large."""

    BY = ("elements", "tensors", "groups")

    sizes: list[Comparison] = field(default_factory=list)
    counts: list[Comparison] = field(default_factory=list)
    groups: list[Comparison] = field(default_factory=list)

    @property
    def parts(self) -> dict[str, list[Comparison]]:
        """Under what grows in them."""
        return dict(zip(self.BY, (self.sizes, self.counts, self.groups), strict=True))

    @property
    def all(self) -> list[Comparison]:
        return [one for part in self.parts.values() for one in part]

    @staticmethod
    def at(by: str, one: Comparison) -> int:
        """How much there is in this comparison of what grows."""
        return {"elements": one.numel, "tensors": len(one.shapes), "groups": one.base.groups}[by]

    @staticmethod
    def label(by: str) -> str:
        """What grows, and over what."""
        return {
            "elements": f"elements, in {TENSORS} tensors",
            "tensors": f"tensors, {ELEMENTS / 1e6:.3g} M elements in all",
            "groups": f"param groups, over {GROUPED} tensors of {EACH:,} elements",
        }[by]


def even(elements: int, tensors: int) -> list[Shape]:
    """So many tensors of one length, with about as many elements in all."""
    return [(max(1, elements // tensors),)] * tensors


def growth(dtype: torch.dtype, budget: Budget, into: Growth, left_out: list[str], say: Say = lambda text: None) -> None:
    """SGD's step over ``SIZES`` elements in 161 tensors, over 25.6 M elements in ``COUNTS`` tensors, and over 500
    tensors in ``GROUPS`` groups. What has no room in memory, or no time, is added to ``left_out``.
    """
    everyone = [next(c for c in CONTENDERS if c.name == name) for name in RACING]
    plan: list[tuple[int, int, list[Comparison], Base]] = [  # elements, tensors
        *((EACH * GROUPED, GROUPED, into.groups, dataclasses.replace(SGD, groups=count)) for count in GROUPS),
        *((size, TENSORS, into.sizes, SGD) for size in SIZES),
        *((ELEMENTS, count, into.counts, SGD) for count in COUNTS),
    ]
    plan.sort(key=lambda one: one[0])  # what takes longest comes last
    late: list[str] = []
    try:
        for done, (elements, tensors, part, base) in enumerate(plan):
            what = f"{elements / 1e6:,.4g} M elements in {tensors:,} tensors"
            what += f" and {base.groups} groups" if part is into.groups else ""
            racing, needed = that_fit(everyone, elements, dtype, free_bytes())
            least = min((one.validation / one.numel for one in into.all), default=0.0) * elements
            if not racing:
                left_out.append(f"Growth, {what}: left out: it needs {needed / 2**30:.1f} GiB of free memory")
            elif least >= budget.left():
                late.append(what)
            else:
                say(f"growth, {what}")
                share = 0.9 / (len(plan) - done)
                one = compare(racing, base, even(elements, tensors), dtype, budget, part, share, most=30)
                one.results |= {c.name: Result(c, refused=NO_ROOM) for c in everyone[len(racing) :]}
    finally:
        if late:
            left_out.append(f"Growth, left out, as it did not fit into the time that was left: {'; '.join(late)}")


def that_fit(
    everyone: Sequence[Contender], elements: int, dtype: torch.dtype, free: int | None
) -> tuple[list[Contender], int]:
    """Those of the first contenders that fit into memory together, and the bytes that they need; none: for one."""
    for count in range(len(everyone), 0, -1):
        needed = needed_bytes(elements, dtype, count)
        if free is None or needed <= USABLE * free:
            return list(everyone[:count]), needed
    return [], needed_bytes(elements, dtype, 1)


def needed_bytes(elements: int, dtype: torch.dtype, contenders: int) -> int:
    """Of memory, at the peak: θ, two gradients and the oracle with its momenta; or its two results and for each
    contender θ, what it saves, its momenta, and one list of temporaries.
    """
    oracle, side_by_side = 3 * 8, 2 * 8 + (3 * contenders + 1) * dtype.itemsize
    return elements * (3 * dtype.itemsize + max(oracle, side_by_side))
