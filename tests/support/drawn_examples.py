"""How many examples hypothesis draws, and how: the same ones at every run, new ones where their number is asked for."""

import os

from hypothesis import HealthCheck, Phase, settings

#: LETS_KERNELS_EXAMPLES, or 0: the examples of every run.
EXAMPLES = int(os.environ.get("LETS_KERNELS_EXAMPLES", "0"))


def drawn(few: int, **options):
    """``few`` examples, or as many new ones as were asked for. What fails is shrunk, and kept nowhere."""
    defaults = {
        "max_examples": EXAMPLES or few,
        "derandomize": not EXAMPLES,
        "deadline": None,
        "database": None,
        "report_multiple_bugs": False,
        "phases": (Phase.generate, Phase.shrink),
        "suppress_health_check": list(HealthCheck),
    }
    return settings(**defaults | options)
