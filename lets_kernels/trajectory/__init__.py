"""Loss terms that flatten the trajectory of training: SAF and MESA (Du et al., NeurIPS 2022). One gradient a step."""

from lets_kernels.trajectory.loss import trajectory_loss
from lets_kernels.trajectory.mesa import MESA
from lets_kernels.trajectory.saf import SAF

__all__ = ["MESA", "SAF", "trajectory_loss"]
