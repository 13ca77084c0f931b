"""Fixtures: the backends, the seed, the number of threads."""

import importlib.util
import os

import pytest
import torch

from backends import Backend, targets

# Thousands of small ops: a second thread costs more than it brings, and far more where the cores are shared. The tests
# that are about threads ask for the `threads` fixture.
torch.set_num_threads(1)


# `make gpu-check` needs no more than torch and the test tools; `make test` installs all of these.
DEMO = ("sklearn", "matplotlib", "rich")
FRAMEWORKS = ("accelerate", "lightning", "transformers")


def _missing(*names):
    return any(importlib.util.find_spec(name) is None for name in names)


collect_ignore = [f"test_frameworks_{name}.py" for name in FRAMEWORKS if _missing(name)]
collect_ignore += ["test_demo.py"] if _missing(*DEMO) else []
collect_ignore += ["test_examples.py", "test_frameworks_replicas.py"] if _missing(*FRAMEWORKS) else []


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        ops = metafunc.definition.get_closest_marker("ops") is not None
        metafunc.parametrize("backend", targets(ops), indirect=True)


@pytest.fixture
def backend(request):
    name, device = request.param
    if name in ("cpu", "emulated") and os.environ.get("LETS_KERNELS_TESTS_WITHOUT_EXTENSION") == "1":
        pytest.skip("LETS_KERNELS_TESTS_WITHOUT_EXTENSION=1")
    return Backend(name, device)


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Every test starts from the same seed, with the backend chosen by its argument and nothing else."""
    monkeypatch.delenv("LETS_KERNELS_BACKEND", raising=False)
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
