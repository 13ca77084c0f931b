"""Sharpness-aware training for PyTorch: SAM and its family, and a radius that is learned (LETS), on fused kernels."""

from lets_kernels._version import __version__
from lets_kernels.learning.auto import AutoConstants, AutoRadius
from lets_kernels.learning.learned import CurvatureWarning, LearnedRadius
from lets_kernels.methods.asam import ASAM
from lets_kernels.methods.bsam import BSAM
from lets_kernels.methods.esam import ESAM, DeltaSAM
from lets_kernels.methods.fisher import FisherSAM, SparseSAM
from lets_kernels.methods.friendly import FriendlySAM, VaSSO
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
from lets_kernels.parts.samples import Samples, SelectedSamples, WeightedSamples
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
