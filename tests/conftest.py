"""Fixtures: the backends, the seed, the number of threads."""

import os

import pytest
import torch

from backends import BACKENDS, Backend

# Thousands of small ops: a second thread costs more than it brings, and far more where the cores are shared. The tests
# that are about threads ask for the `threads` fixture.
torch.set_num_threads(1)


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "cpu" and os.environ.get("LETS_KERNELS_TESTS_WITHOUT_EXTENSION") == "1":
        pytest.skip("LETS_KERNELS_TESTS_WITHOUT_EXTENSION=1")
    return Backend(request.param)


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
