"""The few scalars that cross ranks, so that all ranks take the same step to the bit."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lets_kernels.space import shards

ALONE = "alone"


def check_whole(name: str) -> None:
    """``TypeError`` if ZeroRedundancyOptimizer builds the optimizer: it would give each rank a part of the parameters.

    Norms, perturbations and passes need all parameters, and nothing shows that a part is not the whole network.
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
    """The ranks that train one model together, and means of scalars over these ranks.

    Under DistributedDataParallel the ranks hold the same weights and the same (already reduced) gradients. Their sums
    may still differ in the last bit, since the order of summation depends on the machine. The means are the same on
    every rank; if a value is not finite on one rank, the mean is not finite on any rank. Each rank holds a part of a
    DTensor (:mod:`lets_kernels.space.shards`).

    Args:
        group: a process group; ``"alone"``, which sends nothing; or None, to look for a group: see :meth:`find`.
    """

    def __init__(self, group: "dist.ProcessGroup | str | None" = None) -> None:
        if isinstance(group, str) and group != ALONE:
            raise ValueError(f"process_group must be a process group, {ALONE!r} or None, not {group!r}")
        self.asked = group
        self.groups: list[dist.ProcessGroup | None] = []
        #: True if there are several ranks, and nothing says whether they train one model together.
        self.unclear = False
        if group is not None:
            self.find(None, [])

    def __deepcopy__(self, memo: object) -> "Replicas":
        return self  # a process group belongs to this process, and cannot be copied

    def __reduce__(self) -> str | tuple[type["Replicas"], tuple[Any]]:
        if self.asked is not None and not isinstance(self.asked, str):
            raise TypeError("an optimizer with a process_group cannot be pickled; save its state_dict()")
        return Replicas, (self.asked,)

    def any(self, flag: bool, home: torch.device) -> bool:
        """True if ``flag`` is True on any rank. Waits for the other ranks, and for the device."""
        if not self.groups:
            return flag
        found = torch.full((), float(flag), device=home)
        for group in self.groups:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
        return bool(found > 0)

    def find(self, model: torch.nn.Module | None, params: Sequence[Tensor]) -> None:
        """Take the given group; or the group of the DTensors' mesh; or the group of a DistributedDataParallel model."""
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
        """This rank's place in the group; all ranks take over the radius of rank 0."""
        return max((dist.get_rank(group) for group in self.groups), default=0)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a float64 tensor over ranks: one all-reduce, or one a mesh dimension if no group has all."""
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
