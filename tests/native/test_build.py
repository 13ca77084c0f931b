"""What the compiled extension may and may not contain."""

import shutil
import subprocess

import pytest

from lets_kernels.ops import native

pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm is not installed")


def symbols(*options):
    command = ["nm", "-D", "-C", *options, native._C.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_only_torchs_stable_abi_is_used():
    """No symbol of ATen or c10, so that one binary serves every torch from 2.10 on."""
    undefined = symbols("--undefined-only")
    assert any("aoti_torch" in line for line in undefined), "this is not the extension"
    assert [line for line in undefined if "at::" in line or "c10::" in line] == []


def test_nothing_but_the_module_is_exported():
    names = [line.split()[-1] for line in symbols("--defined-only")]
    assert "PyInit__C" in names
    assert [n for n in names if "lets" in n] == []
