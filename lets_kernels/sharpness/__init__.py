"""How sharp is the minimum? What the papers measure, at a model, a loss and a data loader.

``Objective`` is the loss as a function of the weights. ``in_ball``, ``along_gradient`` and ``m_sharpness`` measure how
far it rises; ``eigenvalues``, ``trace`` and ``spectrum`` how it bends; ``line`` and ``plane`` are for looking at it;
``Watch`` measures during training. ``plots`` draws, with matplotlib. docs/sharpness.md shows each of them.
"""

from lets_kernels.sharpness.ball import Rise, along_gradient, in_ball, m_sharpness
from lets_kernels.sharpness.hessian import Eigenvalues, Spectrum, Trace, eigenvalues, spectrum, trace
from lets_kernels.sharpness.landscape import Line, Plane, direction, line, plane
from lets_kernels.sharpness.objective import Objective, samples
from lets_kernels.sharpness.watch import Gap, Watch, generalisation_gap

__all__ = [
    "Eigenvalues",
    "Gap",
    "Line",
    "Objective",
    "Plane",
    "Rise",
    "Spectrum",
    "Trace",
    "Watch",
    "along_gradient",
    "direction",
    "eigenvalues",
    "generalisation_gap",
    "in_ball",
    "line",
    "m_sharpness",
    "plane",
    "samples",
    "spectrum",
    "trace",
]
