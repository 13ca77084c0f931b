"""Every op in plain PyTorch: the formulas as the papers print them, the oracle's counterpart and the fallback.

The functions and their arguments are declared in :mod:`lets_kernels.ops.declared`; see :mod:`lets_kernels.ops` for what
a run, a table and a gate are. Nothing here reads a value on the host.
"""

from torch import Tensor

from lets_kernels.ops.reference.average import *
from lets_kernels.ops.reference.combine import *
from lets_kernels.ops.reference.mask import *
from lets_kernels.ops.reference.noise import *
from lets_kernels.ops.reference.norm import *
from lets_kernels.ops.reference.perturb import *
from lets_kernels.ops.reference.rho import *
from lets_kernels.ops.reference.step import *


def pack(tensors: list[Tensor], anchor: Tensor, addresses: object = None) -> list[Tensor]:
    """As :func:`lets_kernels.ops.native.pack`; here a list stays a list."""
    return tensors
