"""Memory: what is free on this machine, and what this process takes at its peak."""

import contextlib
import ctypes
import gc
from pathlib import Path

LARGE_ENOUGH = 2**24  # bytes: below, the memory that a process holds says little about what it needs


def free_bytes() -> int | None:
    """Bytes that can be had without swapping; None where Linux does not tell."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


class Memory:
    """The memory that this process takes from here on, where Linux tells and lets its peak be reset.

    Args:
        parameters: their bytes; for few, there is no answer.
    """

    STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self, parameters: int) -> None:
        self.before = 0
        if parameters < LARGE_ENOUGH:
            return
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # else what is free in the heap already would not show
        with contextlib.suppress(OSError):
            self.before = self._read("VmRSS")
        self.reset()

    def reset(self) -> None:
        """The peak is what there is now."""
        try:
            self.RESET.write_text("5")
        except OSError:
            self.before = 0

    def _read(self, key: str) -> int:
        return next(int(x.split()[1]) * 1024 for x in self.STATUS.read_text().splitlines() if x.startswith(key))

    def peak(self, known: int) -> int | None:
        """Bytes at the peak since the reset, above those of the beginning and the ``known`` ones; None: not known."""
        return max(0, self._read("VmHWM") - self.before - known) if self.before else None
