"""What ops need to know of the memory of tensors."""

import sys

import torch
from torch import Tensor


def is_dense(t: Tensor) -> bool:
    """True if the elements fill one stretch of memory without holes or overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(t.stride(), t.shape, strict=True) if si != 1):
        if stride != expected:
            return t.numel() == 0
        expected *= size
    return True


def is_fake(t: Tensor) -> bool:
    """True for a tensor of torch's tracers, which has a shape but no memory."""
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    return fakes is not None and isinstance(t, fakes.FakeTensor)


def capturing() -> bool:
    """True while the work of the current stream goes into a CUDA graph instead of running."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
