"""The ops in every backend, and the choice of the backend.

A **bucket** is an index space over parameters of one device and dtype; a **run** is one parameter's stretch of it.
Numbers such as a learning rate are one for all runs, or one a run, so the parameters of several param groups take one
call. The run **table** is an int64 CPU tensor with one row a run: ``start`` (offset in the bucket's flat buffers),
``numel``, ``filter_length``, ``filter_count``, ``filter_start``. The last three say how ASAM's T scales the run:
``filter_length`` is ``UNSCALED`` for T = 1, ``ELEMENT_WISE`` for T = |θ| + ξ, ``FISHER`` for T = (1 + ξv²)^(-1/2) of a
vector v (all three in :mod:`lets_kernels.ops.declared`). Otherwise T = ‖filter‖ + ξ: element e (in memory order)
belongs to filter ``(e // filter_length) % filter_count``, whose norm is ``filter_norms[filter_start + filter]``. A list
argument holds one dense tensor a run, or a single flat buffer that ``start`` addresses.

Scalars are 0-d float64 tensors on the parameters' device, so nothing waits for the device. A **gate** is such a scalar:
0 if a gradient was not finite and the step must not happen. ``dirty`` is a 0-d int64 tensor that an op sets while
weights are perturbed. The op itself sets it, so that an interrupt between two Python instructions cannot leave the flag
and the weights in disagreement.
"""

import importlib
import os

import torch

from lets_kernels.ops import foreach, reference
from lets_kernels.ops.declared import Backend

NAMES = ("cuda", "triton", "cpu", "foreach", "reference")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ENVIRONMENT = "LETS_KERNELS_BACKEND"


def _load(name: str) -> tuple[Backend | None, str]:
    """The backend's module (None if it cannot run here) and the reason in words."""
    if name == "foreach":
        return foreach, "PyTorch's foreach and fused functions, any device"
    if name == "reference":
        return reference, "the formulas in plain PyTorch, any device"
    if name == "triton":
        try:
            triton = importlib.import_module("lets_kernels.ops.triton")
        except Exception as error:  # Triton looks for drivers when it is imported, and may raise anything
            return None, str(error)
        if triton.INTERPRETED:
            return triton, "Triton's interpreter, for tests (TRITON_INTERPRET=1)"
        if not (torch.cuda.is_available() or torch.xpu.is_available()):
            return None, "torch finds no GPU"
        reason = triton.refuses()
        return (triton, f"Triton {triton.VERSION}") if reason is None else (None, reason)
    try:
        native = importlib.import_module("lets_kernels.ops.native")
    except ImportError as error:
        return None, (
            f"the compiled extension lets_kernels._C could not be imported ({error}); reinstall with a C++ "
            "compiler and LETS_KERNELS_CPU=1 to see why"
        )
    if name == "cpu":
        return native, f"compiled C++, instruction set {native._C.cpu_isa()}"
    reason = native.load_cuda()
    listed = native._C.CUDA_ARCHITECTURES.replace(";", ", ")
    return (native, f"compiled CUDA C++ for {listed}") if reason is None else (None, reason)


_loaded: dict[str, tuple[Backend | None, str]] = {}


def load(name: str) -> tuple[Backend | None, str]:
    """Like ``_load``, but called once in a process."""
    if name not in _loaded:
        _loaded[name] = _load(name)
    return _loaded[name]


def backends() -> dict[str, str]:
    """For each backend its name, and in words what it is or why it does not run here.

    Examples:
        >>> "reference" in backends()  # always runs; the values say what the others need
        True
    """
    return {name: ("available: " if load(name)[0] else "not available: ") + load(name)[1] for name in NAMES}


def check_request(requested: str) -> str:
    """The backend that the argument asks for or, if that is "auto", the variable ``LETS_KERNELS_BACKEND``.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend cannot run here; the message says why.
    """
    source = f"backend={requested!r}"
    if requested == "auto" and os.environ.get(ENVIRONMENT):
        requested = os.environ[ENVIRONMENT]
        source = f"{ENVIRONMENT}={requested}"
    if requested == "auto":
        return requested
    if requested not in NAMES:
        raise ValueError(f"{source}: choose one of auto, {', '.join(NAMES)}")
    module, reason = load(requested)
    if module is None:
        raise RuntimeError(f"{source} does not run here: {reason}. backend='auto' takes a backend that does")
    return requested


def refusal(name: str, device: torch.device) -> str | None:
    """Why a backend has no kernels for parameters on ``device``, in words, or None if it runs there."""
    module, reason = load(name)
    if module is None:
        return reason
    kinds = {
        "cpu": ("cpu",),
        "cuda": ("cuda",),
        "triton": ("cuda", "xpu", *["cpu"] * getattr(module, "INTERPRETED", 0)),
    }
    if device.type not in kinds.get(name, (device.type,)):
        return f"it has no kernels for parameters on {device}"
    if name == "cuda":
        return module.refuses_device(device.index or 0)  # type: ignore[attr-defined]
    return None


def automatic(device: torch.device) -> tuple[str, ...]:
    """The backends that backend="auto" tries for parameters on ``device``, the fastest first."""
    return ("cpu", "foreach") if device.type == "cpu" else ("cuda", "triton", "foreach")


def choose(requested: str, device: torch.device) -> tuple[str, Backend]:
    """The backend for parameters on ``device``: its name and its module.

    Raises:
        ValueError, RuntimeError: as :func:`check_request`; also if the backend asked for has no kernels for this
            device.
    """
    requested = check_request(requested)
    if requested == "auto":
        requested = next(name for name in automatic(device) if refusal(name, device) is None)
    elif reason := refusal(requested, device):
        raise RuntimeError(f"backend {requested!r} does not run here: {reason}; use 'auto' or 'foreach'")
    module = load(requested)[0]
    assert module is not None
    return requested, module
