"""Sharpness-aware training for PyTorch: SAM and its family, and a radius that is learned (LETS), on fused kernels.

Every class has a short example, which follows on these lines. There are two weights at (3, 2) with the loss
½w₁² + w₂², whose gradient is (w₁, 2w₂) = (3, 4), of length 5; and a small network with a batch of eight samples::

    >>> import torch
    >>> from torch.nn import functional
    >>> from torch.optim import SGD
    >>> from lets_kernels import *
    >>> w = torch.nn.Parameter(torch.tensor([3.0, 2.0]))
    >>> def closure():  # zeroes, computes the loss, calls backward and returns the loss
    ...     w.grad = None
    ...     loss = w[0] ** 2 / 2 + w[1] ** 2
    ...     loss.backward()
    ...     return loss.detach()
    >>> model = torch.nn.Linear(2, 3)
    >>> inputs, targets = torch.randn(8, 2), torch.randint(3, (8,))
    >>> def batch():
    ...     model.zero_grad()
    ...     loss = functional.cross_entropy(model(inputs), targets)
    ...     loss.backward()
    ...     return loss.detach()
"""

from lets_kernels._version import __version__
from lets_kernels.learning.auto import AutoConstants, AutoRadius
from lets_kernels.learning.learned import CurvatureWarning, LearnedRadius
from lets_kernels.methods.asam import ASAM
from lets_kernels.methods.base_step import BaseStepSAM
from lets_kernels.methods.bsam import BSAM
from lets_kernels.methods.esam import ESAM, DeltaSAM
from lets_kernels.methods.fisher import FisherSAM, SparseSAM
from lets_kernels.methods.friendly import FriendlySAM, VaSSO
from lets_kernels.methods.functional import FunctionalSAM
from lets_kernels.methods.gsam import GSAM, RGSAM, GradientNormPenalty
from lets_kernels.methods.late import LateSAM
from lets_kernels.methods.lengths import LESAM, USAM, LightSAM
from lets_kernels.methods.lets import LETSASAM, LETSSAM
from lets_kernels.methods.looksam import AESAM, AELookSAM, LookSAM
from lets_kernels.methods.msam import MSAM
from lets_kernels.methods.multistep import Lookbehind, MultiStepSAM
from lets_kernels.methods.rsam import RSAM, RandomSAM
from lets_kernels.methods.rst import RST
from lets_kernels.methods.sampa import SAMPa
from lets_kernels.methods.stable import StableSAM
from lets_kernels.methods.wsam import WSAM
from lets_kernels.ops import backends
from lets_kernels.parts.descent import (
    Decoupled,
    Descent,
    Gathered,
    NormPenalty,
    Perturbed,
    Renormalized,
    Reuse,
    SurrogateGap,
)
from lets_kernels.parts.direction import (
    Adaptive,
    Ahead,
    BaseStep,
    Direction,
    Dropped,
    Fisher,
    Friendly,
    Gaussian,
    Gradient,
    Masked,
    Momentum,
    MultiStep,
    Posterior,
    RandomStart,
    Smoothed,
)
from lets_kernels.parts.length import Accumulated, Length, LossEquated, Unified
from lets_kernels.parts.radius import ConstantRadius, LearningRateRadius, Radius, RadiusWarning, ScheduledRadius
from lets_kernels.parts.samples import FunctionalSamples, Samples, SelectedSamples, WeightedSamples
from lets_kernels.parts.schedule import Always, Bernoulli, Every, NormThreshold, Schedule, Tail
from lets_kernels.sam import SAM
from lets_kernels.step.convention import ClosureWarning
from lets_kernels.step.precision import PrecisionWarning
from lets_kernels.trajectory import MESA, SAF, trajectory_loss

__all__ = [
    "AESAM",
    "ASAM",
    "BSAM",
    "ESAM",
    "GSAM",
    "LESAM",
    "LETSASAM",
    "LETSSAM",
    "MESA",
    "MSAM",
    "RGSAM",
    "RSAM",
    "RST",
    "SAF",
    "SAM",
    "USAM",
    "WSAM",
    "AELookSAM",
    "Accumulated",
    "Adaptive",
    "Ahead",
    "Always",
    "AutoConstants",
    "AutoRadius",
    "BaseStep",
    "BaseStepSAM",
    "Bernoulli",
    "ClosureWarning",
    "ConstantRadius",
    "CurvatureWarning",
    "Decoupled",
    "DeltaSAM",
    "Descent",
    "Direction",
    "Dropped",
    "Every",
    "Fisher",
    "FisherSAM",
    "Friendly",
    "FriendlySAM",
    "FunctionalSAM",
    "FunctionalSamples",
    "Gathered",
    "Gaussian",
    "Gradient",
    "GradientNormPenalty",
    "LateSAM",
    "LearnedRadius",
    "LearningRateRadius",
    "Length",
    "LightSAM",
    "LookSAM",
    "Lookbehind",
    "LossEquated",
    "Masked",
    "Momentum",
    "MultiStep",
    "MultiStepSAM",
    "NormPenalty",
    "NormThreshold",
    "Perturbed",
    "Posterior",
    "PrecisionWarning",
    "Radius",
    "RadiusWarning",
    "RandomSAM",
    "RandomStart",
    "Renormalized",
    "Reuse",
    "SAMPa",
    "Samples",
    "Schedule",
    "ScheduledRadius",
    "SelectedSamples",
    "Smoothed",
    "SparseSAM",
    "StableSAM",
    "SurrogateGap",
    "Tail",
    "Unified",
    "VaSSO",
    "WeightedSamples",
    "__version__",
    "backends",
    "trajectory_loss",
]
