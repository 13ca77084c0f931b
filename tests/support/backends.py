"""The backends under test, and proof of which one ran.

The op tests (marked ``ops``) run on every target below; the other tests, which take whole steps on the CPU, on
``reference`` and ``cpu``. Both run on ``foreach``, too, where it has ops of its own (marked ``own``). Where there is a
GPU the op tests also run there (marked ``gpu``), with unchanged arguments: every storage is copied to the device, guard
bands and all, and back again.
"""

import contextlib
import importlib.util
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support import emulated

BACKENDS = ("reference", "cpu")
MODULES = {
    "reference": "lets_kernels.ops.reference",
    "foreach": "lets_kernels.ops.foreach",
    "cpu": "lets_kernels.ops.native",
    "emulated": "support.emulated",
    "triton": "lets_kernels.ops.triton",
    "cuda": "lets_kernels.ops.native",
}
# What the dispatcher sees of a call; the reference and Triton's launchers bypass it.
NAMESPACES = {"cpu": "lets_kernels", "cuda": "lets_kernels", "emulated": "lets_kernels_emulated"}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = pytest.mark.gpu


def prepare_once_a_launch():
    """Spare Triton's interpreter a fifth of its work: within a kernel, each call of a function would prepare Triton's
    language anew, as the launch has already done.
    """
    from triton import language
    from triton.runtime import interpreter

    prepare = interpreter._patch_lang

    def prepare_unless_prepared(function):
        if language.core.is_builtin(language.load):
            return prepare(function)
        return interpreter._LangPatchScope()  # nothing to put back

    interpreter._patch_lang = prepare_unless_prepared


if INTERPRETED and importlib.util.find_spec("triton") is not None:
    prepare_once_a_launch()


def targets(ops, own=False):
    """pytest parameters for the fixture `backend`: (backend, device); own: what foreach does itself is tested."""
    if not ops:
        return [pytest.param((name, "cpu"), id=name) for name in (*BACKENDS, *["foreach"] * own)]
    if INTERPRETED:  # a process for that alone: the rest has been tested elsewhere
        return [pytest.param(("triton", "cpu"), id="triton")]
    found = [pytest.param((name, "cpu"), id=name) for name in (*BACKENDS, *["foreach"] * own, "emulated")]
    if torch.cuda.is_available():
        found += [pytest.param((n, "cuda"), id=f"{n}-gpu", marks=GPU) for n in ("cuda", "triton", "reference")]
    return found


def plain():
    """The reference itself, to compare with: its hundreds of small ops are faster where nobody listens."""
    return importlib.import_module(MODULES["reference"])


class Recorder(TorchDispatchMode):
    """Records the operators of our namespaces that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.ops, self.namespaces = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in NAMESPACES.values():
            self.ops.append(func.overloadpacket.__name__)
            self.namespaces.add(func.namespace)
        return func(*args, **(kwargs or {}))


class Backend:
    """One backend: `backend.perturb_(...)` calls its op and asserts that this backend, and no other, ran it."""

    def __init__(self, name, device="cpu"):
        self.name, self.device = name, device
        if name == "emulated":
            emulated.load()
        if device == "cuda" and name == "cuda":
            reason = importlib.import_module("lets_kernels.ops").load("cuda")[1]
            assert importlib.import_module("lets_kernels.ops.native").load_cuda() is None, reason

    def __getattr__(self, op):
        function = getattr(importlib.import_module(MODULES[self.name]), op)

        def call(*args, **kwargs):
            there = Mirror() if self.device == "cuda" else None
            if there:
                args = [there.give(a) for a in args]
                kwargs = {name: there.give(a) for name, a in kwargs.items()}
            with Recorder() as recorder:
                result = function(*args, **kwargs)
            expected = {NAMESPACES[self.name]} if self.name in NAMESPACES else set()
            ran = f"{op} ran {recorder.ops} of {recorder.namespaces} on {self.name}"
            assert recorder.ops == [op] * len(expected) and recorder.namespaces == expected, ran
            if there:
                there.bring_back()
                if result is not None:
                    assert result.device.type == "cuda", f"{op} returned a tensor on {result.device}"
                    result = result.cpu()
            return result

        return call

    @contextlib.contextmanager
    def watch(self, *expected):
        """Asserts that the optimizer steps inside ran these compiled operators (reference: none at all)."""
        with Recorder() as recorder:
            yield
        if self.name in ("reference", "foreach"):
            assert recorder.ops == [], f"{self.name} ran {sorted(set(recorder.ops))}"
        else:
            assert set(expected) <= set(recorder.ops), f"{expected} expected, {sorted(set(recorder.ops))} ran"


class Mirror:
    """Copies of CPU storages on the GPU, with the same tensors in them; `bring_back` copies the bytes home."""

    def __init__(self):
        self._copies = {}

    def give(self, argument):
        if isinstance(argument, (list, tuple)):
            return [self.give(a) for a in argument]
        if not torch.is_tensor(argument) or self._is_table(argument):
            return argument
        home = argument.untyped_storage()
        if home.data_ptr() not in self._copies:
            self._copies[home.data_ptr()] = (home, home.cuda())
        copy = self._copies[home.data_ptr()][1]
        there = torch.empty(0, dtype=argument.dtype, device="cuda")
        return there.set_(copy, argument.storage_offset(), argument.size(), argument.stride())

    @staticmethod
    def _is_table(t):
        """The run table stays on the CPU; it is the one int64 matrix among the arguments."""
        return t.dtype is torch.int64 and t.ndim == 2

    def bring_back(self):
        for home, copy in self._copies.values():
            home.copy_(copy)
