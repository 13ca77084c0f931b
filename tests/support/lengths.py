"""How long the long tests are: in every run a part, with LETS_KERNELS_LONG=1 (`make long`) all of what they promise."""

import os

WHOLE = os.environ.get("LETS_KERNELS_LONG") == "1"


def at_length(whole, part):
    """``whole`` where the tests are run at length, otherwise ``part``."""
    return whole if WHOLE else part


def pairwise(rows, first=0):
    """Places of some of the rows, in which each two values stand together that do so in any row, column by column.

    Each next row is the one with the most pairs that are missing yet; of equal ones the next from place ``first`` on.
    No chance is in it: the same rows give the same places.
    """
    if not rows or not rows[0]:
        return [*range(len(rows))]
    numbers = {}

    def pairs(row):
        """A bit for each two values of the row, and for each one."""
        cells = list(enumerate(row))
        found = 0
        for i, cell in enumerate(cells):
            for other in cells[i:]:
                found |= 1 << numbers.setdefault((cell, other), len(numbers))
        return found

    first %= len(rows)
    left = [(pairs(row), place) for place, row in [*enumerate(rows)][first:] + [*enumerate(rows)][:first]]
    missing, chosen = (1 << len(numbers)) - 1, []
    while missing:
        best = max(left, key=lambda one: (one[0] & missing).bit_count())
        missing &= ~best[0]
        chosen.append(best[1])
    return sorted(chosen)


def thinned(items):
    """The tests that this run has. At length and on a GPU all; else of a function that is marked ``pairwise``, on each
    backend, every two values of two of its parameters in one test at least, and not each combination of them all.
    """
    products, kept = {}, []
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if WHOLE or "pairwise" not in marks or "gpu" in marks or not hasattr(item, "callspec"):
            kept.append(item)
        else:
            values = dict(item.callspec.params)
            backend, function = values.pop("backend", None), item.nodeid.partition("[")[0]
            products.setdefault((function, backend), []).append(([repr(values[name]) for name in sorted(values)], item))
    for count, found in enumerate(products.values()):
        places = pairwise([values for values, _ in found], 7 * count)  # each backend begins with others
        kept += [found[place][1] for place in places]
    wanted = set(map(id, kept))
    return [item for item in items if id(item) in wanted]
