"""Sharpness-aware training for PyTorch: SAM, ASAM and a radius that is learned (LETS), on fused kernels."""

from lets_kernels._version import __version__
from lets_kernels.descent import Descent, Perturbed
from lets_kernels.direction import Adaptive, Direction, Gradient
from lets_kernels.learned import LearnedRadius
from lets_kernels.ops import backends
from lets_kernels.optimizers import ASAM, LETSASAM, LETSSAM, SAM
from lets_kernels.precision import PrecisionWarning
from lets_kernels.radius import ConstantRadius, Radius, ScheduledRadius
from lets_kernels.schedule import Always, Schedule

__all__ = [
    "ASAM",
    "LETSASAM",
    "LETSSAM",
    "SAM",
    "Adaptive",
    "Always",
    "ConstantRadius",
    "Descent",
    "Direction",
    "Gradient",
    "LearnedRadius",
    "Perturbed",
    "PrecisionWarning",
    "Radius",
    "Schedule",
    "ScheduledRadius",
    "__version__",
    "backends",
]
