"""Every op where there are no compiled kernels: the frequent ones by torch's foreach and fused functions, the others by
the reference's own functions.

The formulas, with their shapes, units and sources, are those of :mod:`lets_kernels.ops.reference`, which stays the
oracle. What is here decides on the host, where the flags and the scalars lie on the CPU and nothing waits for them; on
other devices, for fake tensors and under torch.compile every op is the reference's. Results differ from the reference's
in the last digits: torch contracts a product and a sum into one rounding, which the reference rounds apart.
"""

from lets_kernels.ops.foreach.norm import *
from lets_kernels.ops.foreach.perturb import *
from lets_kernels.ops.foreach.rho import *
from lets_kernels.ops.foreach.step import *
from lets_kernels.ops.reference import pack as pack
from lets_kernels.ops.reference.average import *
from lets_kernels.ops.reference.combine import *
from lets_kernels.ops.reference.mask import *
from lets_kernels.ops.reference.noise import *
