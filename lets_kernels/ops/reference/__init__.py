"""Every op in plain PyTorch: the formulas as the papers print them, the oracle's counterpart and the fallback.

The functions, their arguments and their meaning are those of :mod:`lets_kernels.ops.native`; see
:mod:`lets_kernels.ops` for what a run, a table and a gate are. Nothing here reads a value on the host.
"""

from torch import Tensor

from lets_kernels.ops.reference.average import average_, posterior_ascent_
from lets_kernels.ops.reference.combine import combine_, displacement_dots, dots
from lets_kernels.ops.reference.mask import count_above, masked_, select_
from lets_kernels.ops.reference.noise import noise_
from lets_kernels.ops.reference.norm import all_finite_, filter_norms, grad_norm, largest, peaks_
from lets_kernels.ops.reference.perturb import perturb_, restore_
from lets_kernels.ops.reference.rho import rho_grad_diagonal, rho_grad_secant
from lets_kernels.ops.reference.step import restore_adamw_, restore_bsam_, restore_sgd_

__all__ = [
    "all_finite_",
    "average_",
    "combine_",
    "count_above",
    "displacement_dots",
    "dots",
    "filter_norms",
    "grad_norm",
    "largest",
    "masked_",
    "noise_",
    "pack",
    "peaks_",
    "perturb_",
    "posterior_ascent_",
    "restore_",
    "restore_adamw_",
    "restore_bsam_",
    "restore_sgd_",
    "rho_grad_diagonal",
    "rho_grad_secant",
    "select_",
]


def pack(tensors: list[Tensor], anchor: Tensor) -> list[Tensor]:
    """As :func:`lets_kernels.ops.native.pack`; here a list stays a list."""
    return tensors
