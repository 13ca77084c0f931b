"""The two backends under test, and proof of which one ran."""

import contextlib
import importlib

from torch.utils._python_dispatch import TorchDispatchMode

BACKENDS = ("reference", "cpu")
MODULES = {"reference": "lets_kernels.ops.reference", "cpu": "lets_kernels.ops.native"}


class Recorder(TorchDispatchMode):
    """Records the lets_kernels:: operators that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lets_kernels":
            self.ops.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Backend:
    """One backend: `backend.perturb_(...)` calls its op and asserts that this backend, and no other, ran it."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, op):
        function = getattr(importlib.import_module(MODULES[self.name]), op)

        def call(*args, **kwargs):
            with Recorder() as recorder:
                result = function(*args, **kwargs)
            assert recorder.ops == ([op] if self.name == "cpu" else []), f"{op} ran {recorder.ops} on {self.name}"
            return result

        return call

    @contextlib.contextmanager
    def watch(self, *expected):
        """Asserts that the optimizer steps inside ran these compiled operators (reference: none at all)."""
        with Recorder() as recorder:
            yield
        if self.name == "reference":
            assert recorder.ops == [], f"the reference ran {sorted(set(recorder.ops))}"
        else:
            assert set(expected) <= set(recorder.ops), f"{expected} expected, {sorted(set(recorder.ops))} ran"
