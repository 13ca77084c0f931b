"""Fixtures: the backends, the seed, the number of threads."""

import gc
import os

import pytest

# Before libgomp is loaded, and for every process started from here: threads that wait would spin, and take the cores
# from the other worker, from ranks, from compilers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from support.backends import Backend, targets
from support.guard_bands import assert_guards, forget_guards
from support.lengths import thinned
from support.needs import missing
from support.standing_ranks import Ranks

# Thousands of small ops: a second thread costs more than it brings, and far more where the cores are shared. The tests
# that are about threads ask for the `threads` fixture.
torch.set_num_threads(1)


collect_ignore = list(missing())


#: Files of few and long tests. They go first, so that at the end there are short ones to share out.
LONG = (
    "native/test_triton.py",
    "native/test_sanitize.py",
    "native/test_triton_aot.py",
    "gpu/test_gpu_check.py",
    "distributed/test_ddp.py",
    "distributed/test_mesh.py",
    "distributed/test_fsdp.py",
    "mutations/test_mutants.py",
    "step/test_interrupts.py",
    "native/test_cuda_library.py",
)


@pytest.hookimpl(trylast=True)  # of what -k leaves
def pytest_collection_modifyitems(config, items):
    place = {config.rootpath / "tests" / file: i for i, file in enumerate(LONG)}
    kept = thinned(items)
    if len(kept) < len(items):
        wanted = set(map(id, kept))
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in wanted])
    items[:] = sorted(kept, key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish():
    """The tests live to the end, all twenty thousand: the garbage collector need not go through them each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # or libraries report at the exit that their objects were never collected


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        ops = metafunc.definition.get_closest_marker("ops") is not None
        own = metafunc.definition.get_closest_marker("own") is not None
        metafunc.parametrize("backend", targets(ops, own), indirect=True)


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


@pytest.fixture(autouse=True)
def guard_bands():
    """No test may forget them: whatever it gave to an op from guard_bands.py, nothing around it was written."""
    forget_guards()
    yield
    assert_guards()


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Two processes over gloo, started when the first test needs them."""
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()
