"""The launchers of all ops: what torch.compile does not see, and the operators stand for. Each takes one Call."""

from lets_kernels.ops.triton.average import *
from lets_kernels.ops.triton.combine import *
from lets_kernels.ops.triton.mask import *
from lets_kernels.ops.triton.noise import *
from lets_kernels.ops.triton.norm import *
from lets_kernels.ops.triton.peaks import *
from lets_kernels.ops.triton.perturb import *
from lets_kernels.ops.triton.rho import *
from lets_kernels.ops.triton.step import *
