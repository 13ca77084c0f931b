"""Where to perturb: the direction part of a method."""

from lets_kernels.direction.average import Friendly, Smoothed
from lets_kernels.direction.base import Ascent, Direction, Perturbation, check_xi
from lets_kernels.direction.gradient import Adaptive, Fisher, Gradient
from lets_kernels.direction.mask import Dropped, Masked
from lets_kernels.direction.noise import Gaussian, Posterior, RandomStart

__all__ = [
    "Adaptive",
    "Ascent",
    "Direction",
    "Dropped",
    "Fisher",
    "Friendly",
    "Gaussian",
    "Gradient",
    "Masked",
    "Perturbation",
    "Posterior",
    "RandomStart",
    "Smoothed",
    "check_xi",
]
