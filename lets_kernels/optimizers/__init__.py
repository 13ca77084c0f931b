"""The optimizers: an engine, and one short file for each family of methods."""

from lets_kernels.optimizers.asam import ASAM
from lets_kernels.optimizers.bsam import BSAM
from lets_kernels.optimizers.convention import ClosureWarning
from lets_kernels.optimizers.esam import ESAM, DeltaSAM
from lets_kernels.optimizers.fisher import FisherSAM, SparseSAM
from lets_kernels.optimizers.friendly import FriendlySAM, VaSSO
from lets_kernels.optimizers.gsam import GSAM, RGSAM, GradientNormPenalty
from lets_kernels.optimizers.lets import LETSASAM, LETSSAM
from lets_kernels.optimizers.looksam import AESAM, AELookSAM, LookSAM
from lets_kernels.optimizers.rsam import RSAM, RandomSAM
from lets_kernels.optimizers.rst import RST
from lets_kernels.optimizers.sam import SAM

__all__ = [
    "AESAM",
    "ASAM",
    "BSAM",
    "ESAM",
    "GSAM",
    "LETSASAM",
    "LETSSAM",
    "RGSAM",
    "RSAM",
    "RST",
    "SAM",
    "AELookSAM",
    "ClosureWarning",
    "DeltaSAM",
    "FisherSAM",
    "FriendlySAM",
    "GradientNormPenalty",
    "LookSAM",
    "RandomSAM",
    "SparseSAM",
    "VaSSO",
]
