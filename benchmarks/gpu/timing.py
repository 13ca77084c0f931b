"""Time on a device: events on a GPU, with work queued up before them so that the host's speed does not show.

On the CPU the same calls are timed with the host's clock; that is for dry runs only.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CYCLES_PER_SECOND = 2e9  # at most, so that a delay is at least as long as asked for
LONGEST_DELAY = 0.02
LEAST_ROUNDS = 3


@dataclass
class Contender:
    """What is timed. Both functions get the number of the buffer set to work on."""

    run: Callable[[int], object]
    before: Callable[[int], object] | None = None  # not timed


class Device:
    """The GPU, or for a dry run the CPU."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.cuda = self.device.type == "cuda"
        self.generator = torch.Generator(self.device).manual_seed(0)
        if self.cuda:
            properties = torch.cuda.get_device_properties(self.device)
            self.l2 = int(properties.L2_cache_size)
        else:
            self.l2 = 2**6  # so that a dry run rotates as well

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0] if self.cuda else 2**30

    def normal(self, shape: Sequence[int], sd: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.device).normal_(0, sd, generator=self.generator)

    def delay(self, seconds: float) -> None:
        """Keep the device busy this long (at most 20 ms), so that the host can queue up what is to be timed."""
        if self.cuda:
            torch.cuda._sleep(int(min(seconds, LONGEST_DELAY) * CYCLES_PER_SECOND) + 20_000)

    def mark(self) -> Any:
        """A point in the device's stream of work."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one mark to another; the device has been waited for."""
        return start.elapsed_time(end) * 1e-3 if self.cuda else end - start

    def empty_kernel(self) -> None:
        """A kernel that does nothing."""
        if self.cuda:
            torch.cuda._sleep(0)
        else:
            torch.empty(0)


def measure(
    device: Device, contenders: dict[str, Contender], rounds: int, sets: int = 1, limit: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of every round, the contenders in turn (A B C A B C …), each on another buffer set than the one before.

    Warmed up on every set. A delay at the head of each round lets the host queue up the whole round. After `limit`
    seconds there are no more rounds, but three at least.
    """
    names = list(contenders)
    hop = max(1, sets // len(names))

    def one_round(number: int) -> list[tuple[Any, Any]]:
        marks = []
        for place, name in enumerate(names):
            contender, index = contenders[name], (number + place * hop) % sets
            if contender.before:
                contender.before(index)
            start = device.mark()
            contender.run(index)
            marks.append((start, device.mark()))
        return marks

    host = 0.0
    for number in range(max(2 if device.cuda else 1, sets)):
        device.synchronize()
        start = time.perf_counter()
        one_round(number)
        host = time.perf_counter() - start
    device.synchronize()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    end_at = time.perf_counter() + limit
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() > end_at:
            break
        device.delay(1.3 * host)
        marks = one_round(number)
        device.synchronize()
        for name, (start, end) in zip(names, marks, strict=True):
            seconds[name].append(device.between(start, end))
    return seconds


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median over rounds of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def summary(seconds: Sequence[float], unit: str = "us") -> dict[str, float]:
    """Median, 20th and 80th percentile, and the number of rounds."""
    factor = {"us": 1e6, "ms": 1e3}[unit]
    found = {f"{name}_{unit}": quantile(seconds, q) * factor for name, q in (("median", 0.5), ("p20", 0.2))}
    found[f"p80_{unit}"] = quantile(seconds, 0.8) * factor
    return {**{k: round(v, 4) for k, v in found.items()}, "rounds": len(seconds)}


def copy_of(device: Device, moved: int, sets: int = 1) -> Contender:
    """A device-to-device copy that reads and writes `moved` bytes in all, on as many pairs of buffers."""
    count = max(1, moved // 8)
    sources = [device.normal((count,), 1.0) for _ in range(sets)]
    targets = [torch.empty_like(s) for s in sources]
    return Contender(lambda i: targets[i].copy_(sources[i]))
