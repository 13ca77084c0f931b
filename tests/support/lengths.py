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
    numbers = {}

    def pairs(row):
        """A bit for each two values of the row, and for each one."""
        cells = list(enumerate(row))
        found = 0
        for i, cell in enumerate(cells):
            for other in cells[i:]:
                found |= 1 << numbers.setdefault((cell, other), len(numbers))
        return found

    first %= max(1, len(rows))
    left = [(pairs(row), place) for place, row in [*enumerate(rows)][first:] + [*enumerate(rows)][:first]]
    missing, chosen = (1 << len(numbers)) - 1, []
    while missing:
        best = max(left, key=lambda one: (one[0] & missing).bit_count())
        missing &= ~best[0]
        chosen.append(best[1])
    return sorted(chosen)


def thinned(items):
    """The tests of which every run has a part: of the parameters of a function that is marked ``pairwise``, on each
    backend each two values of two parameters, and not each combination. All of the others, and of all tests at length.
    """
    products, kept = {}, []
    for item in items:
        if WHOLE or item.get_closest_marker("pairwise") is None or not hasattr(item, "callspec"):
            kept.append(item)
        else:
            where = dict(item.callspec.indices)
            backend = where.pop("backend", 0)
            function = item.nodeid.partition("[")[0]
            products.setdefault((function, backend), []).append((tuple(sorted(where.items())), item))
    for (_, backend), found in products.items():
        places = pairwise([[value for _, value in where] for where, _ in found], 7 * backend)
        kept += [found[place][1] for place in places]
    wanted = {id(item) for item in kept}
    return [item for item in items if id(item) in wanted]
