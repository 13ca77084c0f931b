"""Every op as Triton kernels: the portable backend, and the fallback for GPUs without a built extension.

The functions, their arguments and their meaning are those of :mod:`lets_kernels.ops.reference`. Called from eager code
they launch at once. Under ``torch.compile`` they are the operators ``torch.ops.lets_kernels_triton.*``, with fake
kernels that give the shapes without running anything. With ``TRITON_INTERPRET=1`` set before the import, Triton's
interpreter runs them, on CPU tensors.

Importing this module raises ``ImportError`` if Triton is missing or too old.
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

from lets_kernels.ops.declared import OPS, Op  # noqa: E402
from lets_kernels.ops.triton import launchers  # noqa: E402
from lets_kernels.ops.triton.device import INTERPRETED as INTERPRETED  # noqa: E402
from lets_kernels.ops.triton.launch import Call, Packed  # noqa: E402


def refuses() -> str | None:
    """Why Triton cannot launch anything here, in words, or None. The first use compiles Triton's driver, in C."""
    try:
        _triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"Triton's driver does not start ({type(error).__name__}: {error}); it needs a C compiler"
    return None


_library = torch.library.Library("lets_kernels_triton", "DEF")


def _fake(op: Op) -> Callable[..., Tensor | None]:
    """The fake result of an op: sums, on the device of the first tensor (without runs: of the run table)."""

    def sums(*arguments: Any) -> Tensor:
        first = next(filter(torch.is_tensor, tree_leaves(arguments)))
        return torch.empty(op.shape or (), dtype=torch.float64, device=first.device)

    return (lambda *_: None) if op.shape is None else sums


def _registered(op: Op) -> Callable[..., Any]:
    """The function of an op: calls its launcher, or its operator while torch.compile traces."""
    launcher: Callable[[Call], Any] = getattr(launchers, op.name)
    _library.define(op.schema)
    for key in ("CPU", "CUDA", "XPU"):
        _library.impl(op.name, lambda *arguments: launcher(Call(op, arguments)), key)
    torch.library.register_fake(f"lets_kernels_triton::{op.name}", _fake(op), lib=_library)
    operator = getattr(torch.ops.lets_kernels_triton, op.name).default

    def call(*arguments: Any) -> Any:
        return operator(*arguments) if torch.compiler.is_compiling() else launcher(Call(op, arguments))

    call.__name__, call.__doc__ = op.name, f"As :func:`lets_kernels.ops.reference.{op.name}`."
    return call


def pack(tensors: list[Tensor], anchor: Tensor, addresses: object = None) -> list[Tensor]:
    """Like :func:`lets_kernels.ops.native.pack`: the list with its addresses, read once for several ops."""
    return tensors if torch.compiler.is_compiling() else Packed(tensors)


globals().update({op.name: _registered(op) for op in OPS})
