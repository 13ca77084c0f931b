"""The optimizers: an engine, and one short file for each family of methods."""

from lets_kernels.methods.asam import ASAM
from lets_kernels.methods.bsam import BSAM
from lets_kernels.methods.esam import ESAM, DeltaSAM
from lets_kernels.methods.fisher import FisherSAM, SparseSAM
from lets_kernels.methods.friendly import FriendlySAM, VaSSO
from lets_kernels.methods.gsam import GSAM, RGSAM, GradientNormPenalty
from lets_kernels.methods.lets import LETSASAM, LETSSAM
from lets_kernels.methods.looksam import AESAM, AELookSAM, LookSAM
from lets_kernels.methods.rsam import RSAM, RandomSAM
from lets_kernels.methods.rst import RST
from lets_kernels.sam import SAM
from lets_kernels.step.convention import ClosureWarning

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
