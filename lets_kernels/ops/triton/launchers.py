"""The launchers of all ops, each with one Call as argument. torch.compile sees the operators instead of these."""

from lets_kernels.ops.triton.average import *
from lets_kernels.ops.triton.combine import *
from lets_kernels.ops.triton.mask import *
from lets_kernels.ops.triton.noise import *
from lets_kernels.ops.triton.norm import *
from lets_kernels.ops.triton.peaks import *
from lets_kernels.ops.triton.perturb import *
from lets_kernels.ops.triton.rho import *
from lets_kernels.ops.triton.step import *
