"""The optimizers: an engine, and one short file for each family of methods."""

from lets_kernels.optimizers.asam import ASAM
from lets_kernels.optimizers.lets import LETSASAM, LETSSAM
from lets_kernels.optimizers.sam import SAM

__all__ = ["ASAM", "LETSASAM", "LETSSAM", "SAM"]
