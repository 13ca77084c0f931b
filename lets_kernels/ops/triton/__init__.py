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
from torch.utils._pytree import tree_leaves

MINIMUM = (3, 6)

try:
    import triton as _triton
except ImportError as error:
    raise ImportError(f"Triton is not installed ({error})") from error
if tuple(int(x) for x in _triton.__version__.split(".")[:2]) < MINIMUM:
    raise ImportError(f"Triton {_triton.__version__} is too old; {'.'.join(map(str, MINIMUM))} or later is needed")

VERSION: str = _triton.__version__

from lets_kernels.ops.triton import (  # noqa: E402
    average,
    bsam,
    combine,
    launch,
    mask,
    noise,
    norm,
    peaks,
    perturb,
    rho,
    step,
)
from lets_kernels.ops.triton.device import INTERPRETED as INTERPRETED  # noqa: E402
from lets_kernels.ops.triton.schemas import SCHEMAS  # noqa: E402


def refuses() -> str | None:
    """Why Triton cannot launch anything here, in words, or None: its driver is compiled at the first use, in C."""
    try:
        _triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"Triton's driver does not start ({type(error).__name__}: {error}); it needs a C compiler"
    return None


_library = torch.library.Library("lets_kernels_triton", "DEF")


def _fake(name: str, schema: str) -> Callable[..., Tensor | None]:
    """What an op returns: sums, on the device of the first tensor (of no runs: of the run table)."""
    shape = (3,) if name in ("dots", "displacement_dots") else ()

    def sums(*arguments: Any) -> Tensor:
        first = next(filter(torch.is_tensor, tree_leaves(arguments)))
        return torch.empty(shape, dtype=torch.float64, device=first.device)

    return (lambda *_: None) if schema.endswith("()") else sums


def _op(name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
    """The op: its launcher, or its operator while torch.compile traces."""
    schema = next(s for s in SCHEMAS if s.startswith(f"{name}("))
    _library.define(schema)
    for key in ("CPU", "CUDA", "XPU"):
        _library.impl(name, launcher, key)
    torch.library.register_fake(f"lets_kernels_triton::{name}", _fake(name, schema), lib=_library)
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
dots = _op("dots", combine.dots)
displacement_dots = _op("displacement_dots", combine.displacement_dots)
combine_ = _op("combine_", combine.combine_)
average_ = _op("average_", average.average_)
posterior_ascent_ = _op("posterior_ascent_", average.posterior_ascent_)
restore_bsam_ = _op("restore_bsam_", bsam.restore_bsam_)
noise_ = _op("noise_", noise.noise_)
masked_ = _op("masked_", mask.masked_)
count_above = _op("count_above", mask.count_above)
select_ = _op("select_", mask.select_)
largest = _op("largest", peaks.largest)
peaks_ = _op("peaks_", peaks.peaks_)
all_finite_ = _op("all_finite_", norm.all_finite_)
