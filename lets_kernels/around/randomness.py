"""Random numbers that depend only on a seed, a count of steps and a stream.

Nothing is drawn ahead and nothing is stored: Philox (Salmon et al., SC 2011) computes each number from its position. So
all ranks have the same numbers, a step that is taken again has the same numbers again, and a saved state needs only two
integers.
"""

from typing import Any

import torch
from torch import Tensor

from lets_kernels.ops.reference.noise import words
from lets_kernels.space.distributed import Replicas

_LOW = 0xFFFFFFFF
_HOST = 1 << 16  # the host's streams count down from the last stream
_SEEDS = 1 << 53  # a seed is sent to other ranks as a float64
#: The distance between the seeds of the parts of a sharded parameter, whose noise must differ.
_PARTS = 0x9E3779B97F4A7C15
#: The distance between the seeds of the micro-batches of a step, for what each of them draws for itself.
_PIECES = 0xC2B2AE3D27D4EB4F


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox 4x32-10: four words of 32 bits from a counter and a key."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ k, q & _LOW, (p >> 32) ^ d ^ m, p & _LOW
        k, m = (k + 0x9E3779B9) & _LOW, (m + 0xBB67AE85) & _LOW
    return a, b, c, d


class Randomness:
    """The seed and the count of an optimizer.

    Args:
        seed: in [0, 2^53). None draws a seed from torch's generator, so that ``torch.manual_seed`` determines it.
        used: False for an optimizer that draws nothing; its seed is 0, and torch's generator is not used.

    Raises:
        ValueError: the seed is out of range.
    """

    def __init__(self, seed: int | None, used: bool) -> None:
        if seed is not None and not (isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < _SEEDS):
            raise ValueError(f"seed must be an integer from 0 to 2**53 - 1, not {seed!r}")
        self.used, self.given = used, seed is not None
        if seed is None:
            seed = int(torch.randint(1 << 48, (), device="cpu")) if used else 0
        self.seed, self._agreed = seed, False
        #: (seed, count) on each device, for the ops.
        self._state = torch.tensor([seed, 0], dtype=torch.int64, device="cpu")

    def agree(self, replicas: Replicas) -> None:
        """Take over the first rank's seed: once, and again after a load, since each rank may load its own state."""
        if self.used and replicas.groups and not self._agreed:
            mine = torch.tensor(self.seed, dtype=torch.float64, device=self._state.device)
            self._take(int(replicas.agree([], [mine])[1][0]))
            self._agreed = True

    def _take(self, seed: int) -> None:
        self.seed = seed
        self._state[0] = seed

    def to(self, device: torch.device) -> None:
        self._state = self._state.to(device)

    def at(self, device: torch.device, part: int, piece: int = 0) -> Tensor:
        """(seed, count) for the ops on a device: int64, of shape [2]. Each part of a tensor has its own seed, and so
        has each ``piece`` of a batch.
        """
        state = self._state.to(device)
        if part == 0 == piece:
            return state
        shift = (part * _PARTS + piece * _PIECES) % (1 << 62)
        return state + torch.stack([state.new_full((), shift), state.new_zeros(())])

    def uniform(self, step: int, stream: int) -> float:
        """A random number in [0, 1) for a step, on the host."""
        counter = ((step >> 32) & _LOW, 0, step & _LOW, _LOW - stream)
        return philox(counter, (self.seed & _LOW, self.seed >> 32))[0] / 2.0**32

    def uniforms(self, step: int, count: int, stream: int) -> list[float]:
        """Like :meth:`uniform`, but several numbers."""
        place = torch.tensor([self.seed, step], dtype=torch.int64, device="cpu")
        return [word / 2.0**32 for word in words(0, count, place, _LOW - _HOST - stream).tolist()]

    def advance(self) -> None:
        """The step is over: the next step draws other numbers."""
        if self.used:
            self._state[1] += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "count": self._state[1].clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._take(int(state["seed"]))
        self._state[1] = state["count"]
        self._agreed = False
