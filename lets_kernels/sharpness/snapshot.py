"""A measurement leaves nothing behind: weights, buffers, modes and random numbers are as they were, bit for bit.

There is no context manager. An interrupt between the instructions that leave one is not seen by it; it is seen here,
since both the measurement and its end stand in one ``try``.
"""

import random
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")


class Snapshot:
    """What a measurement may touch, as it was: weights, buffers, training modes, random numbers, autograd's mode."""

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter]) -> None:
        self.params = params
        self.weights = [p.detach().clone() for p in params]
        self._versions = [p._version for p in params]
        self._modes = [(m, m.training) for m in model.modules()]
        self._buffers = [
            (m, name, b, None if b is None else b.detach().clone())
            for m in model.modules()
            for name, b in m._buffers.items()
        ]
        self._grad_enabled = torch.is_grad_enabled()
        self._python = random.getstate()
        self._numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        self._numbers = {torch.device("cpu"): torch.get_rng_state()}
        for device in {p.device for p in params if p.device.type != "cpu"}:
            self._numbers[device] = torch.get_device_module(device.type).get_rng_state(device)

    def replay(self) -> None:
        """Every pass draws the same random numbers, so that the loss is a function of the weights."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        for device, state in self._numbers.items():
            if device.type == "cpu":
                torch.set_rng_state(state)
            else:
                torch.get_device_module(device.type).set_rng_state(state, device)

    def restore(self) -> None:
        """May be called again if an interrupt fell into it."""
        torch.set_grad_enabled(False)
        for p, w, version in zip(self.params, self.weights, self._versions, strict=True):
            if p._version != version:
                p.copy_(w)
        for module, name, buffer, copy in self._buffers:
            module._buffers[name] = buffer
            if buffer is not None and copy is not None and not torch.equal(buffer, copy):
                buffer.copy_(copy)
        for module, training in self._modes:
            module.training = training
        self.replay()
        forget_casts()
        torch.set_grad_enabled(self._grad_enabled)


class Holding(Protocol):
    """What :func:`held` needs of an object: a beginning, an end that may be called twice, and whether it has begun."""

    @property
    def begun(self) -> bool: ...

    def begin(self) -> None: ...

    def end(self) -> None: ...


H = TypeVar("H", bound=Holding)


def held(measure: Callable[Concatenate[H, P], R]) -> Callable[Concatenate[H, P], R]:
    """A measurement of its first argument, which is as before when it is over, whatever ended it."""

    @wraps(measure)
    def run(at: H, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if at.begun:
            return measure(at, *args, **kwargs)
        try:
            at.begin()
            found = measure(at, *args, **kwargs)
            at.end()
        except BaseException:
            at.end()
            raise
        return found

    return run


def forget_casts() -> None:
    """Autocast remembers the casts of weights, within the caller's context too; they are old once weights move."""
    if torch.is_autocast_cache_enabled():
        torch.clear_autocast_cache()


def detached(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Gradients outside of autograd and dense, with zeros where there is none."""
    made = []
    for t, p in zip(tensors, like, strict=True):
        t = torch.zeros_like(p) if t is None else t.detach()
        made.append(t.to_dense() if t.is_sparse else t)
    return made
