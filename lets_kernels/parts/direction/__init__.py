"""In which direction to perturb: the direction part of a method."""

from lets_kernels.parts.direction.ahead import Ahead
from lets_kernels.parts.direction.average import Friendly, Smoothed
from lets_kernels.parts.direction.base import Ascent, Direction, Perturbation, check_xi
from lets_kernels.parts.direction.gradient import Adaptive, Fisher, Gradient
from lets_kernels.parts.direction.mask import Dropped, Masked
from lets_kernels.parts.direction.momentum import Momentum
from lets_kernels.parts.direction.multistep import MultiStep
from lets_kernels.parts.direction.noise import Gaussian, Posterior, RandomStart

__all__ = [
    "Adaptive",
    "Ahead",
    "Ascent",
    "Direction",
    "Dropped",
    "Fisher",
    "Friendly",
    "Gaussian",
    "Gradient",
    "Masked",
    "Momentum",
    "MultiStep",
    "Perturbation",
    "Posterior",
    "RandomStart",
    "Smoothed",
    "check_xi",
]
