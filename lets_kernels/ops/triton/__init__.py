"""Every op as Triton kernels: the fallback for GPUs without a built extension, and the portable path.

The functions, their arguments and their meaning are those of :mod:`lets_kernels.ops.reference`. Called from eager code
they launch at once; under ``torch.compile`` they are the operators ``torch.ops.lets_kernels_triton.*``, whose fake
kernels tell the shapes without running anything. With ``TRITON_INTERPRET=1`` set before the import, Triton's
interpreter runs them, on CPU tensors.

Importing this module raises ``ImportError`` where Triton is missing or too old.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MINIMUM = (3, 6)

try:
    import triton as _triton
except ImportError as error:
    raise ImportError(f"Triton is not installed ({error})") from error
if tuple(int(x) for x in _triton.__version__.split(".")[:2]) < MINIMUM:
    raise ImportError(f"Triton {_triton.__version__} is too old; {'.'.join(map(str, MINIMUM))} or later is needed")

VERSION: str = _triton.__version__

from lets_kernels.ops.triton import launch, norm, perturb, rho, step  # noqa: E402
from lets_kernels.ops.triton.device import INTERPRETED as INTERPRETED  # noqa: E402


def refuses() -> str | None:
    """Why Triton cannot launch anything here, in words, or None: its driver is compiled at the first use, in C."""
    try:
        _triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"Triton's driver does not start ({type(error).__name__}: {error}); it needs a C compiler"
    return None


SCHEMAS = (
    "grad_norm(Tensor[] vectors, Tensor[] params, Tensor table, Tensor? filter_norms, float xi, float q) -> Tensor",
    "filter_norms(Tensor[] params, Tensor table, Tensor(a!) out) -> ()",
    "perturb_(Tensor(a!)[] params, Tensor[] vectors, Tensor(b!) saved, Tensor(c!) dirty, Tensor table, "
    "Tensor? filter_norms, float xi, float q, Tensor total, Tensor rho) -> ()",
    "restore_(Tensor(a!)[] params, Tensor saved, Tensor(b!) dirty, Tensor table) -> ()",
    "restore_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor saved, Tensor(c!) dirty, "
    "Tensor table, Tensor gate, float lr, float momentum, float weight_decay, bool nesterov, bool maximize) -> ()",
    "restore_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, Tensor saved, Tensor(e!) dirty, Tensor table, Tensor gate, float lr, float beta1, "
    "float beta2, float eps, float weight_decay, bool decoupled, bool maximize) -> ()",
    "rho_grad_diagonal(Tensor[] val, Tensor[] train, Tensor[] perturbed, Tensor[] vectors, Tensor[] params, "
    "Tensor table, Tensor? filter_norms, float xi, float q) -> Tensor",
    "rho_grad_secant(Tensor[] val, Tensor[] train, Tensor[] perturbed, Tensor[] first, Tensor table) -> Tensor",
    "all_finite_(Tensor[] values, Tensor(a!) skipped) -> Tensor",
)

_library = torch.library.Library("lets_kernels_triton", "DEF")


def _fake_scalar(tensors: list[Tensor], *_: object, **__: object) -> Tensor:
    return torch.empty((), dtype=torch.float64, device=tensors[0].device if tensors else "cpu")


def _fake_nothing(*_: object, **__: object) -> None:
    return None


def _op(name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
    """The op: its launcher, or its operator while torch.compile traces."""
    schema = next(s for s in SCHEMAS if s.startswith(f"{name}("))
    _library.define(schema)
    for key in ("CPU", "CUDA", "XPU"):
        _library.impl(name, launcher, key)
    fake = _fake_nothing if schema.endswith("()") else _fake_scalar
    torch.library.register_fake(f"lets_kernels_triton::{name}", fake, lib=_library)
    operator = getattr(torch.ops.lets_kernels_triton, name).default

    def op(*arguments: Any) -> Any:
        return operator(*arguments) if torch.compiler.is_compiling() else launcher(*arguments)

    op.__name__, op.__doc__ = name, f"As :func:`lets_kernels.ops.reference.{name}`."
    return op


def pack(tensors: list[Tensor], anchor: Tensor) -> list[Tensor]:
    """As :func:`lets_kernels.ops.native.pack`: the list with its addresses, read once for several ops."""
    return tensors if torch.compiler.is_compiling() else launch.Packed(tensors)


grad_norm = _op("grad_norm", norm.grad_norm)
filter_norms = _op("filter_norms", norm.filter_norms)
perturb_ = _op("perturb_", perturb.perturb_)
restore_ = _op("restore_", perturb.restore_)
restore_sgd_ = _op("restore_sgd_", step.restore_sgd_)
restore_adamw_ = _op("restore_adamw_", step.restore_adamw_)
rho_grad_diagonal = _op("rho_grad_diagonal", rho.rho_grad_diagonal)
rho_grad_secant = _op("rho_grad_secant", rho.rho_grad_secant)
all_finite_ = _op("all_finite_", norm.all_finite_)
