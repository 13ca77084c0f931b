"""Every op through the compiled extension, ``torch.ops.lets_kernels.*``.

Importing this module loads ``lets_kernels._C`` and raises ``ImportError`` where it was not built. The names below are
the registered ops themselves; schemas are in ``csrc/ops.cpp``. What stands here in Python are the fake kernels, from
which torch.compile and ``torch.library.opcheck`` learn the shapes without running anything.
"""

import os

import torch
from torch import Tensor

from lets_kernels import _C  # type: ignore[attr-defined]

_ops = torch.ops.lets_kernels
grad_norm = _ops.grad_norm.default
filter_norms = _ops.filter_norms.default
perturb_ = _ops.perturb_.default
restore_ = _ops.restore_.default
restore_sgd_ = _ops.restore_sgd_.default
restore_adamw_ = _ops.restore_adamw_.default
rho_grad_diagonal = _ops.rho_grad_diagonal.default
rho_grad_secant = _ops.rho_grad_secant.default
all_finite_ = _ops.all_finite_.default

OPS = (
    grad_norm,
    filter_norms,
    perturb_,
    restore_,
    restore_sgd_,
    restore_adamw_,
    rho_grad_diagonal,
    rho_grad_secant,
    all_finite_,
)


def _fake_scalar(tensors: list[Tensor], *_: object, **__: object) -> Tensor:
    return torch.empty((), dtype=torch.float64, device=tensors[0].device if tensors else "cpu")


def _fake_nothing(*_: object, **__: object) -> None:
    return None


for _op in OPS:
    _returns = _op._schema.returns
    torch.library.register_fake(_op.name(), _fake_scalar if _returns else _fake_nothing)

if "LETS_KERNELS_CPU_ISA" in os.environ:
    _C.use_cpu_isa(os.environ["LETS_KERNELS_CPU_ISA"])
