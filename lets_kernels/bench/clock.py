"""Time: interleaved rounds, their quantiles, what other processes do meanwhile, and a budget of seconds."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch


class Clock:
    """Seconds, and a way to leave out what is not to be timed."""

    def __init__(self) -> None:
        self._left_out = 0.0

    def __call__(self) -> float:
        return time.perf_counter() - self._left_out

    @contextmanager
    def stopped(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._left_out += time.perf_counter() - start


CLOCK = Clock()


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_seconds() -> tuple[float, float]:
    """CPU time used on this machine by all processes, and by this one; zeros where /proc does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0, 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:2])


class Others:
    """Cores that other processes keep busy. A thread that must wait for one of them makes any timing worthless."""

    LIMIT = 0.1  # of one core

    def __init__(self) -> None:
        self._start, self._before = time.perf_counter(), cpu_seconds()

    def cores(self) -> float:
        everyone, own = (now - then for now, then in zip(cpu_seconds(), self._before, strict=True))
        return max(0.0, everyone - own) / (time.perf_counter() - self._start)

    @classmethod
    def wait(cls, seconds: float) -> None:
        """Until they have been idle for two seconds, at most as long as this."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            others = cls()
            time.sleep(min(2.0, seconds))
            if others.cores() < cls.LIMIT:
                return


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of every round, and the cores that other processes kept busy meanwhile."""

    seconds: tuple[float, ...]
    others: float

    @property
    def disturbed(self) -> bool:
        return self.others > Others.LIMIT

    def quantile(self, q: float) -> float:
        """In seconds, interpolated."""
        ordered = sorted(self.seconds)
        at = q * (len(ordered) - 1)
        low = int(at)
        return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: "Timing") -> float:
        """How many times as long as ``other`` this takes: the median over rounds, so that a slow minute cancels."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    def summary(self) -> dict[str, float]:
        found = {"median_ms": self.median, "p20_ms": self.quantile(0.2), "p80_ms": self.quantile(0.8)}
        return {
            **{k: round(v * 1e3, 5) for k, v in found.items()},
            "rounds": len(self.seconds),
            "others": round(self.others, 2),
        }


LEAST_ROUNDS = 3


class Budget:
    """The seconds that a program may take, and how many rounds of something fit into what is left of them.

    Args:
        seconds: from now on.
        now: a clock, in seconds.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds, self._now, self._start = seconds, now, now()

    def used(self) -> float:
        return self._now() - self._start

    def left(self) -> float:
        return max(0.0, self.seconds - self.used())

    def rounds(self, a_round: float, share: float, most: int) -> int:
        """As many rounds of ``a_round`` seconds as fit into this share of what is left, but at most ``most``.

        At least ``LEAST_ROUNDS``, for a median; none where not even these fit into all that is left.
        """
        if LEAST_ROUNDS * a_round > self.left():
            return 0
        return max(LEAST_ROUNDS, min(most, int(share * self.left() / max(a_round, 1e-9))))


def in_turn(
    runs: Mapping[str, Callable[[], object]],
    seconds: Mapping[str, list[float]],
    rounds: int,
    late: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = CLOCK,
) -> None:
    """Runs everything in turn, A B C A B C ..., and appends the seconds of each run to its list.

    There are fewer rounds once it is ``late()``, but never fewer than ``LEAST_ROUNDS``.
    """
    for done in range(rounds):
        if done >= LEAST_ROUNDS and late():
            return
        for name, run in runs.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)


def timings(seconds: Mapping[str, list[float]], others: float) -> dict[str, Timing]:
    """What the rounds show that every contender took part in; empty if there is none (after Ctrl-C)."""
    whole = min(map(len, seconds.values()), default=0)
    return {name: Timing(tuple(values[:whole]), others) for name, values in seconds.items()} if whole else {}
