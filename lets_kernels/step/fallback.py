"""The word to users whose parameters have no kernels, though they could have them."""

import os
import warnings
from collections.abc import Sequence

from lets_kernels import ops
from lets_kernels.ops.memory import is_fake
from lets_kernels.space.buckets import Bucket

#: The devices that there are kernels for.
_COULD = ("cpu", "cuda", "xpu")
_said: set[str] = set()


def warn_without_kernels(requested: str, buckets: Sequence[Bucket]) -> None:
    """Warn, once a process, if parameters run without kernels that nobody has declined: why, and what to do.

    Args:
        requested: the optimizer's argument ``backend``.
        buckets: its buckets.
    """
    if _said or requested != "auto" or os.environ.get(ops.ENVIRONMENT):
        return
    slow = [b for b in buckets if b.backend == "foreach" and b.device.type in _COULD and not is_fake(b.params[0])]
    if slow:
        device = slow[0].device
        _said.add(device.type)
        reasons = "".join(f"; {name}: {ops.refusal(name, device)}" for name in ops.automatic(device)[:-1])
        warnings.warn(
            f"no compiled kernels run here: the steps of parameters on {device} go through PyTorch's own functions, "
            "right but slower. backend='foreach' asks for them, and for no warning; 'python -m lets_kernels' shows "
            f"what runs{reasons}",
            UserWarning,
            stacklevel=2,
        )
