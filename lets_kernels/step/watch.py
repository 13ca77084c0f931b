"""What a closure does to zeros that stand in the place of gradients."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lets_kernels.space.shards import is_spread, version
from lets_kernels.step.now import Now
from lets_kernels.step.workspace import Workspace


class Watch:
    """Zeros in the place of gradients, by which a closure is seen to zero: it drops them, or writes zeros over them.

    They are -0, to which any gradient can be added and stays what it is, and are looked at when backward comes to them.
    """

    def __init__(self, w: Workspace, now: Now, params: Sequence[Tensor]) -> None:
        self._work, self._now, self._calls = w, now, now.zeroed
        self._before = [(p, p.grad) for p in params]
        with torch.no_grad():
            self._zeros = [_zeros_for(p) for p in params]
        self._versions = list(map(version, self._zeros))
        self._reached = [False] * len(params)
        self._zeroed = False
        self._replaced: list[Tensor | None] = []
        self._hooks: list[RemovableHandle] = []
        for i, (p, zero) in enumerate(zip(params, self._zeros, strict=True)):
            p.grad = zero
            self._hooks.append(p.register_hook(partial(self._reach, i)))

    def _reach(self, i: int, _: Tensor) -> None:
        """Backward has come to the i-th: was it dropped, or written to, before?"""
        if not self._reached[i]:
            self._reached[i] = True
            self._zeroed = self._zeroed or self._is_another(i)

    def _is_another(self, i: int) -> bool:
        (p, _), zero = self._before[i], self._zeros[i]
        if p.grad is not zero or version(zero) != self._versions[i]:
            return True
        # What goes by grad.data shows in the sign of zero alone; nobody waits for a device to look at that.
        seen = zero.numel() and zero.device.type == "cpu" and not is_spread(zero) and not zero.is_complex()
        return bool(seen and not torch.signbit(zero.flatten()[0]))

    @property
    def gradients(self) -> list[Tensor]:
        """Those that were there before."""
        return [grad for _, grad in self._before if grad is not None]

    def ends(self) -> None:
        """The closure has been called, or has failed. What it did not touch is None again."""
        for hook in self._hooks:
            hook.remove()
        for i, (p, _) in enumerate(self._before):
            if p.grad is not self._zeros[i]:
                self._replaced.append(p.grad)
            elif not self._reached[i] and not self._holds_gradient(i):
                p.grad = None

    def _holds_gradient(self, i: int) -> bool:
        """Somebody has written one without a backward of the parameter's own: FSDP and DDP do. Scaled, it is zero."""
        zero = self._zeros[i]
        return version(zero) != self._versions[i] and (is_spread(zero) or bool(zero.any()))

    def saw_zeroing(self) -> bool:
        """Did the closure zero? On every rank that takes part, if on any."""
        zeroed = self._zeroed or self._now.zeroed != self._calls
        replicas = self._work.setting.replicas
        if not replicas.groups:  # DDP puts others there at any time
            # Backward does so only where it makes a graph of itself.
            zeroed = zeroed or any(g is None or not g.requires_grad for g in self._replaced)
        return replicas.any(zeroed, self._work.progress.home)

    def give_back(self) -> None:
        """The gradients that were there before."""
        for p, grad in self._before:
            p.grad = grad


def _zeros_for(p: Tensor) -> Tensor:
    dtype = getattr(p, "grad_dtype", None) or p.dtype
    like = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    return like.neg_()
