"""Every op through the compiled libraries, ``torch.ops.lets_kernels.*``, on the CPU and, after ``load_cuda``, on GPUs.

Importing this module loads ``lets_kernels._C``, and raises ``ImportError`` if that was not built. The functions of this
module are the registered ops themselves, which :mod:`lets_kernels.ops.declared` declares. Only the fake kernels are in
Python here: from them torch.compile and ``torch.library.opcheck`` learn the shapes without running anything.
"""

import ctypes
import functools
import os
import sysconfig
from array import array
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lets_kernels import _C  # type: ignore[attr-defined]
from lets_kernels.ops import declared

#: The registered ops, by name: the functions of this module.
OPS = {op.name: getattr(torch.ops.lets_kernels, op.name).default for op in declared.OPS}
globals().update(OPS)

# The numbers are those of csrc/layout.h.
_NUMBERS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_WORTH_PACKING = 4
_READS: bool = _C.reads_lists()
_LEAST_ADDRESS = 1 << 32  # lower addresses are mostly offsets of tensors without memory
#: As in csrc/runs.h: two words that mark a list of two int64 tensors as packed here.
_PACKED = (0x6C65747353414D2B, -0x3D9B1F8A7C52E046)


class Packed(list[Tensor]):
    """The addresses of tensors, and a tensor on their device. It keeps the tensors alive."""

    tensors: list[Tensor]


def pack(tensors: list[Tensor], anchor: Tensor, addresses: object = None) -> list[Tensor]:
    """A list of dense tensors in the form with the least work on the host: see :class:`Packed`.

    The ops take it in the place of the list, as long as the tensors stay where they are; ``anchor`` is 0-d int64.
    ``addresses``: what a layout has just said of these tensors, if one was asked.
    """
    if len(tensors) < _WORTH_PACKING:
        return tensors
    words = None
    if type(addresses) is bytes:  # so nothing is traced: these tensors have memory
        words = _words.of(_NUMBERS[tensors[0].dtype], addresses, _LEAST_ADDRESS)
    if words is None:
        if torch.compiler.is_compiling():
            return tensors
        read: bytes | None = _C.addresses(tensors, _LEAST_ADDRESS) if _READS else None
        if read is None:
            found = list(map(Tensor.data_ptr, tensors))
            if min(found) < _LEAST_ADDRESS and any(t.numel() and not t.untyped_storage().nbytes() for t in tensors):
                return tensors  # a tensor has no memory of its own; the op will raise the error
            read = array("q", found).tobytes()
        words = _words.of(_NUMBERS[tensors[0].dtype], read, 0)
    packed = Packed((words, anchor))
    packed.tensors = tensors
    return packed


def _table(number: int, addresses: bytes) -> Tensor:
    """The number of a dtype, then addresses, as the ops read them."""
    return torch.frombuffer(bytearray(array("q", (*_PACKED, number)).tobytes() + addresses), dtype=torch.int64)


_words = _C.Words(_table)


def _fake_numbers(shape: tuple[int, ...], *args: object, **kwargs: object) -> Tensor:
    """New float64 numbers on the device of the call's tensors. The table, the only matrix, is always on the CPU."""
    given = (*args, *kwargs.values())
    tensors = [x[-1] for x in given if isinstance(x, list | tuple) and x and isinstance(x[-1], Tensor)]
    tensors += [x for x in given if isinstance(x, Tensor) and x.ndim != 2]
    _fake_nothing(*args, **kwargs)
    return torch.empty(shape, dtype=torch.float64, device=tensors[0].device if tensors else "cpu")


def _fake_nothing(*args: object, **kwargs: object) -> None:
    """``RuntimeError`` if some tensors have memory and others have none: then nothing can be computed."""
    given = (*args, *kwargs.values())
    lists = [x for x in given if isinstance(x, list | tuple)]
    tensors = [t for x in (*lists, given) for t in x if isinstance(t, Tensor) and (x is not given or t.ndim != 2)]
    if any(t.device.type != "meta" and not isinstance(t, FakeTensor) for t in tensors):
        raise RuntimeError("tensors on the meta device together with others: an op needs all of them on one device")


def _refuse_negated(*_: object, **__: object) -> None:
    raise RuntimeError(
        "a lazily negated or conjugated tensor: ops read memory, which holds other numbers; pass "
        "t.resolve_conj().resolve_neg()"
    )


_lazy = torch.library.Library("lets_kernels", "IMPL")  # must live as long as its registrations
for _op in declared.OPS:
    _fake = _fake_nothing if _op.shape is None else functools.partial(_fake_numbers, _op.shape)
    torch.library.register_fake(f"lets_kernels::{_op.name}", _fake)
    for _key in ("Negative", "Conjugate"):
        _lazy.impl(_op.name, _refuse_negated, _key)

if os.environ.get("LETS_KERNELS_CPU_ISA"):
    _C.use_cpu_isa(os.environ["LETS_KERNELS_CPU_ISA"])

CUDA_LIBRARY = Path(__file__).parent.parent / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"


@functools.cache
def load_cuda() -> str | None:
    """Load the CUDA kernels: None, or the reason in words why they cannot run here."""
    if not CUDA_LIBRARY.exists():
        return f"lets_kernels was installed without CUDA kernels: {_C.WITHOUT_CUDA or f'no {CUDA_LIBRARY.name}'}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:
        return f"{CUDA_LIBRARY.name} could not be loaded: {error}"
    return None


@functools.cache
def refuses_device(index: int) -> str | None:
    """Why the CUDA kernels do not run on this device, in words, or None; call ``load_cuda`` first."""
    refuses = ctypes.CDLL(str(CUDA_LIBRARY)).lets_kernels_refuses_device
    refuses.restype = ctypes.c_char_p
    reason: bytes | None = refuses(index)
    if reason is None:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return (
        f"its kernels do not run on cuda:{index} ({reason.decode()}); rebuild with "
        f"TORCH_CUDA_ARCH_LIST={major}.{minor}, or use 'triton'"
    )
