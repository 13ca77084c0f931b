"""The few scalars that cross ranks, so that replicas take the same step to the bit."""

import torch
import torch.distributed as dist
from torch import Tensor


class Replicas:
    """Ranks that hold the same weights and the same (already reduced) gradients, as under DistributedDataParallel.

    Their sums may still differ in the last bit, since summation order depends on the machine; the means over the group
    are the same everywhere, and a value that is not finite on one rank is not finite on any.

    Args:
        group: a process group, or None for a single process, where nothing is sent.
    """

    def __init__(self, group: "dist.ProcessGroup | None") -> None:
        self.group = group

    def __deepcopy__(self, memo: object) -> "Replicas":
        return self  # a process group is this process's own

    def __reduce__(self) -> str | tuple[type["Replicas"], tuple[None]]:
        if self.group is not None:
            raise TypeError("an optimizer with a process_group cannot be pickled; save its state_dict()")
        return Replicas, (None,)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks of a float64 tensor; one all-reduce."""
        if self.group is None:
            return values
        reduced = values.detach().clone()
        dist.all_reduce(reduced, group=self.group)
        return reduced / dist.get_world_size(self.group)

    def means(self, values: list[Tensor]) -> list[Tensor]:
        """:meth:`mean` of several 0-d tensors, in one all-reduce."""
        return list(self.mean(torch.stack(values)).unbind()) if self.group is not None else values
