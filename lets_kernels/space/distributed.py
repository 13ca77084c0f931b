"""The few scalars that cross ranks, so that all of them take the same step to the bit."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lets_kernels.space import shards

ALONE = "alone"


def check_whole(name: str) -> None:
    """Refuse to be built by ZeroRedundancyOptimizer, which gives each rank a part of the parameters: ``TypeError``.

    Norms, perturbations and passes are of all parameters, and nothing tells a part from a whole network.
    """
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe(1) if zero is not None else None
    while frame is not None:
        if frame.f_code.co_filename == zero.__file__:  # type: ignore[union-attr]
            raise TypeError(
                f"ZeroRedundancyOptimizer(params, optimizer_class={name}) would perturb each rank's part of the "
                "parameters by itself. Put it inside: "
                f"{name}(params, ZeroRedundancyOptimizer(params, optimizer_class=torch.optim.SGD, ...), model=model)"
            )
        frame = frame.f_back


class Replicas:
    """The ranks that train one model together, and the mean of a scalar over them.

    Under DistributedDataParallel they hold the same weights and the same (already reduced) gradients. Their sums may
    still differ in the last bit, since summation order depends on the machine; the means are the same everywhere, and a
    value that is not finite on one rank is not finite on any. Of DTensors each rank holds a part
    (:mod:`lets_kernels.space.shards`).

    Args:
        group: a process group; ``"alone"``, where nothing is sent; or None, to look for it: see :meth:`find`.
    """

    def __init__(self, group: "dist.ProcessGroup | str | None" = None) -> None:
        if isinstance(group, str) and group != ALONE:
            raise ValueError(f"process_group must be a process group, {ALONE!r} or None, not {group!r}")
        self.asked = group
        self.groups: list[dist.ProcessGroup | None] = []
        #: Several ranks are there, and nothing says whether they train one model together.
        self.unclear = False
        if group is not None:
            self.find(None, [])

    def __deepcopy__(self, memo: object) -> "Replicas":
        return self  # a process group is this process's own

    def __reduce__(self) -> str | tuple[type["Replicas"], tuple[Any]]:
        if self.asked is not None and not isinstance(self.asked, str):
            raise TypeError("an optimizer with a process_group cannot be pickled; save its state_dict()")
        return Replicas, (self.asked,)

    def any(self, flag: bool, home: torch.device) -> bool:
        """Is it true on any rank? Waits for the others, and for the device."""
        if not self.groups:
            return flag
        found = torch.full((), float(flag), device=home)
        for group in self.groups:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
        return bool(found > 0)

    def find(self, model: torch.nn.Module | None, params: Sequence[Tensor]) -> None:
        """Take the group that was given; else that of DTensors' mesh; else that of a DistributedDataParallel model."""
        self.unclear = False
        if self.asked is not None:
            self.groups = [] if isinstance(self.asked, str) else [self.asked]
            return
        self.groups = []
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        mesh = shards.groups_of(params)
        if mesh is not None:
            self.groups = mesh
        elif isinstance(model, torch.nn.parallel.DistributedDataParallel):
            self.groups = [model.process_group]
        else:
            self.unclear = True

    @property
    def rank(self) -> int:
        """This rank's place among them; 0 is the one whose radius is taken over."""
        return max((dist.get_rank(group) for group in self.groups), default=0)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks of a float64 tensor; one all-reduce (one a mesh dimension, where no group has all)."""
        if not self.groups:
            return values
        reduced, count = values.detach().clone(), 1
        for group in self.groups:
            dist.all_reduce(reduced, group=group)
            count *= dist.get_world_size(group)
        return reduced / count

    def means(self, values: list[Tensor]) -> list[Tensor]:
        """:meth:`mean` of several 0-d tensors, in one all-reduce."""
        return list(self.mean(torch.stack(values)).unbind()) if self.groups else values

    def agree(self, values: list[Tensor], own: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The means of ``values``, and the first rank's ``own``, in the same all-reduce."""
        if not self.groups:
            return values, own
        count = len(values)
        mine = torch.stack([*values, *own])
        if self.rank != 0:
            mine[count:] = 0
        size = 1
        for group in self.groups:
            dist.all_reduce(mine, group=group)
            size *= dist.get_world_size(group)
        return list((mine[:count] / size).unbind()), list(mine[count:].unbind())
