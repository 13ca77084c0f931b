"""`make wheel`: a wheel with every library, installed into an empty environment, trains."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from lets_kernels.ops import native

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import torch, lets_kernels
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
x, y = torch.randn(64, 8), torch.randn(64, 1)
opt = lets_kernels.LETSASAM(net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
def closure():
    opt.zero_grad()
    loss = (net(x) - y).square().mean()
    loss.backward()
    return loss
losses = [opt.step(closure, closure).item() for _ in range(20)]
assert losses[-1] < 0.9 * losses[0], losses
print(lets_kernels.__file__)
print(opt.backend)
print(lets_kernels.backends()["cuda"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        ROOT,
    ]
    subprocess.run(command, check=True)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_the_libraries_and_nothing_else_that_is_compiled(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    expected = {f"lets_kernels/_C{suffix}"} | (
        {f"lets_kernels/_cuda{suffix}"} if native.CUDA_LIBRARY.exists() else set()
    )
    assert {n for n in names if n.endswith((".so", ".o", ".a"))} == expected
    assert os.environ.get("LETS_KERNELS_CUDA") != "1" or len(expected) == 2
    assert all(n.startswith(("lets_kernels/", "lets_kernels-")) for n in names)
    assert {"lets_kernels/ops/triton/__init__.py", "lets_kernels/py.typed"} <= set(names)


def test_it_trains_in_an_empty_environment(wheel, tmp_path):
    """The environment has the wheel and, by a path file, what this one has of torch; not this checkout."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    install = ["install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    result = subprocess.run([python, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    where, backend, cuda = result.stdout.splitlines()
    assert where == str(site / "lets_kernels" / "__init__.py")
    assert backend == "cpu"
    assert "was installed without CUDA kernels" not in cuda or not native.CUDA_LIBRARY.exists()
