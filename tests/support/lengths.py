"""How long the long tests are: in every run a part, with LETS_KERNELS_LONG=1 (`make long`) all of what they promise."""

import os

WHOLE = os.environ.get("LETS_KERNELS_LONG") == "1"


def at_length(whole, part):
    """``whole`` where the tests are run at length, otherwise ``part``."""
    return whole if WHOLE else part
