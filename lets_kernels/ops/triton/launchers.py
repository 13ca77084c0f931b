"""The launchers of all ops, as a backend: what torch.compile does not see, and the operators stand for."""

from torch import Tensor

from lets_kernels.ops.triton import launch
from lets_kernels.ops.triton.average import *
from lets_kernels.ops.triton.bsam import *
from lets_kernels.ops.triton.combine import *
from lets_kernels.ops.triton.mask import *
from lets_kernels.ops.triton.noise import *
from lets_kernels.ops.triton.norm import *
from lets_kernels.ops.triton.peaks import *
from lets_kernels.ops.triton.perturb import *
from lets_kernels.ops.triton.rho import *
from lets_kernels.ops.triton.step import *


def pack(tensors: list[Tensor], anchor: Tensor) -> list[Tensor]:
    """As :func:`lets_kernels.ops.native.pack`: the list with its addresses, read once for several ops."""
    return launch.Packed(tensors)
